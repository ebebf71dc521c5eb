"""How long a path that nobody waits for may be silent: a NAT forgets it soon, a relay later, and else nobody does.

    through a NAT or a firewall that lets nobody in, or not known    25 s, and 22 s on the side that dialled
    within one network or machine; strangers reach us here anyway    300 s
    a circuit through a relay                                        80 s; what it runs over is kept up itself

Each side decides by what it knows of its own side. The one that needs more keeps the path up for both: what it sends,
and what answers it, is heard by the other.
"""

from __future__ import annotations

from typing import Final

MAPPING_SECONDS: Final = 25.0
"""NATs keep a UDP mapping for 30 s at least (of 34 home routers measured in 2010 the quickest forgot after 30 s; RFC
4787 asks for 120), and one packet may be late."""
DIALLER_SECONDS: Final = 22.0
"""Of the side that dialled, when both need it: else both would ask at the same moment, counted from when they last
heard each other."""
RESTING_SECONDS: Final = 300.0
"""Where nothing forgets the path. A peer that vanished without a word is noticed in the end, and a cloud's firewall
that we do not know of is satisfied (they forget idle TCP after 350 s, or more)."""
CIRCUIT_SECONDS: Final = 80.0
"""Our relays end a circuit through which nothing went for 180 s."""


def keep_alive_seconds(*, relayed: bool, dialled: bool, mapped: bool) -> float:
    """How long to be silent at the most. `mapped`: something on our side may forget the path, as far as we know."""
    if relayed:
        return CIRCUIT_SECONDS
    if not mapped:
        return RESTING_SECONDS
    return DIALLER_SECONDS if dialled else MAPPING_SECONDS
