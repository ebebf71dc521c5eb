"""What is asked for and what comes of it, the same for all three protocols."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

Transport: TypeAlias = Literal["tcp", "udp"]
ProtocolName: TypeAlias = Literal["pcp", "nat-pmp", "upnp"]

LIFETIME: Final = 3600.0
"""Seconds asked for. Long enough to be little traffic, short enough that what a crash leaves behind is gone soon."""
MAX_LIFETIME: Final = 86400.0
"""Believed of what a router grants: one that says more is asked again after half a day all the same."""
MIN_RENEWAL: Final = 4.0
"""At least so many seconds between two renewals, whatever a router grants: RFC 6887, section 11.2.1."""
MIN_LIFETIME: Final = 2 * MIN_RENEWAL
"""A mapping for less could not be kept: it counts as refused."""
CHECK_SECONDS: Final = 60.0
"""Between two looks whether the router still knows our mappings: it may have been restarted without telling."""
RETRY_SECONDS: Final = 300.0
"""Until a router that answered nothing, or refused, is asked again."""
MIN_RETRY: Final = 30.0
MAX_RETRY: Final = 1800.0
"""Bounds of the time that a router may send us away for: the second is RFC 6887's (section 7.4) for long errors."""


@dataclass(frozen=True, slots=True, order=True)
class Port:
    """One of our ports."""

    transport: Transport
    number: int

    def __str__(self) -> str:
        return f"{self.transport} {self.number}"


@dataclass(frozen=True, slots=True)
class Lease:
    """A port of the router that leads to one of ours."""

    port: Port
    external_ip: str
    external_port: int
    lifetime: float
    """Seconds, as the router granted it; infinite for a mapping that only we end."""
    granted_at: float
    via: ProtocolName

    @property
    def expires_at(self) -> float:
        """An infinite one is believed for as long as the longest: the router may be gone."""
        return self.granted_at + min(self.lifetime, MAX_LIFETIME)


@dataclass(slots=True)
class ProtocolReport:
    """How it went with one protocol, for people."""

    protocol: ProtocolName
    tried: bool = False
    answered: bool = False
    error: str = ""
    """Why it gave no mapping, or not all of them; empty while nothing is wrong."""
    external_ip: str | None = None
    """What the router says its address outside is."""
    ignored: int = 0
    """Answers that came from somebody else, or answered nothing we had asked."""
    last_ignored: str = ""
    garbled: int = 0
    """Answers of the router that made no sense."""
    last_garbled: str = ""
    restarts: int = 0
    """How often the router had forgotten what it granted."""
    leases: tuple[Lease, ...] = field(default=())

    @property
    def is_garbled(self) -> bool:
        """Whether it is for such answers that nothing is mapped."""
        return self.garbled > 0 and (not self.answered or self.last_garbled in self.error)

    def ignore(self, why: str) -> None:
        """Something was received that is not for us."""
        self.ignored += 1
        self.last_ignored = why

    def garble(self, why: str) -> None:
        """Something was received from the router that is of no use."""
        self.garbled += 1
        self.last_garbled = why


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A datagram, from the socket of that name."""

    channel: ProtocolName
    to: tuple[str, int]
    data: bytes


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """A request over a TCP connection of its own; answered by `receive_response` or `request_failed`."""

    number: int
    host: str
    port: int
    data: bytes
