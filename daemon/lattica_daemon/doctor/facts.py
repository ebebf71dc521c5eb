"""What the checks of `lattica doctor` look at: plain values, gathered once, so that a check is a pure function."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trio

from lattica.errors import ConnectError
from lattica.listen_addrs import interface_ips
from lattica.nat.hops import trace_routers
from lattica_protocols.nat.behaviour import NatBehaviour

if TYPE_CHECKING:
    from lattica.node import Node
    from lattica.portmap import PortMapStatus
    from lattica.transports.circuit import RelayTroubles
    from lattica_protocols.autonat.reach import Verdict
    from lattica_protocols.multiaddr import Multiaddr
    from lattica_protocols.stun import SocketAddr

DISCOVERY_SECONDS = 8.0
"""A discovery takes 2 s, and 5 when nobody answers."""


@dataclass(frozen=True)
class Finding:
    """What one check found out. `evidence`: what was seen, line by line."""

    check: str
    ok: bool | None
    """`None`: it could not be found out."""
    detail: str
    fix: str = ""
    """What would help; empty when nothing is wrong."""
    evidence: tuple[str, ...] = ()

    def to_plain(self) -> dict[str, Any]:
        return {
            "check": self.check,
            "ok": self.ok,
            "detail": self.detail,
            "fix": self.fix,
            "evidence": list(self.evidence),
        }


@dataclass(frozen=True)
class Link:
    """A connection that is up."""

    path: str
    direction: str
    remote: Multiaddr


@dataclass
class Facts:
    """About this daemon."""

    behaviour: NatBehaviour = field(default_factory=NatBehaviour)
    observers: tuple[SocketAddr, ...] = ()
    """Whom the verdict could have come from."""
    routers: tuple[str | None, ...] = ()
    """The first ones on the way out, `None` for one that keeps silent."""
    own_ips: tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, ...] = ()
    listening: tuple[Multiaddr, ...] = ()
    announced: tuple[Multiaddr, ...] = ()
    """What the user configured to be told to others."""
    links: tuple[Link, ...] = ()
    verdicts: dict[Multiaddr, Verdict] = field(default_factory=dict)
    """Of our addresses, as others tried them (AutoNAT)."""
    reachability: Verdict = "unknown"
    relays_wanted: int = 0
    reservations: dict[str, list[str]] = field(default_factory=dict)
    silent_relays: frozenset[str] = frozenset()
    """Of these reservations, those at relays that do not answer now."""
    relay_errors: dict[str, str] = field(default_factory=dict)
    relay_troubles: dict[str, RelayTroubles] = field(default_factory=dict)
    """By relay: what befell connections through it."""
    port_mapping: PortMapStatus | None = None
    surroundings: str = ""
    """`wsl`, `container`, or nothing special."""

    @property
    def ports(self) -> str:
        """`TCP 4101 and UDP 4101`: where we listen, for advice about routers."""
        found: dict[str, None] = {}
        for addr in self.listening:
            target = addr.host_port()
            if target is not None and not addr.is_loopback:
                found[f"{target[0].upper()} {target[2]}"] = None
        return " and ".join(sorted(found)) or "the ports of listen.addrs"


async def gather_facts(node: Node, *, fresh: bool = True) -> Facts:
    """Ask observers and routers now (`fresh`), or take what is known. Up to some seconds."""
    facts = Facts(
        own_ips=tuple(ip for ip in interface_ips() if not ip.is_loopback),
        listening=tuple(addr for addr in node.host.listen_addrs() if not addr.is_circuit),
        announced=tuple(node.host.announce),
        links=tuple(Link(c.path, c.direction, c.remote_addr) for c in node.host.connections()),
        verdicts=node.reach.verdicts(),
        reachability=node.host.reachability,
        relays_wanted=node.relay_client.wanted,
        reservations={
            str(relay): [str(addr) for addr in addrs] for relay, addrs in node.relay_client.reservations().items()
        },
        silent_relays=frozenset(str(relay) for relay in node.relay_client.silent()),
        relay_errors={str(relay): error for relay, error in node.relay_client.last_error.items()},
        relay_troubles={str(relay): troubles for relay, troubles in node.circuits.troubles.items()},
        port_mapping=node.port_map.status(),
        surroundings=surroundings(),
    )
    if node.nat is None or node.nat_watch is None:
        return facts
    observers = await node.nat_watch.observers()
    facts.observers = tuple(observer.addr for observer in observers)
    if fresh and observers:
        async with trio.open_nursery() as nursery:

            async def trace() -> None:
                facts.routers = tuple(await trace_routers(observers[0].addr))

            nursery.start_soon(trace)
            with trio.move_on_after(DISCOVERY_SECONDS):
                try:
                    await node.nat.discover(observers)
                except ConnectError:
                    pass  # nobody is left to ask: the check on observers says so
    facts.behaviour = node.nat.behaviour
    return facts


def surroundings(release: str | None = None) -> str:
    """Whether this machine's network is not the one that its user thinks of. `release`: of the kernel, for tests."""
    kernel = os.uname().release if release is None else release
    if "microsoft" in kernel.lower():
        return "wsl"
    if (os.path.exists("/.dockerenv") or os.path.exists("/run/.containerenv")) and _has_veth():
        return "container"
    return ""


def _has_veth() -> bool:
    """Whether an interface is one end of a cable between namespaces: with the host's network there is none of ours."""
    for name in os.listdir("/sys/class/net"):
        try:
            with open(f"/sys/class/net/{name}/ifindex") as own, open(f"/sys/class/net/{name}/iflink") as other:
                if int(own.read()) != int(other.read()):
                    return True
        except (OSError, ValueError):
            continue
    return False


def is_shared_space(ip: str) -> bool:
    """100.64.0.0/10 (RFC 6598): between a carrier's NAT and its customers, nowhere else."""
    return ipaddress.ip_address(ip) in _SHARED


def is_private(ip: str) -> bool:
    """RFC 1918 or RFC 6598: not an address of the internet."""
    address = ipaddress.ip_address(ip)
    return any(address in network for network in (*_PRIVATE, _SHARED) if network.version == address.version)


_SHARED = ipaddress.ip_network("100.64.0.0/10")
_PRIVATE = tuple(ipaddress.ip_network(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"))
