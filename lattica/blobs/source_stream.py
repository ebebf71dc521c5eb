"""The asking end of a stream: turns what one source sends into calls on the download it belongs to.

Everything here runs inside the task that reads the connection (`StreamSink`): decrypted bytes are copied once, into
the buffer of their chunk, and no task is woken before a chunk is whole.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Protocol

import trio

from lattica.blobs.files import new_buffer
from lattica.errors import ConnectionLost, LatticaError
from lattica_protocols.blobs.source import (
    BlobSource,
    ChunkReceived,
    GoneReceived,
    HaveReceived,
    MoreReceived,
    ObjectReceived,
    SourceEvent,
)
from lattica_protocols.limits import CHUNK_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from lattica.interfaces import Connection, Stream
    from lattica_protocols.blobs.chunk_set import ChunkRange, ChunkSet
    from lattica_protocols.multihash import Multihash
    from lattica_protocols.peer_id import PeerId

_BLOB = 0
"""A stream asks about one blob, under this number."""
_KEPT_BUFFERS = 16
OBJECT_TIMEOUT = 20.0
"""Seconds without progress on an object that was asked for."""
PROGRESS_BYTES = 4096
"""So many are progress, or whoever sends a byte now and then would be waited for without an end."""


class ChunkBuffers:
    """Chunk buffers that are used again, fit for direct writes. Fresh memory costs more than the copy into it."""

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    def take(self, length: int) -> memoryview:
        buffer = self._free.pop() if self._free else new_buffer(CHUNK_BYTES)
        return memoryview(buffer)[:length]

    def give_back(self, view: memoryview) -> None:
        buffer = view.obj
        view.release()
        if isinstance(buffer, mmap.mmap) and len(buffer) == CHUNK_BYTES and len(self._free) < _KEPT_BUFFERS:
            self._free.append(buffer)


class SourceOwner(Protocol):
    """What a source reports to."""

    buffers: ChunkBuffers

    def source_progressed(self, source: SourceStream) -> None: ...
    def chunk_came(self, source: SourceStream, index: int, buffer: memoryview) -> None: ...
    def chunk_gone(self, source: SourceStream, index: int) -> None: ...
    def source_grew(self, source: SourceStream, ranges: list[ChunkRange]) -> None: ...
    def source_closed(self, source: SourceStream) -> None: ...
    def waits_for(self, source: SourceStream) -> bool: ...


class SourceStream:
    """One peer, asked for one blob."""

    def __init__(self, owner: SourceOwner, peer: PeerId, stream: Stream) -> None:
        self.peer = peer
        self.machine = BlobSource(owner.buffers.take)
        self.have: ChunkSet | None = None
        """What the peer has; `None` before it answered, and when it has nothing."""
        self.answered = trio.Event()
        self.closed = False
        self.lost = False
        """It was closed because its connection is gone."""
        self.connection = stream.connection
        self.attached = False
        self.received_bytes = 0
        """Of whatever it sent, since the last look of `Places`."""
        self._owner = owner
        self._stream = stream
        self._objects: dict[int, tuple[trio.Event, list[bytes | None]]] = {}
        self._progressed = False
        self._unreported = 0

    def start(self, multihash: Multihash) -> None:
        """Ask what the peer has; `answered` is set when it told or the stream ended."""
        self.machine.want(_BLOB, multihash)
        self.flush()
        self._stream.connection.expect(self._waits)
        self._stream.set_sink(self)

    async def get_object(self, multihash: Multihash, max_bytes: int) -> bytes | None:
        """An object, its hash not checked; `None` when the peer does not have it, or does not answer."""
        number = len(self._objects)
        event: trio.Event = trio.Event()
        result: list[bytes | None] = [None]
        self._objects[number] = (event, result)
        self.machine.request_object(number, multihash, max_bytes)
        self.flush()
        while not self.closed:
            self._progressed = False
            with trio.move_on_after(OBJECT_TIMEOUT):
                await event.wait()
            if event.is_set() or not self._progressed:
                break
        return result[0]

    def gains_by(self, connection: Connection) -> bool:
        """Whether this peer should rather be asked over `connection`."""
        mine = self.connection
        if mine.path == "relay":
            return connection.path != "relay"
        return mine.path == connection.path and connection.for_bulk and not mine.for_bulk

    def set_manifest(self, count: int, chunk_size: Callable[[int], int]) -> None:
        """The manifest is known. Raises `RemoteProtocolError` when it contradicts what the peer told."""
        self.machine.set_chunk_sizes(_BLOB, count, chunk_size)

    def request(self, ranges: list[ChunkRange]) -> None:
        self.machine.request_chunks(_BLOB, ranges)
        self.flush()

    def cancel(self, ranges: list[ChunkRange]) -> None:
        self.machine.cancel_chunks(_BLOB, ranges)
        self.flush()

    def flush(self) -> None:
        frames = self.machine.poll_transmit()
        if frames and not self.closed:
            try:
                self._stream.write(*frames)
            except LatticaError:
                pass  # `stream_closed` follows, or has been called

    def pause(self) -> None:
        if not self.closed:
            self._stream.pause_sink()

    def resume(self) -> None:
        if not self.closed:
            self._stream.resume_sink()

    def reset(self) -> None:
        """End the stream now."""
        self._stream.reset()
        self.stream_closed(None)

    # -- StreamSink -----------------------------------------------------------------------------------------
    def data_received(self, data: memoryview) -> None:
        if self.closed:
            return
        self.machine.receive_data(data)
        self.received_bytes += len(data)
        self._unreported += len(data)
        if self._unreported >= PROGRESS_BYTES:
            self._unreported = 0
            self._progressed = True
            self._owner.source_progressed(self)
        while (event := self.machine.next_event()) is not None:
            self._on_event(event)

    def eof_received(self) -> None:
        self._stream.reset()

    def stream_closed(self, error: Exception | None) -> None:
        if self.closed:
            return
        self.closed = True
        self.lost = isinstance(error, ConnectionLost)
        self._stream.connection.unexpect(self._waits)
        self.answered.set()
        unfinished = self.machine.take_unfinished()
        if unfinished is not None:
            self._owner.buffers.give_back(unfinished)
        for event, _ in self._objects.values():
            event.set()
        self._owner.source_closed(self)

    def owes(self) -> bool:
        """It was asked for something that has not come."""
        return any(not event.is_set() for event, _ in self._objects.values()) or self._owner.waits_for(self)

    def _waits(self) -> bool:
        return not self.answered.is_set() or self._owner.waits_for(self)

    def _on_event(self, event: SourceEvent) -> None:
        if isinstance(event, ChunkReceived):
            self._owner.chunk_came(self, event.index, event.buffer)
        elif isinstance(event, GoneReceived):
            self._owner.chunk_gone(self, event.index)
        elif isinstance(event, MoreReceived):
            if not self.attached and self.have is not None:
                for first, count in event.ranges:
                    for index in range(first, first + count):
                        self.have.add(index)
            self._owner.source_grew(self, event.ranges)
        elif isinstance(event, HaveReceived):
            self.have = event.have
            self.answered.set()
        else:
            assert isinstance(event, ObjectReceived)
            done, result = self._objects[event.request]
            result[0] = event.data
            done.set()
