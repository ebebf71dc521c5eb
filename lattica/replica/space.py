"""One space on this peer: typed access to its document, its members, its history.

Edits are made at once, signed, stored and visible here when the call returns; they travel by themselves. Everything is
called from the node's trio thread. Reading never waits for anything.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgpack
import trio

from lattica.errors import InvalidArgument, NotWriter, StorageError
from lattica.replica.changes import RESET, Change, ChangeFeed
from lattica.replica.shared import Counter, SharedList, SharedMap, SharedSet, SharedText
from lattica_protocols.errors import LocalProtocolError
from lattica_protocols.keys import PublicKey
from lattica_protocols.limits import REPLICA_MAX_NAME_BYTES, REPLICA_MAX_PRESENCE_BYTES
from lattica_protocols.peer_id import PeerId
from lattica_protocols.replica.genesis import space_text
from lattica_protocols.replica.operation import Kind, Operation
from lattica_protocols.replica.plain import TYPES, container_value
from lattica_protocols.replica.proof import make_proof

if TYPE_CHECKING:
    from lattica.replica.store import SpaceStore
    from lattica_protocols.replica.replica import Replica, Verified
    from lattica_protocols.replica.sync import ReplicaSync

log = logging.getLogger("lattica.replica")

list_of = list  # `list` is a method below

DEFAULT_MAP = "data"
"""The map that `space[key]` means."""
WATCH_BUFFER = 1024
"""Changes that wait for a watcher; one that falls behind gets a "reset" and reads again."""


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One operation of the history."""

    id: bytes
    author: PeerId
    kind: str
    seq: int
    time: int
    """Unix seconds, by the author's clock."""
    bytes: int


@dataclass(frozen=True, slots=True)
class Member:
    """A member that announced itself within 30 s."""

    peer: PeerId
    info: Any
    seconds_ago: float


