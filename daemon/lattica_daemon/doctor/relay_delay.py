"""Whether a relay holds back what it carries: the round trip through it against those of both sides with it.

All three are measured at about the same time, each the smallest of some, so what slows a side down, or the relay's own
line, is in both. Nothing is said while the circuit carries other things, which may queue at its ends, or when the peer
does not measure its part.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from lattica.errors import LatticaError
from lattica_daemon.doctor.facts import Finding
from lattica_protocols.errors import ProtocolError, RemoteProtocolError
from lattica_protocols.peer_id import PeerId

if TYPE_CHECKING:
    from lattica.interfaces import Connection
    from lattica.node import Node

TRIES: Final = 3
"""One of them meets no loss on the way."""
MEASURE_SECONDS: Final = 15.0
"""In all. A relay that adds more than 6.5 s has its connections left."""
HELD_SECONDS: Final = 1.0
"""More than this between the two is nobody's queue: the smallest of several trips, at a circuit that rests."""
QUIET_BYTES: Final = 16 << 10
"""What the measurement itself carries, and some calls of others."""
AGAIN_SECONDS: Final = 5.0
"""For so long peers are told what was measured last."""


@dataclass(frozen=True, slots=True)
class RelayTrips:
    """Round trips in seconds; `None`: not measured."""

    relay: str
    through: float | None = None
    ours: float | None = None
    theirs: float | None = None
    carried: int = 0
    """Bytes over the circuit meanwhile."""


def check_relay_delay(trips: RelayTrips | None) -> Finding | None:
    """Whether the relay adds what neither side's way to it explains."""
    if trips is None or trips.through is None or trips.ours is None or trips.theirs is None:
        return None
    held = trips.through - trips.ours - trips.theirs
    if held < HELD_SECONDS or trips.carried > QUIET_BYTES:
        return None
    detail = f"the relay {trips.relay} holds back what it carries: it adds {held:.1f} s to each round trip"
    evidence = (
        f"round trip with the peer through the relay: {trips.through:.2f} s",
        f"ours with the relay: {trips.ours:.3f} s",
        f"the peer's with the relay: {trips.theirs:.3f} s",
    )
    return Finding("relay-delay", False, detail, "do not use this relay: name others in relay.relays", evidence)


async def measure_relay(node: Node, target: PeerId) -> RelayTrips | None:
    """For a peer that is relayed; `None`: it is direct."""
    connections = node.host.connections(target)
    relayed = next((c for c in connections if c.path == "relay"), None)
    facts = None if relayed is None else node.circuits.facts(relayed)
    if relayed is None or facts is None or any(c.path != "relay" for c in connections):
        return None
    found: dict[str, float | None] = {}
    before = relayed.sent_bytes + relayed.received_bytes

    async def measure(name: str, trip: Callable[[], Awaitable[float | None]]) -> None:
        try:
            found[name] = await trip()
        except (LatticaError, ProtocolError):
            found[name] = None

    async def theirs() -> float | None:
        return seconds_untrusted(await node.rpc.call(target, "lattica.relay_trip", str(facts.relay)))

    with trio.move_on_after(MEASURE_SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(measure, "through", lambda: smallest_trip(node, target, relayed))
            nursery.start_soon(measure, "ours", lambda: smallest_trip(node, facts.relay, direct(node, facts.relay)))
            nursery.start_soon(measure, "theirs", theirs)
    carried = relayed.sent_bytes + relayed.received_bytes - before
    return RelayTrips(str(facts.relay), found.get("through"), found.get("ours"), found.get("theirs"), carried)


def direct(node: Node, peer: PeerId) -> Connection | None:
    """The connection that circuits go over, if they go over this peer."""
    up = [c for c in node.host.connections(peer) if c.path != "relay"]
    return min(up, key=lambda c: c.path == "quic", default=None)


async def smallest_trip(node: Node, peer: PeerId, connection: Connection | None) -> float | None:
    """Of some pings; those that were done when the time is over, if any."""
    if connection is None:
        return None
    trips: list[float] = []
    with trio.move_on_after(MEASURE_SECONDS * 0.9):
        for _ in range(TRIES):
            trips.append(await node.ping.ping(peer, timeout=MEASURE_SECONDS, connection=connection))
    return min(trips, default=None)


class RelayTripsForPeers:
    """What peers are told of our way to the relay between us: one measurement at a time, and not often."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._turn = trio.Lock()
        self._known: tuple[PeerId, float, float | None] | None = None

    async def trip(self, relay: PeerId) -> float | None:
        """Seconds; `None` for a peer that is no relay of ours, and when it does not answer."""
        circuits = (self._node.circuits.facts(connection) for connection in self._node.host.connections())
        if not any(facts is not None and facts.relay == relay for facts in circuits):
            return None
        async with self._turn:
            now = trio.current_time()
            if self._known is None or self._known[0] != relay or now - self._known[1] > AGAIN_SECONDS:
                try:
                    found = await smallest_trip(self._node, relay, direct(self._node, relay))
                except LatticaError:
                    found = None
                self._known = relay, now, found
            return self._known[2]


def seconds_untrusted(value: object) -> float | None:
    """What the peer says that it measured."""
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 3600:
        raise RemoteProtocolError("a round trip is a number of seconds")
    return float(value)


__all__ = ["RelayTrips", "RelayTripsForPeers", "check_relay_delay", "measure_relay"]
