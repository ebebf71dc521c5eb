"""Streams of `/lattica/replica/1`: one to each neighbour for what we send, the neighbour's for what it sends.

A message is u32 length (big endian) || bytes. What does not fit a link's queue is dropped: every message stands alone,
and the next comparison makes up for it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING

import trio

from lattica.errors import ConnectionLost, LatticaError, StreamReset
from lattica_protocols.errors import ProtocolError, RemoteProtocolError
from lattica_protocols.limits import REPLICA_MAX_MESSAGE_BYTES
from lattica_protocols.replica import PROTOCOL

if TYPE_CHECKING:
    from lattica.host import Host
    from lattica.interfaces import Stream
    from lattica_protocols.peer_id import PeerId

log = logging.getLogger("lattica.replica")

MAX_QUEUED_BYTES = 16 << 20
"""Bytes waiting for one neighbour: the batches in flight of 16 spaces."""
MAX_ALL_QUEUED_BYTES = 64 << 20
"""The same for all neighbours together: strangers that ask for much and read nothing."""
FAIR_QUEUED_BYTES = 2 << 20
"""What may wait for each in any case: the longest message, and one that is on its way."""
LINK_IDLE = 300.0
"""Seconds without a message to send after which a link's stream is closed."""
SEND_TIMEOUT = 30.0
"""Seconds a neighbour may take to accept what is queued."""


class Queued:
    """Bytes that wait in all links of a service."""

    def __init__(self) -> None:
        self.bytes = 0


class Link:
    """What we send to one peer: a queue, and a task that empties it into a stream."""

    def __init__(self, host: Host, peer: PeerId, lost: Callable[[PeerId, bool], None], queued: Queued) -> None:
        """`lost(peer, path_lost)` is called at the end; `path_lost`: it ended with its connection, not in order."""
        self._host = host
        self._peer = peer
        self._lost = lost
        self._closed: Exception | None = None
        self._queue: list[bytes] = []
        self._queued = 0
        """Bytes in the queue, and in the stream until it is drained."""
        self._all = queued
        self._wake = trio.Event()
        self.dropped = 0

    def send(self, data: bytes) -> None:
        """Queue a message; dropped when the peer is far behind."""
        size = len(data)
        crowded = self._all.bytes + size > MAX_ALL_QUEUED_BYTES
        if self._queued + size > (FAIR_QUEUED_BYTES if crowded else MAX_QUEUED_BYTES):
            self.dropped += 1
            return
        self._queue += [size.to_bytes(4, "big"), data]
        self._count(size)
        self._wake.set()

    def _count(self, size: int) -> None:
        self._queued += size
        self._all.bytes += size

    async def run(self) -> None:
        """Send until the peer is gone or nothing was to be sent for long; tells `lost` at the end."""
        stream: Stream | None = None
        path_lost = False
        try:
            while True:
                with trio.move_on_after(LINK_IDLE) as idle:
                    await self._wake.wait()
                if idle.cancelled_caught:
                    break
                self._wake = trio.Event()
                if self._closed is not None:
                    raise self._closed
                if stream is None:
                    stream = await self._host.open_stream(self._peer, PROTOCOL)
                    stream.set_sink(self)
                queue, self._queue = self._queue, []
                size = self._queued
                stream.write(*queue)
                with trio.fail_after(SEND_TIMEOUT):
                    await stream.drain()
                self._count(-size)
        except (LatticaError, ProtocolError, trio.TooSlowError) as error:
            log.debug("replica_link_lost peer=%s error=%s", self._peer.short(), error)
            path_lost = stream is not None and isinstance(stream.connection.close_error, ConnectionLost)
        finally:
            if stream is not None:
                stream.reset()
            self._count(-self._queued)
            self._lost(self._peer, path_lost)

    # -- the stream's sink: the peer sends on one of its own, so this only tells when ours is gone --------------
    def data_received(self, data: memoryview) -> None:
        raise RemoteProtocolError("data against the direction of a link")

    def eof_received(self) -> None: ...

    def stream_closed(self, error: Exception | None) -> None:
        self._closed = error or StreamReset("the peer closed the link")
        self._wake.set()


async def receive_messages(stream: Stream) -> AsyncGenerator[bytes, None]:
    """The messages of an inbound stream, until the peer ends it."""
    buffer = bytearray()
    while data := await stream.receive_some(1 << 18):
        buffer += data
        at = 0
        while len(buffer) - at >= 4:
            length = int.from_bytes(buffer[at : at + 4], "big")
            if length > REPLICA_MAX_MESSAGE_BYTES:
                raise RemoteProtocolError(f"message of {length} bytes is over {REPLICA_MAX_MESSAGE_BYTES}")
            if len(buffer) - at < 4 + length:
                break
            yield bytes(buffer[at + 4 : at + 4 + length])
            at += 4 + length
        del buffer[:at]
