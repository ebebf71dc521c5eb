"""NATs and firewalls of a simulated network: what each does to a packet, as a class without I/O or clock.

A `BoxKind` says what a box does, in the words of RFC 4787; `BOXES` are the kinds that are found in the wild, named as
the tests name them. A `Box` is one of them with its tables. The decision about an arriving packet must be made when it
arrives, with the tables of that moment: `SimulatedInternet` does.

Modelled after Linux, where home routers and carriers' NATs run: a mapping lives `lifetime` seconds after its last
packet in either direction; `poisoned` is a Linux box whose INPUT chain accepts: a stray packet from outside becomes
a flow of the box itself for 30 s, and our own packet to the same peer, which clashes with it, leaves from another port,
as do all later flows of its socket: the newest mapping is used again. Older flows keep theirs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Final

from lattica_protocols.nat.behaviour import Filtering, Mapping, Ports
from lattica_protocols.stun import SocketAddr

POISON_SECONDS: Final = 30.0
"""nf_conntrack_udp_timeout of Linux: how long one unanswered packet stays in its table."""
DEFAULT_LIFETIME: Final = 120.0
"""Seconds; what RFC 4787 REQ-5 demands at least. Many home routers have 30."""
_RANDOM_PORTS: Final = (1024, 65535)


@dataclass(frozen=True, slots=True)
class Packet:
    """One datagram (`protocol` "udp"), or one segment of a TCP connection ("tcp")."""

    source: SocketAddr
    to: SocketAddr
    data: bytes
    ttl: int = 64
    protocol: str = "udp"


@dataclass(frozen=True, slots=True)
class BoxKind:
    """What a box does. The defaults are those of a usual home router."""

    name: str
    mapping: Mapping = Mapping.ENDPOINT_INDEPENDENT
    """`Mapping.NONE`: a firewall, addresses stay as they are."""
    filtering: Filtering = Filtering.ADDRESS_AND_PORT_DEPENDENT
    ports: Ports = Ports.PRESERVED
    port_range: tuple[int, int] = _RANDOM_PORTS
    """Where public ports are taken from, both ends included; `SEQUENTIAL` starts at the lower one."""
    step: int = 1
    """For `SEQUENTIAL`."""
    hairpin: bool = False
    """Whether hosts inside reach each other by their public addresses."""
    poisoned: bool = False
    rejects: bool = False
    """Answers unwanted packets with an ICMP error, which UDP sockets do not notice: counted only."""
    udp: bool = True
    tcp_ports: frozenset[int] | None = None
    """TCP ports that hosts inside may connect to; `None`: all."""
    lifetime: float = DEFAULT_LIFETIME


_EIF, _ADF = Filtering.ENDPOINT_INDEPENDENT, Filtering.ADDRESS_DEPENDENT
_ADM, _APDM = Mapping.ADDRESS_DEPENDENT, Mapping.ADDRESS_AND_PORT_DEPENDENT

BOXES: Final[dict[str, BoxKind]] = {
    kind.name: kind
    for kind in (
        BoxKind("fw", mapping=Mapping.NONE),
        BoxKind("full", filtering=_EIF, hairpin=True),
        BoxKind("adf", filtering=_ADF),
        BoxKind("apdf"),
        BoxKind("apdfr", ports=Ports.RANDOM),
        BoxKind("rej", rejects=True),
        BoxKind("open", poisoned=True),
        BoxKind("adm", mapping=_ADM, ports=Ports.RANDOM),
        BoxKind("symf", mapping=_APDM, filtering=_EIF, ports=Ports.RANDOM),
        BoxKind("syma", mapping=_APDM, filtering=_ADF, ports=Ports.RANDOM),
        BoxKind("symseq", mapping=_APDM, ports=Ports.SEQUENTIAL, port_range=(20000, 65535)),
        BoxKind("sym", mapping=_APDM, ports=Ports.RANDOM),
        BoxKind("symblk", mapping=_APDM, ports=Ports.BLOCK, port_range=(30000, 32047)),
        BoxKind("noudp", udp=False),
        BoxKind("tcp443", udp=False, tcp_ports=frozenset({80, 443})),
    )
}
"""Firewall without NAT; full cone; address restricted; port restricted with kept, random ports, and rejecting; the
poisoned Linux box; address-dependent mapping; symmetric with endpoint-independent, address-dependent and port-dependent
filter (sequential, random, port block); UDP blocked; nothing but the web. No box at all is `None` where one is asked
for; a home behind a carrier's NAT is a box behind a box."""


@dataclass(slots=True)
class _Mapping:
    inside: SocketAddr
    port: int
    used: float
    contacted: dict[SocketAddr, float]


