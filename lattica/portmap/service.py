"""Keeps the ports that we listen on mapped in the router in front of us, and tells others where they lead out.

What the router grants is advertised and tried like any other address (`lattica.reach`): one that nobody reaches us at
is not told to others any more. An address that is private, because another NAT follows, is not told in the first place.
"""

from __future__ import annotations

import ipaddress
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import trio

from lattica.portmap.driver import MapperRun
from lattica.portmap.route import Route, default_route
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.nat.scope import is_local
from lattica_protocols.portmap.gateway import GatewayMapper
from lattica_protocols.portmap.mapping import Lease, Port, ProtocolReport

if TYPE_CHECKING:
    from lattica.host import Host

log = logging.getLogger("lattica.portmap")

RELEASE_SECONDS: Final = 1.0
"""For ending the mappings at exit: two datagrams, or a request for each port."""
ROUTE_SECONDS: Final = 60.0
"""Between two looks at the default route, which can change without an address of ours changing."""

Phase: TypeAlias = Literal["off", "not-needed", "no-router", "asking", "mapped", "failed"]


@dataclass(frozen=True, slots=True)
class PortMapStatus:
    """How it stands, for people."""

    phase: Phase
    why: str = ""
    """Of `off` and `not-needed`."""
    gateway: str = ""
    ports: tuple[Port, ...] = ()
    leases: tuple[Lease, ...] = ()
    reports: tuple[ProtocolReport, ...] = ()
    seconds: float | None = None
    """From the first question until all ports were mapped."""
    rest: tuple[float, ...] = ()
    """Seconds that each of the leases has left."""


class PortMapService:
    """One for each node. `run` in a task."""

    def __init__(
        self, host: Host, *, enabled: bool = True, find_route: Callable[[], Route | None] = default_route
    ) -> None:
        self._host = host
        self._enabled = enabled
        self._find_route = find_route
        self._run: MapperRun | None = None
        self._asked_for: tuple[Route, tuple[Port, ...]] | None = None
        self._why = "" if enabled else "port mapping is off in the settings"
        self._seconds: float | None = None
        self._started_at = 0.0
        self._changed = trio.Event()
        host.address_sources.append(self.addrs)

    # -- what is so ---------------------------------------------------------------------------------------------------
    def addrs(self) -> list[Multiaddr]:
        """Where the mapped ports lead out."""
        leases = () if self._run is None else self._run.mapper.leases()
        return [addr for lease in leases if (addr := lease_addr(lease)) is not None]

    def status(self) -> PortMapStatus:
        """As of now."""
        if self._run is None or self._asked_for is None:
            phase: Phase = "off" if not self._enabled else "not-needed" if self._why else "no-router"
            return PortMapStatus(phase, self._why)
        mapper, (route, ports) = self._run.mapper, self._asked_for
        leases, now = mapper.leases(), trio.current_time()
        phase = "mapped" if leases else "failed" if mapper.phase == "waiting" or mapper.is_refused else "asking"
        rest = tuple(lease.expires_at - now for lease in leases)
        return PortMapStatus(phase, "", route.gateway, ports, leases, mapper.reports(), self._seconds, rest)

    # -- work ---------------------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Until cancelled; then the mappings are ended."""
        if not self._enabled:
            await trio.lowlevel.checkpoint()
            return
        try:
            while True:
                self._changed = trio.Event()
                await self._look()
                with trio.move_on_after(ROUTE_SECONDS):
                    await self._changed.wait()
        finally:
            with trio.CancelScope(shield=True):
                await self._end()

    def network_changed(self) -> None:
        """Our interfaces are others than before."""
        if self._run is not None:
            self._run.network_checked()
        self._changed.set()

    async def _look(self) -> None:
        """Begin with the router that is there now, when that is another one than before."""
        route = await trio.to_thread.run_sync(self._find_route)
        wanted = None if route is None else (route, self._ports(route))
        self._why = self._needless(wanted)
        if self._why:
            wanted = None
        if wanted == self._asked_for:
            return
        await self._end()
        if wanted is None:
            return
        route, ports = wanted
        self._asked_for, self._seconds, self._started_at = wanted, None, trio.current_time()
        rng = random.Random(self._host.rng.getrandbits(64))
        mapper = GatewayMapper(route.gateway, route.local_ip, ports, rng)
        self._run = MapperRun(mapper, self._on_leases)
        self._host.nursery.start_soon(self._run.run)

    def _ports(self, route: Route) -> tuple[Port, ...]:
        """Of our IPv4 sockets that the router can reach."""
        found: dict[Port, None] = {}
        for addr in self._host.bound_addrs():
            target, ip = addr.host_port(), addr.ip()
            if target is None or addr.is_circuit or ip is None or ip.version != 4:
                continue
            if ip.is_unspecified or str(ip) == route.local_ip:
                found[Port("tcp" if target[0] == "tcp" else "udp", target[2])] = None
        return tuple(found)

    def _needless(self, wanted: tuple[Route, tuple[Port, ...]] | None) -> str:
        """Why no mapping is of use; empty when one may be, or nothing is known."""
        if self._host.announce:
            return "the addresses to tell others are configured (listen.announce)"
        if wanted is None:
            return ""
        route, ports = wanted
        if not is_local(ipaddress.IPv4Address(route.local_ip)):
            return f"our own address {route.local_ip} is a public one"
        return "" if ports else "nothing listens where the router could lead to"

    async def _end(self) -> None:
        """End what the router holds for us, if it answers."""
        if self._run is None:
            return
        ending, self._run, self._asked_for = self._run, None, None
        count = len(ending.mapper.leases())
        ending.release()
        with trio.move_on_after(RELEASE_SECONDS) as waited:
            await ending.released.wait()
        ending.close()
        if count:
            log.info("ports_released count=%d complete=%s", count, not waited.cancelled_caught)
            self._host.addrs_changed()

    def _on_leases(self, leases: tuple[Lease, ...]) -> None:
        if self._run is None:
            return
        if self._seconds is None and self._asked_for is not None and len(leases) >= len(self._asked_for[1]):
            self._seconds = trio.current_time() - self._started_at
            log.info("ports_mapped seconds=%.3f", self._seconds)
        told = [f"{lease.port}->{lease.external_ip}:{lease.external_port}".replace(" ", "") for lease in leases]
        log.info("port_mapping leases=%s via=%s", ",".join(told) or "none", leases[0].via if leases else "none")
        self._host.addrs_changed()


def lease_addr(lease: Lease) -> Multiaddr | None:
    """What others can dial; `None`: the address outside is not one of the internet."""
    ip = ipaddress.ip_address(lease.external_ip)
    if is_local(ip) or ip.version != 4:
        return None
    rest = f"tcp/{lease.external_port}" if lease.port.transport == "tcp" else f"udp/{lease.external_port}/quic-v1"
    return Multiaddr.parse(f"/ip4/{ip}/{rest}")
