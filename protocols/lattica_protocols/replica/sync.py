"""The machine that keeps one replica equal to those of its neighbours.

    new operation, here or pushed ──▶ pushed to all neighbours but the one it came from
    every few seconds: HELLO to a random neighbour ──digests differ──▶ FRONTIER back
    FRONTIER ──▶ the operations its sender lacks, in causal order, a few batches ahead of the ACKs
    operation whose parents are missing ──▶ kept aside, WANT; given up when it is not healed by the next comparisons
    pushed one in the short form that follows one that is not here ──▶ FRONTIER

Messages stand alone, so that loss, repetition and reordering cost time and nothing else; a neighbour that went away in
the middle is resumed by the next FRONTIER, which names what has arrived. Two replicas that differ in d operations
exchange those and one chain end for each author.

Drive it by the machine contract; `poll_transmit` gives pairs (neighbour, message).
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Generic, TypeVar

from blake3 import blake3

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import (
    REPLICA_BATCH_BYTES,
    REPLICA_BATCH_OPERATIONS,
    REPLICA_BATCHES_IN_FLIGHT,
    REPLICA_MAX_PENDING,
    REPLICA_MAX_PENDING_BYTES,
    REPLICA_MAX_PENDING_PER_PEER,
    REPLICA_MAX_TIPS,
    REPLICA_MAX_WANTED,
)
from lattica_protocols.replica.checkpoint import Checkpoint, Rank
from lattica_protocols.replica.download import CHUNK, Downloads
from lattica_protocols.replica.equivocation import Equivocation, Fork, equivocation_untrusted
from lattica_protocols.replica.errors import MissingParents, NotYet
from lattica_protocols.replica.graph import Admission, Branch, Entry, Past
from lattica_protocols.replica.messages import MAX_FORKS, Kind, Message, decode_message_untrusted, encode_message
from lattica_protocols.replica.operation import Operation
from lattica_protocols.replica.presence import Presence, Record
from lattica_protocols.replica.proposal import Proposal, Proposals, Signatures
from lattica_protocols.replica.replica import Replica
from lattica_protocols.replica.short_form import Row, read_row_untrusted, write_row

HELLO_INTERVAL = (2.0, 5.0)
"""Seconds between comparisons with a random neighbour."""
SETTLE = 0.05
"""Seconds that what came in batches is gathered before others are told of it."""
PRESENCE_INTERVAL = 10.0
PRESENT_IN_MESSAGE = 256
"""Announcements in one message: with 1 KiB in each they are a quarter of what a message may be."""
FRONTIER_PAUSE = 0.25
"""Seconds between frontiers to one neighbour, unless something came of the last one."""
ASKS = (4.0, 4.0)
"""Frontiers of one peer that are answered at once, and a second in the long run: as many as `FRONTIER_PAUSE` lets it
send. Each answer may be 1 MiB."""
STALLED = 10.0
"""Seconds without an ACK after which batches are no longer sent."""
LOST = 2.0
"""Seconds without an ACK after which what is in flight is sent again when a frontier does not show it."""
WANT_AGAIN = 1.0
FORK_PAUSE = (1.0, 60.0)
"""Seconds in which no earlier fork of an author that is excluded already is taken: doubling likewise. Each makes the
whole graph be counted anew, and who signs a long chain can make thousands, one before the other."""
FRUITLESS = 2
"""Frontiers that changed nothing, after which all chain ends are compared by id."""
READ_ALONE = 16
"""A message of more operations may be read before those that came earlier are taken in (so that signatures can be
checked meanwhile): it names none by their place in the receiver's replica."""
_PROOF_BYTES = 512 << 10
"""Of a message of proofs; a longer proof has one to itself."""
_REFUSED_KEPT = 4096

Peer = TypeVar("Peer", bound=Hashable)