class Box:
    """One NAT or firewall. `address`: its public address (of no meaning for a firewall)."""

    def __init__(self, kind: BoxKind, address: str, rng: random.Random) -> None:
        self.kind = kind
        self.address = address
        self.rejected = 0
        """Unwanted packets, where `kind.rejects`."""
        self._rng = rng
        self._by_inside: dict[object, _Mapping] = {}
        self._by_port: dict[tuple[str, str, int], list[_Mapping]] = {}
        self._poison: dict[tuple[str, int, SocketAddr], float] = {}
        self._next = kind.port_range[0]

    def outbound(self, packet: Packet, now: float) -> Packet | None:
        """The packet as it leaves towards the outside; `None`: dropped."""
        if not self._lets_out(packet):
            return None
        mapping = self._mapping_for(packet, now)
        mapping.used = now
        mapping.contacted[packet.to] = now
        return replace(packet, source=(self._outer(packet.source[0]), mapping.port))

    def inbound(self, packet: Packet, now: float) -> Packet | None:
        """The packet as it goes on to the host inside; `None`: dropped."""
        for mapping in self._by_port.get((packet.protocol, packet.to[0], packet.to[1]), []):
            if self._is_alive(mapping, now) and self._passes(mapping, packet.source, now):
                mapping.used = now
                if packet.source in mapping.contacted:
                    mapping.contacted[packet.source] = now
                return replace(packet, to=mapping.inside)
        self.rejected += self.kind.rejects
        if self.kind.poisoned:
            self._poison[packet.protocol, packet.to[1], packet.source] = now
        return None

    # -- inside -------------------------------------------------------------------------------------------------------
    def _lets_out(self, packet: Packet) -> bool:
        if packet.protocol == "udp":
            return self.kind.udp
        return self.kind.tcp_ports is None or packet.to[1] in self.kind.tcp_ports

    def _outer(self, host: str) -> str:
        return host if self.kind.mapping is Mapping.NONE else self.address

    def _is_alive(self, mapping: _Mapping, now: float) -> bool:
        return now - mapping.used <= self.kind.lifetime

    def _passes(self, mapping: _Mapping, source: SocketAddr, now: float) -> bool:
        if self.kind.filtering is _EIF:
            return True
        if self.kind.filtering is _ADF:
            at = max((at for remote, at in mapping.contacted.items() if remote[0] == source[0]), default=None)
        else:
            at = mapping.contacted.get(source)
        return at is not None and now - at <= self.kind.lifetime

    def _mapping_for(self, packet: Packet, now: float) -> _Mapping:
        flow = (packet.protocol, packet.source, packet.to)
        keys: dict[Mapping, object] = {_ADM: (packet.protocol, packet.source, packet.to[0]), _APDM: flow}
        key = keys.get(self.kind.mapping, (packet.protocol, packet.source))
        for candidate in (flow, key):  # the flow's own: older than a clash that moved the later ones
            mapping = self._by_inside.get(candidate)
            if mapping is not None and self._is_alive(mapping, now):
                if packet.to in mapping.contacted or not self._clashes(mapping, packet, now):
                    return mapping
                for remote in mapping.contacted:
                    self._by_inside[packet.protocol, packet.source, remote] = mapping
                break
            if mapping is not None:
                self._forget(candidate, mapping, packet)
        port = packet.source[1] if self.kind.mapping is Mapping.NONE else self._new_port(packet, now)
        mapping = _Mapping(packet.source, port, now, {})
        self._by_inside[key] = mapping
        self._by_port.setdefault((packet.protocol, self._outer(packet.source[0]), port), []).append(mapping)
        return mapping

    def _clashes(self, mapping: _Mapping, packet: Packet, now: float) -> bool:
        at = self._poison.get((packet.protocol, mapping.port, packet.to))
        return at is not None and now - at <= POISON_SECONDS

    def _forget(self, key: object, mapping: _Mapping, packet: Packet) -> None:
        del self._by_inside[key]
        there = self._by_port[packet.protocol, self._outer(packet.source[0]), mapping.port]
        if mapping in there:  # else it was forgotten for another of its flows
            there.remove(mapping)

    def _new_port(self, packet: Packet, now: float) -> int:
        low, high = self.kind.port_range
        if self.kind.ports is Ports.PRESERVED and self._is_free(packet, packet.source[1], now):
            return packet.source[1]
        for _ in range(4 * (high - low + 1)):
            if self.kind.ports is Ports.SEQUENTIAL:
                port = self._next
                self._next = low + (self._next + self.kind.step - low) % (high - low + 1)
            else:
                port = self._rng.randint(low, high)
            if self._is_free(packet, port, now):
                return port
        raise RuntimeError(f"{self.kind.name}: all ports are taken")

    def _is_free(self, packet: Packet, port: int, now: float) -> bool:
        at = self._poison.get((packet.protocol, port, packet.to))
        if at is not None and now - at <= POISON_SECONDS:
            return False
        there = self._by_port.get((packet.protocol, self.address, port), [])
        return not any(self._is_alive(mapping, now) for mapping in there)
