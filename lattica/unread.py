"""A bound on what all connections of a node hold for streams that nobody reads.

Flow control bounds each connection, generously, since one fast peer should be fast. But peer ids are free: whoever
opens connections by the hundred and fills their windows (pings without taking the answers) would fill our memory.
Over `MAX_UNREAD_BYTES` the connection that holds the most is closed, then the next, until the rest fits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import trio

from lattica.errors import ConnectionLost
from lattica_protocols.limits import MAX_UNREAD_BYTES

if TYPE_CHECKING:
    from lattica.interfaces import Connection

log = logging.getLogger("lattica.host")

STEP: Final = MAX_UNREAD_BYTES // 16
"""Bytes of growth after which the connections are counted again."""


class UnreadAccount:
    """`connections` lists those that are open; `soon` starts a task, as the nursery's `start_soon`."""

    def __init__(self, connections: Callable[[], Sequence[Connection]], soon: Callable[..., Any]) -> None:
        self._connections = connections
        self._soon = soon
        self._grown = 0
        self.closed = 0
        """Connections ended so far."""

    def grew(self, count: int) -> None:
        """A connection has so many more unread bytes. Called while data is delivered, so nothing is closed here."""
        self._grown += count
        if self._grown >= STEP:
            self._grown = 0
            self._soon(self._look)

    async def _look(self) -> None:
        await trio.lowlevel.checkpoint()
        held = sorted(self._connections(), key=lambda connection: connection.unread(), reverse=True)
        total = sum(connection.unread() for connection in held)
        for connection in held:
            if total <= MAX_UNREAD_BYTES:
                return
            unread = connection.unread()
            total -= unread
            self.closed += 1
            log.info("unread_over_limit peer=%s bytes=%d", connection.peer_id.short(), unread)
            connection.abort(ConnectionLost(f"{unread} bytes wait to be read, all connections together hold too many"))
