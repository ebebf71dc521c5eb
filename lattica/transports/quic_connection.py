"""One QUIC connection: the engine, its streams, its timers, and who is at the other end.

All of it is driven by the endpoint's tasks: `receive`, `handle_timer` and `transmit` are plain calls. A write only
marks the connection dirty; the endpoint calls `transmit` once for everything that was written in a scheduling turn.

A path that falls silent while somebody waits for the peer is given up after 6.5 s (`Heartbeat`): libp2p peers other
than Go do not follow a changed address, and ours go on over another path. One that nobody waits for is kept up by a
PING every 25 s, or more often when the peer's idle timeout asks for it (Rust peers drop us after 10 s).
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import trio
from aioquic.quic import events

from lattica.errors import ConnectionLost, DialError, LatticaError, PathLost, WrongPeer
from lattica.interfaces import Connection, Direction
from lattica.transports.quic_engine import ALPN, MAX_DATAGRAM_BYTES, Address, Engine
from lattica.transports.quic_mtu import BASE_BYTES, PathMtuSearch
from lattica.transports.quic_stream import QuicStream
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import MAX_QUIC_STREAMS
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.paths.heartbeat import USUAL, Heartbeat, Verdict
from lattica_protocols.peer_id import PeerId
from lattica_protocols.tls import verify_certificate_untrusted

if TYPE_CHECKING:
    from lattica.transports.quic_endpoint import Endpoint

PACE = USUAL
KEEP_ALIVE_SHARE = 0.4
"""Of the idle timeout: two keep-alives may be lost."""
LINGER_SECONDS = 5.0
HANDSHAKE_TIMEOUT_SECONDS = 10.0

_BLACK_HOLE_LOSSES = 3
"""Loss events in a row that took only large datagrams (RFC 8899 section 4.3)."""
_CRYPTO_ERROR = 0x100
_BAD_CERTIFICATE = 42
_CERTIFICATE_REQUIRED = 116
_NO_APPLICATION_PROTOCOL = 120
_CLOSE_REPEATS = 4
_MAX_UNACCEPTED = 2 * MAX_QUIC_STREAMS
"""A stream that the peer finished and asked us not to answer (STOP_SENDING) makes room for another before anybody
has accepted it, so the engine's limit alone does not bound these."""


