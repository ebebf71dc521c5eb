"""The QUIC state machine: aioquic's `QuicConnection`, adapted to libp2p and to a node that must bound everything.

With `quic_bulk`, which it extends, this is the one place that reaches into aioquic's private attributes;
`tests/unit/test_quic_adapter.py` fails when one of them goes away, and `pyproject.toml` pins the minor version.

What aioquic has no public way for:

* asking the client for its certificate (`tls._request_client_certificate`) and reading it;
* limits of 256 streams, none of them unidirectional (its own are fixed at 128);
* flow control that follows what the application consumed: aioquic doubles a window whenever half of it has *arrived*,
  so a peer could fill our memory. Here a limit is `consumed + window`, and `consumed()` moves it;
* how much of a stream is unsent (`unsent_bytes`), because its send buffer has no bound;
* datagrams that grow (path MTU discovery) and packets that probe for it;
* stateless reset tokens that can be computed again after a restart (RFC 9000 section 10.3.2).

No sockets and no clock in here: bytes and `now` in, datagrams and events out.
"""

from __future__ import annotations

import hmac
import logging
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aioquic import tls
from aioquic._buffer import Buffer
from aioquic.buffer import size_uint_var
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import (
    END_STATES,
    MAX_STREAM_DATA_FRAME_CAPACITY,
    QuicConnectionError,
    QuicConnectionState,
    QuicReceiveContext,
)
from aioquic.quic.events import ConnectionTerminated
from aioquic.quic.packet import (
    QuicErrorCode,
    QuicFrameType,
    QuicPacketType,
    QuicProtocolVersion,
    pull_quic_transport_parameters,
)
from aioquic.quic.packet_builder import QuicDeliveryState, QuicPacketBuilder
from aioquic.quic.recovery import QuicPacketSpace
from aioquic.quic.stream import QuicStream

from lattica.transports.quic_bulk import CONNECTION_ID_BYTES, BulkPaths
from lattica.transports.quic_congestion import ALGORITHM, BurstPacer, Cubic
from lattica_protocols.limits import (
    MAX_QUIC_HANDSHAKE_BYTES,
    MAX_QUIC_STREAMS,
    QUIC_CONNECTION_WINDOW_BYTES,
    QUIC_STREAM_WINDOW_BYTES,
)

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes

Address = tuple[str, int] | tuple[str, int, int, int]
"""As the socket module writes it: IPv6 with flow label and scope."""

ALPN = "libp2p"
MAX_DATAGRAM_BYTES = 16384
"""Larger ones exist on loopback only and cost more to lose."""
IDLE_TIMEOUT_SECONDS = 750.0
"""Ours: two and a half keep-alives of a path that needs few (300 s); a dead one is noticed by the heartbeat. The
smaller of both sides' counts; Go uses 30 s, Rust 10 s."""
RESET_TOKEN_BYTES = 16

_INITIAL_DATAGRAM_BYTES = 1200
_UPDATE_SHARE = 4
"""A window is raised when a quarter of it was consumed: few updates, and the sender never stalls for one."""
_MAX_TWO_BYTE_VARINT = 0x3FFF

_log = logging.getLogger("lattica.quic")

# aioquic logs every error a peer makes as a warning; we report them ourselves, as the connection's `close_error`.
logging.getLogger("quic").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Credentials:
    """What proves who we are: a libp2p certificate, its key, and the secret that stateless resets derive from."""

    certificate: x509.Certificate
    private_key: CertificateIssuerPrivateKeyTypes
    reset_secret: bytes

    def reset_token(self, connection_id: bytes) -> bytes:
        """The stateless reset token of one of our connection ids."""
        return hmac.digest(self.reset_secret, connection_id, "sha256")[:RESET_TOKEN_BYTES]


