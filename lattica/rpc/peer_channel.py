"""One session with a peer: a control stream, its machine, and the bulk streams that carry long tails."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import trio

from lattica.errors import ConnectionLost, LatticaError, StreamReset
from lattica.interfaces import Stream
from lattica.rpc.channel import Channel, RequestHandler, Turn
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import RPC_MAX_BULK_STREAMS
from lattica_protocols.rpc.bulk import BulkReader
from lattica_protocols.rpc.calls import Call
from lattica_protocols.rpc.connection import RpcConnection
from lattica_protocols.rpc.frames import GOAWAY, HELLO, Buffer, Hello, encode_bulk_header, encode_hello

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from lattica_protocols.peer_id import PeerId

HIGH_WATER: Final = 1 << 20
"""Unsent bytes on the control stream above which handlers and callers wait before they add more."""
UNREAD_LIMIT: Final = 16 << 20
"""Unsent bytes that end the session: only a peer that asks and never reads gets there, as all else waits."""
BULK_HIGH_WATER: Final = 16 << 20
"""Unsent bytes of long tails above which handlers wait before they add more."""
OPENED_BULK_STREAMS: Final = 4
"""Bulk streams we open ourselves; they share one path, so this is for fairness among tails and not for speed."""


class BulkStream:
    """One bulk stream: sends tails from the session's queue, receives those of the peer."""

    def __init__(self, channel: PeerChannel, stream: Stream) -> None:
        self._channel = channel
        self._stream = stream
        self._reader = BulkReader(channel.machine)

    def data_received(self, data: memoryview) -> None:
        if not self._channel.closed.is_set():
            self._reader.receive_data(data)
            self._channel.dispatch()

    def eof_received(self) -> None:
        self._channel.abort("a bulk stream ended")

    def stream_closed(self, error: Exception | None) -> None:
        self._channel.abort("a bulk stream was lost")

    async def run(self) -> None:
        """Send tails until the session is over."""
        self._stream.set_sink(self)
        try:
            while True:
                tail_id, length, buffers = await self._channel.next_tail()
                self._stream.write(encode_bulk_header(tail_id, length), *buffers)
                await self._stream.drain()
                self._channel.tail_sent(length)
        except (ConnectionLost, StreamReset):
            self._channel.abort("a bulk stream was lost")
        finally:
            self._stream.reset()