class Space:
    """A replica with its machine and its place on disk. Made by `SpaceService`."""

    def __init__(
        self,
        replica: Replica,
        machine: ReplicaSync[PeerId],
        store: SpaceStore,
        wake: Callable[[], None],
        clock: Callable[[], float],
        take_back: Callable[[Space], None],
    ) -> None:
        """`take_back(space)` makes it what it is in the store."""
        self.replica = replica
        self.machine = machine
        self._store = store
        self._wake = wake
        self._clock = clock
        self._take_back = take_back
        self._not_stored = False
        """The last edit could not be stored."""
        self._depth = 0
        self._instance = replica.instance
        self._watchers: list_of[Watcher] = []
        self._feed = ChangeFeed(self._publish)
        self._announced: list_of[bytes | None] = [None]
        self.since_snapshot = 0
        """Operations stored since the document was."""

    # -- what it is -----------------------------------------------------------------------------------------
    @property
    def id(self) -> str:
        """The id as text."""
        return space_text(self.replica.space)

    @property
    def name(self) -> str:
        return self.replica.genesis.name

    @property
    def owners(self) -> Sequence[PeerId]:
        """Who may grant, remove and hand over."""
        return sorted(peer_of(key) for key in self.replica.graph.membership().owners)

    @property
    def writers(self) -> Sequence[PeerId]:
        """Who may write, owners included, those who equivocated left out."""
        graph = self.replica.graph
        return sorted(peer_of(key) for key in graph.membership().writers if not graph.excluded(key))

    @property
    def excluded(self) -> Sequence[PeerId]:
        """Who is out because they signed two operations with one sequence number, or have too many instances."""
        return sorted(peer_of(author) for author, _, _ in self.replica.graph.exclusions())

    def root(self) -> bytes:
        """32 bytes; equal on two peers exactly when they hold the same operations, and then the same document."""
        return self.replica.root()

    def operations(self) -> int:
        """How many operations the state is made of."""
        return self.replica.operations()

    def lost(self) -> Sequence[bytes]:
        """Ids of our own operations that a checkpoint left out and that cannot follow it: they have to be made again.
        Only operations that built on an equivocator's can come to this."""
        return [op.id for op in self.replica.lost]

    # -- contents -------------------------------------------------------------------------------------------
    def map(self, name: str = DEFAULT_MAP) -> SharedMap:
        return SharedMap(self, _container("m", name))

    def list(self, name: str) -> SharedList:
        return SharedList(self, _container("l", name))

    def text(self, name: str) -> SharedText:
        return SharedText(self, _container("t", name))

    def counter(self, name: str) -> Counter:
        return Counter(self, _container("c", name))

    def set(self, name: str) -> SharedSet:
        return SharedSet(self, _container("s", name))

    def __getitem__(self, key: str) -> Any:
        return self.map()[key]

    def __setitem__(self, key: str, value: object) -> None:
        self.map()[key] = value

    def __delitem__(self, key: str) -> None:
        del self.map()[key]

    def __contains__(self, key: object) -> bool:
        return key in self.map()

    def __iter__(self) -> Iterator[str]:
        return iter(self.map())

    def __len__(self) -> int:
        return len(self.map())

    def get(self, key: str, default: Any = None) -> Any:
        return self.map().get(key, default)

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """A plain copy of everything: {"map": {name: …}, "list": …, "text": …, "counter": …, "set": …}."""
        doc = self.replica.doc
        out: dict[str, dict[str, Any]] = {"map": {}, "list": {}, "text": {}, "counter": {}, "set": {}}
        kinds = dict(zip("mltcs", out, strict=True))
        for name in sorted(doc.keys()):
            if name[0] in TYPES:
                out[kinds[name[0]]][name[2:]] = container_value(doc, name)
        return out

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything written inside the block becomes one operation: others see all of it or nothing.

        A block that puts items at more than 8 places of lists and texts, deletes from more than 64, or writes more
        than 4,096 items becomes several operations, which others may see one after the other.
        When the block raises, nothing of it is kept. May be nested. Errors: `NotWriter`; `InvalidArgument` (the edit
        is over the size limit); `StorageFull`, `StorageError` (it could not be stored and is taken back).
        """
        if self._depth:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
            return
        self._check_writable()
        self._depth = 1
        made: list_of[Operation] = []
        try:
            with self.replica.transaction(self._clock()) as made:
                yield
        except LocalProtocolError as error:
            raise InvalidArgument(str(error)) from None
        finally:
            self._depth = 0
        self._made(made)

    def _check_writable(self) -> None:
        reason = self.replica.why_not_writable()
        if reason is not None:
            raise NotWriter(f"{reason}; {_who_may_help(self)}")
        if self._not_stored:
            self._store.try_to_write()  # making an edit and taking it back costs much more
            self._not_stored = False

    def restored(self, replica: Replica, machine: ReplicaSync[PeerId]) -> None:
        """Go on with what was read from the store."""
        self.replica, self.machine = replica, machine
        self._instance = replica.instance
        self.after_change()

    def _made(self, operations: list_of[Operation]) -> None:
        try:
            self.save()
        except StorageError:
            # Nothing of it was sent. If it stayed, it would come into effect some time after its author heard that
            # it had failed, and made it again.
            self._not_stored = True
            self._take_back(self)
            raise
        self.machine.push(operations)
        self.after_change()
        self._wake()

    def save(self) -> None:
        """Store what is new. Raises `StorageFull` or `StorageError`."""
        replica = self.replica
        if not replica.unsaved:
            return
        unsaved = replica.take_unsaved()
        kept: list_of[tuple[Operation, int]] = []
        if unsaved.checkpoint is not None:
            kept = [(entry.op, entry.end - entry.start) for entry in replica.graph.counted()]
            self.since_snapshot = 0
        instance = replica.instance if replica.instance != self._instance else None
        try:
            self._store.save(replica.space, unsaved, kept, instance)
        except StorageError:
            replica.unsaved = unsaved  # tried again with the next change
            raise
        self._instance = replica.instance
        self.since_snapshot += len(unsaved.operations)
        for op in unsaved.lost:
            why = "left out by a checkpoint"
            log.warning("space_operation_lost space=%s operation=%s reason=%s", self.id, op.id.hex(), why)

    def after_change(self) -> None:
        """Tell the watchers of what came."""
        if self._watchers:
            self._feed.follow(self.replica.doc)

    # -- watching -------------------------------------------------------------------------------------------
    def watch(self) -> Watcher:
        """Changes from now on, our own too: `async for change in space.watch()`."""
        if not self._watchers:
            self._feed.follow(self.replica.doc)
        watcher = Watcher(self._unwatch)
        self._watchers.append(watcher)
        return watcher

    def _unwatch(self, watcher: Watcher) -> None:
        if watcher in self._watchers:
            self._watchers.remove(watcher)
            if not self._watchers:
                self._feed.stop()

    def _publish(self, change: Change) -> None:
        for watcher in self._watchers:
            watcher.put(change)

    # -- members --------------------------------------------------------------------------------------------
    def add_writer(self, peer: PeerId) -> None:
        """Let `peer` write. Only an owner may. Errors: `NotWriter`, `InvalidArgument`."""
        self._change_members(Kind.GRANT, peer)

    def remove_writer(self, peer: PeerId) -> None:
        """Let `peer` write no more. What it wrote without knowing of this stays only where others built on it."""
        self._change_members(Kind.REMOVE, peer)

    def hand_over(self, peer: PeerId) -> None:
        """Make `peer` the owner instead of us; we stay a writer."""
        self._change_members(Kind.HAND_OVER, peer)

    def _change_members(self, kind: Kind, peer: PeerId) -> None:
        key = key_of(peer)
        self._check_writable()
        assert self.replica.key is not None
        if self.replica.key.public_key.data not in self.replica.graph.membership().owners:
            raise NotWriter(f"only the owner may change who writes; {_who_may_help(self)}")
        try:
            self._made([self.replica.change_members(kind, key, self._clock())])
        except LocalProtocolError as error:
            raise InvalidArgument(str(error)) from None

    def announce(self, info: object) -> None:
        """Say that we are here, with something about us (a JSON value of up to 1 KiB), until told otherwise.

        Others see it in `members()`, until we say otherwise or 30 s after our last word. None: stop.
        """
        self._announced[0] = None if info is None else _presence_bytes(info)
        self._announce()

    @contextmanager
    def present(self, info: object) -> Iterator[None]:
        """The same while the block runs; of several the last one started counts."""
        data = _presence_bytes(info)
        self._announced.append(data)
        self._announce()
        try:
            yield
        finally:
            del self._announced[_last_index(self._announced, data)]
            self._announce()

    def _announce(self) -> None:
        self.machine.presence_info = next((data for data in reversed(self._announced) if data is not None), None)
        self.machine.announce_presence(trio.current_time(), self._clock())
        self._wake()

    def members(self) -> Sequence[Member]:
        """Who announced itself within 30 s, ourselves included."""
        now = trio.current_time()
        return [
            Member(peer_of(member.key), _presence_value(member.info), now - member.heard)
            for member in self.machine.presence.members(now)
        ]

    # -- history --------------------------------------------------------------------------------------------
    def log(self, limit: int = 100) -> Sequence[LogEntry]:
        """The newest operations since the checkpoint, oldest first."""
        counted = self.replica.graph.counted()[-limit:]
        return [
            LogEntry(
                entry.op.id,
                peer_of(entry.op.author),
                Kind(entry.op.kind).name.lower(),
                entry.op.seq,
                entry.op.time,
                len(entry.op.encoded),
            )
            for entry in counted
        ]

    def verify(self) -> Verified:
        """Check all operations again, from the genesis or the checkpoint. Blocks: run it in a thread when there are
        many (nothing may be written meanwhile)."""
        return self.replica.verify()

    def prove(self, operation: bytes) -> bytes:
        """A proof for third parties that this operation is part of the state with our root. `InvalidArgument` when it
        is not here."""
        try:
            return make_proof(self.replica, operation)
        except LocalProtocolError as error:
            raise InvalidArgument(str(error)) from None

    def checkpoint(self) -> bytes:
        """Replace the history by a signed state, here and on all members; its id. Errors: `NotWriter`.

        Where the space has signers, this proposes the state to them: each signs it by itself when it finds the same,
        and it is taken everywhere once a quorum did (`checkpoint_id` tells).
        """
        replica = self.replica
        key = b"" if replica.key is None else replica.key.public_key.data
        if replica.genesis.quorum:
            made = self._propose(key)
        else:
            if key not in replica.graph.membership().owners:
                raise NotWriter(f"only the owner may make a checkpoint; {_who_may_help(self)}")
            checkpoint = replica.make_checkpoint(self._clock())
            if not replica.receive_checkpoint(checkpoint.encode()):
                raise InvalidArgument("there is a newer checkpoint already")
            made = checkpoint.id
            self.machine.announce_checkpoint()
        self.save()
        self.after_change()
        self._wake()
        return made

    def _propose(self, key: bytes) -> bytes:
        signers = self.replica.genesis.signers
        if key not in signers:
            names = ", ".join(str(peer_of(signer)) for signer in signers)
            raise NotWriter(f"only signers of {self.id} may propose a checkpoint: {names}")
        try:
            return self.machine.propose_checkpoint(trio.current_time(), self._clock())
        except LocalProtocolError as error:
            raise InvalidArgument(str(error)) from None

    @property
    def checkpoint_id(self) -> bytes | None:
        """Id of the checkpoint that the state stands on; None: the genesis."""
        return None if self.replica.checkpoint is None else self.replica.checkpoint.id


class Watcher:
    """An async iterator over the changes of a space. Ends with `close`, or with the task that iterates."""

    def __init__(self, closed: Callable[[Watcher], None]) -> None:
        self._closed = closed
        self._changes: deque[Change] = deque()
        self._wake = trio.Event()

    def put(self, change: Change) -> None:
        if len(self._changes) >= WATCH_BUFFER:
            self._changes.clear()
            change = RESET
        self._changes.append(change)
        self._wake.set()

    def close(self) -> None:
        """Watch no longer."""
        self._closed(self)

    def __aiter__(self) -> Watcher:
        return self

    async def __anext__(self) -> Change:
        try:
            await trio.lowlevel.checkpoint()
            while not self._changes:
                self._wake = trio.Event()
                await self._wake.wait()
        except trio.Cancelled:
            self.close()
            raise
        return self._changes.popleft()


def peer_of(key: bytes) -> PeerId:
    """The peer id of an Ed25519 key."""
    return PeerId.from_public_key(PublicKey.ed25519(key))


def key_of(peer: PeerId) -> bytes:
    """The Ed25519 key of a peer id. `InvalidArgument` when it has another key."""
    key = peer.public_key()
    if key is None or len(key.data) != 32:
        raise InvalidArgument(f"{peer} has no Ed25519 key: it cannot be a member of a space")
    return key.data


def _who_may_help(space: Space) -> str:
    owners = ", ".join(str(peer) for peer in space.owners)
    return f"owner of {space.id}: {owners}; writers: {len(space.writers)} (`lattica space list` names them)"


def _container(kind: str, name: str) -> str:
    if not isinstance(name, str) or not name or len(name.encode()) > REPLICA_MAX_NAME_BYTES:
        raise InvalidArgument(f"a name in a space is a text of 1 to {REPLICA_MAX_NAME_BYTES} bytes")
    return f"{kind}:{name}"


def _presence_bytes(info: object) -> bytes:
    try:
        data = json.dumps(info, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
        msgpack.packb(info)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidArgument(f"what a member says about itself is a JSON value: {error}") from None
    if len(data) > REPLICA_MAX_PRESENCE_BYTES:
        raise InvalidArgument(f"presence of {len(data)} bytes is over {REPLICA_MAX_PRESENCE_BYTES}")
    return data


def _last_index(items: list[bytes | None], item: bytes) -> int:
    return len(items) - 1 - items[::-1].index(item)


def _presence_value(info: bytes) -> Any:
    """What a member says about itself; None when that is nothing that can be handed on to programs and people."""
    try:
        value = json.loads(info, parse_constant=_no_constant)
        msgpack.packb(value)  # no number over 64 bits, no half of a character
    except (ValueError, OverflowError, RecursionError):
        return None
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
