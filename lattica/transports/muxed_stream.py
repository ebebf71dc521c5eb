"""`MuxedStream`: the `Stream` that a `MuxedConnection` gives out.

Inbound data takes the shortest way there is: to the sink by call; else straight into the buffer of a task
that waits in `receive_into`; else into a buffer that the stream's window bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import outcome
import trio

from lattica.errors import StreamReset
from lattica.interfaces import Buffer, Stream, StreamSink
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import YAMUX_MAX_BUFFERED
from lattica_protocols.yamux_stream import YamuxStream

if TYPE_CHECKING:
    from lattica.transports.muxed import MuxedConnection

HIGH_WATER: Final = 256 * 1024
"""`drain` waits while this much or more is queued (see `Stream.drain`)."""


class MuxedStream(Stream):
    """One yamux stream."""

    def __init__(self, connection: MuxedConnection, state: YamuxStream) -> None:
        self.connection = connection
        self.protocol = None
        self._connection = connection
        self._session = connection.session
        self.state = state
        state.context = self
        self._buffer = bytearray()
        self._pushed_back = 0  # bytes at the front of the buffer that count as consumed already
        self._sink: StreamSink | None = None
        self._waiting_reader: trio.lowlevel.Task | None = None
        self._target: memoryview | None = None
        self._eof = False
        self._eof_told = False
        self._ended = False
        self._discarding = False
        self._error: Exception | None = None

    # -- sending ---------------------------------------------------------------------------------------------
    def write(self, *buffers: Buffer) -> None:
        if self._error is not None or self.state.fin_due:
            self._refuse_write()
        self._session.write(self.state, *buffers)
        self._connection.wake_writer()

    def write_now(self, *buffers: Buffer) -> None:
        if self._error is not None or self.state.fin_due:
            self._refuse_write()
        self._session.write(self.state, *buffers)
        self._connection.send_now()

    def write_through(self, data: memoryview) -> None:
        self.borrow(data)
        self.settle()

    def borrow(self, data: memoryview) -> None:
        """Queue memory that stays as it is until `settle`, which has to follow before anything else runs."""
        if self._error is not None or self.state.fin_due:
            self._refuse_write()
        self._session.write(self.state, data)

    def settle(self) -> None:
        """Send what was borrowed from where it is, as far as the channel takes it, and copy the rest."""
        self._connection.send_now()
        if self.state.queued:
            self.state.own_borrowed()
            self._connection.wake_writer()

    def when_read(self, call: Callable[[], None]) -> bool:
        """Called by a sink: its memory stays as it is until `call` was called, when the whole of this read has been
        delivered. False: there is no read going on, the memory is valid during the sink's call only."""
        return self._connection.when_read(call)

    def _refuse_write(self) -> None:
        if self._error is not None:
            raise _again(self._error)
        raise StreamReset("our direction of the stream is already closed")

    def queued_bytes(self) -> int:
        return self.state.queued

    async def drain(self, below: int | None = None) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        state, below = self.state, HIGH_WATER if below is None else below
        if state.queued >= below:
            await self._connection.wait_sent(self, state.sent + state.queued - below + 1)
        elif self._error is not None:
            raise _again(self._error)

    async def send_all(self, data: Buffer) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        state = self.state
        if type(data) is bytes and state.queued + len(data) < HIGH_WATER:
            self.write(data)  # cannot change, so there is nothing to wait for
            return
        if len(data) == 0:
            return
        with memoryview(data) as whole, whole.cast("B") as view:
            self.write(view)
            done = False
            try:
                await self._connection.wait_sent(self, state.sent + state.queued)
                done = True
            finally:
                # Cancelled: the caller wants the memory back, and the peer must not see a hole in the stream. Either
                # nothing of it was sent, then it never was; or it stands first in the queue, and the rest is copied.
                if not done and not state.withdraw(view):
                    state.own_queued()

    async def close_write(self) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._error is not None:
            raise _again(self._error)
        self._session.close_write(self.state)
        self._connection.wake_writer()

    # -- receiving -------------------------------------------------------------------------------------------
    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        await trio.lowlevel.checkpoint_if_cancelled()
        if not self._buffer and not await self._wait_received(None):
            return b""
        data = bytes(memoryview(self._buffer)[:max_bytes])
        self._take_from_buffer(len(data))
        return data

    async def receive_into(self, buffer: Buffer) -> int:
        await trio.lowlevel.checkpoint_if_cancelled()
        view = memoryview(buffer)
        if view.format != "B" or view.ndim != 1:
            view = view.cast("B")
        if not view:
            raise ValueError("the buffer is empty")
        if not self._buffer:
            return await self._wait_received(view)
        size = min(len(view), len(self._buffer))
        with memoryview(self._buffer) as source:
            view[:size] = source[:size]
        self._take_from_buffer(size)
        return size

    async def _wait_received(self, target: memoryview | None) -> int:
        """Wait for data. It is in `target`, so many bytes, or in the buffer when there is no target. 0 at the
        end."""
        if self._eof:
            return 0
        if self._error is not None:
            raise _again(self._error)
        if self._waiting_reader is not None:
            raise trio.BusyResourceError("another task reads from this stream")
        self._waiting_reader = trio.lowlevel.current_task()
        self._target = target

        def abort(_raise_cancel: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
            self._waiting_reader = self._target = None
            return trio.lowlevel.Abort.SUCCEEDED

        received: int = await trio.lowlevel.wait_task_rescheduled(abort)
        return received

    def _wake_reader(self, result: outcome.Outcome[int]) -> None:
        task = self._waiting_reader
        if task is not None:
            self._waiting_reader = self._target = None
            trio.lowlevel.reschedule(task, result)

    def _take_from_buffer(self, size: int) -> None:
        """Drop bytes from the front of the buffer and give the peer its window back."""
        del self._buffer[:size]
        credit = size - self._pushed_back
        self._pushed_back = max(0, -credit)
        if credit > 0:
            self._connection.unread_bytes -= credit
            self._consume(credit)

    def _consume(self, size: int) -> None:
        self._session.consume(self.state, size, self._connection.now())
        self._connection.wake_writer()

    def push_back(self, data: bytes) -> None:
        self._buffer[:0] = data
        self._pushed_back += len(data)

    def set_sink(self, sink: StreamSink) -> None:
        self._sink = sink
        if self._buffer:
            data, self._buffer = self._buffer, bytearray()
            credit = len(data) - self._pushed_back
            self._pushed_back = 0
            self._connection.unread_bytes -= credit
            with memoryview(data) as view:
                self._call_sink(view)
            if credit:
                self._consume(credit)
        self._tell_sink_end()

    def pause_sink(self) -> None:
        self._session.set_granting(self.state, False, self._connection.now())

    def resume_sink(self) -> None:
        self._session.set_granting(self.state, True, self._connection.now())
        self._connection.wake_writer()

    def limit_window(self, size: int) -> None:
        self._session.limit_window(self.state, size)

    def _call_sink(self, data: memoryview) -> None:
        assert self._sink is not None
        try:
            self._sink.data_received(data)
        except RemoteProtocolError as error:
            self._abort(StreamReset(f"the peer broke the protocol: {error}"))

    def _tell_sink_end(self) -> None:
        sink = self._sink
        if sink is None:
            return
        if self._eof and not self._eof_told and self._error is None and not self._discarding:
            self._eof_told = True
            try:
                sink.eof_received()
            except RemoteProtocolError as error:
                self._abort(StreamReset(f"the peer broke the protocol: {error}"))
        if (self._ended or self._error is not None) and self._sink is sink:
            self._sink = None
            sink.stream_closed(self._error)

    # -- ending ----------------------------------------------------------------------------------------------
    def reset(self) -> None:
        self._drop_buffer()
        self._abort(StreamReset("the stream was reset by us"))

    def _abort(self, error: Exception) -> None:
        if self._error is None and not self._ended:
            self._session.reset(self.state)
            self._connection.wake_writer()
            self.fail(error)

    async def aclose(self) -> None:
        if self._error is None and not self._discarding:
            self._session.close_write(self.state)
            self._discarding = True
            self._drop_buffer()
            if not self._ended:
                self._connection.linger(self)
            self._connection.wake_writer()
            self._wake_reader(outcome.Value(0))
        await trio.lowlevel.checkpoint_if_cancelled()

    # -- from the connection ---------------------------------------------------------------------------------
    def deliver(self, data: memoryview) -> None:
        """Data of the peer."""
        size = len(data)
        if self._error is not None:
            return
        if self._sink is not None and not self._discarding:
            self._call_sink(data)
        elif self._discarding:
            # No window is given back, so a peer that goes on sending runs into the wall.
            if self.state.receive_window == 0:
                self.reset()
            return
        elif self._target is not None:
            size = min(size, len(self._target))
            self._target[:size] = data[:size]
            self._wake_reader(outcome.Value(size))
            if size < len(data):
                self._keep(data[size:])
        else:
            self._keep(data)
            self._wake_reader(outcome.Value(size))
            return
        self._session.consume(self.state, size, self._connection.now())

    def _keep(self, data: memoryview) -> None:
        self._buffer += data
        self._connection.unread_bytes += len(data)
        if self._connection.on_unread is not None:
            self._connection.on_unread(len(data))
        if self._connection.unread_bytes > YAMUX_MAX_BUFFERED:
            self._drop_buffer()
            self._abort(StreamReset(f"over {YAMUX_MAX_BUFFERED} bytes of this connection wait to be read"))

    def _uncount_buffer(self) -> None:
        """What is buffered is ours from now on: nobody gets window for it, and it goes away with this object."""
        self._connection.unread_bytes -= len(self._buffer) - self._pushed_back
        self._pushed_back = len(self._buffer)

    def _drop_buffer(self) -> None:
        self._uncount_buffer()
        self._buffer.clear()
        self._pushed_back = 0

    def deliver_eof(self) -> None:
        """The peer finished its direction."""
        self._eof = True
        self._wake_reader(outcome.Value(0))
        self._tell_sink_end()

    def finish(self) -> None:
        """Both directions ended in order."""
        self._ended = True
        self._uncount_buffer()
        self._tell_sink_end()

    def fail(self, error: Exception) -> None:
        """The stream is gone. What was received before can still be read."""
        if self._error is None and not self._ended:
            self._error = error
            self._uncount_buffer()
            self._connection.fail_write_waiters(self, error)
            self._wake_reader(outcome.Error(_again(error)))
            self._tell_sink_end()


def _again(error: Exception) -> Exception:
    """The same error as a new object: a traceback grows each time an object is raised."""
    return type(error)(*error.args)
