"""One replica of a space: the graph of operations and the document they make.

    received operation ──admit──▶ graph ──those that count──▶ document (pycrdt) and Merkle tree
    local edit ──transaction──▶ document ──update──▶ operation, signed ──▶ graph

The document is a function of the operations that count: those are applied in an order of the graph, ids renamed where
the author equivocated. When something that counted no longer does, the document is made anew; `generation` tells.

What the owner of a replica has to store collects in `unsaved` until it is taken with `take_unsaved`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgpack
from blake3 import blake3
from pycrdt import Doc, TransactionEvent

from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.keys import PrivateKey
from lattica_protocols.limits import (
    REPLICA_MAX_FIRST_BYTES,
    REPLICA_MAX_INSTANCES,
    REPLICA_MAX_PARENTS,
    REPLICA_MAX_UPDATE_BYTES,
)
from lattica_protocols.replica.checkpoint import NO_RANK, Checkpoint, Rank, vector_of
from lattica_protocols.replica.client_ids import client_id, forked_client
from lattica_protocols.replica.equivocation import Equivocation, equivocation_untrusted
from lattica_protocols.replica.floor import COVERED_PREFIX, ChainEnd, Floor
from lattica_protocols.replica.genesis import Genesis
from lattica_protocols.replica.graph import Admission, Chain, Entry, Graph
from lattica_protocols.replica.operation import Kind, Operation
from lattica_protocols.replica.plain import apply_untrusted, document_value, same_value
from lattica_protocols.replica.short_form import RowReader
from lattica_protocols.replica.tree import MerkleTree
from lattica_protocols.replica.update import filler, parse_update_untrusted, rename

_ROOT_DOMAIN = b"lattica-replica-root-1"
_FIRST_BODY = REPLICA_MAX_FIRST_BYTES - 34 * REPLICA_MAX_PARENTS - 256
"""What the first operation of a chain has room for beside all its links: a longer edit becomes the second."""


@dataclass(slots=True)
class Unsaved:
    """What changed since it was last taken. Written in one transaction."""

    operations: list[tuple[Operation, int]] = field(default_factory=list)
    """With the number of their items, so that they need not be read again."""
    forks: list[Equivocation] = field(default_factory=list)
    checkpoint: Checkpoint | None = None
    """Replaces all operations that it covers."""
    lost: list[Operation] = field(default_factory=list)
    """Of ours, left out by the checkpoint."""
    signed: bytes = b""
    """Header of a checkpoint that we signed as one of a quorum: no other that it does not lead to may be signed."""

    def __bool__(self) -> bool:
        return bool(self.operations or self.forks or self.checkpoint or self.lost or self.signed)


@dataclass(frozen=True, slots=True)
class Verified:
    """What `Replica.verify` found."""

    operations: int
    refused: tuple[tuple[bytes, str], ...]
    """Ids of operations that do not stand the check, and why."""
    document_equal: bool

    @property
    def ok(self) -> bool:
        return not self.refused and self.document_equal


class Replica:
    """State of a space at one member. With a key it can write; without one it only follows."""

    def __init__(
        self, genesis: Genesis, *, key: PrivateKey | None = None, instance: int = 0, rng: random.Random | None = None
    ) -> None:
        """`instance` tells apart the chains of a key: it must be one that the key never used, or the one whose
        operations are loaded next. `rng` gives further ones."""
        self.genesis = genesis
        self.space = genesis.id
        self.key = key
        self.instance = instance
        self.graph = Graph(self.space, genesis.owner, genesis.writers)
        self.tree = MerkleTree()
        self.checkpoint: Checkpoint | None = None
        self.doc: Doc[Any] = self._new_doc()
        self.generation = 0
        """Counts the times that the document was made anew."""
        self.unsaved = Unsaved()
        self.lost: list[Operation] = []
        """Operations of ours that a checkpoint does not cover and that cannot follow it: reported, not dropped."""
        self._rng = rng
        self._captured: list[bytes] | None = None
        self._left_out: set[Entry] = set()
        """Operations that count, whose update yrs does not take: the checks before should leave none."""

    # -- reading --------------------------------------------------------------------------------------------
    def root(self) -> bytes:
        """32 bytes, equal for two replicas exactly when they hold the same operations on the same checkpoint."""
        return root_of(self.space, self._checkpoint_id(), len(self.tree), self.exclusions_digest(), self.tree.root())

    def exclusions_digest(self) -> bytes:
        return blake3(msgpack.packb(self.graph.exclusions())).digest()

    def operations(self) -> int:
        """How many operations count, those before the checkpoint included."""
        return len(self.tree) + (self.checkpoint.operations if self.checkpoint else 0)

    def value(self) -> dict[str, Any]:
        """The whole document as plain values, by container."""
        return document_value(self.doc)

    def rank(self) -> Rank:
        """That of our checkpoint."""
        return NO_RANK if self.checkpoint is None else self.checkpoint.rank

    def _checkpoint_id(self) -> bytes:
        return bytes(32) if self.checkpoint is None else self.checkpoint.id

    def take_unsaved(self) -> Unsaved:
        out, self.unsaved = self.unsaved, Unsaved()
        return out

    # -- receiving ------------------------------------------------------------------------------------------
    def receive_operation(self, op: Operation, unix_now: float) -> Admission:
        """Take in an operation. Raises `Refused`, `NotYet` or `MissingParents`; then nothing changed."""
        return self._apply(self.graph.admit(op, unix_now))

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Apply what is received inside the block in one transaction of the document: five times quicker."""
        if self._captured is not None:
            raise LocalProtocolError("a transaction of this space is under way")
        with self.doc.transaction():
            yield

    def receive_fork(self, fork: Equivocation) -> Admission:
        """Take in a proof that somebody equivocated. Raises `Refused` or `NotYet`."""
        return self._apply(self.graph.add_fork_untrusted(fork))

    def load(
        self,
        operations: Iterable[tuple[bytes, int]],
        forks: Iterable[Sequence[bytes]] = (),
        snapshot: tuple[int, bytes] = (0, b""),
    ) -> None:
        """Take back what was stored: a row of operations (`short_form`), each with the number of its items, and proofs.
        Trusted, so not checked again.

        `snapshot`: how many of the first operations a stored document contains, and that document.
        Raises `RemoteProtocolError` for a damaged one; those before it are loaded.
        """
        contained, state = snapshot
        self.graph.restore_forks([equivocation_untrusted(row, self.space) for row in forks])
        if contained:
            self.doc.apply_update(state)
        number, reader = 0, RowReader(self.space)
        for number, (data, items) in enumerate(operations, 1):
            op = reader.read_untrusted(data)
            op.verified = True
            start = self.graph.clock_before(op)
            admission = self.graph.admit(op, None, span=(start, start + items))
            self._apply(admission, save=False, document=number > contained)
            if admission.rebuild:
                contained = 0  # the document was made anew, of the operations up to here
        if number < contained:
            self._rebuild()
        for head in self.graph.heads & self.graph.entries.keys():
            # The others are named by hashes in these; bytes of these that changed on the disk would go unnoticed.
            op = self.graph.entries[head].op
            op.verified = False
            if not op.check_signature(self.space):
                raise RemoteProtocolError("a stored operation is not the one that its author signed")

    def _apply(self, admission: Admission, *, save: bool = True, document: bool = True) -> Admission:
        if save:
            self.unsaved.operations += [(entry.op, entry.end - entry.start) for entry in admission.counted]
            if admission.fork is not None:
                self.unsaved.forks.append(admission.fork)
        if admission.rebuild:
            self._rebuild()
            return admission
        spoiled = False
        for entry in admission.counted:
            self.tree.add(entry.op.id)
            if document and entry.op.body and entry.op.kind == Kind.EDIT and not spoiled:
                try:
                    self._apply_to_document(entry)
                except RemoteProtocolError:
                    spoiled = True
                    self._left_out.add(entry)
        if spoiled:
            self._rebuild()
        return admission

    def _apply_to_document(self, entry: Entry) -> None:
        if self._captured is not None:
            return  # our own edit: it is in the document already
        body = entry.op.body
        graph = self.graph
        if graph.any_renamed:
            parsed = parse_update_untrusted(body)
            if graph.is_renamed(entry) and parsed.end > parsed.start:
                apply_untrusted(self.doc, filler(forked_client(entry.op.id), parsed.start))
            named = {client for client, _ in parsed.references} | {client for client, _, _ in parsed.deletions}
            if any(graph.is_forked(client) for client in named | {parsed.client}):
                scope = graph.scope_of(entry)
                body = rename(body, parsed, lambda c, k, n: graph.pieces(entry, scope, c, k, n))
        apply_untrusted(self.doc, body)

    def _new_doc(self) -> Doc[Any]:
        doc: Doc[Any] = Doc()
        if self.key is not None:
            doc = Doc(client_id=client_id(self.key.public_key.data, self.instance))
        if self.checkpoint is not None:
            doc.apply_update(self.checkpoint.state)
        return doc

    def _rebuild(self) -> None:
        self.generation += 1
        counted = self.graph.counted()
        self.tree = MerkleTree(entry.op.id for entry in counted)
        edits = [entry for entry in counted if entry.op.body and entry.op.kind == Kind.EDIT]
        captured, self._captured = self._captured, None
        while not self._fill_new_doc(edits):
            pass
        self._captured = captured

    def _fill_new_doc(self, edits: Sequence[Entry]) -> bool:
        """Make the document from these operations; False when one more has to be left out."""
        self.doc = self._new_doc()
        with self.doc.transaction():
            for entry in edits:
                if entry not in self._left_out:
                    try:
                        self._apply_to_document(entry)
                    except RemoteProtocolError:
                        self._left_out.add(entry)
                        return False
        return True

    # -- writing --------------------------------------------------------------------------------------------
    def why_not_writable(self) -> str | None:
        """Why we cannot write, None when we can."""
        if self.key is None:
            return "this replica has no key"
        own = self.key.public_key.data
        if self.graph.excluded(own):
            return (
                "this key is excluded: two operations with one sequence number were signed with it, or more than "
                f"{REPLICA_MAX_INSTANCES} instances were started"
            )
        if own not in self.graph.membership().writers:
            return "this key is no writer of the space"
        if self._is_one_too_many((own, self.instance)):
            return (
                f"this key has {REPLICA_MAX_INSTANCES} instances here already, one for each time that it lost its "
                "memory, and would be excluded with another: write with another key"
            )
        return None

    def _is_one_too_many(self, chain: Chain) -> bool:
        """Whether to write in this chain would prove that we have too many."""
        graph = self.graph
        if chain in graph.chains or chain in graph.floor.chains:
            return False
        own = {each for each in (*graph.chains, *graph.floor.chains) if each[0] == chain[0]}
        return len(own) >= REPLICA_MAX_INSTANCES

    @contextmanager
    def transaction(self, unix_now: float) -> Iterator[list[Operation]]:
        """Edit `doc` inside the block: all of it becomes one operation, put into the list that the block gets.

        What is too much work for one (thousands of items, dozens of places in lists or texts) becomes several.
        Nothing is signed when nothing changed. When the block raises, or what it did may not be written (too large),
        the document is put back to what it was. Raises `LocalProtocolError`.
        """
        self._check_writable()
        if self._captured is not None:
            raise LocalProtocolError("a transaction of this space is under way")
        made: list[Operation] = []
        captured = self._captured = []
        doc = self.doc
        # Observed for our own edits only: for those of others yrs would encode each update again.
        subscription = doc.observe(self._on_update)
        try:
            with doc.transaction():
                yield made
        except BaseException:  # whatever the block raised undoes it, and goes on as it is
            self._captured = None
            if captured:
                self._rebuild()
            raise
        finally:
            doc.unobserve(subscription)
        try:
            for update in captured:
                made += self._write_edit(update, unix_now)
        except BaseException:  # likewise: half of the edits must not stay
            self._captured = None
            self._rebuild()
            raise
        self._captured = None

    def change_members(self, kind: Kind, key: bytes, unix_now: float) -> Operation:
        """Grant, remove or hand over to `key`. Raises `LocalProtocolError` when that is not ours to do."""
        self._check_writable()
        assert self.key is not None
        membership = self.graph.membership()
        if self.key.public_key.data not in membership.owners:
            raise LocalProtocolError("only the owner may change who writes")
        if kind == Kind.REMOVE and key not in membership.writers:
            raise LocalProtocolError("this key is no writer of the space")
        return self._write(kind, key, unix_now, (0, 0))[-1]

    def _check_writable(self) -> None:
        reason = self.why_not_writable()
        if reason is not None:
            raise LocalProtocolError(reason)
        assert self.key is not None
        chain = (self.key.public_key.data, self.instance)
        void = any(not branch.entries[-1].counted for branch in self.graph.chains.get(chain, ()))
        lost = any(op.chain == chain for op in self.lost)
        if void or lost or self.graph.client_ids.is_taken(chain):
            # Operations of ours are void (we were removed, and granted again), or a checkpoint left them out: to go on
            # from before them would be a fork, to build on void ones would bring them back. Or another chain has our
            # client id, and items of both have others.
            if self._rng is None:
                raise LocalProtocolError("this chain is void, lost or collides, and there is no other instance")
            while self.graph.client_ids.is_taken((chain[0], self.instance)) or self.instance == chain[1]:
                self.instance = self._rng.getrandbits(32)
            self._rebuild()
            reason = self.why_not_writable()
            if reason is not None:
                raise LocalProtocolError(reason)

    def _write_edit(self, body: bytes, unix_now: float) -> list[Operation]:
        if len(body) > REPLICA_MAX_UPDATE_BYTES:
            raise LocalProtocolError(
                f"an edit of {len(body)} bytes is over the limit of {REPLICA_MAX_UPDATE_BYTES}: share a blob and "
                "write its content id"
            )
        try:
            parts = self.graph.check_own(body)
        except RemoteProtocolError as error:
            raise LocalProtocolError(f"this edit cannot be shared: {error}") from None
        made = list[Operation]()
        for part, parsed in parts:
            made += self._write(Kind.EDIT, part, unix_now, (parsed.start, parsed.end))
        return made

    def _write(self, kind: Kind, body: bytes, unix_now: float, span: tuple[int, int]) -> list[Operation]:
        """An operation, and before it those that have to come first."""
        made = []
        while len(self.graph.heads) >= REPLICA_MAX_PARENTS:
            made.append(self._sign(Kind.EDIT, b"", unix_now, (0, 0)))
        if len(body) > _FIRST_BODY and self._starts_chain():
            made.append(self._sign(Kind.EDIT, b"", unix_now, (0, 0)))
        return [*made, self._sign(kind, body, unix_now, span)]

    def _starts_chain(self) -> bool:
        assert self.key is not None
        chain = (self.key.public_key.data, self.instance)
        return chain not in self.graph.floor.chains and self.graph.tip(chain) is None

    def _sign(self, kind: Kind, body: bytes, unix_now: float, span: tuple[int, int]) -> Operation:
        assert self.key is not None
        author = self.key.public_key.data
        chain = (author, self.instance)
        tip = self.graph.tip(chain)
        ended = self.graph.floor.chains.get(chain)
        previous: list[bytes] = []
        seq, end, time = 0, 0, int(unix_now)
        if tip is not None:
            previous, seq, end, time = [tip.op.id], tip.op.seq + 1, tip.end, max(time, tip.op.time)
        elif ended is not None:
            previous, seq, end, time = [ended.last], ended.seq + 1, ended.end, max(time, ended.time)
        others = sorted(self.graph.heads.difference(previous))[: REPLICA_MAX_PARENTS - 1]
        op = Operation.seal(
            self.key,
            self.space,
            kind=kind,
            instance=self.instance,
            seq=seq,
            parents=[*previous, *others],
            time=time,
            body=body,
        )
        if span[0] == span[1]:
            span = (end, end)
        if span[0] != end:
            raise LocalProtocolError(f"the document is at clock {span[0]}, the chain at {end}")
        self._apply(self.graph.admit(op, None, span=span))
        return op

    def _on_update(self, event: TransactionEvent) -> None:
        if self._captured is not None and event.update != b"\x00\x00":
            self._captured.append(event.update)

    # -- checkpoints ----------------------------------------------------------------------------------------
    def make_checkpoint(self, unix_now: float) -> Checkpoint:
        """A checkpoint of what counts now, signed with our key. It is valid once enough of the signers signed it."""
        if self.key is None:
            raise LocalProtocolError("this replica has no key")
        return self.unsigned_checkpoint(int(unix_now)).signed(self.key)

    def unsigned_checkpoint(self, time: int) -> Checkpoint:
        """A checkpoint of what counts now."""
        graph, counted, state = self.graph, self.graph.counted(), self.doc.get_update()
        membership = graph.membership()
        chains = dict(graph.floor.chains)
        for entry in counted:
            known = chains.get(entry.op.chain)
            if known is None or (known.seq, entry.op.id) < (entry.op.seq, known.last):
                chains[entry.op.chain] = ChainEnd(entry.op.seq, entry.end, entry.op.id, entry.op.time)
        handed = [entry.op.encoded for entry in counted if entry.op.kind == Kind.HAND_OVER]
        floor = Floor(
            owners=membership.owners,
            writers=membership.writers,
            former=membership.former,
            chains=chains,
            vector=vector_of(state),
            heads=frozenset(graph.heads),
            excluded={author: (seq, instance) for author, seq, instance in graph.exclusions()},
            covered=graph.floor.covered | {entry.op.id[:COVERED_PREFIX] for entry in counted},
            renamed=(
                *graph.floor.renamed,
                *(
                    (entry.branch.client, entry.start, entry.end, forked_client(entry.op.id))
                    for entry in counted
                    if graph.is_renamed(entry) and entry.end > entry.start
                ),
            ),
            handed_over=(*graph.floor.handed_over, *handed),
            state=state,
        )
        return Checkpoint.make(
            space=self.space,
            number=1 if self.checkpoint is None else self.checkpoint.number + 1,
            previous=self._checkpoint_id(),
            time=time,
            root=self.root(),
            operations=self.operations(),
            floor=floor,
            state=state,
        )

    def at_heads(self, heads: Iterable[bytes]) -> Replica | None:
        """A replica that holds the operations `heads` and those before them on the same checkpoint, built in an order
        that depends on these operations alone. None when some are not here."""
        graph = self.graph
        depth: dict[bytes, int] = {}
        wanted: set[bytes] = set()
        stack = list(heads)
        while stack:
            key = stack.pop()
            if key not in wanted and not graph.floor.covers(key):
                if key not in graph.entries:
                    return None
                wanted.add(key)
                stack += graph.entries[key].op.parents
        chosen = [entry for key, entry in graph.entries.items() if key in wanted]  # parents first
        for entry in chosen:
            depth[entry.op.id] = 1 + max((depth.get(parent, 0) for parent in entry.op.parents), default=0)
        chosen.sort(key=lambda entry: (depth[entry.op.id], entry.op.id))
        other = Replica(self.genesis)
        if self.checkpoint is not None:
            other.adopt(self.checkpoint, save=False)
        other.graph.restore_forks(graph.forks.values())
        for entry in chosen:
            other.graph.admit(entry.op, None, span=(entry.start, entry.end))
        other._rebuild()
        return other

    def receive_checkpoint(self, data: bytes) -> bool:
        """Replace history by a checkpoint, if it ranks above ours. True when it was taken.

        Operations it does not cover are kept on top of it; own ones that cannot be are put into `lost`.
        Raises `RemoteProtocolError` when nobody signed it who may.
        """
        checkpoint = Checkpoint.decode_untrusted(data, self.genesis, self.graph.membership().owners)
        if not checkpoint.ranks_above(self.rank()):
            return False
        self.adopt(checkpoint)
        return True

    def adopt(self, checkpoint: Checkpoint, *, save: bool = True) -> None:
        """Take a checkpoint that was checked."""
        old, lost = self.graph, list[Operation]()
        self.graph = Graph(self.space, self.genesis.owner, self.genesis.writers, checkpoint.floor)
        self.checkpoint = checkpoint
        self.graph.restore_forks(old.forks.values())
        for entry in old.entries.values():
            try:
                # Checked again: what an operation names may be ambiguous without the history, here as elsewhere.
                self.graph.admit(entry.op, None)
            except RemoteProtocolError:
                if self.key is not None and entry.op.author == self.key.public_key.data:
                    lost.append(entry.op)
        self.lost += lost
        self._rebuild()
        if save:
            self.unsaved.lost += lost
            self.unsaved.checkpoint = checkpoint

    # -- checking -------------------------------------------------------------------------------------------
    def verify(self) -> Verified:
        """Check everything anew from the genesis or the checkpoint, and compare the documents. Takes about 0.1 ms an
        operation."""
        fresh = Replica(self.genesis)
        if self.checkpoint is not None:
            fresh.adopt(
                Checkpoint.decode_untrusted(self.checkpoint.encode(), self.genesis, self.graph.table.base.owners),
                save=False,
            )
        refused = []
        rows = [[op.encoded for op in fork.operations] for fork in self.graph.forks.values()]
        forks = [equivocation_untrusted(row, self.space) for row in rows]
        for fork in forks:
            fork.check_untrusted(self.space)
        fresh.graph.restore_forks(forks)
        for entry in self.graph.entries.values():
            try:
                fresh.receive_operation(Operation.decode_untrusted(entry.op.encoded, self.space), entry.op.time)
            except RemoteProtocolError as error:
                refused.append((entry.op.id, str(error)))
        equal = same_value(fresh.value(), self.value()) and fresh.root() == self.root()
        return Verified(len(self.tree), tuple(refused), equal)


def root_of(space: bytes, checkpoint: bytes, count: int, exclusions: bytes, tree: bytes) -> bytes:
    """The root: BLAKE3 of the domain, space, checkpoint id, number of operations, exclusions and Merkle root."""
    return blake3(_ROOT_DOMAIN + space + checkpoint + count.to_bytes(8, "big") + exclusions + tree).digest()