class PeerChannel(Channel):
    """A session. `run` has to run as long as it lives; `open_bulk` opens a stream for long tails, negotiated."""

    def __init__(
        self,
        stream: Stream,
        machine: RpcConnection,
        session: bytes,
        on_request: RequestHandler,
        open_bulk: Callable[[], Awaitable[Stream]],
        turn: Turn | None = None,
    ) -> None:
        super().__init__(machine, on_request, turn)
        self.stream = stream
        self.peer: PeerId = stream.connection.peer_id
        self.session = session
        self.closed = trio.Event()
        self.greeted = trio.Event()
        """The peer's HELLO is here, or never comes."""
        self.capacity = trio.lowlevel.ParkingLot()
        """Callers that wait because the peer takes no more calls at the moment."""
        self._open_bulk = open_bulk
        self._nursery: trio.Nursery | None = None
        self._timer_scope: trio.CancelScope | None = None
        self._tails: deque[tuple[int, int, Sequence[Buffer]]] = deque()
        self._tail_bytes = 0
        self._idle_bulk = trio.lowlevel.ParkingLot()
        self._bulk_room = trio.lowlevel.ParkingLot()
        self._opened_bulk = 0
        self._bulk_streams = 0
        self._closing = False
        self.on_retired: Callable[[PeerChannel], None] | None = None
        """Called when the session takes no new calls any more."""
        machine.session_call.owner = self

    # -- life -----------------------------------------------------------------------------------------
    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Live until the stream is gone."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._run_timer)
                self.stream.set_sink(self)
                self.flush()
                task_status.started()
                await self.closed.wait()
                nursery.cancel_scope.cancel()
        finally:
            self.abort("the session was closed")

    def abort(self, reason: str) -> None:
        """End the session at once: every call on it fails. Safe to call twice."""
        if not self.closed.is_set():
            self.closed.set()
            self.greeted.set()
            self.stream.reset()
            self.lost(reason)
            self.capacity.unpark_all()
            self._bulk_room.unpark_all()
            self._tails.clear()
            self._idle_bulk.unpark_all()

    def retire(self) -> None:
        """Take no new calls; end when those that run are done, and the peer agrees."""
        self.machine.go_away()
        self.capacity.unpark_all()
        if self.on_retired is not None:
            self.on_retired(self)
        self.flush()

    def write_output(self) -> None:
        super().write_output()
        if self.machine.drained() and not self._closing and self._nursery is not None:
            self._closing = True
            self._nursery.start_soon(self._close_in_order)

    async def _close_in_order(self) -> None:
        try:
            await self.stream.close_write()
        except (ConnectionLost, StreamReset):
            pass  # it is closed, then

    async def serve_bulk(self, stream: Stream) -> None:
        """Use a bulk stream that the peer opened, until the session is over."""
        if self._bulk_streams >= RPC_MAX_BULK_STREAMS:
            raise RemoteProtocolError(f"more than {RPC_MAX_BULK_STREAMS} bulk streams")
        self._bulk_streams += 1
        await BulkStream(self, stream).run()

    # -- the control stream as a sink --------------------------------------------------------------------
    def data_received(self, data: memoryview) -> None:
        if self.closed.is_set():
            return
        self.machine.receive_data(data, trio.current_time())
        self.dispatch()
        if self.stream.queued_bytes() > UNREAD_LIMIT:
            raise RemoteProtocolError("the peer does not read its answers")

    def eof_received(self) -> None:
        self.abort("the peer closed the session")

    def stream_closed(self, error: Exception | None) -> None:
        self.abort(f"the connection to {self.peer.short()} was lost" + (f": {error}" if error else ""))

    def on_frame(self, kind: int, call: Call, head: bytes, tail: Buffer) -> None:
        """Events of the session itself."""
        if kind == HELLO:
            self.greeted.set()
            self.capacity.unpark_all()
        elif kind == GOAWAY:
            self.retire()

    # -- waiting ------------------------------------------------------------------------------------------
    def congested(self) -> bool:
        """The peer reads slower than we write."""
        if self.machine.outbox.unsent > HIGH_WATER:
            self.write_output()  # what a turn gathers would not be counted before its end
        return self.stream.queued_bytes() > HIGH_WATER or self._tail_bytes > BULK_HIGH_WATER

    async def writable(self) -> None:
        """Wait until the peer has caught up, or the session is over."""
        while self.congested() and not self.closed.is_set():
            if self._tail_bytes > BULK_HIGH_WATER:
                await self._bulk_room.park()
                continue
            try:
                await self.stream.drain()
            except (ConnectionLost, StreamReset):
                return

    # -- what the base class asks for -----------------------------------------------------------------------
    def now(self) -> float:
        return trio.current_time()

    def deadlines_changed(self) -> None:
        scope = self._timer_scope
        if scope is not None:
            when = self.machine.next_timeout()
            if when is not None and when < scope.deadline:
                scope.deadline = when

    def deadline_added(self, when: float) -> None:
        """A call with this deadline was opened: the timer may have to ring earlier."""
        scope = self._timer_scope
        if scope is not None and when < scope.deadline:
            scope.deadline = when

    async def _run_timer(self) -> None:
        while True:
            when = self.machine.next_timeout()
            with trio.CancelScope(deadline=float("inf") if when is None else when) as scope:
                self._timer_scope = scope
                await trio.sleep_forever()
            self.expire()

    def _write(self, buffers: Sequence[Buffer]) -> None:
        try:
            self.stream.write_now(*buffers)
        except (ConnectionLost, StreamReset):
            pass  # `stream_closed` tells

    # -- long tails ---------------------------------------------------------------------------------------
    def _write_detached(self, tail_id: int, length: int, buffers: Sequence[Buffer]) -> None:
        self._tails.append((tail_id, length, buffers))
        self._tail_bytes += length
        if self._idle_bulk:
            self._idle_bulk.unpark()
        elif self._opened_bulk < OPENED_BULK_STREAMS and self._nursery is not None:
            self._opened_bulk += 1
            self._nursery.start_soon(self._run_bulk)

    async def next_tail(self) -> tuple[int, int, Sequence[Buffer]]:
        """The next tail to send on a bulk stream. `ConnectionLost` when the session is over."""
        while not self._tails:
            if self.closed.is_set():
                raise ConnectionLost("the session is over")
            await self._idle_bulk.park()
        return self._tails.popleft()

    def tail_sent(self, length: int) -> None:
        """A tail has left: there is room for more."""
        self._tail_bytes -= length
        if self._bulk_room and self._tail_bytes <= BULK_HIGH_WATER:
            self._bulk_room.unpark_all()

    async def _run_bulk(self) -> None:
        await self.greeted.wait()  # only then does the peer know the session that the stream belongs to
        try:
            stream = await self._open_bulk()
            stream.write(encode_hello(Hello(self.session, bulk=True)))
        except LatticaError as error:
            self.abort(f"no bulk stream could be opened: {error}")
            return
        await BulkStream(self, stream).run()
