"""Being reachable through relays: finds them, keeps reservations, and says at which addresses we are there.

A relay that dies without a word takes its reservation with it, and nobody who looks for us there can tell us. So those
at which we have a place are asked for a sign of life every 8 s; one that gives none is replaced before its connections
are given up, and stays when it turns out to have been slow.

Possible relays are connected peers whose identify lists the hop protocol, those named in the settings, and, when too
few of these give us a place, providers of `RELAY_KEY` in the DHT. `ReservationKeeper` decides whom to ask and when.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import AsyncIterable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import trio

from lattica.errors import ConnectError, DialError
from lattica.host import PeerDisconnected, PeerIdentified
from lattica.peerstore import FOUND_TTL, PERMANENT
from lattica.relay.requests import CIRCUIT, Granted, reserve
from lattica_protocols.limits import RELAY_MAX_ADVERTISED_ADDRS, RELAY_MAX_CANDIDATES
from lattica_protocols.relay.keeper import WANTED_RESERVATIONS, Release, ReservationKeeper, Reserve, Search
from lattica_protocols.relay.messages import HOP_PROTOCOL

if TYPE_CHECKING:
    from lattica.host import Host
    from lattica.interfaces import Connection
    from lattica.transports.circuit import CircuitTransport
    from lattica_protocols.multiaddr import Multiaddr
    from lattica_protocols.peer_id import PeerId

log = logging.getLogger("lattica.relay")

RELAY_KEY: Final = b"\x12\x20" + hashlib.sha256(b"/lattica/relay/1").digest()
"""Multihash under which relays provide themselves in the DHT."""
FOUND_PER_SEARCH: Final = 8
SEARCH_SECONDS: Final = 20.0
LOOK_SECONDS: Final = 8.0
"""Between two signs of life of a relay: 12 s at most until it is replaced, for 13 bytes a second over QUIC."""
ANSWER_SECONDS: Final = 2.0
"""For a sign of life; then all connections with the relay are asked, and have as long again."""
_UNKNOWN_RTT: Final = 1.0
_PREFERRED: Final = -1000.0
"""Rank of relays named in the settings: before all others."""

FindRelays = Callable[[int], AsyncIterable["tuple[PeerId, Iterable[Multiaddr]]"]]
"""Up to so many relays from the DHT, with addresses."""


class RelayClient:
    """Keeps reservations for `host`, whose circuits `transport` takes. `run` does the work."""

    def __init__(
        self,
        host: Host,
        transport: CircuitTransport,
        *,
        preferred: Sequence[Multiaddr] = (),
        find: FindRelays | None = None,
    ) -> None:
        """`preferred`: relays to ask first, each address with `/p2p/RELAY`."""
        self._host = host
        self._transport = transport
        self._find = find
        self._keeper = ReservationKeeper(random.Random(host.rng.getrandbits(64)))
        self._changed = trio.Event()
        self._addrs: dict[PeerId, list[Multiaddr]] = {}
        self._silent: set[PeerId] = set()
        """Relays at which we have a place, and that do not answer."""
        self.last_error: dict[PeerId, str] = {}
        """Why relays did not give us a place, for `doctor`."""
        for addr in preferred:
            relay = addr.peer_id()
            if relay is not None:
                host.peerstore.add_addrs(relay, [addr], PERMANENT)
                self._keeper.offer(relay, _PREFERRED, trio.current_time())
                host.protect(relay)
        self._preferred = {addr.peer_id() for addr in preferred}

    # -- what others see ----------------------------------------------------------------------------------
    @property
    def wanted(self) -> int:
        """How many reservations are kept; 0: we can be reached without."""
        return self._keeper.wanted

    def want(self, count: int = WANTED_RESERVATIONS) -> None:
        """Keep so many reservations from now on."""
        if count != self._keeper.wanted:
            self._keeper.set_wanted(count, trio.current_time())
            self._wake()

    def reservations(self) -> dict[PeerId, list[Multiaddr]]:
        """Relays at which we have a place, each with the addresses at which others find us there."""
        return {relay: list(addrs) for relay, addrs in self._addrs.items()}

    def silent(self) -> frozenset[PeerId]:
        """Those of these relays that do not answer, and may be gone."""
        return frozenset(self._silent)

    # -- the work -----------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Until cancelled."""
        self._listener = await self._host.listen(CIRCUIT)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow_peers)
            nursery.start_soon(self._look_after_relays)
            while True:
                self._changed = trio.Event()
                self._keeper.handle_timer(trio.current_time())
                while (event := self._keeper.next_event()) is not None:
                    if isinstance(event, Reserve):
                        nursery.start_soon(self._reserve, event.peer)
                    elif isinstance(event, Release):
                        self._forget(event.peer)
                    elif isinstance(event, Search):
                        nursery.start_soon(self._search)
                timeout = self._keeper.next_timeout()
                with trio.move_on_at(float("inf") if timeout is None else timeout):
                    await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()

    async def _follow_peers(self) -> None:
        events = self._host.subscribe()
        for peer in self._host.peers():
            self._consider(peer)
        async for event in events:
            if isinstance(event, PeerIdentified):
                self._consider(event.peer)
            elif isinstance(event, PeerDisconnected):
                if event.peer in self._addrs:
                    log.info("reservation_lost relay=%s", event.peer.short())
                    self._forget(event.peer)
                self._keeper.lost(event.peer, trio.current_time())
            else:
                continue
            self._wake()

    def _consider(self, peer: PeerId) -> None:
        if peer in self._preferred:
            return
        direct = [c for c in self._host.connections(peer) if c.path != "relay"]
        if HOP_PROTOCOL in self._host.peerstore.protocols(peer):
            if direct:
                rtt = min((c.rtt for c in direct if c.rtt is not None), default=_UNKNOWN_RTT)
                self._keeper.offer(peer, rtt, trio.current_time())
        else:
            self._keeper.withdraw(peer, trio.current_time())
            self._forget(peer)

    async def _reserve(self, relay: PeerId) -> None:
        self._transport.relays.add(relay)  # a circuit may come right behind the answer
        try:
            connection = await self._transport.connect_relay(relay)
            granted = await reserve(self._host, connection)
        except DialError as error:
            log.info("reservation_failed relay=%s error=%s", relay.short(), error)
            self._note_error(relay, str(error))
            self._forget(relay)
            self._keeper.refused(relay, trio.current_time())
        else:
            self.last_error.pop(relay, None)
            self._silent.discard(relay)
            self._keeper.granted(relay, granted.seconds, trio.current_time())
            if relay in self._keeper.held() and not connection.closed.is_set():
                self._keep(relay, connection, granted)
                self._host.nursery.start_soon(self._be_seen, relay)
            else:
                self._forget(relay)
                self._keeper.lost(relay, trio.current_time())
        self._wake()

    def _keep(self, relay: PeerId, connection: Connection, granted: Granted) -> None:
        addrs = list(granted.addrs)
        if connection.direction == "outbound":
            addrs.insert(0, connection.remote_addr.without_peer())
        addrs += [addr for addr in self._host.peerstore.addrs(relay) if not addr.is_circuit]
        usable = [addr for addr in dict.fromkeys(addrs) if addr.host_port() is not None or addr.has("memory")]
        chosen = [addr.with_peer(relay).encapsulate(CIRCUIT) for addr in _spread(usable)[:RELAY_MAX_ADVERTISED_ADDRS]]
        if relay not in self._addrs:
            log.info("reservation_held relay=%s seconds=%d", relay.short(), granted.seconds)
            self._host.protect(relay)
        if self._addrs.get(relay) != chosen:
            self._addrs[relay] = chosen
            self._tell()

    async def _be_seen(self, relay: PeerId) -> None:
        """Connect with the relay over the other transport, too: it tells how our NAT maps TCP and UDP ports, which is
        what partners need for hole punching."""
        transports = {connection.path for connection in self._host.connections(relay)}
        for path, kind in (("tcp", "tcp"), ("quic", "udp")):
            known = [(addr, addr.host_port()) for addr in self._host.peerstore.addrs(relay) if not addr.is_circuit]
            addrs = [addr for addr, found in known if found is not None and found[0] == kind]
            if path in transports or not addrs:
                continue
            try:
                await self._host.dial(relay, addrs)
            except ConnectError as error:
                log.debug("relay_not_seen relay=%s path=%s error=%s", relay.short(), path, error)

    async def _look_after_relays(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                await trio.sleep(LOOK_SECONDS)
                for relay in self._addrs:
                    nursery.start_soon(self._look_at, relay)

    async def _look_at(self, relay: PeerId) -> None:
        """Whether it answers, over whichever connection."""
        before = {c: c.received_bytes for c in self._host.connections(relay) if c.path in ("quic", "tcp")}
        if not before:
            return
        min(before, key=lambda connection: connection.path != "quic").ask()
        await trio.sleep(ANSWER_SECONDS)
        if not (heard := self._heard(relay, before)):
            for connection in before:
                connection.doubt()
            await trio.sleep(ANSWER_SECONDS)
            heard = self._heard(relay, before)
        if relay not in self._addrs or heard != (relay in self._silent):
            return
        if heard:
            log.info("relay_answers relay=%s", relay.short())
            self._silent.remove(relay)
            self.last_error.pop(relay, None)
            self._keeper.heard(relay)
        else:
            log.info("relay_silent relay=%s", relay.short())
            self._silent.add(relay)
            self._note_error(relay, "it does not answer any more")
            self._keeper.silent(relay, trio.current_time())
        self._wake()

    def _note_error(self, relay: PeerId, error: str) -> None:
        if len(self.last_error) < RELAY_MAX_CANDIDATES or relay in self.last_error:
            self.last_error[relay] = error

    def _heard(self, relay: PeerId, before: Mapping[Connection, int]) -> bool:
        """Whether anything came since, or a new connection."""
        return any(c.received_bytes != before.get(c) for c in self._host.connections(relay) if c.path != "relay")

    def _forget(self, relay: PeerId) -> None:
        self._silent.discard(relay)
        self._transport.relays.discard(relay)
        if self._addrs.pop(relay, None) is not None:
            self._host.unprotect(relay)
            self._tell()

    def _tell(self) -> None:
        self._listener.addrs[:] = [addr for addrs in self._addrs.values() for addr in addrs]
        self._host.addrs_changed()

    async def _search(self) -> None:
        try:
            if self._find is not None:
                with trio.move_on_after(SEARCH_SECONDS):
                    async for relay, addrs in self._find(FOUND_PER_SEARCH):
                        if relay != self._host.peer_id:
                            self._host.peerstore.add_addrs(relay, addrs, FOUND_TTL)
                            self._keeper.offer(relay, _UNKNOWN_RTT, trio.current_time())
                            self._wake()
        finally:
            self._keeper.search_over(trio.current_time())
            self._wake()


def _spread(addrs: Sequence[Multiaddr]) -> list[Multiaddr]:
    """The first address of each kind (family and transport) before the second of any."""
    seen: dict[tuple[str, ...], int] = {}
    ranked = []
    for addr in addrs:
        kind = addr.names()
        seen[kind] = seen.get(kind, 0) + 1
        ranked.append((seen[kind], addr))
    return [addr for _, addr in sorted(ranked, key=lambda item: item[0])]
