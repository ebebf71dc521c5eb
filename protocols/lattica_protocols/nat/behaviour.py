"""The words for what a NAT does (RFC 4787), used by whoever finds it out and whoever imitates it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from lattica_protocols.stun import SocketAddr


class Mapping(Enum):
    """What a new public port depends on, for one port inside (RFC 4787 section 4.1)."""

    NONE = "none"
    """No translation: the address inside is the public one."""
    ENDPOINT_INDEPENDENT = "endpoint-independent"
    """The same public port whomever we talk to."""
    ADDRESS_DEPENDENT = "address-dependent"
    """Another one for each address."""
    ADDRESS_AND_PORT_DEPENDENT = "address-and-port-dependent"
    """Another one for each address and port: "symmetric"."""
    UNKNOWN = "unknown"


class Filtering(Enum):
    """Whose datagrams are let in at a public port (RFC 4787 section 5)."""

    ENDPOINT_INDEPENDENT = "endpoint-independent"
    """Everybody's."""
    ADDRESS_DEPENDENT = "address-dependent"
    """Those of addresses that we have sent to."""
    ADDRESS_AND_PORT_DEPENDENT = "address-and-port-dependent"
    """Those of addresses and ports that we have sent to."""
    UNKNOWN = "unknown"


class Ports(Enum):
    """How public ports are chosen."""

    PRESERVED = "preserved"
    """The port inside, where it is free."""
    SEQUENTIAL = "sequential"
    """One after the other."""
    RANDOM = "random"
    BLOCK = "block"
    """At random out of a small range: a carrier's NAT gives each customer one."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Allocation:
    """How public ports are chosen, and what the next ones may be."""

    ports: Ports = Ports.UNKNOWN
    low: int = 1024
    high: int = 65535
    """The range that the samples suggest, both ends included."""
    step: int = 0
    """From one to the next, for `SEQUENTIAL`; may be negative."""
    last: int | None = None
    """The newest sample."""

    def next_ports(self, count: int) -> list[int]:
        """What a sequential NAT will give next, the likeliest first. Empty when it cannot be told."""
        if self.ports is not Ports.SEQUENTIAL or self.last is None:
            return []
        ports = [self.last + self.step * i for i in range(1, count + 1)]
        return [port for port in ports if 0 < port <= 65535]


@dataclass(frozen=True, slots=True)
class NatBehaviour:
    """What is known of the NATs in front of a host, seen as one."""

    mapping: Mapping = Mapping.UNKNOWN
    filtering: Filtering = Filtering.UNKNOWN
    allocation: Allocation = Allocation()
    mapped: SocketAddr | None = None
    """The public address of the host's socket, where that does not depend on the other side."""
    seen: tuple[SocketAddr, ...] = ()
    """Every address of that socket that an observer named, the most often named first: candidates, believed or not."""
    observed: tuple[tuple[SocketAddr, SocketAddr], ...] = ()
    """Each observer that was asked from that socket, and the address that it named."""
    public_ip: str | None = None
    udp_blocked: bool = False
    """No observer answered over UDP."""
    certain: bool = False
    """One lying observer could not have turned the verdict on the mapping round, or that UDP is blocked."""
    hairpin: bool | None = None
    """Whether two sockets behind it reach each other by their public addresses."""
    lives_for: float | None = None
    """Seconds that a mapping was seen to survive without traffic."""
    dies_within: float | None = None
    """Seconds without traffic after which a mapping was gone."""
    evidence: tuple[str, ...] = ()
    """What was seen, in words, for a person to read."""
