"""All connections with one peer, and which of them a new stream should take.

Bulk takes direct TCP when there is one; calls take the direct path with the lowest round-trip time. A relayed
path is used only while no direct one is up. A path that fell silent or broke casts doubt on the others with the
same peer, which share most of the way: those are used last until the peer is heard on them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lattica.interfaces import Connection, Path, StreamClass
    from lattica_protocols.peer_id import PeerId

_BULK_RANK: dict[Path, int] = {"tcp": 0, "memory": 0, "quic": 1, "relay": 2}
_RTT_GAIN = 0.8
"""Another path must be a fifth quicker before calls move to it: the measurements jitter by about that much."""
_RTT_NOISE = 0.001
"""Seconds, and by so much more: nearer than that it is not the path that is measured but the processes at its ends."""


class Session:
    """The connections that are up between us and `peer_id`."""

    __slots__ = ("bulk_upgrade_at", "connections", "peer_id")

    def __init__(self, peer_id: PeerId) -> None:
        self.peer_id = peer_id
        self.connections: list[Connection] = []
        """Until they have been served to their end: one that is `closed` may still be among them."""
        self.bulk_upgrade_at = 0.0
        """When TCP may be tried (again) for bulk, by the clock of trio."""

    def path_lost(self) -> None:
        """A connection with the peer fell silent, or ended without a goodbye."""
        for connection in self.connections:
            connection.doubt()

    def best(self, stream_class: StreamClass) -> Connection | None:
        """The connection a new stream should take, `None` when none is up."""
        best: Connection | None = None
        for connection in self.connections:
            if connection.closed.is_set():
                continue
            if best is None or _better(connection, best, stream_class):
                best = connection
        return best


def _better(new: Connection, old: Connection, stream_class: StreamClass) -> bool:
    if new.doubtful != old.doubtful:
        return old.doubtful
    if stream_class == "bulk":
        return (_BULK_RANK[new.path], not new.for_bulk) < (_BULK_RANK[old.path], not old.for_bulk)
    if (new.path == "relay") != (old.path == "relay"):
        return old.path == "relay"
    if new.path == old.path and new.for_bulk != old.for_bulk:
        return old.for_bulk
    if new.rtt is not None and old.rtt is not None:
        return new.rtt < old.rtt * _RTT_GAIN - _RTT_NOISE
    return _BULK_RANK[new.path] < _BULK_RANK[old.path]
