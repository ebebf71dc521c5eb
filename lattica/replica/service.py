"""Spaces for the rest of the node: create, join, find; and the loop that drives their machines.

    async with trio.open_nursery() as nursery:
        service = SpaceService(host, kad, store)
        nursery.start_soon(service.run)
        space = await service.create("roster")

Members find each other through provider records of the space's id, and by asking connected peers that speak the
protocol. A space talks to up to 6 neighbours of its own choice, and to those that chose us.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import trio

from lattica.errors import InvalidArgument, LatticaError, SpaceNotFound, StorageError
from lattica.host import PeerDisconnected, PeerIdentified
from lattica.replica.links import Link, Queued, receive_messages
from lattica.replica.signatures import SignatureChecker
from lattica.replica.space import Space, key_of
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import REPLICA_FANOUT, REPLICA_MAX_NEIGHBOURS
from lattica_protocols.peer_id import PeerId
from lattica_protocols.replica import PROTOCOL
from lattica_protocols.replica.genesis import Genesis, parse_space, provider_key, space_text
from lattica_protocols.replica.messages import TAG_BYTES, Kind, Message, decode_message_untrusted, encode_message
from lattica_protocols.replica.operation import Operation
from lattica_protocols.replica.replica import Replica
from lattica_protocols.replica.short_form import Row, read_row_untrusted
from lattica_protocols.replica.sync import READ_ALONE, ReplicaSync

if TYPE_CHECKING:
    from lattica.host import Host
    from lattica.interfaces import Stream
    from lattica.kad import KadService
    from lattica.replica.store import SpaceStore, StoredSpace

log = logging.getLogger("lattica.replica")

T = TypeVar("T")

JOIN_TIMEOUT = 30.0
"""Seconds to find somebody who serves a space."""
SEARCH_PAUSES = (1.0, 60.0)
"""Seconds between searches for members, for neighbours or to compare with one beyond them: doubling from the first to
the second, and from the start again when a neighbour is gone."""
CHECKS_AHEAD = 4
"""Messages of one stream whose signatures are checked while earlier ones are taken in."""
TURN = 0.05
"""Seconds of CPU in which operations are taken in before other tasks get their turn. A message of 1,024 usually takes
less, on a busy machine, too."""
SNAPSHOT_EVERY = 50_000
"""Stored operations after which the document is stored, too: a start applies fewer than that, at 1.5 µs each. Storing
it takes 30 ms where there are 60,000."""


@dataclass(frozen=True, slots=True)
class SpaceInfo:
    """A line of `list`."""

    id: str
    name: str
    operations: int
    writers: Sequence[PeerId]
    owners: Sequence[PeerId]
    excluded: Sequence[PeerId]
    neighbours: Sequence[PeerId]
    writable: bool


class SpaceService:
    """All spaces of a node. Serves `/lattica/replica/1` from the moment it is made; `run` does the rest."""

    def __init__(
        self, host: Host, kad: KadService | None, store: SpaceStore, clock: Callable[[], float] = time.time
    ) -> None:
        """`clock` gives Unix seconds."""
        self.store = store
        self._host = host
        self._kad = kad
        self._clock = clock
        self._spaces: dict[bytes, Space] = {}
        self._by_tag: dict[bytes, Space] = {}
        self._links: dict[PeerId, Link] = {}
        self._queued = Queued()
        self._turn_ends = 0.0
        self._inbound: dict[PeerId, trio.CancelScope] = {}
        """The stream of each peer that is served."""
        self._wake = trio.Event()
        self._joins: dict[bytes, trio.MemorySendChannel[Genesis]] = {}
        self._searching: set[bytes] = set()
        self._search_at: dict[bytes, tuple[float, float]] = {}
        self._provided: set[bytes] = set()
        self._signatures = SignatureChecker()
        for stored in store.load():
            self._restore(stored)
        for genesis in store.to_restore:
            self._add(genesis)
        host.handle(PROTOCOL, self._handle)

    # -- what the node asks for -----------------------------------------------------------------------------
    async def create(
        self, name: str, writers: Sequence[PeerId] = (), *, quorum: int = 0, signers: Sequence[PeerId] = ()
    ) -> Space:
        """A new space that we own. `writers` may write, too. With a `quorum`, checkpoints need that many of `signers`.
        Errors: `InvalidArgument`."""
        if not name:
            raise InvalidArgument("space: it needs a name")
        try:
            genesis = Genesis.create(
                self._host.key.public_key.data,
                name,
                os.urandom(16),
                [key_of(peer) for peer in writers],
                quorum,
                [key_of(peer) for peer in signers],
            )
        except (ValueError, TypeError) as error:
            raise InvalidArgument(f"space: {error}") from None
        return self._add(genesis)

    async def join(self, space: str, peers: Sequence[PeerId] = (), *, timeout: float = JOIN_TIMEOUT) -> Space:
        """Hold a replica of a space: found through the network, at `peers`, or at connected peers.

        Returns when its genesis is here; the contents follow (`wait_synced`). Errors: `InvalidArgument`,
        `SpaceNotFound` (nobody answered within `timeout` seconds who has it).
        """
        key = _parse(space)
        found = self._spaces.get(key)
        if found is None and key[:TAG_BYTES] in self._by_tag:
            raise InvalidArgument(f"{space} has the tag of another space here: one of them was made to collide")
        if found is None:
            genesis = await self._find_genesis(key, peers, timeout)
            found = self._spaces.get(key) or self._add(genesis)
        for peer in peers:
            self._add_neighbour(found, peer)
        return found

    def get(self, space: str) -> Space:
        """A space we hold, by its id, or by its name when only one has it. Errors: `SpaceNotFound`."""
        named = [each for each in self._spaces.values() if each.name == space]
        if len(named) == 1:
            return named[0]
        if len(named) > 1:
            raise SpaceNotFound(f"{len(named)} spaces are called {space!r}: use the id")
        try:
            key = parse_space(space)
        except ValueError:
            raise SpaceNotFound(
                f"no space {space!r} on this peer: `lattica space list` shows those that are, `lattica space join ID` "
                "fetches another"
            ) from None
        found = self._spaces.get(key)
        if found is None:
            raise SpaceNotFound(f"{space} is not on this peer: `lattica space join {space}` fetches it")
        return found

    def list(self) -> list[SpaceInfo]:
        """The spaces we hold."""
        return [
            SpaceInfo(
                space.id,
                space.name,
                space.operations(),
                space.writers,
                space.owners,
                space.excluded,
                space.machine.neighbours(),
                space.replica.why_not_writable() is None,
            )
            for space in self._spaces.values()
        ]

    async def leave(self, space: str) -> None:
        """Forget a space: our replica and its file."""
        key = self.get(space).replica.space
        del self._spaces[key], self._by_tag[key[:TAG_BYTES]]
        self.store.remove(key)
        if self._kad is not None:
            await self._kad.stop_providing(provider_key(key))

    async def wait_synced(self, space: Space, timeout: float = JOIN_TIMEOUT) -> bool:
        """Wait until a neighbour said that it has exactly what we have; False when none did in time."""
        with trio.move_on_after(timeout):
            while not space.machine.in_step:
                for peer in space.machine.neighbours():
                    space.machine.compare(peer)
                self.wake()
                await trio.sleep(0.05)
        return space.machine.in_step

    # -- making spaces --------------------------------------------------------------------------------------
    def _add(self, genesis: Genesis) -> Space:
        instance = int.from_bytes(os.urandom(4), "big")
        self.store.add(genesis, instance)
        space = self._open(genesis, instance)
        self.wake()
        return space

    def _new_replica(self, genesis: Genesis, instance: int) -> tuple[Replica, ReplicaSync[PeerId]]:
        replica = Replica(genesis, key=self._host.key, instance=instance, rng=self._host.rng)
        machine: ReplicaSync[PeerId] = ReplicaSync(replica, self._host.rng, trio.current_time())
        machine.is_long = lambda: time.thread_time() > self._turn_ends
        return replica, machine

    def _take_back(self, space: Space) -> None:
        """An edit could not be stored: the space becomes what it is on disk."""
        before, stored = space.machine, self.store.load_space(space.replica.genesis)
        replica, machine = self._new_replica(stored.genesis, stored.instance)
        _fill(replica, machine, stored)
        machine.presence_info = before.presence_info
        space.restored(replica, machine)
        for peer in before.neighbours():
            self._add_neighbour(space, peer, REPLICA_MAX_NEIGHBOURS)
        self.wake()

    def _open(self, genesis: Genesis, instance: int) -> Space:
        replica, machine = self._new_replica(genesis, instance)
        space = Space(replica, machine, self.store, self.wake, self._clock, self._take_back)
        self._spaces[genesis.id] = self._by_tag[genesis.id[:TAG_BYTES]] = space
        for peer in self._host.peers():
            if PROTOCOL in self._host.peerstore.protocols(peer):
                self._add_neighbour(space, peer)
        return space

    def _restore(self, stored: StoredSpace) -> None:
        space = self._open(stored.genesis, stored.instance)
        try:
            _fill(space.replica, space.machine, stored)
        except (RemoteProtocolError, ValueError) as error:
            self._restore_sound(stored, space.replica, error)

    def _restore_sound(self, stored: StoredSpace, damaged: Replica, error: Exception) -> None:
        """Keep what is sound of a space whose rows were damaged; the rest comes from the neighbours. We go on in a
        chain that nobody has seen: operations of ours may be missing here that others have."""
        instance = int.from_bytes(os.urandom(4), "big")
        self.store.remove(stored.genesis.id)
        self.store.add(stored.genesis, instance)
        space = self._open(stored.genesis, instance)
        if damaged.checkpoint is not None:
            space.replica.adopt(damaged.checkpoint)
        for entry in damaged.graph.counted():
            entry.op.verified = False
            try:
                space.replica.receive_operation(entry.op, self._clock())
            except RemoteProtocolError:
                continue
        space.save()
        missing = len(stored.operations) - len(space.replica.tree)
        self.store.note_partly_lost(stored.genesis, missing, error)

    def _add_neighbour(self, space: Space, peer: PeerId, limit: int = REPLICA_FANOUT) -> None:
        neighbours = space.machine.neighbours()
        if peer not in neighbours and len(neighbours) < limit and peer != self._host.peer_id:
            space.machine.add_neighbour(peer, trio.current_time())
            self.wake()

    # -- finding --------------------------------------------------------------------------------------------
    async def _find_genesis(self, key: bytes, peers: Sequence[PeerId], timeout: float) -> Genesis:
        send, receive = trio.open_memory_channel[Genesis](1)
        self._joins[key] = send
        request = encode_message(Kind.GET_GENESIS, key, key)

        async def ask_providers() -> None:
            while True:
                for peer in [*peers, *self._host.peers()]:
                    self._send(peer, request)
                await self._for_providers(key, lambda peer: self._send(peer, request))
                await trio.sleep(1.0)

        try:
            with trio.fail_after(timeout):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(ask_providers)
                    genesis = await receive.receive()
                    nursery.cancel_scope.cancel()
                    return genesis
        except trio.TooSlowError:
            pass
        finally:
            self._joins.pop(key, None)
        raise SpaceNotFound(
            f"nobody serves {space_text(key)}: within {timeout:g} s no provider was found in the network and no "
            "connected peer has it"
        )

    async def _for_providers(self, key: bytes, call: Callable[[PeerId], None]) -> None:
        if self._kad is None:
            return
        try:
            async for peer, addrs in self._kad.find_providers(provider_key(key)):
                if peer != self._host.peer_id:
                    self._host.peerstore.add_addrs(peer, addrs, 600.0)
                    call(peer)
        except LatticaError as error:
            log.debug("space_search_failed error=%s", error)

    async def _search(self, space: Space) -> None:
        key = space.replica.space
        try:
            if self._kad is not None and key not in self._provided:
                self._provided.add(key)
                await self._kad.provide(provider_key(key))
            if len(space.machine.neighbours()) < REPLICA_FANOUT:
                await self._for_providers(key, lambda peer: self._add_neighbour(space, peer))
            else:
                await self._meet_a_stranger(key, space)
        except LatticaError as error:
            self._provided.discard(key)
            log.debug("space_announce_failed space=%s error=%s", space.id, error)
        finally:
            self._searching.discard(key)

    async def _meet_a_stranger(self, key: bytes, space: Space) -> None:
        """Compare with a random member beyond the neighbours: circles of members that have enough of each other, as a
        parted network leaves them, find together again."""
        strangers = {peer for peer in self._host.peers() if PROTOCOL in self._host.peerstore.protocols(peer)}
        await self._for_providers(key, strangers.add)
        strangers -= {self._host.peer_id, *space.machine.neighbours()}
        if strangers:
            space.machine.compare(self._host.rng.choice(sorted(strangers)))
            self.wake()

    # -- the loop -------------------------------------------------------------------------------------------
    def wake(self) -> None:
        """Something may be to be sent."""
        self._wake.set()

    async def run(self) -> None:
        """Drive the machines until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow_host)
            nursery.start_soon(self._signatures.run)
            while True:
                now, unix_now = trio.current_time(), self._clock()
                deadline = now + SEARCH_PAUSES[1]
                for key, space in list(self._spaces.items()):
                    before = space.replica.generation, len(space.replica.tree)
                    if space.machine.next_timeout() <= now:
                        self._turn_ends = time.thread_time() + TURN
                        space.machine.handle_timer(now, unix_now)
                    self._flush(space)
                    if before != (space.replica.generation, len(space.replica.tree)):
                        space.after_change()
                    self._maybe_search(nursery, key, space, now)
                    deadline = min(deadline, space.machine.next_timeout(), self._search_at[key][0])
                with trio.move_on_at(deadline):
                    await self._wake.wait()
                self._wake = trio.Event()

    def _maybe_search(self, nursery: trio.Nursery, key: bytes, space: Space, now: float) -> None:
        at, pause = self._search_at.get(key, (now, SEARCH_PAUSES[0]))
        if now >= at:
            if key not in self._searching:
                self._searching.add(key)
                nursery.start_soon(self._search, space)
            at, pause = now + pause, min(2 * pause, SEARCH_PAUSES[1])
        self._search_at[key] = (at, pause)

    def _flush(self, space: Space) -> None:
        """Store, then send: nobody may know an operation of ours that we could forget."""
        try:
            space.save()
        except StorageError as error:
            log.error("space_not_stored space=%s error=%s", space.id, error)
            return
        for peer, data in space.machine.poll_transmit():
            self._send(peer, data)
        if space.since_snapshot >= SNAPSHOT_EVERY:
            self._snapshot(space)

    def _snapshot(self, space: Space) -> None:
        space.since_snapshot = 0
        stored = self.store.count(space.replica.space)
        if stored == len(space.replica.tree):  # else some stored operations do not count: they are applied one by one
            self.store.save_snapshot(space.replica.space, stored, space.replica.doc.get_update())

    def _send(self, peer: PeerId, data: bytes) -> None:
        if peer == self._host.peer_id:
            return
        link = self._links.get(peer)
        if link is None:
            link = self._links[peer] = Link(self._host, peer, self._link_lost, self._queued)
            self._host.nursery.start_soon(link.run)
        link.send(data)

    def _link_lost(self, peer: PeerId, path_lost: bool) -> None:
        self._links.pop(peer, None)
        spaces = [space for space in self._spaces.values() if peer in space.machine.neighbours()]
        self._forget(peer)
        if path_lost and spaces:
            self._host.nursery.start_soon(self._reconnect, peer, spaces)

    async def _reconnect(self, peer: PeerId, spaces: Sequence[Space]) -> None:
        """The connection with a neighbour was lost: go on over another one, without a search."""
        try:
            await self._host.connect(peer)
        except LatticaError as error:
            log.debug("replica_not_reconnected peer=%s error=%s", peer.short(), error)
            return
        for space in spaces:
            if space in self._spaces.values():
                self._add_neighbour(space, peer)

    def _forget(self, peer: PeerId) -> None:
        for key, space in self._spaces.items():
            if peer in space.machine.neighbours():
                space.machine.remove_neighbour(peer)
                self._search_at[key] = (trio.current_time() + SEARCH_PAUSES[0], SEARCH_PAUSES[0])
        self.wake()

    async def _follow_host(self) -> None:
        async for event in self._host.subscribe():
            if isinstance(event, PeerIdentified) and PROTOCOL in event.info.protocols:
                for space in self._spaces.values():
                    self._add_neighbour(space, event.peer)
            elif isinstance(event, PeerDisconnected):
                self._forget(event.peer)

    # -- inbound --------------------------------------------------------------------------------------------
    async def _handle(self, stream: Stream) -> None:
        """Serve a peer's stream until it ends or the peer opens another one: what a message that is on its way holds of
        our memory counts once for each peer."""
        peer = stream.connection.peer_id
        if peer in self._inbound:
            self._inbound[peer].cancel()
        with trio.CancelScope() as scope:
            self._inbound[peer] = scope
            try:
                await self._take_messages(peer, stream)
            finally:
                if self._inbound.get(peer) is scope:
                    del self._inbound[peer]
        if scope.cancelled_caught:
            stream.reset()

    async def _take_messages(self, peer: PeerId, stream: Stream) -> None:
        """Take the messages of one peer in order; signatures of the next ones are checked meanwhile."""
        send, receive = trio.open_memory_channel[tuple[Message, Awaitable[None] | None, Row | None]](CHECKS_AHEAD)
        async with trio.open_nursery() as nursery:

            async def take() -> None:
                async for message, checked, row in receive:
                    if checked is not None:
                        await checked
                    if message.kind == Kind.OPERATIONS:
                        row = await self._take_most(peer, message, row)
                    self._on_message(peer, message, row)
                    await trio.lowlevel.checkpoint()

            nursery.start_soon(take)
            async with send, aclosing(receive_messages(stream)) as messages:
                async for data in messages:
                    message = decode_message_untrusted(data)
                    checked, row = None, None
                    space = self._by_tag.get(message.tag)
                    if message.kind == Kind.OPERATIONS and space is not None and len(message.fields[1]) > READ_ALONE:
                        row = _new_operations(message, space.replica)
                        checked = self._start_checking(nursery, row.operations, space.replica.space)
                    await send.send((message, checked, row))

    async def _take_most(self, peer: PeerId, message: Message, row: Row | None) -> Row | None:
        """Take operations of a message as long as that takes more than a turn; what is left of its row. One may take
        170 ms, so a message full of them three minutes."""
        space = self._by_tag.get(message.tag)
        if space is None:
            return row
        if row is None:
            row = read_row_untrusted(message.fields[1], space.replica.space, space.replica.graph.operation_at)
        left, batch = row.operations, message.fields[0]
        while len(left) > 1:
            self._turn_ends = time.thread_time() + TURN
            machine = space.machine
            taking = partial(machine.take_some, peer, batch, left, trio.current_time(), self._clock())
            left = list(self._changing(space, taking))
            if left:
                await trio.lowlevel.checkpoint()
        return Row(left, row.complete)

    def _changing(self, space: Space, change: Callable[[], T]) -> T:
        """Let the machine do something; store what is new, send, and tell who watches."""
        before = space.replica.generation, len(space.replica.tree)
        try:
            return change()
        finally:
            self._flush(space)
            if before != (space.replica.generation, len(space.replica.tree)):
                space.after_change()
            if space.machine.next_timeout() <= trio.current_time():
                self.wake()

    def _start_checking(
        self, nursery: trio.Nursery, operations: Sequence[Operation], space: bytes
    ) -> Awaitable[None]:
        """Check the signatures of `operations` beside this thread; awaiting the result waits for it."""
        done = trio.Event()

        async def work() -> None:
            await self._signatures.check(operations, space)
            done.set()

        nursery.start_soon(work)
        return done.wait()

    def _on_message(self, peer: PeerId, message: Message, row: Row | None) -> None:
        space = self._by_tag.get(message.tag)
        if message.kind == Kind.GENESIS:
            self._on_genesis(message)
            return
        if space is None:
            if message.kind in (Kind.HELLO, Kind.FRONTIER, Kind.GET_GENESIS):
                self._send(peer, encode_message(Kind.UNKNOWN, message.tag))
            return
        if message.kind == Kind.UNKNOWN:
            space.machine.remove_neighbour(peer)
            return
        if message.kind in (Kind.HELLO, Kind.FRONTIER):
            self._add_neighbour(space, peer, REPLICA_MAX_NEIGHBOURS)
        self._turn_ends = time.thread_time() + TURN
        now, unix_now = trio.current_time(), self._clock()
        self._changing(space, partial(space.machine.receive, peer, message, now, unix_now, row))

    def _on_genesis(self, message: Message) -> None:
        genesis = Genesis.decode_untrusted(message.fields[0])
        waiting = self._joins.get(genesis.id)
        if waiting is None:
            return
        try:
            waiting.send_nowait(genesis)
        except trio.WouldBlock:
            pass


def _fill(replica: Replica, machine: ReplicaSync[PeerId], stored: StoredSpace) -> None:
    """Put what is stored into a new replica. Raises `RemoteProtocolError` or `ValueError` when it is damaged."""
    if stored.checkpoint is not None:
        replica.receive_checkpoint(stored.checkpoint)
        replica.take_unsaved()
    replica.load(stored.operations, stored.forks, stored.snapshot)
    replica.lost = [Operation.decode_untrusted(data, stored.genesis.id) for data in stored.lost]
    machine.proposals.signed = stored.signed


def _new_operations(message: Message, replica: Replica) -> Row:
    known = replica.graph.entries
    row = read_row_untrusted(message.fields[1], replica.space)
    return Row([op for op in row.operations if op.id not in known], row.complete)


def _parse(space: str) -> bytes:
    try:
        return parse_space(space)
    except ValueError as error:
        raise InvalidArgument(str(error)) from None
