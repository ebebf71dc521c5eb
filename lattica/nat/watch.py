"""Keeps the verdict on our NATs fresh: asks again when there are more to ask and when our addresses change."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Final

import trio

from lattica.errors import ConnectError
from lattica.host import PeerConnected, PeerIdentified, SelfChanged
from lattica.listen_addrs import interface_ips
from lattica.nat.hops import trace_routers
from lattica.nat.observers import peer_observers, resolve_servers
from lattica_protocols.limits import GUESS_OPENER_MAX_TTL
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.nat.behaviour import Filtering, Mapping
from lattica_protocols.nat.classify import MIN_OBSERVERS
from lattica_protocols.nat.punch_plan import OPENER_TTL

if TYPE_CHECKING:
    from lattica.host import Host
    from lattica.nat.service import NatService
    from lattica_protocols.nat.behaviour import NatBehaviour
    from lattica_protocols.nat.discovery import Observer
    from lattica_protocols.stun import SocketAddr

log = logging.getLogger("lattica.nat")

AGAIN_SECONDS: Final = 900.0
"""A router is replaced, a phone changes its network: seen by an interface first, so this is for what is behind it."""
SOON_SECONDS: Final = 10.0
UNSURE_SECONDS: Final = 1.0
"""At least so long between two discoveries, whatever happens; the second while too few could be asked to be sure."""
_CANDIDATES: Final = 2
_TRACES: Final = 3
"""In a row, each 0.7 s: routers send few ICMP messages to one host in a second."""
_BEHIND_NATS: Final = tuple(
    ipaddress.ip_network(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10")
)


class NatWatch:
    """`run` in a task. `asked`: how many observers the newest verdict rests on."""

    def __init__(self, host: Host, nat: NatService, servers: Sequence[str] = ()) -> None:
        self._host = host
        self.nat = nat
        self._servers = servers
        self._wakeup = trio.Event()
        self.asked = 0
        self.on_known: Callable[[], None] = lambda: None
        """Called after each discovery."""
        self._routers: list[str | None] = []
        """The first ones on the way out, as far as they answered at any time."""

    @property
    def behaviour(self) -> NatBehaviour:
        return self.nat.behaviour

    def candidates(self) -> list[Multiaddr]:
        """Where a partner may find our QUIC socket, as observers saw it."""
        return [quic_multiaddr(addr) for addr in self.behaviour.seen[:_CANDIDATES]]

    @property
    def _own_routers(self) -> int:
        """How many routers with private addresses are in front of us, as far as they answered."""
        return own_routers(self._routers)

    def opening_hops(self) -> int:
        """How far a datagram has to go that opens our own NAT and reaches nobody else's box: nowhere without a NAT.

        A firewall needs none: it drops what is early, and has no other port to give to our own packet afterwards.
        """
        known = self.behaviour
        seen = {addr[0] for addr in known.seen}
        own = known.mapping is Mapping.UNKNOWN and bool(seen) and seen <= {str(ip) for ip in interface_ips()}
        if own or known.mapping is Mapping.NONE:
            return 0
        return min(max(OPENER_TTL, 1 + self._own_routers), GUESS_OPENER_MAX_TTL)

    @property
    def hops_measured(self) -> bool:
        """Whether `opening_hops` is known to suffice, and not only likely to."""
        return sees_out(self._routers) and 1 + self._own_routers <= GUESS_OPENER_MAX_TTL

    def early_hops(self) -> int:
        """The same where a partner's packet may come before any of ours: a firewall would drop it."""
        known = self.behaviour
        is_firewall = known.mapping is Mapping.NONE and known.filtering is Filtering.ADDRESS_AND_PORT_DEPENDENT
        return OPENER_TTL if is_firewall else self.opening_hops()

    async def refresh(self) -> None:
        """Bring the candidates up to date: a round trip, a second at most."""
        await self.nat.sample()

    async def observers(self) -> list[Observer]:
        """Whom we can ask now."""
        return [*await resolve_servers(self._servers), *peer_observers(self._host)]

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow_peers)
            while True:
                self._wakeup = trio.Event()
                await self._ask()
                await trio.sleep(SOON_SECONDS if self.asked >= MIN_OBSERVERS else UNSURE_SECONDS if self.asked else 0.1)
                with trio.move_on_after(AGAIN_SECONDS):
                    await self._wakeup.wait()

    async def _ask(self) -> None:
        observers = await self.observers()
        if not observers:
            return
        try:
            await self.nat.discover(observers)
            await self.nat.sample()  # tells each observer's word to `on_seen`
        except ConnectError as error:
            log.debug("discovery_failed error=%s", error)
        else:
            self.asked = len(observers)
            self.on_known()
            if self.behaviour.mapping is not Mapping.NONE:
                await self._trace(observers[0].addr)

    async def _trace(self, target: SocketAddr) -> None:
        """Until the first router behind our own has answered, or it seems that it does not."""
        for _ in range(_TRACES):
            if self.hops_measured:
                return
            self._routers = both_heard(self._routers, await trace_routers(target))
            log.debug("routers_found routers=%s", " ".join(router or "-" for router in self._routers))

    async def _follow_peers(self) -> None:
        async for event in self._host.subscribe():
            if isinstance(event, PeerConnected) and event.connection.path == "relay":
                await self.refresh()  # a punch is about to begin
            elif isinstance(event, PeerIdentified) and self.asked < MIN_OBSERVERS:
                if len(peer_observers(self._host)) > self.asked:
                    self._wakeup.set()
            elif isinstance(event, SelfChanged) and not self.asked:
                self._wakeup.set()

    def network_changed(self) -> None:
        """Our interfaces are others than before (`lattica.reach.interfaces`)."""
        self.asked = 0
        self._routers = []
        self._wakeup.set()


def own_routers(routers: Sequence[str | None]) -> int:
    """Of the first routers on the way out, those up to the last with an address as behind NATs (RFC 1918, RFC 6598).

    One that kept silent counts when such a one follows: routers send few ICMP messages to one host in a second.
    """
    inner = 0
    for number, router in enumerate(routers, 1):
        if router is None:
            continue
        if not any(ipaddress.ip_address(router) in network for network in _BEHIND_NATS):
            break
        inner = number
    return inner


def both_heard(before: Sequence[str | None], now: Sequence[str | None]) -> list[str | None]:
    """What two traces found: each router answers some of the time."""
    return [new or old for old, new in zip_longest(before, now)]


def sees_out(routers: Sequence[str | None]) -> bool:
    """Whether one of ours answered, and the next one behind them: no silent one of ours stands between."""
    own = own_routers(routers)
    return 0 < own < len(routers) and routers[own] is not None


def quic_multiaddr(addr: SocketAddr) -> Multiaddr:
    """`/ip4/…/udp/…/quic-v1`."""
    family = "ip6" if ":" in addr[0] else "ip4"
    return Multiaddr.parse(f"/{family}/{addr[0]}/udp/{addr[1]}/quic-v1")
