"""What a peer tells another one about the NATs in front of it, as a Protocol Buffers message.

    NatReport { enum mapping = 1; enum filtering = 2; enum ports = 3; uint32 low = 4; uint32 high = 5;
                int32 step = 6; uint32 last = 7; bool udp_blocked = 8; bool certain = 9; }

      mapping     0 unknown, 1 none, 2 endpoint-independent, 3 address-dependent, 4 address-and-port-dependent
      filtering   0 unknown, 1 endpoint-independent, 2 address-dependent, 3 address-and-port-dependent
      ports       0 unknown, 1 preserved, 2 sequential, 3 random, 4 block
      low, high   the range of public ports, both ends included
      step, last  for sequential ports: from one to the next, and the newest
      certain     three observers or more stand for the mapping, or for UDP being blocked

No addresses: those are named where they are needed, and checked there. A number that is not known means "unknown", and
ports that cannot be are left out, so that a later version can say more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeVar

from lattica_protocols.limits import NAT_MAX_STEP
from lattica_protocols.nat.behaviour import Allocation, Filtering, Mapping, NatBehaviour, Ports
from lattica_protocols.protobuf import Kind, Message, optional

_MAPPINGS: Final = (
    Mapping.UNKNOWN,
    Mapping.NONE,
    Mapping.ENDPOINT_INDEPENDENT,
    Mapping.ADDRESS_DEPENDENT,
    Mapping.ADDRESS_AND_PORT_DEPENDENT,
)
_FILTERINGS: Final = (
    Filtering.UNKNOWN,
    Filtering.ENDPOINT_INDEPENDENT,
    Filtering.ADDRESS_DEPENDENT,
    Filtering.ADDRESS_AND_PORT_DEPENDENT,
)
_PORTS: Final = (Ports.UNKNOWN, Ports.PRESERVED, Ports.SEQUENTIAL, Ports.RANDOM, Ports.BLOCK)


@dataclass(frozen=True, slots=True)
class NatReport(Message):
    """A `NatBehaviour` in numbers: an enum is its place in the tables above."""

    mapping: int | None = optional(1, Kind.ENUM)
    filtering: int | None = optional(2, Kind.ENUM)
    ports: int | None = optional(3, Kind.ENUM)
    low: int | None = optional(4, Kind.UINT)
    high: int | None = optional(5, Kind.UINT)
    step: int | None = optional(6, Kind.INT)
    last: int | None = optional(7, Kind.UINT)
    udp_blocked: bool | None = optional(8, Kind.BOOL)
    certain: bool | None = optional(9, Kind.BOOL)

    @classmethod
    def of(cls, known: NatBehaviour) -> NatReport:
        """What is told of `known`."""
        allocation = known.allocation
        return cls(
            mapping=_MAPPINGS.index(known.mapping),
            filtering=_FILTERINGS.index(known.filtering),
            ports=_PORTS.index(allocation.ports),
            low=allocation.low,
            high=allocation.high,
            step=allocation.step or None,
            last=allocation.last,
            udp_blocked=True if known.udp_blocked else None,
            certain=True if known.certain else None,
        )

    def behaviour(self) -> NatBehaviour:
        """What the sender claims, made fit for use: whatever was received, ports are ports and steps are small."""
        low, high = _port(self.low), _port(self.high)
        if low is None or high is None or low >= high:
            low, high = Allocation().low, Allocation().high
        step = self.step or 0
        return NatBehaviour(
            mapping=_named(_MAPPINGS, self.mapping),
            filtering=_named(_FILTERINGS, self.filtering),
            allocation=Allocation(
                _named(_PORTS, self.ports),
                low,
                high,
                step=step if abs(step) <= NAT_MAX_STEP else 0,
                last=_port(self.last),
            ),
            udp_blocked=bool(self.udp_blocked),
            certain=bool(self.certain),
        )


_Name = TypeVar("_Name", Mapping, Filtering, Ports)


def _named(names: tuple[_Name, ...], number: int | None) -> _Name:
    return names[number] if number is not None and 0 <= number < len(names) else names[0]


def _port(value: int | None) -> int | None:
    return value if value is not None and 0 < value <= 65535 else None