class QuicLink(Connection):
    """See `lattica.interfaces.Connection`. `peer_id` is known once `established` is set."""

    path = "quic"
    peer_id: PeerId

    def __init__(
        self, endpoint: Endpoint, engine: Engine, direction: Direction, remote: Address, expected: PeerId | None
    ) -> None:
        self.engine = engine
        self.direction = direction
        self.closed = trio.Event()
        self.settled = trio.Event()
        """The handshake is over: `established`, or failed with `close_error`."""
        self.established = False
        self.local_addr = endpoint.local_addr
        self.remote = remote
        self.remote_addr = to_multiaddr(remote)
        self.opened_at = trio.current_time()
        self._unread_told = 0
        self.source: bytes | None = None
        """The local address datagrams came to, to answer from the same one."""
        self.connection_ids: set[bytes] = set()
        self.refusable = False
        """ICMP errors may end the handshake."""
        """All ids under which the endpoint finds this connection."""
        self.scheduled_at = float("inf")
        """The endpoint's timer entry."""
        self.waiting_writers: set[QuicStream] = set()
        self._endpoint = endpoint
        self._expected = expected
        self._streams: dict[int, QuicStream] = {}
        self._accepted: deque[QuicStream] = deque()
        self._accepting = trio.lowlevel.ParkingLot()
        self._opening = trio.lowlevel.ParkingLot()
        self._lingering: deque[tuple[float, QuicStream]] = deque()
        self._last_received = self.opened_at
        self._waits: list[Callable[[], bool]] = []
        self._heartbeat = Heartbeat(self.opened_at, PACE)
        self._quiet = True
        """Nobody waited for the peer when we last looked."""
        self._over = False
        self._close_datagrams: list[tuple[bytes, Any]] = []
        self._packets_after_close = 0
        self._mtu = self._new_mtu_search()

    # -- the connection -----------------------------------------------------------------------------------------------
    async def open_stream(self) -> QuicStream:
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._over and not self.engine.can_open_stream:
            await self._opening.park()
        self._check_alive()
        stream = QuicStream(self, self.engine.open_stream())
        self._streams[stream.stream_id] = stream
        return stream

    async def accept_stream(self) -> QuicStream:
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            while self._accepted:
                stream = self._accepted.popleft()
                if not stream.failed:
                    return stream
            self._check_alive()
            await self._accepting.park()

    async def aclose(self) -> None:
        self.abort()
        await trio.lowlevel.checkpoint()

    def abort(self, error: Exception | None = None) -> None:
        if self._over:
            return
        self.engine.close(error_code=0)
        self._finish(error)
        self._endpoint.transmit_now(self)

    def unread(self) -> int:
        return self.engine.unread_bytes()

    def stream_count(self) -> int:
        return len(self._streams)

    def mark_dirty(self) -> None:
        """Something is to be sent."""
        self._endpoint.schedule(self)

    def linger(self, stream: QuicStream) -> None:
        """Nobody reads `stream` any more, but the peer has not finished it: see `QuicStream.stop_lingering`."""
        self._lingering.append((trio.current_time() + LINGER_SECONDS, stream))

    def forget_if_finished(self, stream: QuicStream) -> None:
        """`stream` may have ended in both directions."""
        if stream.finished:
            self._streams.pop(stream.stream_id, None)

    # -- driven by the endpoint ---------------------------------------------------------------------------------------
    def receive(self, data: bytes, addr: Address, now: float) -> None:
        """One datagram for this connection."""
        if self._over:
            self._packets_after_close += 1
            return
        self.received_bytes += len(data)
        self._last_received = now
        self.engine.receive(data, addr, now)

    def handle_events(self, now: float) -> None:
        """After the datagrams of one batch: what did they mean?"""
        engine = self.engine
        while (event := engine.next_event()) is not None:
            if isinstance(event, events.StreamDataReceived):
                if self.established and not self._over:
                    self._stream(event.stream_id).deliver(event.data, event.end_stream)
            elif isinstance(event, events.StreamReset):
                if self.established and not self._over:
                    self._stream(event.stream_id).peer_reset()
            elif isinstance(event, events.StopSendingReceived):
                stream = self._streams.get(event.stream_id)
                if stream is not None:
                    stream.peer_stopped()
            elif isinstance(event, events.HandshakeCompleted):
                self._verify_peer(now)
            elif isinstance(event, events.ConnectionIdIssued):
                self._endpoint.add_connection_id(self, event.connection_id)
            elif isinstance(event, events.ConnectionIdRetired):
                self._endpoint.remove_connection_id(self, event.connection_id)
        if engine.close_reason is not None and not self._over:
            self._finish(self._close_error(engine.close_reason))
        if self._opening and engine.can_open_stream:
            self._opening.unpark_all()
        addr = engine.get_peer_address()
        if addr is not None and addr != self.remote:
            self._moved(addr, now)
        if self.on_unread is not None:
            before, self._unread_told = self._unread_told, engine.unread_bytes()
            if self._unread_told > before:
                self.on_unread(self._unread_told - before)

    def handle_timer(self, now: float) -> None:
        """The deadline that `next_timeout` named has come, or may have."""
        engine = self.engine
        engine_deadline = engine.get_timer()
        if engine_deadline is not None and now >= engine_deadline:
            engine.on_timer(now)
            self.handle_events(now)
        if self._over:
            return
        if not self.established:
            if now >= self.opened_at + HANDSHAKE_TIMEOUT_SECONDS:
                self.abort(DialError("no answer") if self.direction == "outbound" else ConnectionLost("no answer"))
            return
        if now >= self._heartbeat.next_timeout:
            verdict = self._check_heartbeat(now)
            if verdict is Verdict.DEAD:
                self.abort(PathLost(f"the peer did not answer for {now - self._last_received:.1f} s"))
                return
            if verdict is Verdict.PROBE:
                engine.send_ping(0)
        while self._lingering and self._lingering[0][0] <= now:
            self._lingering.popleft()[1].stop_lingering()
        if engine.large_loss_events >= _BLACK_HOLE_LOSSES and engine.datagram_bytes > BASE_BYTES:
            self._mtu.black_hole(now)
            self._use_datagram_size()

    def transmit(self, now: float) -> list[tuple[bytes, Any]]:
        """Everything that may be sent now."""
        engine = self.engine
        if self._over and self._close_datagrams:
            return self._repeat_close()
        datagrams = engine.transmit(now)
        if self.established:
            if self._quiet and engine.awaits_acknowledgement:
                self._check_heartbeat(now)
            datagrams += self._mtu_probe(now)
            if self.waiting_writers:
                self._wake_writers()
            self.rtt = engine.rtt
        self.handle_events(now)
        for data, _ in datagrams:
            self.sent_bytes += len(data)
        if self._over:
            self._close_datagrams = datagrams
        return datagrams

    def next_timeout(self) -> float | None:
        """When `handle_timer` wants to be called. `None` when the connection can be forgotten."""
        deadline = self.engine.get_timer()
        if deadline is None or self._over:
            # A goodbye that could not be sent (no keys yet) leaves the engine running: nobody needs it.
            return deadline if self.engine.ended else None
        if not self.established:
            return min(deadline, self.opened_at + HANDSHAKE_TIMEOUT_SECONDS)
        deadline = min(deadline, self._heartbeat.next_timeout)
        if self._lingering:
            deadline = min(deadline, self._lingering[0][0])
        mtu = self._mtu.next_timeout() if self.engine.can_probe_mtu else None
        return deadline if mtu is None else min(deadline, max(mtu, self._last_received))

    def datagram_too_big(self, size: int, now: float) -> None:
        """The interface refused a datagram of `size`."""
        if size > self.engine.datagram_bytes:
            self.engine.cancel_mtu_probe()
            self._mtu.probe_failed(size, now)
        elif size > BASE_BYTES:
            self._mtu.too_big(size, now)
            self._use_datagram_size()

    def send_failed(self, error: OSError) -> None:
        """There is no way to the peer's address from this machine, or ICMP said so."""
        self.engine.terminate()
        refused = error.errno == errno.ECONNREFUSED
        text = "connection refused, nobody listens there" if refused else error.strerror or "unreachable"
        self._finish(DialError(text))

    def stateless_reset(self, token: bytes) -> bool:
        """Whether `token` proves that the peer has lost the connection; it is over then."""
        if self._over or not self.engine.is_reset_token(token):
            return False
        self.engine.terminate()
        self._finish(ConnectionLost("the peer has lost the connection (it was restarted?)"))
        return True

    def is_dialling(self, expected: PeerId) -> bool:
        """Whether this is a handshake with `expected` that we began and that goes on."""
        return self.direction == "outbound" and not self.settled.is_set() and self._expected == expected

    def resend_handshake(self) -> None:
        """Without waiting for the timer."""
        self.engine.resend_handshake(trio.current_time())
        self.mark_dirty()

    def ask(self) -> None:
        if self.established and not self._over:
            self.engine.send_ping(0)
            self.mark_dirty()

    def keep_up(self, every: float) -> None:
        if self.established and not self._over:
            self._keep_up(every, trio.current_time())
            self.mark_dirty()

    def expect(self, waits: Callable[[], bool]) -> None:
        self._waits.append(waits)

    def unexpect(self, waits: Callable[[], bool]) -> None:
        if waits in self._waits:
            self._waits.remove(waits)

    # -- inside -------------------------------------------------------------------------------------------------------
    def _check_heartbeat(self, now: float) -> Verdict:
        wanted = self.engine.awaits_acknowledgement or self.doubtful or any(waits() for waits in self._waits)
        self._quiet = not wanted
        return self._heartbeat.check(now, heard_at=self._last_received, wanted=wanted)

    def _keep_up(self, every: float, now: float) -> None:
        self._heartbeat.keep_up(min(every, KEEP_ALIVE_SHARE * self.engine.idle_timeout), now)

    def _check_alive(self) -> None:
        if self._over:
            raise ConnectionLost(str(self.close_error or "the connection is closed"))

    def _stream(self, stream_id: int) -> QuicStream:
        stream = self._streams.get(stream_id)
        if stream is None:
            stream = self._streams[stream_id] = QuicStream(self, stream_id)
            if self.engine.cannot_send(stream_id):
                stream.peer_stopped()
            self._accepted.append(stream)
            self._accepting.unpark()
            if len(self._accepted) > _MAX_UNACCEPTED:
                self.abort(ConnectionLost("the peer opens streams faster than they can be accepted"))
        return stream

    def _verify_peer(self, now: float) -> None:
        """The handshake is done: who is it? Nothing of the peer's streams was handed on before this."""
        certificates = self.engine.peer_certificates
        if self.engine.negotiated_alpn != ALPN:
            self._refuse(_NO_APPLICATION_PROTOCOL, DialError("the peer does not speak libp2p over QUIC"))
        elif not certificates:
            self._refuse(_CERTIFICATE_REQUIRED, DialError("the peer has no certificate"))
        elif len(certificates) > 1:
            self._refuse(_BAD_CERTIFICATE, DialError("the peer sent more than one certificate"))
        else:
            try:
                key = verify_certificate_untrusted(certificates[0], self._endpoint.wall_clock())
            except RemoteProtocolError as error:
                self._refuse(_BAD_CERTIFICATE, DialError(f"the peer's certificate was refused: {error}"))
                return
            self.peer_id = PeerId.from_public_key(key)
            if self._expected is not None and self.peer_id != self._expected:
                text = f"{self.remote_addr}: expected peer {self._expected}, but {self.peer_id} answered"
                self._refuse(_BAD_CERTIFICATE, WrongPeer(text))
                return
            self._establish(now)

    def _establish(self, now: float) -> None:
        self.established = True
        self.opened_at = now
        self._heartbeat = Heartbeat(now, PACE)
        self._keep_up(PACE.keep_alive, now)
        self._mtu = self._new_mtu_search()
        self.settled.set()
        self._endpoint.handshake_over(self)

    def _moved(self, addr: Address, now: float) -> None:
        """The peer's address changed (its NAT gave it another port): follow it, and learn the path's MTU again."""
        self.remote = addr
        self.remote_addr = to_multiaddr(addr)
        self._mtu.reset(now)
        self.engine.cancel_mtu_probe()
        self._use_datagram_size()

    def _refuse(self, alert: int, error: LatticaError) -> None:
        self.engine.close(error_code=_CRYPTO_ERROR + alert, frame_type=0x06, reason_phrase=str(error)[:80])
        self._finish(error)

    def _finish(self, error: Exception | None) -> None:
        """The connection is over for its users; the engine may still say goodbye."""
        if self._over:
            return
        self._over = True
        self.close_error = error
        lost = error if isinstance(error, ConnectionLost) else ConnectionLost(str(error or "the connection was closed"))
        streams, self._streams = list(self._streams.values()), {}
        for stream in streams:
            stream.connection_lost(lost)
        self._accepted.clear()
        self._lingering.clear()
        self.waiting_writers.clear()
        self._accepting.unpark_all()
        self._opening.unpark_all()
        self.closed.set()
        self.settled.set()
        self._endpoint.handshake_over(self)

    def _close_error(self, reason: events.ConnectionTerminated) -> Exception | None:
        if reason.error_code == 0:
            return None if self.established else DialError("the peer closed the connection during the handshake")
        text = f"the connection ended: {reason.reason_phrase or 'no reason given'} (code {reason.error_code:#x})"
        return ConnectionLost(text) if self.established else DialError(text)

    def _repeat_close(self) -> list[tuple[bytes, Any]]:
        """The peer goes on after our goodbye: it was lost. Repeat it after 1, 2, 4, 8 packets (RFC 9000, 10.2.1)."""
        count = self._packets_after_close
        if count and count < 1 << _CLOSE_REPEATS and not count & (count - 1):
            return self._close_datagrams
        return []

    def _wake_writers(self) -> None:
        self.waiting_writers = {s for s in self.waiting_writers if not s.wake_writers_if_drained()}

    def _mtu_probe(self, now: float) -> list[tuple[bytes, Any]]:
        """Path MTU discovery: take in what became of the last probe, and send the next one."""
        again = None
        for probed, arrived in self.engine.take_mtu_results():
            if arrived:
                self._mtu.probe_arrived(probed, now)
                self._use_datagram_size()
            else:
                again = self._mtu.retry()
                if again is None:
                    self._mtu.probe_failed(probed, now)
        if not self.engine.can_probe_mtu:
            return []
        size = again if again is not None else self._mtu.next_probe(now)
        if size is None:
            return []
        return [self.engine.build_mtu_probe(size, now)]

    def _new_mtu_search(self) -> PathMtuSearch:
        headers = 48 if ":" in self.remote[0] else 28
        return PathMtuSearch(headers, min(MAX_DATAGRAM_BYTES, self.engine.max_udp_payload_bytes))

    def _use_datagram_size(self) -> None:
        self.engine.forget_large_losses()
        if self.engine.datagram_bytes != self._mtu.size:
            self.engine.set_datagram_bytes(self._mtu.size)


def to_multiaddr(addr: Address) -> Multiaddr:
    """A socket address as `/ip4|ip6/…/udp/…/quic-v1`."""
    return Multiaddr.quic(addr[0].partition("%")[0], addr[1])
