"""One session with a peer: a control stream, its machine, and the bulk streams that carry long tails."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import trio

from lattica.errors import ConnectionLost, LatticaError, PathLost, StreamReset
from lattica.interfaces import Connection, Stream
from lattica.rpc.channel import Channel, RequestHandler, Turn
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import RPC_MAX_BULK_STREAMS, RPC_MAX_UNACKED
from lattica_protocols.rpc.bulk import BulkReader
from lattica_protocols.rpc.calls import Call
from lattica_protocols.rpc.connection import RpcConnection
from lattica_protocols.rpc.frames import ACK, GOAWAY, HELLO, Buffer, Hello, encode_bulk_header, encode_hello
from lattica_protocols.rpc.resume import Account, Tail

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from lattica_protocols.peer_id import PeerId

HIGH_WATER: Final = 1 << 20
"""Unsent bytes on the control stream above which handlers and callers wait before they add more."""
UNREAD_LIMIT: Final = 16 << 20
"""Unsent bytes that end the session: only a peer that asks and never reads gets there, as all else waits."""
UNACKED_LIMIT: Final = 2 * RPC_MAX_UNACKED
"""The same for a peer that reads and does not acknowledge."""
BULK_HIGH_WATER: Final = 16 << 20
"""Unsent bytes of long tails above which handlers wait before they add more."""
OPENED_BULK_STREAMS: Final = 4
"""Bulk streams we open ourselves; they share one path, so this is for fairness among tails and not for speed."""
SILENT_SECONDS: Final = 20.0
"""How long a session waits for another path when the one it had fell silent: the peer changes networks, or its NAT
forgot us. A phone takes some 5 s from Wi-Fi to mobile."""
TOLD_SECONDS: Final = 5.0
"""The same when the other end closed the path: in all likelihood its process is gone."""
PASSIVE_SECONDS: Final = 30.0
"""How long a session without calls is kept for a peer that notices the loss later, and has 20 s from then on."""


class BulkStream:
    """One bulk stream: sends tails from the session's queue, receives those of the peer, as long as the control stream
    that it goes with carries the session."""

    def __init__(self, channel: PeerChannel, stream: Stream) -> None:
        self._channel = channel
        self._stream = stream
        self._reader = BulkReader(channel.machine)
        self._scope = trio.CancelScope()
        self.over = False

    def data_received(self, data: memoryview) -> None:
        if not self.over:
            try:
                self._reader.receive_data(data)
            except RemoteProtocolError as error:
                self._channel.abort(f"the peer broke the protocol: {error}")
                raise
            self._channel.dispatch()

    def eof_received(self) -> None:
        self._lost("a bulk stream ended")

    def stream_closed(self, error: Exception | None) -> None:
        self._lost("a bulk stream was lost")

    def stop(self) -> None:
        """Take and send nothing more."""
        self.over = True
        self._scope.cancel()

    def _lost(self, reason: str) -> None:
        if not self.over:
            self._channel.bulk_lost(reason)

    async def run(self) -> None:
        """Send tails until the session is over, or goes on elsewhere."""
        channel, stream = self._channel, self._stream
        channel.bulk_streams.add(self)
        try:
            with self._scope:
                stream.set_sink(self)
                while True:
                    tail_id, length, buffers = await channel.next_tail()
                    stream.write(encode_bulk_header(tail_id, length), *buffers)
                    await stream.drain()
                    del buffers  # gigabytes, perhaps, which would be kept until the next tail
                    channel.tail_sent(length)
        except (ConnectionLost, StreamReset):
            self._lost("a bulk stream was lost")
        finally:
            self.over = True
            channel.bulk_streams.discard(self)
            stream.reset()


class ControlPath:
    """A control stream as a sink. It is deaf from the moment on at which we tell the peer how far we are: what it still
    brings comes again."""

    __slots__ = ("_channel", "gone", "stream")

    def __init__(self, channel: PeerChannel, stream: Stream) -> None:
        self._channel = channel
        self.stream = stream
        self.gone = trio.Event()
        """The stream is closed."""

    def data_received(self, data: memoryview) -> None:
        if self._channel.path is self:
            self._channel.data_received(data)

    def eof_received(self) -> None:
        if self._channel.path is self:
            self._channel.abort("the peer closed the session")

    def stream_closed(self, error: Exception | None) -> None:
        self.gone.set()
        if self._channel.path is self:
            self._channel.path_lost(self.stream.connection, error)


class PeerChannel(Channel):
    """A session. `run` has to run as long as it lives; `open_bulk` opens a stream for long tails, negotiated.

    When its path is lost the session is *suspended*: nothing is sent, no call can be opened, those that run wait.
    `reopen` then looks for another path, and `paths.py` has both sides of the exchange that goes on over it."""

    def __init__(
        self,
        stream: Stream,
        machine: RpcConnection,
        session: bytes,
        on_request: RequestHandler,
        open_bulk: Callable[[], Awaitable[Stream]],
        turn: Turn | None = None,
        *,
        initiator: bool = True,
    ) -> None:
        super().__init__(machine, on_request, turn)
        self.stream = stream
        self.path: ControlPath | None = None
        """What carries the session now, `None` before it runs and while it is suspended."""
        self.peer: PeerId = stream.connection.peer_id
        self.session = session
        self.initiator = initiator
        self.epoch = 0
        """The highest that one of the sides proposed, see `rpc.resume`."""
        self.proposing = False
        """We wait for the answer to our RESUME."""
        self.suspensions = 0
        """How often it was suspended."""
        self.closed = trio.Event()
        self.greeted = trio.Event()
        """The peer's HELLO is here, or never comes."""
        self.capacity = trio.lowlevel.ParkingLot()
        """Callers that wait because the peer takes no more calls at the moment."""
        self.bulk_streams: set[BulkStream] = set()
        self.give_up_at = 0.0
        """Of a suspended session: when it ends."""
        self.seeks_path = False
        """While suspended: we need a path. Otherwise that is left to the peer, which may have a call whose answer was
        lost."""
        self.lost_reason = ""
        """Why it is suspended."""
        self._open_bulk = open_bulk
        self._nursery: trio.Nursery | None = None
        self._timer_scope: trio.CancelScope | None = None
        self._tails: deque[Tail] = deque()
        self._tail_bytes = 0
        self._idle_bulk = trio.lowlevel.ParkingLot()
        self._room = trio.lowlevel.ParkingLot()
        self._opened_bulk = 0
        self._closing = False
        self._left: list[Stream] = []
        """Control streams that were given up, and that the peer may still use."""
        self.on_retired: Callable[[PeerChannel], None] | None = None
        """Called when the session takes no new calls any more."""
        self.on_resumed: Callable[[PeerChannel], None] | None = None
        self.reopen: Callable[[PeerChannel], Awaitable[None]] | None = None
        """Finds another path. Runs while the session is suspended."""
        machine.session_call.owner = self

    # -- life -----------------------------------------------------------------------------------------
    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Live until the session is over."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._run_timer)
                path = self.path = ControlPath(self, self.stream)
                self.stream.connection.expect(self.waits)
                self.stream.set_sink(path)
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
            self.stream.connection.unexpect(self.waits)
            for stream in (self.stream, *self._left):
                stream.reset()
            self._left.clear()
            for bulk in self.bulk_streams:
                bulk.stop()
            self.lost(reason)
            self.capacity.unpark_all()
            self._room.unpark_all()
            self._tails.clear()
            self._idle_bulk.unpark_all()

    def retire(self) -> None:
        """Take no new calls; end when those that run are done, and the peer agrees."""
        self.machine.go_away()
        self.capacity.unpark_all()
        if self.on_retired is not None:
            self.on_retired(self)
        self.flush()

    def start(self, work: Callable[..., Awaitable[None]], *args: object) -> None:
        """Run something in a task that ends with the session."""
        if self._nursery is not None and not self.closed.is_set():
            self._nursery.start_soon(work, *args)

    def waits(self) -> bool:
        """We wait for something of the peer: its silence means something."""
        return self.machine.outbound_calls > 0

    def write_output(self) -> None:
        super().write_output()
        if self.machine.drained() and not self._closing and self.path is not None and self._nursery is not None:
            self._closing = True
            self._nursery.start_soon(self._close_in_order)

    async def _close_in_order(self) -> None:
        try:
            await self.stream.close_write()
        except (ConnectionLost, StreamReset):
            pass  # it is closed, then

    async def serve_bulk(self, stream: Stream, epoch: int) -> None:
        """Use a bulk stream that the peer opened, until the session is over or goes on elsewhere."""
        if epoch != self.epoch or self.closed.is_set():
            stream.reset()  # it was on its way when the session moved
            return
        if len(self.bulk_streams) >= RPC_MAX_BULK_STREAMS:
            raise RemoteProtocolError(f"more than {RPC_MAX_BULK_STREAMS} bulk streams")
        await BulkStream(self, stream).run()

    # -- paths ----------------------------------------------------------------------------------------
    def path_lost(self, connection: Connection, error: Exception | None) -> None:
        """The control stream is gone. The peer did not want it to be when its connection was lost, too."""
        why = connection.close_error
        reason = f"the connection to {self.peer.short()} was lost" + (f": {error}" if error else "")
        if isinstance(error, ConnectionLost) and isinstance(why, ConnectionLost):
            self.suspend(reason, SILENT_SECONDS if isinstance(why, PathLost) else TOLD_SECONDS)
        else:
            self.abort(reason)

    def bulk_lost(self, reason: str) -> None:
        """A bulk stream is gone, and tails with it: they are sent again when the session was resumed."""
        self.suspend(reason, SILENT_SECONDS, known=False)

    def suspend(self, reason: str, seconds: float, *, known: bool = True, reopen: bool = True) -> None:
        """Go on elsewhere within `seconds`, or end. `known`: the peer notices, too. Without `reopen` the caller has
        another path already."""
        machine = self.machine
        if self.closed.is_set() or machine.suspended:
            return
        if machine.resumption is None or machine.peer is None or machine.drained() or self.reopen is None:
            self.abort(reason)
            return
        self.detach()
        self.suspensions += 1
        self.seeks_path = self.has_calls() or not known
        self.lost_reason = reason
        self.give_up_at = trio.current_time() + (seconds if self.seeks_path else PASSIVE_SECONDS)
        if not reopen:
            return
        if not self.has_calls() and self.on_retired is not None:
            self.on_retired(self)  # new calls need not wait for this one
        self.start(self.reopen, self)

    def has_calls(self) -> bool:
        """Calls run, of ours or of the peer."""
        return self.machine.outbound_calls > 0 or self.machine.inbound_calls > 0

    def is_suspended(self, number: int) -> bool:
        """Still, or already, by the suspension of this number."""
        return self.machine.suspended and self.suspensions == number and not self.closed.is_set()

    def detach(self) -> None:
        """From now on nothing comes, so that `account` stays true until `attach`."""
        if self.path is not None:
            self.path = None
            self._left.append(self.stream)
            self.stream.connection.unexpect(self.waits)
        self.machine.suspended = True
        for bulk in self.bulk_streams:
            bulk.stop()
        self.bulk_streams.clear()
        self._opened_bulk = 0
        self._tails.clear()
        self._tail_bytes = 0

    def account(self) -> Account:
        """What we have of the session."""
        assert self.machine.resumption is not None
        return self.machine.resumption.received.account()

    def attach(self, stream: Stream, account: Account) -> ControlPath:
        """Go on over `stream` from where the peer is. `RemoteProtocolError` when that cannot be."""
        machine = self.machine
        assert machine.resumption is not None
        control, tails = machine.resumption.resume(account)
        self.stream, self.proposing, machine.suspended = stream, False, False
        path = self.path = ControlPath(self, stream)
        for left in self._left:
            left.reset()
        self._left.clear()
        if control:
            self._write(control)
        for tail in tails:
            self._write_detached(*tail)
        stream.connection.expect(self.waits)
        if self.on_resumed is not None:
            self.on_resumed(self)
        self.capacity.unpark_all()
        self._room.unpark_all()
        stream.set_sink(path)
        if not self.closed.is_set():
            self.flush()
        return path

    # -- the control stream -----------------------------------------------------------------------------
    def data_received(self, data: memoryview) -> None:
        """Bytes of the control stream, while it is ours."""
        machine = self.machine
        machine.receive_data(data, trio.current_time())
        self.dispatch()
        if self.stream.queued_bytes() > UNREAD_LIMIT:
            raise RemoteProtocolError("the peer does not read its answers")
        if machine.resumption is not None and machine.resumption.sent.control_bytes > UNACKED_LIMIT:
            raise RemoteProtocolError("the peer does not acknowledge its answers")

    def on_frame(self, kind: int, call: Call, head: bytes, tail: Buffer) -> None:
        """Events of the session itself."""
        if kind == ACK:
            self._room.unpark_all()
            if self._tails:
                self._idle_bulk.unpark_all()
        elif kind == HELLO:
            self.greeted.set()
            self.capacity.unpark_all()
        elif kind == GOAWAY:
            self.retire()

    # -- waiting ------------------------------------------------------------------------------------------
    def congested(self) -> bool:
        """The peer reads slower than we write."""
        if self.machine.outbox.unsent > HIGH_WATER:
            self.write_output()  # what a turn gathers would not be counted before its end
        resumption = self.machine.resumption
        if resumption is not None and resumption.sent.full:
            return True
        return (self.stream.queued_bytes() > HIGH_WATER and self.path is not None) or self._tail_bytes > BULK_HIGH_WATER

    def _unacknowledged(self) -> bool:
        resumption = self.machine.resumption
        return resumption is not None and resumption.sent.full

    async def writable(self) -> None:
        """Wait until the peer has caught up, or the session is over."""
        while self.congested() and not self.closed.is_set():
            if self._tail_bytes > BULK_HIGH_WATER or self._unacknowledged() or self.path is None:
                await self._room.park()
                continue
            try:
                await self.stream.drain()
            except (ConnectionLost, StreamReset):
                await trio.lowlevel.checkpoint()  # the sink hears of it, too

    async def ready(self) -> None:
        """Wait until the session has a path, or is over."""
        while self.machine.suspended and not self.closed.is_set():
            await self.capacity.park()
        await trio.lowlevel.checkpoint()

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
        if self.path is None:
            return  # kept, see `resume`
        try:
            self.stream.write_now(*buffers)
        except (ConnectionLost, StreamReset):
            pass  # `stream_closed` tells

    # -- long tails ---------------------------------------------------------------------------------------
    def _write_detached(self, tail_id: int, length: int, buffers: Sequence[Buffer]) -> None:
        if self.path is None:
            return  # kept, see `resume`
        self._tails.append((tail_id, length, buffers))
        self._tail_bytes += length
        if self._idle_bulk:
            self._idle_bulk.unpark()
        elif self._opened_bulk < OPENED_BULK_STREAMS and self._nursery is not None:
            self._opened_bulk += 1
            self._nursery.start_soon(self._run_bulk)

    async def next_tail(self) -> Tail:
        """The next tail to send on a bulk stream. `ConnectionLost` when the session is over."""
        while not self._tails or not self._may_send_tail():
            if self.closed.is_set():
                raise ConnectionLost("the session is over")
            await self._idle_bulk.park()
        return self._tails.popleft()

    def _may_send_tail(self) -> bool:
        resumption = self.machine.resumption
        return resumption is None or resumption.sent.may_send_tail(self._tails[0][0])

    def tail_sent(self, length: int) -> None:
        """A tail has left: there is room for more."""
        self._tail_bytes -= length
        if self._room and self._tail_bytes <= BULK_HIGH_WATER:
            self._room.unpark_all()

    async def _run_bulk(self) -> None:
        await self.greeted.wait()  # only then does the peer know the session that the stream belongs to
        epoch = self.epoch
        if self.machine.suspended:
            return
        try:
            stream = await self._open_bulk()
            if epoch == self.epoch and not self.machine.suspended:
                stream.write(encode_hello(Hello(self.session, bulk=True, epoch=epoch)))
        except LatticaError as error:
            if epoch == self.epoch:
                self.bulk_lost(f"no bulk stream could be opened: {error}")
            return
        if epoch == self.epoch and not self.machine.suspended:
            await BulkStream(self, stream).run()
        else:
            stream.reset()
