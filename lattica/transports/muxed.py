"""`MuxedConnection`: Noise and yamux over a channel, driven by one reading and one writing task.

Reading: take what the channel has into memory shared by all connections, decrypt each message in place, let
yamux parse it and hand the data on at once; then send, without a detour over the writing task, what the sinks
wrote meanwhile.

Writing: whoever writes wakes the writing task, which runs when this scheduling turn is over. So everything
written in one turn is gathered: small frames of all streams into one Noise message, up to three messages into
one `send`. Who has gathered already sends without that detour (`send_now`). No more than one `send` is ever
encrypted before the socket has room for it, so that a small call overtakes the bulk that is still in the queues
of yamux.

Both stop after a bounded number of bytes to let other tasks run.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Awaitable, Callable
from typing import Final

import outcome
import trio

from lattica.errors import ConnectionLost, LatticaError, PathAltered, PathLost, PeerMisbehaved, StreamReset
from lattica.interfaces import Connection, Direction, Path
from lattica.transports.channel import Channel
from lattica.transports.muxed_stream import MuxedStream
from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.limits import YAMUX_ACK_BACKLOG
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.noise_transport import MAX_MESSAGE, MAX_PLAINTEXT, NoiseOpener, NoiseSealer, NotAuthentic
from lattica_protocols.paths.heartbeat import Heartbeat, Pace, Verdict
from lattica_protocols.peer_id import PeerId
from lattica_protocols.yamux import (
    GO_AWAY_NORMAL,
    GO_AWAY_PROTOCOL_ERROR,
    DataReceived,
    EofReceived,
    Event,
    GoAwayReceived,
    PingAnswered,
    StreamAborted,
    StreamAcknowledged,
    StreamFinished,
    StreamOpened,
    YamuxSession,
)
from lattica_protocols.yamux_stream import YamuxStream

logger = logging.getLogger(__name__)

RECEIVE_BYTES: Final = 192 * 1024
"""Memory one read goes into. Fits into a core's L2 cache together with what it is copied to."""
SEND_BYTES: Final = 3 * (MAX_MESSAGE + 2)
"""Encrypted and not yet taken by the socket, at the most: 0.2 ms at 1 GB/s, which a small call may have to
wait."""
TURN_BYTES: Final = 128 * 1024
"""Bytes after which one direction of a connection lets other tasks have their turn: one read, or one send. The
bulk of one connection keeps the calls of the others waiting for so long, twice on each side."""
TURN_READS: Final = 16
"""The same for reads that bring little."""
SATURATED_SECONDS: Final = 30.0
"""So long the acknowledgements of the peer's system stand for the peer: our probe waits in up to 4 MB of buffers before
a link that may be slow. Longer, and its process hangs."""
BULK_ALLOWANCE: Final = 4 << 20
"""Bytes in flight on a stream of a connection with nothing but bulk, beyond those of a round trip. With three messages,
as elsewhere, the sender of a blob stood still for a third of the time on a machine whose cores were all busy: the
receiver's turn, and with it more window, came too late."""
FREE_SEND_BUFFERS: Final = 4
"""Send buffers kept for the next connection that has something to send."""
CROWDED_SENDERS: Final = 16
"""When so many connections wait for their sockets the next ones get a buffer for one message and not for four: a relay
whose 100 targets are all slow holds 10 MB there and not 26. More messages in one send pay where few are fast."""
FIRST_PINGS: Final = 4
"""Pings right after the handshake. The shortest counts for the windows; the first meets processes busy with setup."""
PINGS_AGAIN_AFTER: Final = 1.0
"""Seconds until as many more: identify, the first lookups and the first calls are over by then, on most connections."""
GOODBYE_TIMEOUT: Final = 1.0
"""Seconds that `aclose` gives the peer to take what was still queued."""
LINGER_TIMEOUT: Final = 60.0
"""Seconds after which a stream that we closed, and the peer did not, is reset."""


class SharedMemory:
    """Receive and send buffers of all connections of one transport. An idle connection holds none of them."""

    def __init__(self) -> None:
        self.receive = memoryview(bytearray(RECEIVE_BYTES))
        """Used between two checkpoints only."""
        self._free: list[memoryview] = []
        self._senders = 0

    def acquire_send(self) -> memoryview:
        """`SEND_BYTES` of memory, for as long as something in it is waiting to be sent; less when many have some."""
        self._senders += 1
        if self._senders > CROWDED_SENDERS:
            return memoryview(bytearray(MAX_MESSAGE + 2))
        return self._free.pop() if self._free else memoryview(bytearray(SEND_BYTES))

    def release_send(self, buffer: memoryview) -> None:
        """Give it back."""
        self._senders -= 1
        if len(self._free) < FREE_SEND_BUFFERS and len(buffer) == SEND_BYTES:
            self._free.append(buffer)