class Engine(BulkPaths):
    """One QUIC connection, without I/O. Drive it as any machine: `receive_datagram`, `handle_timer`, verbs, then
    `transmit`, `next_event` and `get_timer`."""

    def __init__(
        self,
        credentials: Credentials,
        *,
        is_client: bool,
        original_destination_connection_id: bytes | None = None,
        retry_source_connection_id: bytes | None = None,
    ) -> None:
        configuration = QuicConfiguration(
            alpn_protocols=[ALPN],
            certificate=credentials.certificate,
            cipher_suites=[
                tls.CipherSuite.AES_128_GCM_SHA256,
                tls.CipherSuite.CHACHA20_POLY1305_SHA256,
                tls.CipherSuite.AES_256_GCM_SHA384,
            ],
            congestion_control_algorithm=ALGORITHM,
            connection_id_length=CONNECTION_ID_BYTES,
            idle_timeout=IDLE_TIMEOUT_SECONDS,
            is_client=is_client,
            max_data=QUIC_CONNECTION_WINDOW_BYTES,
            max_datagram_size=_INITIAL_DATAGRAM_BYTES,
            max_stream_data=QUIC_STREAM_WINDOW_BYTES,
            private_key=credentials.private_key,
            supported_versions=[QuicProtocolVersion.VERSION_1],
            verify_mode=ssl.CERT_NONE,
        )
        super().__init__(
            configuration=configuration,
            original_destination_connection_id=original_destination_connection_id,
            retry_source_connection_id=retry_source_connection_id,
        )
        self._credentials = credentials
        for limit, value in ((self._local_max_streams_bidi, MAX_QUIC_STREAMS), (self._local_max_streams_uni, 0)):
            limit.value = limit.sent = value
        self._pacer = BurstPacer(max_datagram_size=_INITIAL_DATAGRAM_BYTES)
        self._loss._pacer = self._pacer
        self._written = False
        self._consumed_total = 0
        self._consumed: dict[int, int] = {}
        self._mtu_probe: tuple[int, int] | None = None
        self._mtu_results: list[tuple[int, bool]] = []
        self.max_udp_payload_bytes = 65527
        """The peer's transport parameter: larger datagrams it does not take."""
        if not is_client:
            self._host_cids[0].stateless_reset_token = credentials.reset_token(self._host_cids[0].cid)

    # -- the handshake ------------------------------------------------------------------------------------------------
    @property
    def peer_certificates(self) -> list[x509.Certificate]:
        """What the peer sent, its own first. Empty when it sent none, which a server has to refuse."""
        leaf = self.tls._peer_certificate
        return [] if leaf is None else [leaf, *self.tls._peer_certificate_chain]

    @property
    def negotiated_alpn(self) -> str | None:
        return self.tls.alpn_negotiated

    def _initialize(self, peer_cid: bytes) -> None:
        super()._initialize(peer_cid)
        self.tls._request_client_certificate = not self._is_client
        # aioquic sends a key share of every group it knows: two are enough, and each costs a key generation.
        self.tls._supported_groups = [tls.Group.X25519, tls.Group.SECP256R1]

    def _handle_crypto_frame(self, context: QuicReceiveContext, frame_type: int, buf: Buffer) -> None:
        super()._handle_crypto_frame(context, frame_type, buf)
        if len(self.tls._receive_buffer) > MAX_QUIC_HANDSHAKE_BYTES:
            raise QuicConnectionError(
                error_code=QuicErrorCode.CRYPTO_BUFFER_EXCEEDED,
                frame_type=frame_type,
                reason_phrase="TLS message too long",
            )

    def _parse_transport_parameters(self, data: bytes, from_session_ticket: bool = False) -> None:
        super()._parse_transport_parameters(data, from_session_ticket)
        size = pull_quic_transport_parameters(Buffer(data=data)).max_udp_payload_size
        if size is not None:
            self.max_udp_payload_bytes = size

    def _replenish_connection_ids(self) -> None:
        known = len(self._host_cids)
        super()._replenish_connection_ids()
        for connection_id in self._host_cids[known:]:
            connection_id.stateless_reset_token = self._credentials.reset_token(connection_id.cid)

    def is_reset_token(self, token: bytes) -> bool:
        """Whether `token` is the stateless reset token of the peer's connection id in use."""
        own = self._peer_cid.stateless_reset_token
        return bool(own) and hmac.compare_digest(own, token)

    # -- the connection -----------------------------------------------------------------------------------------------
    @property
    def close_reason(self) -> ConnectionTerminated | None:
        """Why the connection is ending, known before aioquic's event, which waits for the draining period."""
        return self._close_event

    @property
    def ended(self) -> bool:
        """Nothing will be sent or received any more."""
        return self._state in END_STATES

    @property
    def rtt(self) -> float | None:
        return self._loss._rtt_smoothed if self._loss._rtt_initialized else None

    @property
    def idle_timeout(self) -> float:
        """Seconds of silence after which one of the sides forgets the connection."""
        return self._idle_timeout()

    @property
    def awaits_acknowledgement(self) -> bool:
        """Something is on the way that the peer has to acknowledge."""
        space = self._spaces.get(tls.Epoch.ONE_RTT)
        return space is not None and space.ack_eliciting_in_flight > 0

    def resend_handshake(self, now: float) -> None:
        """What the peer has not acknowledged of the handshake leaves again with the next `transmit`, before the timer
        says so (RFC 9002 section 6.2.3)."""
        self._loss.reschedule_data(now=now, speed_up_handshake=True)

    def terminate(self) -> None:
        """Forget the connection without a word: the peer has told us that it has no state for it."""
        if self._state not in END_STATES:
            self._close_at = None
            for epoch in self._spaces:
                self._discard_epoch(epoch)
            self._set_state(QuicConnectionState.TERMINATED)

    def receive(self, data: bytes, addr: Address, now: float) -> None:
        """One datagram from the network."""
        try:
            if not self._receive_stream_packet(data, addr, now):
                self.receive_datagram(data, addr, now)
        except Exception as error:  # logged, and the reason that the connection ends with
            self._broke(error)

    def on_timer(self, now: float) -> None:
        """The time of `get_timer` has come."""
        try:
            self.handle_timer(now)
        except Exception as error:  # logged, and the reason that the connection ends with
            self._broke(error)

    def transmit(self, now: float) -> list[tuple[bytes, Any]]:
        """The datagrams to send now: at most a burst, the timer says when to come back for more."""
        if not self._network_paths:
            return []
        try:
            return self._transmit(now)
        except Exception as error:  # logged, and the reason that the connection ends with
            self._broke(error)
            return []

    def _broke(self, error: Exception) -> None:
        # Whatever a hostile packet makes aioquic raise (it has had such bugs) ends this connection and nothing else.
        _log.error("quic_connection_bug error=%s", error, exc_info=error)
        self.terminate()
        self._close_event = ConnectionTerminated(
            error_code=QuicErrorCode.INTERNAL_ERROR, frame_type=None, reason_phrase=repr(error)
        )

    def _transmit(self, now: float) -> list[tuple[bytes, Any]]:
        self._pacer.begin_turn()
        if self._written:
            # An acknowledgement that waits for its timer travels with the data: one packet less each way.
            self._written = False
            space = self._spaces.get(tls.Epoch.ONE_RTT)
            if space is not None and space.ack_at is not None:
                space.ack_at = min(space.ack_at, now)
        return self._transmit_bulk(now)

    # -- streams ------------------------------------------------------------------------------------------------------
    @property
    def can_open_stream(self) -> bool:
        """Whether the peer's limit lets us open a stream now."""
        return self._local_next_stream_id_bidi // 4 < self._remote_max_streams_bidi

    def open_stream(self) -> int:
        """The id of a new bidirectional stream. Only when `can_open_stream`."""
        stream_id = self._local_next_stream_id_bidi
        self._get_or_create_stream_for_send(stream_id)
        return stream_id

    def write(self, stream_id: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` into the stream's send buffer. `RuntimeError` after `finish` or when `cannot_send`."""
        self._written = True
        self._streams[stream_id].sender.write(data)  # type: ignore[arg-type]  # it takes any buffer

    def finish(self, stream_id: int) -> None:
        """End our direction, unless it was already reset."""
        if not self.cannot_send(stream_id):
            self._streams[stream_id].sender.write(b"", end_stream=True)

    def cannot_send(self, stream_id: int) -> bool:
        """Our direction is over: finished, reset by us, or by the peer's STOP_SENDING."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return True
        sender = stream.sender
        return sender._buffer_fin is not None or sender._reset_error_code is not None or sender.is_finished

    def unsent_bytes(self, stream_id: int) -> int:
        """Bytes written that did not leave in a packet yet."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.sender._reset_error_code is not None:
            return 0
        return stream.sender._buffer_stop - stream.sender.highest_offset

    def abort_stream(self, stream_id: int, error_code: int) -> None:
        """RESET_STREAM and STOP_SENDING, as far as each direction is still open."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        stream.sender.reset(error_code)
        if not stream.receiver.is_finished:
            stream.receiver.stop(error_code)

    def stop_receiving(self, stream_id: int, error_code: int) -> None:
        """STOP_SENDING: ask the peer to end its direction."""
        stream = self._streams.get(stream_id)
        if stream is not None and not stream.receiver.is_finished:
            stream.receiver.stop(error_code)

    # -- flow control -------------------------------------------------------------------------------------------------
    def unread_bytes(self) -> int:
        """What the peer has sent by its own account and the application has not taken, gaps included."""
        return self._local_max_data.used - self._consumed_total

    def consumed(self, stream_id: int, count: int) -> bool:
        """The application took `count` bytes: the peer may send as many more. True when there is an update to send."""
        stream = self._streams.get(stream_id)
        update = False
        if stream is not None and not stream.receiver.is_finished:
            total = self._consumed.get(stream_id, 0) + count
            self._consumed[stream_id] = total
            limit = total + QUIC_STREAM_WINDOW_BYTES
            if limit - stream.max_stream_data_local >= QUIC_STREAM_WINDOW_BYTES // _UPDATE_SHARE:
                stream.max_stream_data_local = limit
                update = True
        return self._credit_connection(count) or update

    def reset_received(self, stream_id: int, unread: int) -> bool:
        """The peer reset the stream: give back what arrived and was not consumed, and what it says it sent.

        `unread`: bytes that were handed to the application and are thrown away now.
        """
        stream = self._streams.get(stream_id)
        missing = 0
        if stream is not None:
            missing = stream.receiver.highest_offset - stream.receiver.starting_offset()
        self._consumed.pop(stream_id, None)
        return self._credit_connection(unread + missing)

    def receive_finished(self, stream_id: int) -> None:
        """All of the stream was delivered: its window needs no account any more."""
        self._consumed.pop(stream_id, None)

    def _credit_connection(self, count: int) -> bool:
        self._consumed_total += count
        limit = self._consumed_total + QUIC_CONNECTION_WINDOW_BYTES
        if limit - self._local_max_data.value < QUIC_CONNECTION_WINDOW_BYTES // _UPDATE_SHARE:
            return False
        self._local_max_data.value = limit
        return True

    def _write_connection_limits(self, builder: QuicPacketBuilder, space: QuicPacketSpace) -> None:
        # aioquic doubles the limit of the connection when half of it was used; ours moves in `_credit_connection`
        # only, so the doubling is hidden from it: with `used` at zero it has no reason to double.
        limit = self._local_max_data
        used, limit.used = limit.used, 0
        try:
            super()._write_connection_limits(builder, space)
        finally:
            limit.used = used

    def _write_stream_limits(self, builder: QuicPacketBuilder, space: QuicPacketSpace, stream: QuicStream) -> None:
        limit = stream.max_stream_data_local
        if stream.max_stream_data_local_sent == limit or stream.receiver.is_finished:
            return
        buf = builder.start_frame(
            QuicFrameType.MAX_STREAM_DATA,
            capacity=MAX_STREAM_DATA_FRAME_CAPACITY,
            handler=self._on_max_stream_data_delivery,
            handler_args=(stream,),
        )
        buf.push_uint_var(stream.stream_id or 0)
        buf.push_uint_var(limit)
        stream.max_stream_data_local_sent = limit

    # -- path MTU -----------------------------------------------------------------------------------------------------
    @property
    def datagram_bytes(self) -> int:
        """The largest datagram that is sent."""
        return self._max_datagram_size

    def set_datagram_bytes(self, size: int) -> None:
        """Send datagrams up to `size` from now on."""
        self._max_datagram_size = size
        self._pacer.set_datagram_size(size)
        self._cubic.set_datagram_size(size)

    @property
    def large_loss_events(self) -> int:
        """Losses in a row that hit datagrams over the base size: a sign of a black hole."""
        return self._cubic.large_loss_events

    def forget_large_losses(self) -> None:
        self._cubic.large_loss_events = 0

    @property
    def _cubic(self) -> Cubic:
        congestion = self._loss._cc
        assert isinstance(congestion, Cubic)
        return congestion

    @property
    def can_probe_mtu(self) -> bool:
        """Whether `build_mtu_probe` is possible: the path is known to be the peer's."""
        return self._handshake_confirmed and self._state not in END_STATES and self._network_paths[0].is_validated

    def build_mtu_probe(self, size: int, now: float) -> tuple[bytes, Any]:
        """A packet of PING and PADDING of exactly `size`. Only when `can_probe_mtu`.

        It is tracked for loss, but takes no part in congestion control (RFC 8899 section 3, requirement 8).
        """
        path = self._network_paths[0]
        builder = QuicPacketBuilder(
            host_cid=self.host_cid,
            is_client=self._is_client,
            max_datagram_size=size,
            packet_number=self._packet_number,
            peer_cid=self._peer_cid.cid,
            spin_bit=self._spin_bit,
            version=self._version or QuicProtocolVersion.VERSION_1,
        )
        builder.start_packet(QuicPacketType.ONE_RTT, self._cryptos[tls.Epoch.ONE_RTT])
        buf = builder.start_frame(
            QuicFrameType.PING, handler=self._on_mtu_probe_delivery, handler_args=(size, builder.packet_number)
        )
        buf.push_bytes(bytes(builder.remaining_buffer_space))
        assert builder._packet is not None
        builder._packet.in_flight = False
        self._mtu_probe = (size, builder.packet_number)
        datagrams = self._flush_builder(builder=builder, network_path=path, peer_cid=self._peer_cid.cid, now=now)
        # Not in flight, so aioquic did not note the time it was sent, which its probe timeout counts from.
        self._loss._time_of_last_sent_ack_eliciting_packet = now
        return datagrams[0]

    def cancel_mtu_probe(self) -> None:
        """The interface refused the probe: it was never sent."""
        if self._mtu_probe is None:
            return
        _, packet_number = self._mtu_probe
        self._mtu_probe = None
        space = self._spaces[tls.Epoch.ONE_RTT]
        if space.sent_packets.pop(packet_number, None) is not None:
            space.ack_eliciting_in_flight -= 1

    def take_mtu_results(self) -> list[tuple[int, bool]]:
        """The probes that were decided since the last call: (size, arrived)."""
        results, self._mtu_results = self._mtu_results, []
        return results

    def _on_mtu_probe_delivery(self, delivery: QuicDeliveryState, size: int, packet_number: int) -> None:
        if self._mtu_probe == (size, packet_number):
            self._mtu_probe = None
            self._mtu_results.append((size, delivery is QuicDeliveryState.ACKED))

    # -- speed --------------------------------------------------------------------------------------------------------
    def _handle_padding_frame(self, context: QuicReceiveContext, frame_type: int, buf: Buffer) -> None:
        # aioquic walks over padding byte by byte, which costs 0.5 ms for a large probe.
        start = buf.tell()
        rest = buf.data_slice(start, buf.capacity)
        buf.seek(buf.capacity - len(rest.lstrip(b"\0")))

    def _write_stream_frame(
        self, builder: QuicPacketBuilder, space: QuicPacketSpace, stream: QuicStream, max_offset: int
    ) -> int:
        # As aioquic's, without its logging and with a length of up to four bytes: its own two hold 16,383.
        sender = stream.sender
        stream_id = stream.stream_id or 0
        offset = sender.next_offset
        overhead = 3 + size_uint_var(stream_id) + (size_uint_var(offset) if offset else 0)
        space_left = builder.remaining_flight_space - overhead
        wide = space_left > _MAX_TWO_BYTE_VARINT
        if wide:
            overhead += 2
            space_left -= 2
        previous = sender.highest_offset
        frame = sender.get_frame(space_left, max_offset)
        if frame is None:
            return 0
        data = frame.data
        stop = frame.offset + len(data)
        buf = builder.start_frame(
            QuicFrameType.STREAM_BASE | 2 | (4 if frame.offset else 0) | (1 if frame.fin else 0),
            capacity=overhead,
            handler=sender.on_data_delivery,
            handler_args=(frame.offset, stop, frame.fin),
        )
        buf.push_uint_var(stream_id)
        if frame.offset:
            buf.push_uint_var(frame.offset)
        if wide:
            buf.push_uint32(len(data) | 0x80000000)
        else:
            buf.push_uint16(len(data) | 0x4000)
        buf.push_bytes(data)
        return sender.highest_offset - previous
