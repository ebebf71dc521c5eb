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


class Session:
    """The connections that are up between us and `peer_id`."""

    __slots__ = ("connections", "peer_id")

    def __init__(self, peer_id: PeerId) -> None:
        self.peer_id = peer_id
        self.connections: list[Connection] = []

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
        return _BULK_RANK[new.path] < _BULK_RANK[old.path]
    if (new.path == "relay") != (old.path == "relay"):
        return old.path == "relay"
    if new.rtt is not None and old.rtt is not None:
        return new.rtt < old.rtt * _RTT_GAIN
    return _BULK_RANK[new.path] < _BULK_RANK[old.path]
