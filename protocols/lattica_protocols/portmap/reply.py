"""What a router answered, the same for PCP and NAT-PMP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lattica_protocols.portmap.mapping import Port


@dataclass(frozen=True, slots=True)
class Reply:
    """`check` answers the question whether it is there; `map` one about a port."""

    kind: Literal["check", "map"]
    epoch: int | None = None
    port: Port | None = None
    error: str = ""
    external_ip: str | None = None
    """In a `map` of NAT-PMP and a `check` of PCP: `None`, not said."""
    external_port: int = 0
    lifetime: int = 0
    """Seconds; of an error in PCP: until asking again makes sense."""
    unsupported: bool = False
    """The router does not speak this protocol."""