@dataclass(eq=False, slots=True)
class _Neighbour:
    """What we know of one."""

    pushes: list[Operation] = field(default_factory=list)
    batches: Iterator[Entry] = field(default_factory=lambda: iter(()))
    """What it lacks, parents first."""
    batch: int = 0
    in_flight: dict[int, list[Entry]] = field(default_factory=dict)
    """What was sent and not acknowledged, by batch."""
    last_ack: float = 0.0
    frontier_at: float = -1e9
    fruitless: int = 0
    behind: bool = False
    """It pushed what we cannot read: a frontier is to be sent."""


class ReplicaSync(Generic[Peer]):
    """Keeps `replica` equal to the neighbours'. `Peer` is whatever names a neighbour."""

    def __init__(self, replica: Replica, rng: random.Random, now: float) -> None:
        self.replica = replica
        self.presence = Presence(replica.space)
        self.proposals = Proposals(replica)
        self.presence_info: bytes | None = None
        """What we announce about ourselves; None: nothing."""
        self.counters: Counter[str] = Counter()
        self.in_step = False
        """The last neighbour that compared had exactly what we have."""
        self._rng = rng
        self.is_long: Callable[[], bool] = lambda: False
        """Whether the owner wants to do something else: what takes long is interrupted then, and goes on later."""
        self._neighbours: dict[Peer, _Neighbour] = {}
        self._pending: OrderedDict[bytes, tuple[Operation, Peer]] = OrderedDict()
        self._pending_bytes = 0
        self._pending_of: Counter[Peer] = Counter()
        self._ready: deque[tuple[Operation, Peer]] = deque()
        """Operations that waited for a parent which has come."""
        self._waiting: dict[bytes, dict[bytes, None]] = {}
        """Missing parent: operations that wait for it."""
        self._wanted: OrderedDict[bytes, float] = OrderedDict()
        """When these were asked for last, oldest first."""
        self._refused: OrderedDict[bytes, None] = OrderedDict()
        self._asked: dict[Peer, tuple[float, float]] = {}
        """Frontiers of a peer that may be answered yet, and when that was so."""
        self._fork_pauses: dict[bytes, tuple[float, float]] = {}
        """The same by author, for forks."""
        self._downloads: Downloads[Peer] = Downloads(replica, self.counters)
        self._checkpoint_bytes: tuple[bytes, bytes] = (b"", b"")
        self._transmit: list[tuple[Peer, bytes]] = []
        self._hello_at = now + rng.uniform(*HELLO_INTERVAL)
        self._settle_at: float | None = None
        self._settle_not: Peer | None = None
        self._presence_at = now

    # -- what the owner calls -------------------------------------------------------------------------------
    def add_neighbour(self, peer: Peer, now: float) -> None:
        """Exchange new operations with `peer` from now on, and compare with it at once."""
        if peer not in self._neighbours:
            self._neighbours[peer] = _Neighbour()
        self._send_hello(peer)
        members = [member.record for member in self.presence.members(now)]
        for at in range(0, len(members), PRESENT_IN_MESSAGE):
            self._send(peer, Kind.PRESENCE, members[at : at + PRESENT_IN_MESSAGE])

    def remove_neighbour(self, peer: Peer) -> None:
        self._neighbours.pop(peer, None)
        self._downloads.forget(peer)

    def neighbours(self) -> list[Peer]:
        return list(self._neighbours)

    def compare(self, peer: Peer) -> None:
        """Compare with a neighbour now."""
        self._send_hello(peer)

    def push(self, operations: Iterable[Operation]) -> None:
        """Tell the neighbours of operations that were made here."""
        for op in operations:
            for neighbour in self._neighbours.values():
                neighbour.pushes.append(op)

    def push_fork(self, fork: Equivocation) -> None:
        """Tell the neighbours of a proof. One of 800 KB only those get who find that they lack it."""
        for peer in self._neighbours:
            if isinstance(fork, Fork):
                self._send_proofs(peer, [fork])
            else:
                self._send_hello(peer)

    def announce_checkpoint(self) -> None:
        """Tell the neighbours that we have another checkpoint."""
        for peer in self._neighbours:
            self._send_hello(peer)

    def announce_presence(self, now: float, unix_now: float) -> None:
        """Announce ourselves now, and every 10 s from now on; once that we are gone, when we were here."""
        self._presence_at = now + PRESENCE_INTERVAL
        key, info = self.replica.key, self.presence_info
        if key is None or (info is None and not self.presence.is_here(key.public_key.data)):
            return
        record = self.presence.announce(key, info or b"", now, unix_now)
        for peer in self._neighbours:
            self._send(peer, Kind.PRESENCE, [record])

    # -- time -----------------------------------------------------------------------------------------------
    def next_timeout(self) -> float:
        if self._ready:
            return -math.inf
        at = self._hello_at
        if self.presence_info is not None:
            at = min(at, self._presence_at)
        if self._settle_at is not None:
            at = min(at, self._settle_at)
        for neighbour in self._neighbours.values():
            if neighbour.behind:
                at = min(at, neighbour.frontier_at + FRONTIER_PAUSE)
        return at

    def handle_timer(self, now: float, unix_now: float) -> None:
        if self._ready:
            self._take_ready(now, unix_now, pushed=True)
        if self._settle_at is not None and now >= self._settle_at:
            self._settle_at = None
            for peer in self._neighbours:
                if peer != self._settle_not:
                    self._send_hello(peer)
        for peer, neighbour in self._neighbours.items():
            if neighbour.behind:
                self._send_frontier(peer, neighbour, now)
        if now >= self._hello_at:
            self._hello_at = now + self._rng.uniform(*HELLO_INTERVAL)
            self._forget_old(now)
            self._settle_proposals(now, again=True)
            if self._neighbours:
                peer = self._rng.choice(list(self._neighbours))
                self._send_hello(peer)
                for proposal in self.proposals.held():  # what was lost on its way
                    self._send(peer, Kind.PROPOSAL, proposal.header, sorted(proposal.signatures.items()))
        if self.presence_info is not None and now >= self._presence_at:
            self.announce_presence(now, unix_now)

    def _forget_old(self, now: float) -> None:
        while self._wanted and now - next(iter(self._wanted.values())) >= 60:
            self._wanted.popitem(last=False)
        self._asked = {peer: row for peer, row in self._asked.items() if now - row[1] < ASKS[0] / ASKS[1]}
        for neighbour in self._neighbours.values():
            if neighbour.in_flight and now - neighbour.last_ack > STALLED:
                neighbour.in_flight.clear()
                neighbour.batches = iter(())
        self._downloads.forget_old(now)

    # -- receiving ------------------------------------------------------------------------------------------
    def receive_message_untrusted(self, peer: Peer, data: bytes, now: float, unix_now: float) -> None:
        """A message of `peer`. Raises `RemoteProtocolError` when it is malformed."""
        self.receive(peer, decode_message_untrusted(data), now, unix_now)

    def receive(self, peer: Peer, message: Message, now: float, unix_now: float, row: Row | None = None) -> None:
        """The same for a message that is parsed; `row`: the operations in it, when they are parsed, too (their
        signatures may have been checked in a thread)."""
        neighbour = self._neighbours.get(peer) or _Neighbour()
        fields = message.fields
        match message.kind:
            case Kind.HELLO:
                self._on_hello(peer, neighbour, fields[0], (fields[1], fields[2], fields[3]), now)
            case Kind.FRONTIER:
                self._on_frontier(peer, neighbour, message, now)
            case Kind.OPERATIONS:
                if row is None:
                    row = read_row_untrusted(fields[1], self.replica.space, self.replica.graph.operation_at)
                self._on_operations(peer, fields[0], row.operations, now, unix_now)
                if not row.complete and peer in self._neighbours:
                    self.counters["unresolved"] += 1
                    neighbour.behind = True
                    self._send_frontier(peer, neighbour, now)
            case Kind.ACK:
                neighbour.in_flight.pop(fields[0], None)
                neighbour.last_ack = now
                self._send_batches(peer, neighbour, now)
            case Kind.WANT:
                self._on_want(peer, fields[0])
            case Kind.FORKS:
                self._on_forks(peer, fields[0], now)
            case Kind.GET_CHECKPOINT:
                self._on_get_checkpoint(peer, fields[0], fields[1])
            case Kind.CHECKPOINT:
                self._on_checkpoint(peer, *fields, now=now)
            case Kind.PRESENCE:
                self._on_presence(peer, fields[0], now, unix_now)
            case Kind.PROPOSAL:
                self._on_proposal(peer, fields[0], fields[1], now)
            case Kind.GET_GENESIS if fields[0] == self.replica.space:
                self._send(peer, Kind.GENESIS, self.replica.genesis.encode())

    def _on_hello(self, peer: Peer, neighbour: _Neighbour, digest: bytes, theirs: Rank, now: float) -> None:
        if digest == self.digest():
            neighbour.fruitless = 0
            if not self.in_step:
                self.in_step = True
                self._send_hello(peer)
            return
        self.in_step = False
        own = self.replica.rank()
        if theirs[2] != own[2]:
            if self._downloads.is_wanted(theirs):
                if self._downloads.start(peer, theirs[2], now):
                    self._send(peer, Kind.GET_CHECKPOINT, theirs[2], 0)
            elif self.replica.checkpoint is not None:
                self._send_hello(peer)
            return
        if peer in self._neighbours or self._may_ask(peer, now):
            self._send_frontier(peer, neighbour, now)

    def _may_ask(self, peer: Peer, now: float) -> bool:
        """Whether to do what a peer asks for, which is more work than to ask. Else it is as if it had been lost."""
        left, at = self._asked.get(peer, (ASKS[0], now))
        left = min(ASKS[0], left + (now - at) * ASKS[1])
        self._asked[peer] = (left - 1 if left >= 1 else left, now)
        return left >= 1

    def _on_frontier(self, peer: Peer, neighbour: _Neighbour, message: Message, now: float) -> None:
        checkpoint, full, tips, exclusions = message.fields
        if not self._may_ask(peer, now):
            return
        if checkpoint != self.replica.rank()[2]:
            self._send_hello(peer)
            return
        news = self._answer_exclusions(peer, exclusions)
        past, ahead = self._past_of_tips(tips, full)
        found = self._missing(past)
        first = next(found, None)
        missing = first is not None
        if now - neighbour.last_ack > LOST:
            neighbour.in_flight.clear()
        if not neighbour.in_flight:
            neighbour.last_ack = now
        # a frontier that crossed our batches does not show them yet
        flying = {entry.op.id for entries in neighbour.in_flight.values() for entry in entries}
        found = found if first is None else chain([first], found)
        neighbour.batches = (entry for entry in found if entry.op.id not in flying)
        if missing:
            neighbour.fruitless = 0
            self._send_batches(peer, neighbour, now)
        if ahead or news or (full and not missing):
            self._send_frontier(peer, neighbour, now)

    def _answer_exclusions(self, peer: Peer, exclusions: Sequence[tuple[bytes, int, int]]) -> bool:
        """Send the proofs the other lacks; whether it has one that we lack."""
        theirs = {author: (seq, instance) for author, seq, instance in exclusions}
        ours = self.replica.graph.forks
        send = [fork for author, fork in ours.items() if author not in theirs or fork.place < theirs[author]]
        self._rng.shuffle(send)  # there may be some that it does not take yet
        self._send_proofs(peer, send)
        known = {author: (seq, instance) for author, seq, instance in self.replica.graph.exclusions()}
        return any(author not in known or place < known[author] for author, place in theirs.items())

    def _send_proofs(self, peer: Peer, proofs: Iterable[Equivocation]) -> None:
        """As many as a few messages hold; the next comparison asks for the rest."""
        rows: list[list[bytes]] = []
        size = messages = 0
        for proof in proofs:
            row = [op.encoded for op in proof.operations]
            length = sum(map(len, row))
            if rows and (size + length > _PROOF_BYTES or len(rows) == MAX_FORKS):
                self._send(peer, Kind.FORKS, rows)
                rows, size, messages = [], 0, messages + 1
                if messages == REPLICA_BATCHES_IN_FLIGHT:
                    return
            rows.append(row)
            size += length
        if rows:
            self._send(peer, Kind.FORKS, rows)

    def _past_of_tips(self, tips: Sequence[tuple[bytes, int, int, bytes]], full: bool) -> tuple[Past, bool]:
        """What the sender of these chain ends has of ours, and whether it has something that we lack."""
        graph = self.replica.graph
        past: Past = {}
        ahead = False
        for author, instance, seq, prefix in tips:
            found = None
            branches = graph.chains.get((author, instance), [])
            for branch in branches:
                index = seq - branch.first_seq
                if 0 <= index < len(branch.entries) and branch.entries[index].op.id[:8] == prefix:
                    found = branch.entries[index]
            if found is None or not found.counted:
                ahead = True
            if found is None and not full and len(branches) == 1 and branches[0].entries[-1].op.seq < seq:
                found = branches[0].entries[-1]
            if found is not None:
                graph.absorb(past, found)
        return past, ahead

    def _missing(self, past: Past) -> Iterator[Entry]:
        """What counts and is not in this past, in order. Looked for as it is taken: most of it never is when somebody
        asks again and again."""
        lines = []
        for branches in self.replica.graph.chains.values():
            for branch in branches:
                first = max(0, past.get(branch, -1) + 1 - branch.first_seq)
                if first < len(branch.entries):
                    lines.append(_counted_from(branch, first, len(branch.entries)))
        return heapq.merge(*lines, key=lambda entry: entry.order) if len(lines) != 1 else lines[0]

    def _on_operations(
        self, peer: Peer, batch: int, operations: Sequence[Operation], now: float, unix_now: float
    ) -> None:
        known = self.replica.operations()
        self._take_all(peer, operations, batch, now, unix_now)
        if batch:
            self._send(peer, Kind.ACK, batch)
        self._note_news(peer, batch, known, now)

    def _note_news(self, peer: Peer, batch: int, known: int, now: float) -> None:
        """What came in batches is gathered for a moment before others are told; what is pushed is pushed on."""
        if batch and self.replica.operations() != known:
            if peer in self._neighbours:
                self._neighbours[peer].fruitless = 0
            self._settle_at = self._settle_at or now + SETTLE
            self._settle_not = peer

    def take_some(
        self, peer: Peer, batch: int, operations: Sequence[Operation], now: float, unix_now: float
    ) -> Sequence[Operation]:
        """Take operations of a message until `is_long`: the rest of them, for the next turn. The last turn of a message
        is `receive`, with what is left of its row."""
        known = self.replica.operations()
        left = self._take_all(peer, operations, batch, now, unix_now, to_the_end=False)
        self._note_news(peer, batch, known, now)
        return left

    def _take_all(
        self,
        peer: Peer,
        operations: Sequence[Operation],
        batch: int,
        now: float,
        unix_now: float,
        *,
        to_the_end: bool = True,
    ) -> Sequence[Operation]:
        with self.replica.batch() if len(operations) > 1 else nullcontext():
            for number, op in enumerate(operations, 1):
                self._take(op, peer, now, unix_now, pushed=not batch)
                self._take_ready(now, unix_now, pushed=not batch)
                if not to_the_end and self.is_long():
                    return operations[number:]
        return ()

    def _take_ready(self, now: float, unix_now: float, *, pushed: bool) -> None:
        """Take in what waited, until `is_long`."""
        while self._ready:
            op, source = self._ready.pop()
            self._take(op, source, now, unix_now, pushed=pushed)
            if self.is_long():
                return

    def _take(self, op: Operation, source: Peer, now: float, unix_now: float, *, pushed: bool) -> None:
        """Take in an operation; those that waited for it are ready then."""
        if op.id in self._refused or op.id in self.replica.graph.entries:
            self.counters["repeated"] += 1
            return
        try:
            if self.replica.graph.would_move_fork(op):
                self._check_fork_pause(op.author, now)
            admission = self.replica.receive_operation(op, unix_now)
        except MissingParents as error:
            self._set_aside(op, source, error.missing, now)
            return
        except NotYet:
            self.counters["not_yet"] += 1
            return
        except RemoteProtocolError as error:
            self._refuse(op, error)
            return
        self._after(admission, source, now, pushed=pushed)
        for waiting in self._waiting.pop(op.id, ()):
            held = self._pending.pop(waiting, None)
            if held is not None:
                self._pending_bytes -= len(held[0].encoded)
                self._pending_of[held[1]] -= 1
                self._ready.append(held)

    def _check_fork_pause(self, author: bytes, now: float) -> None:
        if now < self._fork_pauses.get(author, (0.0, 0.0))[0]:
            raise NotYet("another fork of this author was taken just now")

    def _after(self, admission: Admission, source: Peer, now: float, *, pushed: bool) -> None:
        self.counters["admitted"] += 1
        if admission.fork is not None:
            self.counters["forks"] += 1
            _, pause = self._fork_pauses.get(admission.fork.author, (0.0, FORK_PAUSE[0] / 2))
            pause = min(2 * pause, FORK_PAUSE[1])
            self._fork_pauses[admission.fork.author] = (now + pause, pause)
            self.push_fork(admission.fork)
        if pushed:
            for entry in admission.counted:
                for peer, neighbour in self._neighbours.items():
                    if peer != source:
                        neighbour.pushes.append(entry.op)

    def _refuse(self, op: Operation, error: RemoteProtocolError) -> None:
        self.counters["refused"] += 1
        self._refused[op.id] = None
        if len(self._refused) > _REFUSED_KEPT:
            self._refused.popitem(last=False)

    def refused(self) -> int:
        """Operations refused so far."""
        return self.counters["refused"]

    def _set_aside(self, op: Operation, peer: Peer, missing: Sequence[bytes], now: float) -> None:
        if op.id not in self._pending:
            if not op.check_signature(self.replica.space):
                self._refuse(op, RemoteProtocolError("wrong signature"))
                return
            self._pending[op.id] = (op, peer)
            self._pending_bytes += len(op.encoded)
            self._pending_of[peer] += 1
            for parent in missing:
                self._waiting.setdefault(parent, {})[op.id] = None
            if self._pending_of[peer] > REPLICA_MAX_PENDING_PER_PEER:
                self._drop_pending(next(key for key, (_, source) in self._pending.items() if source == peer))
            while len(self._pending) > REPLICA_MAX_PENDING or self._pending_bytes > REPLICA_MAX_PENDING_BYTES:
                self._drop_pending(next(iter(self._pending)))
        want = [
            parent
            for parent in missing
            if parent not in self._pending and now - self._wanted.get(parent, -1e9) > WANT_AGAIN
        ]
        for parent in want[:REPLICA_MAX_WANTED]:
            self._wanted[parent] = now
            self._wanted.move_to_end(parent)
        while len(self._wanted) > REPLICA_MAX_PENDING:
            self._wanted.popitem(last=False)
        if want:
            self._send(peer, Kind.WANT, want[:REPLICA_MAX_WANTED])

    def _drop_pending(self, key: bytes) -> None:
        op, peer = self._pending.pop(key)
        self._pending_bytes -= len(op.encoded)
        self._pending_of[peer] -= 1
        if not self._pending_of[peer]:
            del self._pending_of[peer]
        for parent in op.parents:
            waiting = self._waiting.get(parent)
            if waiting is not None:
                waiting.pop(key, None)
                if not waiting:
                    del self._waiting[parent]

    def _on_want(self, peer: Peer, ids: Sequence[bytes]) -> None:
        graph = self.replica.graph
        found = sorted((graph.entries[key] for key in set(ids) if key in graph.entries), key=lambda e: e.order)
        operations = [entry.op for entry in found]
        for start, stop in list(_batches(operations))[:REPLICA_BATCHES_IN_FLIGHT]:  # the rest is asked for again
            self._send(peer, Kind.OPERATIONS, 0, write_row(operations[start:stop]))

    def _on_forks(self, peer: Peer, forks: Sequence[Sequence[bytes]], now: float) -> None:
        for row in forks:
            fork = equivocation_untrusted(row, self.replica.space)
            try:
                if self.replica.graph.excluded(fork.author):
                    self._check_fork_pause(fork.author, now)
                admission = self.replica.receive_fork(fork)
            except NotYet:
                self.counters["not_yet"] += 1
                continue
            except RemoteProtocolError:
                self.counters["refused"] += 1
                continue
            if admission.fork is not None:
                self._after(admission, peer, now, pushed=False)

    # -- checkpoints ----------------------------------------------------------------------------------------
    def propose_checkpoint(self, now: float, unix_now: float) -> bytes:
        """Propose a checkpoint to the quorum of the space: its id. It is taken as soon as enough signed it."""
        proposal = self.proposals.propose(unix_now)
        self._send_proposal(proposal)
        self._take_complete(self.proposals.complete())
        assert proposal.made is not None
        return proposal.made.id

    def _on_proposal(self, peer: Peer, header: bytes, signatures: Signatures, now: float) -> None:
        proposal = self.proposals.receive_untrusted(header, signatures)
        if proposal is not None:
            self._send_proposal(proposal, peer)
            self._settle_proposals(now)

    def _settle_proposals(self, now: float, *, again: bool = False) -> None:
        signed, complete = self.proposals.settle(now, again=again)
        for proposal in signed:
            self._send_proposal(proposal)
        self._take_complete(complete)

    def _take_complete(self, checkpoint: Checkpoint | None) -> None:
        if checkpoint is not None:
            self.replica.adopt(checkpoint)
            self._after_checkpoint()

    def _after_checkpoint(self) -> None:
        self.counters["checkpoints"] += 1
        self._refused.clear()  # what was refused may be right on another state
        for neighbour in self._neighbours.values():
            neighbour.batches = iter(())
        self.announce_checkpoint()

    def _send_proposal(self, proposal: Proposal, source: Peer | None = None) -> None:
        for peer in self._neighbours:
            if peer != source:
                self._send(peer, Kind.PROPOSAL, proposal.header, sorted(proposal.signatures.items()))

    def _on_get_checkpoint(self, peer: Peer, checkpoint: bytes, offset: int) -> None:
        own = self.replica.checkpoint
        if own is None or checkpoint != own.id:
            self._send_hello(peer)
            return
        if self._checkpoint_bytes[0] != checkpoint:
            self._checkpoint_bytes = (checkpoint, own.encode())
        data = self._checkpoint_bytes[1]
        self._send(peer, Kind.CHECKPOINT, checkpoint, offset, len(data), data[offset : offset + CHUNK])

    def _on_checkpoint(
        self, peer: Peer, checkpoint: bytes, offset: int, total: int, data: bytes, *, now: float
    ) -> None:
        behind, taken = self._downloads.receive_untrusted(peer, checkpoint, offset, total, data, now)
        if behind is not None:
            self._send(peer, Kind.GET_CHECKPOINT, checkpoint, behind)
        if taken:
            self._after_checkpoint()

    # -- presence -------------------------------------------------------------------------------------------
    def _on_presence(self, peer: Peer, records: Sequence[Record], now: float, unix_now: float) -> None:
        writers = self.replica.graph.membership().writers
        news = [record for record in records if self.presence.receive_untrusted(record, now, unix_now, writers)]
        if news:
            for other in self._neighbours:
                if other != peer:
                    self._send(other, Kind.PRESENCE, news)

    # -- sending --------------------------------------------------------------------------------------------
    def poll_transmit(self) -> list[tuple[Peer, bytes]]:
        """Messages to send, each to its neighbour."""
        for peer, neighbour in self._neighbours.items():
            pushes, neighbour.pushes = neighbour.pushes, []
            for start, stop in _batches(pushes):
                find = self.replica.graph.operation_at if stop - start <= READ_ALONE else None
                self._send(peer, Kind.OPERATIONS, 0, write_row(pushes[start:stop], find))
        out, self._transmit = self._transmit, []
        return out

    def digest(self) -> bytes:
        """What HELLO says we have."""
        replica = self.replica
        heads = b"".join(sorted(replica.graph.heads))
        own = replica.rank()[2] + replica.exclusions_digest() + heads
        return blake3(b"lattica-replica-digest" + own).digest()

    def _send(self, peer: Peer, kind: Kind, *fields: object) -> None:
        self._transmit.append((peer, encode_message(kind, self.replica.space, *fields)))

    def _send_hello(self, peer: Peer) -> None:
        self._send(peer, Kind.HELLO, self.digest(), *self.replica.rank())

    def _send_frontier(self, peer: Peer, neighbour: _Neighbour, now: float) -> None:
        if now - neighbour.frontier_at < FRONTIER_PAUSE:
            return
        neighbour.frontier_at = now
        neighbour.behind = False
        full = neighbour.fruitless >= FRUITLESS
        neighbour.fruitless = 0 if full else neighbour.fruitless + 1
        tips = []
        for (author, instance), branches in self.replica.graph.chains.items():
            for branch in branches:
                last = next((entry for entry in reversed(branch.entries) if entry.counted), None)
                if last is not None:
                    tips.append((author, instance, last.op.seq, last.op.id[:8]))
        if len(tips) > REPLICA_MAX_TIPS:  # chains that several made up for us: others of them next time
            tips = self._rng.sample(tips, REPLICA_MAX_TIPS)
        exclusions = self.replica.graph.exclusions()
        self._send(peer, Kind.FRONTIER, self.replica.rank()[2], full, tips, exclusions)

    def _send_batches(self, peer: Peer, neighbour: _Neighbour, now: float) -> None:
        while len(neighbour.in_flight) < REPLICA_BATCHES_IN_FLIGHT:
            entries: list[Entry] = []
            size = 0
            for entry in neighbour.batches:
                entries.append(entry)
                size += len(entry.op.encoded)
                if len(entries) >= REPLICA_BATCH_OPERATIONS or size >= REPLICA_BATCH_BYTES:
                    break
            if not entries:
                return
            neighbour.batch += 1
            neighbour.in_flight[neighbour.batch] = entries
            self._send(peer, Kind.OPERATIONS, neighbour.batch, write_row([entry.op for entry in entries]))


def _counted_from(branch: Branch, first: int, stop: int) -> Iterator[Entry]:
    entries = branch.entries
    while first < min(stop, len(entries)):  # what does not count may be forgotten meanwhile
        if entries[first].counted:
            yield entries[first]
        first += 1


def _batches(operations: Sequence[Operation]) -> Iterable[tuple[int, int]]:
    """Cut a list of operations into pieces that fit a message."""
    start = size = 0
    for index, op in enumerate(operations):
        full = size + len(op.encoded) > REPLICA_BATCH_BYTES or index - start >= REPLICA_BATCH_OPERATIONS
        if index > start and full:
            yield start, index
            start, size = index, 0
        size += len(op.encoded)
    if start < len(operations):
        yield start, len(operations)
