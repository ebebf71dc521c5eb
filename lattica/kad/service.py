"""The DHT of one node: what the rest of the node asks it for, and the life of its table and stores.

    provide / stop_providing     say that we have a content; said again every 22 h, until stopped, across restarts
    find_providers               who has it
    put_value / get_value        small values signed by their publisher, under `/lattica/<publisher>/<name>`
    put_record / get_record      the same for raw keys of any namespace that the validators know
    find_peer                    where a peer is
    bootstrap                    fill the table: look up ourselves and a key in each bucket

Peers enter the table when identify says that they serve our protocol. In `server` mode we serve it, in `client` mode we
only ask; `auto` serves when others reach us. Before anybody has tried, it serves unless we are behind a NAT as far as
we can see: talking to the internet without having an address of it ourselves.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import trio

from lattica.datastore import PublishedValue
from lattica.errors import InvalidRecord, LatticaError, NotFound
from lattica.host import PeerConnected, PeerDisconnected, PeerIdentified, SelfChanged
from lattica.kad.inbound import Inbound
from lattica.kad.requests import Requests
from lattica.kad.search import ProviderSearch, drive
from lattica.kad.upkeep import Upkeep
from lattica_protocols.errors import LocalProtocolError, ProtocolError
from lattica_protocols.kad.lookup import Lookup, ProvidersLookup, ValueLookup
from lattica_protocols.kad.messages import KadMessage, MessageType, PeerAddrs, Record, peer_entry
from lattica_protocols.kad.records import SignedValue, Validators, open_value_untrusted, record_key, seal_value
from lattica_protocols.kad.routing import RoutingTable
from lattica_protocols.kad.server import KadServer
from lattica_protocols.kad.shares import origin_of
from lattica_protocols.kad.store import VALUE_LIFETIME
from lattica_protocols.limits import KAD_MAX_ADDRS_PER_PEER, KAD_MAX_PROVIDER_KEY_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lattica.datastore import Datastore
    from lattica.host import Host, HostEvent
    from lattica_protocols.multiaddr import Multiaddr
    from lattica_protocols.peer_id import PeerId

log = logging.getLogger("lattica.kad")

PROTOCOL = "/lattica/kad/1.0.0"
Mode = Literal["auto", "server", "client"]

PARALLEL_ANNOUNCEMENTS = 8
"""Lookups for `provide` at once: sharing a directory of 10,000 files must not start 10,000 lookups."""

PARALLEL_RESOLVES = 4
MAX_RESOLVES = 16
"""Providers whose addresses are looked up in one search, because their record has none any more."""

FIND_PEER_ANSWERS = 2
"""Peers whose word is taken for where a peer is: the second in case the first has old addresses."""


class StoredValue(NamedTuple):
    """What `put_value` did."""

    key: bytes
    sequence: int
    expires: int
    """Unix seconds."""
    stored_on: int
    """Peers that have it now, without ourselves."""


class KadService:
    """Kademlia on `host`. Its background work is `run`; stored state is there once that has read the datastore."""

    def __init__(
        self,
        host: Host,
        datastore: Datastore,
        *,
        protocol: str = PROTOCOL,
        mode: Mode = "auto",
        accept_any: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`accept_any`: store values of any key unchecked, as the network of the Rust lattica does.

        `clock` gives Unix seconds; records live by it. Everything else goes by trio's clock.
        """
        self.protocol = protocol
        self.mode: Mode = mode
        self.table = RoutingTable(host.peer_id, trio.current_time())
        self.validators = Validators(accept_any=accept_any)
        self.server = KadServer(host.peer_id, self.table, self._addresses, validators=self.validators)
        self.datastore = datastore
        self.clock = clock
        self.is_server = False
        self.loaded = trio.Event()
        """Set when the stored state has been read."""
        self._host = host
        self._requests = Requests(host, protocol, self.table)
        self._upkeep = Upkeep(self, host)
        self._inbound = Inbound(self.server, clock, self._upkeep.note_changes)
        self._announcements = trio.CapacityLimiter(PARALLEL_ANNOUNCEMENTS)
        self._bootstrapping = trio.Lock()
        self._counters = {"lookups": 0, "lookup_requests": 0}
        self._update_mode()

    # -- content ------------------------------------------------------------------------------------------
    async def provide(self, key: bytes) -> int:
        """Say that we have the content with the multihash `key`, from now on; how many peers took the record.

        0 when nobody could be reached now: it is tried again. `ValueError` for a key over 80 bytes.
        """
        if not 0 < len(key) <= KAD_MAX_PROVIDER_KEY_BYTES:
            raise ValueError(f"a provider key has 1 to {KAD_MAX_PROVIDER_KEY_BYTES} bytes, not {len(key)}")
        await self.loaded.wait()
        self._upkeep.provided.setdefault(key, 0.0)
        self.server.provided.add(key)
        self.datastore.save_provided(key, self._upkeep.provided[key])
        return await self.announce(key)

    async def stop_providing(self, key: bytes) -> None:
        """Say it no more. Records that others hold run out within 48 h."""
        await self.loaded.wait()
        self._upkeep.provided.pop(key, None)
        self.server.provided.discard(key)
        self.datastore.drop_provided(key)

    def provided(self) -> list[bytes]:
        """Keys we say we provide."""
        return list(self._upkeep.provided)

    async def announce(self, key: bytes) -> int:
        """Store our provider record at the peers closest to `key` now; how many took it."""
        async with self._announcements:
            own = peer_entry(PeerAddrs(self._host.peer_id, tuple(self._addresses(self._host.peer_id))))
            message = KadMessage(type=MessageType.ADD_PROVIDER, key=key, provider_peers=(own,))
            closest, book = await self._closest(key)
            taken = await self._tell_all(closest, book, lambda peer, addrs: self._requests.tell(peer, message, addrs))
        if taken and key in self._upkeep.provided:
            self._upkeep.provided[key] = self.clock()
            self.datastore.save_provided(key, self.clock())
        return taken

    def find_providers(self, key: bytes, count: int = 20) -> ProviderSearch:
        """Search for up to `count` peers that provide the content with the multihash `key`, ourselves left out.

        Returns at once: read the result with `async for`. It starts with what we know ourselves.
        """
        search = ProviderSearch(count)
        self._host.nursery.start_soon(self._search_providers, search, key, count)
        return search

    # -- values -------------------------------------------------------------------------------------------
    async def put_value(
        self, name: str, value: bytes, *, sequence: int | None = None, lifetime: float | None = None
    ) -> StoredValue:
        """Sign `value` and store it under `/lattica/<our peer id>/<name>`.

        It is stored again every 22 h while we run. With `lifetime` (seconds, at most 30 days) it ends then; without, it
        is signed anew before its 48 h are over. `sequence` has to grow from put to put; by default it is the time in
        milliseconds, or one more than the last. Errors: `InvalidRecord`: the name or the value is not allowed, or a
        higher sequence is known. Nobody reached is no error: `stored_on` is 0, and it is tried again.
        """
        await self.loaded.wait()
        last = self._upkeep.published.get(name)
        if sequence is None:
            sequence = max(int(self.clock() * 1000), 0 if last is None else last.sequence + 1)
        elif last is not None and sequence <= last.sequence:
            raise InvalidRecord(f"sequence {sequence} of {name!r} is not above the last one, {last.sequence}")
        expires = int(self.clock() + (VALUE_LIFETIME if lifetime is None else lifetime))
        published = PublishedValue(name, value, sequence, expires, lifetime is None, 0.0)
        key, record = self._seal(published)
        stored = await self._store_published(published, key, record)
        return StoredValue(key, sequence, expires, stored)

    async def get_value(self, name: str, publisher: PeerId | None = None) -> SignedValue:
        """The newest value `name` of `publisher` (default: ours) that can be found.

        Errors: `NotFound` (says how many peers were asked), `InvalidRecord` for a name that is not allowed.
        """
        try:
            key = record_key(publisher or self._host.peer_id, name)
        except LocalProtocolError as error:
            raise InvalidRecord(str(error)) from None
        return open_value_untrusted(key, await self.get_record(key))

    async def unpublish(self, name: str) -> None:
        """Store our value `name` no more. What others hold runs out."""
        await self.loaded.wait()
        self._upkeep.published.pop(name, None)
        self.datastore.drop_published(name)

    async def put_record(self, key: bytes, value: bytes) -> int:
        """Store a ready value under a raw key; how many peers have it now. Not repeated.

        `InvalidRecord`: our own rules refuse it, or all peers reached have a better one.
        """
        await self.loaded.wait()
        try:
            kept = self.server.values.put_untrusted(key, value, self._host.peer_id, self.clock())
        except ProtocolError as error:
            raise InvalidRecord(str(error)) from None
        if kept != value:
            raise InvalidRecord("a newer value is stored under this key")
        self._upkeep.note_changes()
        closest, book = await self._closest(key)
        return await self._put_to(key, value, closest, book)

    async def get_record(self, key: bytes) -> bytes:
        """The best valid value under a raw key. Peers that have an older one or none are given it, in the background.

        `NotFound`: nobody has one; the message says how many peers were asked.
        """
        await self.loaded.wait()
        known = self.server.values.get(key, self.clock())
        book: dict[PeerId, PeerAddrs] = {}
        lookup = ValueLookup(key, self.table.closest(key), self.validators, own=self._host.peer_id, known=known)
        message = KadMessage(type=MessageType.GET_VALUE, key=key)

        async def ask(peer: PeerId) -> Iterable[PeerAddrs]:
            answer = await self._requests.ask(peer, message, self._known(book, peer))
            lookup.on_value(peer, answer.value, self.clock())
            return answer.closer

        await self._run(lookup, ask, book)
        if lookup.best is None:
            hint = ", and their answers were not valid" if lookup.invalid else ""
            raise NotFound(f"no value under this key: asked {lookup.answered()} peers{hint}")
        stale = lookup.stale()
        if stale:
            self._host.nursery.start_soon(self._put_to, key, lookup.best, stale, book)
        return lookup.best

    # -- peers --------------------------------------------------------------------------------------------
    async def find_peer(self, peer: PeerId) -> list[Multiaddr]:
        """Addresses of `peer`, from others if we are not connected with it; empty when nobody knows it."""
        if self._host.connections(peer):
            return list(self._host.peerstore.addrs(peer))
        addrs: dict[Multiaddr, None] = {}
        answers = 0
        key = peer.to_bytes()
        book: dict[PeerId, PeerAddrs] = {}
        lookup = Lookup(key, self.table.closest(key), own=self._host.peer_id)
        message = KadMessage(type=MessageType.FIND_NODE, key=key)

        async def ask(asked: PeerId) -> Iterable[PeerAddrs]:
            nonlocal answers
            answer = await self._requests.ask(asked, message, self._known(book, asked))
            named = [found.addrs for found in answer.closer if found.peer == peer and found.addrs]
            if asked == peer:
                named = [tuple(self._host.peerstore.addrs(peer))]
            for found in named:
                addrs.update(dict.fromkeys(found))
                answers += 1
            if answers >= FIND_PEER_ANSWERS or asked == peer:
                lookup.stop()
            return answer.closer

        await self._run(lookup, ask, book)
        return list(addrs)[: 2 * KAD_MAX_ADDRS_PER_PEER]

    async def closest_peers(self, key: bytes) -> list[PeerAddrs]:
        """The k peers closest to `key` that answered, closest first."""
        closest, book = await self._closest(key)
        return [PeerAddrs(peer, tuple(self._known(book, peer))) for peer in closest]

    async def bootstrap(self) -> int:
        """Fill the table from the peers that are in it: look up ourselves and one key per bucket; peers known then."""
        async with self._bootstrapping:
            await self._closest(self._host.peer_id.to_bytes())
            await self._upkeep.refresh_buckets(older_than=60.0)
        return len(self.table)

    def info(self) -> dict[str, Any]:
        """Figures for people: peers, buckets, mode, stored records."""
        return {
            "protocol": self.protocol,
            "mode": "server" if self.is_server else "client",
            "peers": len(self.table),
            "buckets": [{"prefix_bits": bits, "peers": count} for bits, count in self.table.bucket_sizes()],
            "provider_records": len(self.server.providers),
            "values": len(self.server.values),
            "value_bytes": self.server.values.stored_bytes,
            "provided": len(self._upkeep.provided),
            "published": len(self._upkeep.published),
            "requests_served": self._inbound.requests,
            "requests_refused": self._inbound.refused,
            **self._counters,
        }

    # -- background ---------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Read the stored state, then follow the host's events and keep everything fresh, until cancelled."""
        events = self._host.subscribe()
        async with trio.open_nursery() as nursery:
            await self._upkeep.load()
            self.loaded.set()
            nursery.start_soon(self._upkeep.run)
            for peer in self._host.peers():
                self._consider(peer)
            async for event in events:
                self._on_event(event)

    def _on_event(self, event: HostEvent) -> None:
        if isinstance(event, PeerIdentified):
            self._consider(event.peer)
        if isinstance(event, PeerConnected | PeerDisconnected | SelfChanged):
            self._update_mode()

    def _consider(self, peer: PeerId) -> None:
        """Take `peer` into the table, or out of it, by what it says it serves."""
        protocols = self._host.peerstore.protocols(peer)
        if not protocols:
            return
        if self.protocol not in protocols:
            self.table.remove(peer)
            return
        was_alone = len(self.table) == 0
        addrs = [connection.remote_addr for connection in self._host.connections(peer)]
        self.table.add(peer, addrs, trio.current_time())
        while (wanted := self.table.next_event()) is not None:
            self._host.nursery.start_soon(self._ping, wanted.peer)
        if was_alone and len(self.table):
            self._upkeep.first_peer.set()

    async def _ping(self, peer: PeerId) -> None:
        """Is it alive? A lookup request, as rust-libp2p does not answer Kademlia's own PING."""
        message = KadMessage(type=MessageType.FIND_NODE, key=self._host.peer_id.to_bytes())
        try:
            await self._requests.ask(peer, message)
        except (LatticaError, ProtocolError) as error:
            log.debug("contact_dropped peer=%s error=%s", peer.short(), error)

    def _update_mode(self) -> None:
        """Serve or not, see the module."""
        if self.mode == "auto" and self._host.reachability != "unknown":
            wanted = self._host.reachability == "public"
        elif self.mode == "auto":
            advertised = any(addr.is_global and not addr.is_circuit for addr in self._host.advertised_addrs())
            internet = any(connection.remote_addr.is_global for connection in self._host.connections())
            wanted = advertised or not internet
        else:
            wanted = self.mode == "server"
        if wanted and not self.is_server:
            self._host.handle(self.protocol, self._inbound.serve)
        elif not wanted and self.is_server:
            self._host.unhandle(self.protocol)
        if wanted != self.is_server:
            self.is_server = wanted
            log.info("kad_mode mode=%s protocol=%s", "server" if wanted else "client", self.protocol)

    # -- parts of the above -------------------------------------------------------------------------------
    def _addresses(self, peer: PeerId) -> Sequence[Multiaddr]:
        """The server's address book."""
        if peer == self._host.peer_id:
            return self._host.advertised_addrs()
        return self._host.peerstore.addrs(peer)

    def _known(self, book: dict[PeerId, PeerAddrs], peer: PeerId) -> Sequence[Multiaddr]:
        named = book.get(peer)
        return () if named is None else named.addrs

    async def _run(self, lookup: Lookup, ask: Callable[[PeerId], Any], book: dict[PeerId, PeerAddrs]) -> None:
        try:
            await drive(lookup, ask, book=book)
        finally:
            self._counters["lookups"] += 1
            self._counters["lookup_requests"] += lookup.requests
        self.table.looked_up(lookup.key, trio.current_time())

    def _source(self, peer: PeerId) -> str:
        """Who stands behind what a peer answers: its network, in a private one the peer itself."""
        connection = self._host.connection(peer, "control")
        remote = None if connection is None else connection.remote_addr
        return origin_of(remote) if remote is not None and remote.is_global else str(peer)

    async def _closest(self, key: bytes) -> tuple[list[PeerId], dict[PeerId, PeerAddrs]]:
        book: dict[PeerId, PeerAddrs] = {}
        lookup = Lookup(key, self.table.closest(key), own=self._host.peer_id)
        message = KadMessage(type=MessageType.FIND_NODE, key=key)

        async def ask(peer: PeerId) -> Iterable[PeerAddrs]:
            return (await self._requests.ask(peer, message, self._known(book, peer))).closer

        await self._run(lookup, ask, book)
        return lookup.result(), book

    async def _tell_all(self, peers: Iterable[PeerId], book: dict[PeerId, PeerAddrs], send: Callable[..., Any]) -> int:
        """Run `send(peer, addrs)` for all at once; for how many it raised nothing and gave no false."""
        done = 0

        async def one(peer: PeerId) -> None:
            nonlocal done
            try:
                taken = await send(peer, self._known(book, peer))
                done += taken is not False
            except (LatticaError, ProtocolError) as error:
                log.debug("store_failed peer=%s error=%s", peer.short(), error)

        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(one, peer)
        return done

    async def _put_to(self, key: bytes, value: bytes, peers: Iterable[PeerId], book: dict[PeerId, PeerAddrs]) -> int:
        # Lattica wheels before 1.0.21 end their whole node on a record without a publisher, which others leave out.
        record = Record(key=key, value=value, publisher=self._host.peer_id.to_bytes())
        message = KadMessage(type=MessageType.PUT_VALUE, key=key, record=record)

        async def send(peer: PeerId, addrs: Sequence[Multiaddr]) -> bool:
            return (await self._requests.ask(peer, message, addrs)).value == value

        return await self._tell_all(peers, book, send)

    def _seal(self, published: PublishedValue) -> tuple[bytes, bytes]:
        try:
            return seal_value(
                self._host.key,
                published.name,
                published.value,
                sequence=published.sequence,
                expires=published.expires,
            )
        except LocalProtocolError as error:
            raise InvalidRecord(str(error)) from None

    async def _store_published(self, published: PublishedValue, key: bytes, record: bytes) -> int:
        """Store a value of ours in the network and remember that it is there."""
        stored = await self.put_record(key, record)
        published = replace(published, put=self.clock() if stored else 0.0)
        self._upkeep.published[published.name] = published
        self.datastore.save_published(published)
        return stored

    async def store_again(self, published: PublishedValue) -> int:
        """Store a value of ours that was stored before, signed anew when it is to go on."""
        if published.renew:
            published = replace(published, expires=int(self.clock() + VALUE_LIFETIME))
        key, record = self._seal(published)
        return await self._store_published(published, key, record)

    async def lookup(self, key: bytes) -> None:
        """A lookup for the sake of the table."""
        await self._closest(key)

    async def _search_providers(self, search: ProviderSearch, key: bytes, count: int) -> None:
        book: dict[PeerId, PeerAddrs] = {}
        own = self._host.peer_id
        lookup = ProvidersLookup(key, self.table.closest(key), wanted=count, own=own)
        message = KadMessage(type=MessageType.GET_PROVIDERS, key=key)
        limiter = trio.CapacityLimiter(PARALLEL_RESOLVES)
        unresolved: dict[PeerId, None] = {}

        async def resolve(peer: PeerId) -> None:
            async with limiter:
                addrs = await self.find_peer(peer)
            search.found(PeerAddrs(peer, tuple(addrs)))

        try:
            with search.scope:
                async with trio.open_nursery() as nursery:

                    def offer(providers: Iterable[PeerAddrs], source: str) -> None:
                        hand_on(lookup.on_providers((p for p in providers if p.peer != own), source))

                    def hand_on(providers: Iterable[PeerAddrs]) -> None:
                        for provider in providers:
                            addrs = provider.addrs or tuple(self._host.peerstore.addrs(provider.peer))
                            if addrs or self._host.connections(provider.peer):
                                search.found(PeerAddrs(provider.peer, addrs))
                            elif provider.peer not in unresolved and len(unresolved) < MAX_RESOLVES:
                                unresolved[provider.peer] = None
                                nursery.start_soon(resolve, provider.peer)

                    async def ask(peer: PeerId) -> Iterable[PeerAddrs]:
                        answer = await self._requests.ask(peer, message, self._known(book, peer))
                        offer(answer.providers, self._source(peer))
                        search.asked, search.answered = lookup.requests, lookup.answered() + 1
                        return answer.closer

                    offer(self.server.providers.get(key, self.clock()), "")
                    await self._run(lookup, ask, book)
                    hand_on(lookup.spare())
        finally:
            search.asked, search.answered = lookup.requests, lookup.answered()
            search.finish()
