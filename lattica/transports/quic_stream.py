"""One bidirectional QUIC stream, as the node's services see it.

Receiving: bytes arrive by `deliver` from the connection's task and wait in a queue, or go straight to a sink. The
peer may send as much again only when bytes leave the queue or the sink is not paused, so one stream window bounds
what can wait here.

Ending: a RESET_STREAM of the peer ends both directions, as with yamux. STOP_SENDING ends our direction only: Rust sends
it whenever it drops a read half, after everything was read, so it is an error only for somebody who still writes.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import trio

from lattica.errors import ConnectionLost, StreamReset
from lattica.interfaces import Buffer, Stream, StreamSink
from lattica_protocols.errors import RemoteProtocolError

if TYPE_CHECKING:
    from lattica.transports.quic_connection import QuicLink

HIGH_WATER_BYTES = 256 * 1024
_SEND_ALL_CHUNK = 128 * 1024
_LINGER_BYTES = 64 * 1024
"""Thrown away silently after `aclose`; then the peer is told to stop. Not at once: the answer to a lazy negotiation
may still be under way, and a peer that fails to write it would drop our last bytes."""
_NO_ERROR = 0


class QuicStream(Stream):
    """See `lattica.interfaces.Stream`."""

    def __init__(self, link: QuicLink, stream_id: int) -> None:
        self.connection = link
        self.stream_id = stream_id
        self._link = link
        self._engine = link.engine
        self._chunks: deque[bytes] = deque()
        self._offset = 0
        """Bytes of the first chunk that were read."""
        self._buffered = 0
        self._pushed = b""
        self._receive_done = False
        """No more will arrive: end of stream, or reset."""
        self._eof = False
        """The peer finished its direction in order."""
        self._reader: trio.lowlevel.Task | None = None
        self._sink: StreamSink | None = None
        self._sink_paused = False
        self._owed = 0
        """Delivered to a paused sink, not yet granted to the peer again."""
        self._discarding = False
        self._discarded = 0
        self._stop_sent = False
        self._error: Exception | None = None
        self._write_done = False
        self._peer_stopped = False
        self._writers: trio.lowlevel.ParkingLot | None = None
        self._closed_reported = False

    # -- sending ------------------------------------------------------------------------------------------------------
    def write(self, *buffers: Buffer) -> None:
        self._check_writable()
        engine, stream_id = self._engine, self.stream_id
        for data in buffers:
            engine.write(stream_id, data)
        self._link.mark_dirty()

    async def drain(self, below: int | None = None) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        while self._engine.unsent_bytes(self.stream_id) >= (HIGH_WATER_BYTES if below is None else below):
            if self._error is not None or self._peer_stopped:
                break
            if self._writers is None:
                self._writers = trio.lowlevel.ParkingLot()
            self._link.waiting_writers.add(self)
            await self._writers.park()
        self._check_sending()

    async def send_all(self, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _SEND_ALL_CHUNK):
            self.write(view[start : start + _SEND_ALL_CHUNK])
            await self.drain()

    def queued_bytes(self) -> int:
        return self._engine.unsent_bytes(self.stream_id)

    async def close_write(self) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        self._finish_write()

    # -- receiving ----------------------------------------------------------------------------------------------------
    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        if not await self._wait_readable():
            return b""
        if self._pushed:
            data, self._pushed = self._pushed[:max_bytes], self._pushed[max_bytes:]
            return data
        if len(self._chunks) == 1 and not self._offset and self._buffered <= max_bytes:
            data = self._chunks.popleft()
            self._take(len(data))
            return data
        out = bytearray(min(max_bytes, self._buffered))
        self._copy_into(memoryview(out))
        return bytes(out)

    async def receive_into(self, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")
        if not view or not await self._wait_readable():
            return 0
        if self._pushed:
            count = min(len(view), len(self._pushed))
            view[:count] = self._pushed[:count]
            self._pushed = self._pushed[count:]
            return count
        return self._copy_into(view)

    def push_back(self, data: bytes) -> None:
        self._pushed = bytes(data) + self._pushed

    def set_sink(self, sink: StreamSink) -> None:
        if self._reader is not None:
            raise trio.BusyResourceError("another task reads from this stream")
        self._sink = sink
        if self._pushed:
            pushed, self._pushed = self._pushed, b""
            self._feed_sink(pushed, credit=0)
        while self._chunks and self._sink is not None:
            chunk = self._chunks.popleft()
            fresh = memoryview(chunk)[self._offset :]
            self._offset = 0
            self._buffered -= len(fresh)
            self._feed_sink(fresh, credit=len(fresh))
        if self._error is None and self._receive_done:
            self._feed_sink_eof()
        self._report_if_closed()

    def pause_sink(self) -> None:
        self._sink_paused = True

    def resume_sink(self) -> None:
        self._sink_paused = False
        owed, self._owed = self._owed, 0
        if owed and self._engine.consumed(self.stream_id, owed):
            self._link.mark_dirty()

    # -- ending -------------------------------------------------------------------------------------------------------
    def reset(self) -> None:
        if self._error is None and not (self._receive_done and self._write_done):
            self._abort(StreamReset("the stream was reset by us"))
        elif self._engine.unsent_bytes(self.stream_id):
            self._engine.abort_stream(self.stream_id, _NO_ERROR)
            self._link.mark_dirty()
        self._discard_buffered()

    async def aclose(self) -> None:
        self._finish_write()
        self._discarding = True
        self._discard_buffered()
        self._wake_reader()
        if not self._receive_done and self._error is None:
            self._link.linger(self)
        await trio.lowlevel.checkpoint()

    def stop_lingering(self) -> None:
        """The peer still sends although nobody reads any more: tell it."""
        if not self._receive_done:
            self._stop_sent = True
            self._engine.stop_receiving(self.stream_id, _NO_ERROR)
            self._link.mark_dirty()

    # -- called by the connection -------------------------------------------------------------------------------------
    def deliver(self, data: bytes, end: bool) -> None:
        """The next bytes of the stream, in order."""
        if end:
            self._receive_done = self._eof = True
            self._engine.receive_finished(self.stream_id)
        if data:
            if self._discarding:
                self._credit(len(data))
                self._discarded += len(data)
                if self._discarded - len(data) < _LINGER_BYTES <= self._discarded:
                    self.stop_lingering()
            elif self._sink is not None:
                self._feed_sink(data, credit=len(data))
            else:
                self._chunks.append(data)
                self._buffered += len(data)
        if end and not self._discarding:
            self._feed_sink_eof()
        self._wake_reader()
        self._report_if_closed()

    def peer_reset(self) -> None:
        """RESET_STREAM: the peer gave up on its direction, so we give up on ours."""
        unread = self._buffered + self._owed
        self._buffered = self._owed = 0
        self._chunks.clear()
        self._offset = 0
        self._receive_done = True
        if self._engine.reset_received(self.stream_id, unread):
            self._link.mark_dirty()
        if self._stop_sent:
            self._report_if_closed()  # what we asked for
        else:
            self._abort(StreamReset("the stream was reset by the peer"))

    def peer_stopped(self) -> None:
        """STOP_SENDING: the peer reads no more."""
        self._peer_stopped = True
        if not self._write_done:
            self._write_done = True
            self._wake_writers()
            self._report_if_closed()

    def connection_lost(self, error: Exception) -> None:
        """The connection under the stream is gone."""
        self._receive_done = self._write_done = True
        self._error = self._error or error  # what has arrived can still be read
        self._wake_reader()
        self._wake_writers()
        self._report_closed(self._error)

    def wake_writers_if_drained(self) -> bool:
        """After a transmission. False while tasks still have to wait."""
        if self._engine.unsent_bytes(self.stream_id) >= HIGH_WATER_BYTES and self._error is None:
            return False
        self._wake_writers()
        return True

    @property
    def failed(self) -> bool:
        """It was reset, or its connection is gone."""
        return self._error is not None

    @property
    def finished(self) -> bool:
        """Nothing is left to do in either direction, except for what the engine sends again by itself."""
        return self._receive_done and self._write_done

    # -- inside -------------------------------------------------------------------------------------------------------
    def _check_writable(self) -> None:
        self._check_sending()
        if self._write_done:
            raise StreamReset("our direction of the stream is already finished")

    def _check_sending(self) -> None:
        if self._error is not None:
            raise _again(self._error)
        if self._peer_stopped:
            raise StreamReset("the peer stopped reading from the stream")

    def _finish_write(self) -> None:
        if self._write_done:
            return
        self._write_done = True
        self._engine.finish(self.stream_id)
        self._link.mark_dirty()
        self._report_if_closed()

    async def _wait_readable(self) -> bool:
        """True when there is something to read, False at the end of the stream."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._buffered and not self._pushed:
            if self._error is not None and not (self._eof and isinstance(self._error, ConnectionLost)):
                raise _again(self._error)
            if self._receive_done or self._discarding:
                return False
            if self._reader is not None:
                raise trio.BusyResourceError("another task reads from this stream")
            self._reader = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._stop_waiting)
        return True

    def _stop_waiting(self, _: object) -> trio.lowlevel.Abort:
        self._reader = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _wake_reader(self) -> None:
        if self._reader is not None:
            reader, self._reader = self._reader, None
            trio.lowlevel.reschedule(reader)

    def _wake_writers(self) -> None:
        if self._writers is not None:
            self._writers.unpark_all()

    def _copy_into(self, view: memoryview) -> int:
        filled = 0
        size = len(view)
        while filled < size and self._chunks:
            chunk = self._chunks[0]
            count = min(len(chunk) - self._offset, size - filled)
            view[filled : filled + count] = memoryview(chunk)[self._offset : self._offset + count]
            filled += count
            self._offset += count
            if self._offset == len(chunk):
                self._chunks.popleft()
                self._offset = 0
        self._take(filled)
        return filled

    def _take(self, count: int) -> None:
        self._buffered -= count
        self._credit(count)

    def _credit(self, count: int) -> None:
        if self._engine.consumed(self.stream_id, count):
            self._link.mark_dirty()

    def _feed_sink(self, data: bytes | memoryview, credit: int) -> None:
        if self._sink is None:
            self._credit(credit)
            return
        try:
            self._sink.data_received(memoryview(data))
        except RemoteProtocolError as error:
            self._credit(credit)
            self._abort(error)
            return
        if self._sink_paused:
            self._owed += credit
        else:
            self._credit(credit)

    def _feed_sink_eof(self) -> None:
        if self._sink is None:
            return
        try:
            self._sink.eof_received()
        except RemoteProtocolError as error:
            self._abort(error)

    def _discard_buffered(self) -> None:
        count, self._buffered = self._buffered + self._owed, 0
        self._owed = self._offset = 0
        self._chunks.clear()
        self._pushed = b""
        if count:
            self._credit(count)

    def _abort(self, error: Exception) -> None:
        """End both directions with `error`."""
        self._engine.abort_stream(self.stream_id, _NO_ERROR)
        self._write_done = True
        self._discarding = True
        self._link.mark_dirty()
        self._fail(error)

    def _fail(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
        self._discard_buffered()
        self._wake_reader()
        self._wake_writers()
        self._report_closed(self._error)
        self._link.forget_if_finished(self)

    def _report_if_closed(self) -> None:
        if self._receive_done and self._write_done:
            self._report_closed(self._error)
            self._link.forget_if_finished(self)

    def _report_closed(self, error: Exception | None) -> None:
        if self._sink is None or self._closed_reported:
            return
        self._closed_reported = True
        sink, self._sink = self._sink, None
        sink.stream_closed(error)


def _again(error: Exception) -> Exception:
    """The same error for another caller, without the tracebacks of the ones before."""
    kind = ConnectionLost if isinstance(error, ConnectionLost) else StreamReset
    return kind(str(error))