class MuxedConnection(Connection):
    """A connection over a secured channel. `run` drives it and returns when it is over."""

    def __init__(
        self,
        channel: Channel,
        ciphers: tuple[NoiseSealer, NoiseOpener],
        *,
        initiator: bool,
        peer_id: PeerId,
        addrs: tuple[Multiaddr, Multiaddr],
        direction: Direction,
        path: Path,
        memory: SharedMemory,
        pace: Pace,
        received: bytes = b"",
        decrypted: bytes = b"",
    ) -> None:
        """`addrs`: local and remote. `received`: what came right behind the handshake; `decrypted`: what
        stood before it in messages that were opened already."""
        self.peer_id = peer_id
        self.local_addr, self.remote_addr = addrs
        self.direction = direction
        self.path = path
        self.opened_at = trio.current_time()
        self.sent_bytes = 0
        self.received_bytes = 0
        self.rtt = None
        self.closed = trio.Event()
        self.close_error = None
        self.session = YamuxSession(initiator=initiator)
        self.unread_bytes = 0
        """Received on all streams, and not read by anybody yet."""
        self._channel = channel
        self._sealer, self._opener = ciphers
        self.cipher = self._sealer.cipher
        self._memory = memory
        self._pace = pace
        self._heartbeat = Heartbeat(self.opened_at, pace)
        self._waits: list[Callable[[], bool]] = []
        self._watch_scope: trio.CancelScope | None = None
        """Set while nobody waits for the peer and a write has to wake the watch."""
        self._kept = received
        self._decrypted = decrypted
        self._scope = trio.CancelScope()
        self._accepted, self._to_accept = trio.open_memory_channel[MuxedStream](YAMUX_ACK_BACKLOG)
        self._openers = trio.lowlevel.ParkingLot()
        self._lingering: dict[MuxedStream, float] = {}
        # reading
        self._reading = False
        self._read_over: list[Callable[[], None]] = []
        self._read_at = self.opened_at
        self._answered = 0
        """Bytes of streams that were sent before we last heard of the peer."""
        # writing
        self._out: memoryview | None = None
        self._out_start = 0
        self._out_end = 0
        self._blocked = False
        self._unblocked_at = 0.0
        """When the channel, which was full, last took something: the peer, or its system, did, too."""
        self._first_pings = FIRST_PINGS - 1
        self._parked_writer: trio.lowlevel.Task | None = None
        self._write_waiters: list[tuple[MuxedStream, int, trio.lowlevel.Task]] = []
        self._output_gone = trio.lowlevel.ParkingLot()

    # -- the interface ---------------------------------------------------------------------------------------
    async def open_stream(self) -> MuxedStream:
        await trio.lowlevel.checkpoint()
        while True:
            if self.closed.is_set():
                raise self._lost()
            if self.session.go_away_received or self.session.go_away_sent:
                raise ConnectionLost("the connection is being closed")
            if self.session.can_open:
                break
            await self._openers.park()
        stream = MuxedStream(self, self.session.open_stream(trio.current_time()))
        self.wake_writer()
        return stream

    async def accept_stream(self) -> MuxedStream:
        try:
            stream = await self._to_accept.receive()
        except trio.EndOfChannel:
            raise self._lost() from None
        self.session.accept(stream.state)
        self.wake_writer()
        return stream

    def unread(self) -> int:
        return self.unread_bytes

    def stream_count(self) -> int:
        return len(self.session.streams)

    async def aclose(self) -> None:
        if self.closed.is_set():
            await trio.lowlevel.checkpoint()
            return
        self.session.go_away(GO_AWAY_NORMAL)
        self.wake_writer()
        try:
            with trio.move_on_after(GOODBYE_TIMEOUT):
                while not self.closed.is_set() and (self._out is not None or self.session.wants_transmit):
                    await self._output_gone.park()
        finally:
            self.abort()

    def abort(self, error: Exception | None = None) -> None:
        if self.closed.is_set():
            return
        self.close_error = error
        self.closed.set()
        lost = self._lost()
        for state in list(self.session.streams.values()):
            if state.context is not None:
                state.context.fail(lost)
        self._accepted.close()
        self._openers.unpark_all()
        self._output_gone.unpark_all()
        self._channel.close()
        self._scope.cancel()

    def _lost(self) -> ConnectionLost:
        return ConnectionLost(str(self.close_error) if self.close_error else "the connection is closed")

    # -- for the streams -------------------------------------------------------------------------------------
    def now(self) -> float:
        """Seconds. Inside a read all of its data counts as received at one moment."""
        return self._read_at if self._reading else trio.current_time()

    def when_read(self, call: Callable[[], None]) -> bool:
        """See `MuxedStream.when_read`."""
        if self._reading:
            self._read_over.append(call)
        return self._reading

    def wake_writer(self) -> None:
        """Something was queued: send it at the end of this turn."""
        task = self._parked_writer
        if task is not None and not self._reading and self.session.wants_transmit:
            self._parked_writer = None
            trio.lowlevel.reschedule(task)

    def send_now(self) -> None:
        """Send what is queued without the detour over the writing task, which costs a round of the scheduler."""
        if self._parked_writer is None or self._reading:
            return  # it leaves soon anyway
        try:
            state = self._flush()
        except (OSError, LatticaError):
            state = _Flushed.BLOCKED  # the writing task meets it again, and its error ends the connection
        if state is not _Flushed.ALL or self.session.has_events:
            self._unpark_writer()

    async def wait_sent(self, stream: MuxedStream, mark: int) -> None:
        """Wait until `mark` bytes of the stream were taken. Raises the stream's error when it fails
        before."""
        if self.closed.is_set():
            raise self._lost()
        entry = (stream, mark, trio.lowlevel.current_task())
        self._write_waiters.append(entry)

        def abort(_raise_cancel: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
            self._write_waiters.remove(entry)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def fail_write_waiters(self, stream: MuxedStream, error: Exception) -> None:
        """The stream is gone: tell the tasks that wait for it to send."""
        for entry in [entry for entry in self._write_waiters if entry[0] is stream]:
            self._write_waiters.remove(entry)
            trio.lowlevel.reschedule(entry[2], outcome.Error(type(error)(*error.args)))

    def linger(self, stream: MuxedStream) -> None:
        """The stream was closed by us; reset it if the peer does not close it, too."""
        self._lingering[stream] = trio.current_time() + LINGER_TIMEOUT

    # -- the tasks -------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Drive the connection until it is over. It never raises because of the peer."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._guard, self._read)
                    nursery.start_soon(self._guard, self._write)
                    nursery.start_soon(self._ping_again)
                    await self._guard(self._watch)
        finally:
            self.abort(None if self.closed.is_set() else ConnectionLost("the connection was closed by us"))
            self._release_out()

    async def _guard(self, task: Callable[[], Awaitable[None]]) -> None:
        """Turn what ends a task into the reason why the connection ended."""
        try:
            await task()
        except NotAuthentic as error:
            self.abort(PathAltered(f"what arrived was altered, repeated or cut on its way: {error}"))
        except RemoteProtocolError as error:
            self.session.go_away(GO_AWAY_PROTOCOL_ERROR)
            self._last_words()
            self.abort(PeerMisbehaved(f"the peer broke the protocol: {error}"))
        except trio.ClosedResourceError:
            self.abort()
        except (OSError, LatticaError, LocalProtocolError) as error:
            orderly = self.session.go_away_received or self.session.go_away_sent
            kind = PathLost if isinstance(error, PathLost) else ConnectionLost
            self.abort(None if orderly else kind(f"the connection was lost: {error}"))
        except Exception as error:
            # A bug in a sink, in the worst case one that a peer can provoke: it may cost this connection, not
            # the node.
            logger.exception("connection_bug peer=%s", self.peer_id.short())
            self.abort(ConnectionLost(f"internal error: {error!r}"))

    async def _ping_again(self) -> None:
        await trio.sleep(PINGS_AGAIN_AFTER)
        self._first_pings = FIRST_PINGS - 1
        self.session.ping(trio.current_time())
        self.wake_writer()

    async def _read(self) -> None:
        memory, channel = self._memory.receive, self._channel
        self.session.receive_untrusted(memoryview(self._decrypted), trio.current_time())
        self._handle_events()
        kept = len(self._kept)
        memory[:kept] = self._kept
        kept = self._receive(memory, kept)
        bytes_left, reads_left = TURN_BYTES, TURN_READS
        while not self.closed.is_set():
            size = channel.receive_now(memory[kept:])
            if size == 0:
                orderly = self.session.go_away_received or self.session.go_away_sent
                self.abort(None if orderly else ConnectionLost("the peer closed the connection"))
                return
            if size is not None:
                self.received_bytes += size
                drained = kept + size < len(memory)  # another read would find nothing
                kept = self._receive(memory, kept + size)
                bytes_left -= size
                reads_left -= 1
                if bytes_left > 0 and reads_left > 0 and not drained:
                    continue
            # Others use the memory while we wait, so the beginning of a message that is not all there moves
            # out.
            self._kept = bytes(memory[:kept])
            if self.closed.is_set():
                return
            if size is None or drained:
                await channel.wait_receivable()
            else:
                await trio.lowlevel.checkpoint()
            memory[:kept] = self._kept
            bytes_left, reads_left = TURN_BYTES, TURN_READS

    async def _write(self) -> None:
        while not self.closed.is_set():
            state = self._flush()
            self._handle_events()
            if state is _Flushed.BLOCKED:
                await self._channel.wait_sendable()
            elif state is _Flushed.PART:
                await trio.lowlevel.checkpoint()
            else:
                self._parked_writer = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(self._abort_parking)

    def _abort_parking(self, _raise_cancel: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
        self._parked_writer = None
        return trio.lowlevel.Abort.SUCCEEDED

    async def _watch(self) -> None:
        """Measure the round trip, notice a dead path, reset streams that the peer never closes."""
        session, heartbeat = self.session, self._heartbeat
        measure_at = 0.0
        while not self.closed.is_set():
            now = trio.current_time()
            wanted = session.data_sent != self._answered or self.doubtful or any(waits() for waits in self._waits)
            heard_at = self._read_at
            if now - heard_at < SATURATED_SECONDS:
                heard_at = max(heard_at, self._unblocked_at, self._channel.heard_at(now))
            verdict = heartbeat.check(now, heard_at=heard_at, wanted=wanted)
            if verdict is Verdict.DEAD:
                self.abort(PathLost(f"the peer has been silent for {now - heard_at:.1f} s"))
                return
            if verdict is Verdict.PROBE or (now >= measure_at and (wanted or not measure_at)):
                measure_at = now + self._pace.keep_alive
                session.ping(now)
                self.wake_writer()
            self._end_lingering()
            with trio.CancelScope(deadline=heartbeat.next_timeout) as scope:
                if not wanted:
                    self._watch_scope = scope
                await trio.sleep_forever()
            self._watch_scope = None

    def keep_up(self, every: float) -> None:
        self._heartbeat.keep_up(every, trio.current_time())
        self._wake_watch()

    def set_apart_for_bulk(self) -> None:
        super().set_apart_for_bulk()
        self.session.allowance = BULK_ALLOWANCE

    def ask(self) -> None:
        self.session.ping(trio.current_time())
        self.wake_writer()

    def doubt(self) -> None:
        super().doubt()
        self._wake_watch()

    def _wake_watch(self) -> None:
        if self._watch_scope is not None:
            self._watch_scope.cancel()
            self._watch_scope = None

    def expect(self, waits: Callable[[], bool]) -> None:
        self._waits.append(waits)

    def unexpect(self, waits: Callable[[], bool]) -> None:
        if waits in self._waits:
            self._waits.remove(waits)

    def _end_lingering(self) -> None:
        now = trio.current_time()
        for stream, deadline in list(self._lingering.items()):
            if stream.state.finished:
                del self._lingering[stream]
            elif now >= deadline:
                del self._lingering[stream]
                stream.reset()

    # -- receiving -------------------------------------------------------------------------------------------
    def _receive(self, memory: memoryview, filled: int) -> int:
        """Handle the whole messages in `memory[:filled]`; move the rest to the front and return its size."""
        session, opener = self.session, self._opener
        self._reading = True
        self._read_at = now = trio.current_time()
        self._answered = session.data_sent
        pos = 0
        try:
            while filled - pos > 2:
                end = pos + 2 + (memory[pos] << 8 | memory[pos + 1])
                if end > filled or self.closed.is_set():
                    break
                session.receive_untrusted(opener.open_untrusted(memory[pos + 2 : end]), now)
                pos = end
                self._handle_events()
        finally:
            self._reading = False
            while self._read_over:
                self._read_over.pop()()
        kept = filled - pos
        if kept and pos:
            memory[:kept] = memory[pos:filled]
        if session.wants_transmit and not self._blocked:
            if self._flush() is not _Flushed.ALL:
                self._unpark_writer()
            self._handle_events()
        return kept

    def _handle_events(self) -> None:
        next_event = self.session.next_event
        while (event := next_event()) is not None:
            self._handle(event)

    def _handle(self, event: Event) -> None:
        if isinstance(event, DataReceived):
            if event.stream.context is not None:
                event.stream.context.deliver(event.data)
        elif isinstance(event, StreamOpened):
            self._open_inbound(event.stream)
        elif isinstance(event, PingAnswered):
            sample = event.round_trip
            self.rtt = sample if self.rtt is None else self.rtt * 0.875 + sample * 0.125
            if self._first_pings:
                self._first_pings -= 1
                self.session.ping(self.now())
        elif isinstance(event, GoAwayReceived):
            self._openers.unpark_all()
            if event.code != GO_AWAY_NORMAL:
                self.abort(ConnectionLost(f"the peer ended the connection, error code {event.code}"))
        elif isinstance(event, StreamAcknowledged):
            self._openers.unpark()
        else:
            stream: MuxedStream | None = event.stream.context
            if not event.stream.inbound and not self.session.go_away_received:
                self._openers.unpark()
            if stream is None:
                return
            if isinstance(event, EofReceived):
                stream.deliver_eof()
            elif isinstance(event, StreamFinished):
                stream.finish()
            elif isinstance(event, StreamAborted):
                stream.fail(StreamReset(event.reason))

    def _open_inbound(self, state: YamuxStream) -> None:
        stream = MuxedStream(self, state)
        try:
            self._accepted.send_nowait(stream)
        except trio.WouldBlock:
            stream.reset()  # nobody accepts streams that fast

    # -- sending ---------------------------------------------------------------------------------------------
    def _unpark_writer(self) -> None:
        task = self._parked_writer
        if task is not None:
            self._parked_writer = None
            trio.lowlevel.reschedule(task)

    def _flush(self) -> _Flushed:
        """Encrypt and send what is queued, as far as the channel takes it and this turn's share goes."""
        if self.closed.is_set():
            return _Flushed.ALL
        budget = TURN_BYTES
        while True:
            if self._out is not None:
                sent = self._channel.send_now(self._out[self._out_start : self._out_end])
                self.sent_bytes += sent
                self._out_start += sent
                budget -= sent
                if self._blocked and sent:
                    self._unblocked_at = trio.current_time()
                self._blocked = self._out_start < self._out_end
                if self._blocked:
                    return _Flushed.BLOCKED
                self._release_out()
            if not self.session.wants_transmit:
                if self._output_gone:
                    self._output_gone.unpark_all()
                return _Flushed.ALL
            if budget <= 0:
                return _Flushed.PART
            self._seal()

    def _seal(self) -> None:
        """Fill a send buffer with encrypted messages."""
        session = self.session
        out, pos = self._memory.acquire_send(), 0
        while session.wants_transmit and len(out) - pos >= MAX_MESSAGE + 2:
            start = pos + 2
            end = session.poll_transmit_into(out, start, start + MAX_PLAINTEXT)
            if end > start:
                pos = self._sealer.seal(out, pos, end - start)
        self._out, self._out_start, self._out_end = out, 0, pos
        if self._watch_scope is not None and session.data_sent != self._answered:
            self._wake_watch()
        if self._write_waiters:
            for entry in [entry for entry in self._write_waiters if entry[0].state.sent >= entry[1]]:
                self._write_waiters.remove(entry)
                trio.lowlevel.reschedule(entry[2])

    def _release_out(self) -> None:
        if self._out is not None:
            self._memory.release_send(self._out)
            self._out = None

    def _last_words(self) -> None:
        """Send what is queued if the channel takes it at once."""
        try:
            self._flush()
        except (OSError, LatticaError, LocalProtocolError):
            logger.debug("goodbye_not_sent peer=%s", self.peer_id.short())


class _Flushed(enum.Enum):
    ALL = "nothing is left to send"
    BLOCKED = "the channel takes no more now"
    PART = "there is more, and others wait for their turn"
