"""The two hot paths of a QUIC connection, written out: packets that carry nothing but one stream's bytes.

The other half of the adapter to aioquic (see `quic_engine`), and as close to its inside. aioquic builds and reads
every packet through general machinery, at about 70 us a packet whatever its size; on a path with Ethernet's MTU this
limits a connection to 20 MB/s. Nearly all packets of a bulk transfer look alike, though:

    01 s 00 k 01 | destination id | packet number (2)          header, protected
    000011o0 | stream id | [offset] | data to the end          one STREAM frame without length, encrypted

`_send_stream_packets` writes runs of these, `_receive_stream_packet` reads one. Everything else, and every doubt
(another path, key phase, connection id, an out-of-order or last frame, too little window), is left to aioquic, before
anything was changed.
"""

from __future__ import annotations

from typing import Any

from aioquic import tls
from aioquic._crypto import CryptoError
from aioquic.quic.connection import (
    END_STATES,
    QuicConnection,
    QuicConnectionError,
    QuicConnectionState,
    QuicReceiveContext,
)
from aioquic.quic.events import StreamDataReceived
from aioquic.quic.packet import QuicPacketType, decode_packet_number
from aioquic.quic.packet_builder import QuicSentPacket
from aioquic.quic.recovery import MAX_ACK_RANGES, QuicPacketSpace
from aioquic.quic.stream import QuicStream

from lattica.transports.quic_congestion import BurstPacer

CONNECTION_ID_BYTES = 8
"""Length of the ids we issue."""

_TAG_BYTES = 16
_SENT_NUMBER_BYTES = 2
_SAMPLE_BYTES = 16
_MAX_NUMBER_BYTES = 4
_STREAM, _OFFSET, _LENGTH, _FIN = 0x08, 0x04, 0x02, 0x01


class BulkPaths(QuicConnection):
    """`QuicConnection` with the two paths; `_pacer` is set by the subclass."""

    _pacer: BurstPacer

    # -- sending ------------------------------------------------------------------------------------------------------
    def _transmit_bulk(self, now: float) -> list[tuple[bytes, Any]]:
        """As `datagrams_to_send`, with bulk on the quick path between one packet of everything else and the rest."""
        bulk = self._bulk_streams()
        if not bulk:
            return self.datagrams_to_send(now)
        # aioquic's own packet first: acknowledgements, window updates and small streams do not wait behind bulk.
        self._streams_queue = [stream for stream in self._streams_queue if stream not in bulk] + bulk
        self._pacer.limit_turn(1)
        datagrams = self.datagrams_to_send(now)
        self._pacer.begin_turn()
        self._pacing_at = None
        datagrams += self._send_stream_packets(bulk, now)
        if self._pacing_at is None and self._loss.bytes_in_flight < self._loss.congestion_window:
            datagrams += self.datagrams_to_send(now)
        return datagrams

    def _bulk_streams(self) -> list[QuicStream]:
        """Streams with more than two datagrams to send, when the connection is in its ordinary state."""
        if (
            not self._handshake_confirmed
            or self._state is not QuicConnectionState.CONNECTED
            or self._close_pending
            or not self._network_paths[0].is_validated
            or self._cryptos[tls.Epoch.ONE_RTT]._update_key_requested
        ):
            return []
        least = 2 * self._max_datagram_size
        return [
            stream
            for stream in self._streams_queue
            if not stream.sender.buffer_is_empty
            and not stream.is_blocked
            and len(stream.sender._pending)
            and stream.sender._buffer_stop - stream.sender._pending[0].start > least
        ]

    def _send_stream_packets(self, streams: list[QuicStream], now: float) -> list[tuple[bytes, Any]]:
        """Full packets of `streams` in turn, as far as congestion and flow control let them go."""
        path, size = self._network_paths[0], self._max_datagram_size
        space = self._spaces[tls.Epoch.ONE_RTT]
        datagrams: list[tuple[bytes, Any]] = []
        waiting = list(streams)
        while waiting:
            if self._loss.congestion_window - self._loss.bytes_in_flight < size:
                break
            self._pacing_at = self._pacer.next_send_time(now)
            if self._pacing_at is not None:
                break
            stream = waiting.pop(0)
            datagram = self._stream_packet(stream, size, space, now)
            if datagram is not None:
                datagrams.append((datagram, path.addr))
                self._pacer.update_after_send(now)
                waiting.append(stream)
        path.bytes_sent += size * len(datagrams)
        return datagrams

    def _stream_packet(self, stream: QuicStream, size: int, space: QuicPacketSpace, now: float) -> bytes | None:
        """One full packet, `None` when the stream has not enough to send, or no window."""
        sender = stream.sender
        if sender.reset_pending or not len(sender._pending):
            return None
        pending = sender._pending[0]
        start = pending.start
        peer_cid = self._peer_cid.cid
        frame = _frame_header(stream.stream_id or 0, start)
        stop = start + size - 1 - len(peer_cid) - _SENT_NUMBER_BYTES - len(frame) - _TAG_BYTES
        window = min(
            sender.highest_offset + self._remote_max_data - self._remote_max_data_used, stream.max_stream_data_remote
        )
        if stop > pending.stop or stop > window or stop == sender._buffer_fin:
            return None
        base = sender._buffer_start
        plain = frame + sender._buffer[start - base : stop - base]
        sender._pending.subtract(start, stop)
        if stop > sender.highest_offset:
            self._remote_max_data_used += stop - sender.highest_offset
            sender.highest_offset = stop
        number = self._packet_number
        self._packet_number = number + 1
        datagram = self._seal(peer_cid, number, plain)
        packet = QuicSentPacket(
            epoch=tls.Epoch.ONE_RTT,
            in_flight=True,
            is_ack_eliciting=True,
            is_crypto_packet=False,
            packet_number=number,
            packet_type=QuicPacketType.ONE_RTT,
            sent_time=now,
            sent_bytes=len(datagram),
        )
        packet.delivery_handlers.append((sender.on_data_delivery, (start, stop, False)))
        self._loss.on_packet_sent(packet=packet, space=space)
        return datagram

    def _seal(self, peer_cid: bytes, number: int, plain: bytes) -> bytes:
        """A short-header packet (RFC 9001 section 5)."""
        crypto = self._cryptos[tls.Epoch.ONE_RTT].send
        assert crypto.aead is not None
        assert crypto.hp is not None
        first = 0x40 | self._spin_bit << 5 | crypto.key_phase << 2 | (_SENT_NUMBER_BYTES - 1)
        truncated = number & 0xFFFF
        header = bytes((first,)) + peer_cid + truncated.to_bytes(_SENT_NUMBER_BYTES, "big")
        sealed = crypto.aead.encrypt(plain, header, number)
        at = _MAX_NUMBER_BYTES - _SENT_NUMBER_BYTES
        mask = crypto.hp._mask(sealed[at : at + _SAMPLE_BYTES])
        hidden = truncated ^ int.from_bytes(mask[1:3], "big")
        return b"".join(
            (bytes((first ^ mask[0] & 0x1F,)), peer_cid, hidden.to_bytes(_SENT_NUMBER_BYTES, "big"), sealed)
        )

    # -- receiving ----------------------------------------------------------------------------------------------------
    def _receive_stream_packet(self, data: bytes, addr: Any, now: float) -> bool:
        """Take in a short-header packet on the path in use. False when it has to go through `receive_datagram`."""
        if (
            data[0] & 0x80
            or not self._handshake_confirmed
            or self._state is not QuicConnectionState.CONNECTED
            or self._close_pending
        ):
            return False
        path = self._network_paths[0]
        if not path.is_validated or path.addr != addr or data[1 : 1 + CONNECTION_ID_BYTES] != self.host_cid:
            return False
        opened = self._open(data)
        if opened is None:
            return False
        first, number, plain = opened
        space = self._spaces[tls.Epoch.ONE_RTT]
        if plain is None or number in space.received_packets:
            return True
        if number > space.expected_packet_number:
            space.expected_packet_number = number + 1
        if number > self._spin_highest_pn:
            self._spin_highest_pn = number
            self._spin_bit = bool(first & 0x20) != self._is_client
        is_ack_eliciting = True
        if not self._take_stream_frame(plain):
            context = QuicReceiveContext(tls.Epoch.ONE_RTT, self.host_cid, path, None, now, None)
            try:
                is_ack_eliciting, _ = self._payload_received(context, plain)
            except QuicConnectionError as error:
                self.close(error.error_code, error.frame_type, error.reason_phrase)
            if self._state in END_STATES or self._close_pending:
                return True
        self._close_at = now + self._idle_timeout()
        self._ack_eliciting_sent_since_receipt = False
        self._note_received(space, number, is_ack_eliciting, now)
        return True

    def _open(self, data: bytes) -> tuple[int, int, bytes | None] | None:
        """(first byte, packet number, payload) without protection; the payload is `None` when it is not authentic.

        `None` when it takes more than the key in use, or is malformed.
        """
        crypto = self._cryptos[tls.Epoch.ONE_RTT].recv
        if crypto.aead is None or crypto.hp is None:
            return None
        number_at = 1 + CONNECTION_ID_BYTES
        sample_at = number_at + _MAX_NUMBER_BYTES
        if len(data) < sample_at + _SAMPLE_BYTES:
            return None
        mask = crypto.hp._mask(data[sample_at : sample_at + _SAMPLE_BYTES])
        first = data[0] ^ mask[0] & 0x1F
        if first & 0x18 or first >> 2 & 1 != crypto.key_phase:
            return None
        size = (first & 3) + 1
        end = number_at + size
        truncated = int.from_bytes(data[number_at:end], "big") ^ int.from_bytes(mask[1 : 1 + size], "big")
        expected = self._spaces[tls.Epoch.ONE_RTT].expected_packet_number
        number = decode_packet_number(truncated, size * 8, expected)
        header = bytes((first,)) + data[1:number_at] + truncated.to_bytes(size, "big")
        try:
            return first, number, crypto.aead.decrypt(data[end:], header, number)
        except CryptoError:
            return first, number, None

    def _take_stream_frame(self, plain: bytes) -> bool:
        """Take in a payload that is one STREAM frame with the next bytes of a stream; False when it is not."""
        if not plain or plain[0] & ~(_OFFSET | _LENGTH) != _STREAM:
            return False
        kind, at, offset = plain[0], 1, 0
        try:
            stream_id, at = _pull_varint(plain, at)
            if kind & _OFFSET:
                offset, at = _pull_varint(plain, at)
            if kind & _LENGTH:
                length, at = _pull_varint(plain, at)
                if at + length != len(plain):
                    return False
        except IndexError:
            return False
        length = len(plain) - at
        stream = self._streams.get(stream_id)
        if stream is None or not length:
            return False
        receiver, limit = stream.receiver, self._local_max_data
        stop = offset + length
        if (
            receiver.is_finished
            or receiver._final_size is not None
            or receiver._buffer
            or offset != receiver._buffer_start
            or offset != receiver.highest_offset
            or stop > stream.max_stream_data_local
            or limit.used + length > limit.value
        ):
            return False
        receiver._buffer_start = receiver.highest_offset = stop
        limit.used += length
        self._events.append(StreamDataReceived(data=plain[at:], end_stream=False, stream_id=stream_id))
        return True

    def _note_received(self, space: QuicPacketSpace, number: int, is_ack_eliciting: bool, now: float) -> None:
        """What is to be acknowledged, as at the end of aioquic's `receive_datagram`."""
        if number > space.largest_received_packet:
            space.largest_received_packet = number
            space.largest_received_time = now
        space.ack_queue.add(number)
        space.received_packets.add(number)
        if len(space.ack_queue) > MAX_ACK_RANGES:
            space.ack_queue.shift()
        if is_ack_eliciting and space.ack_at is None:
            space.ack_at = now + self._ack_delay


def _frame_header(stream_id: int, offset: int) -> bytes:
    """Of a STREAM frame that reaches to the end of its packet."""
    if not offset:
        return bytes((_STREAM,)) + _push_varint(stream_id)
    return bytes((_STREAM | _OFFSET,)) + _push_varint(stream_id) + _push_varint(offset)


def _push_varint(value: int) -> bytes:
    """QUIC's variable-length integer (RFC 9000 section 16)."""
    if value < 0x40:
        return bytes((value,))
    if value < 0x4000:
        return (value | 0x4000).to_bytes(2, "big")
    if value < 0x40000000:
        return (value | 0x80000000).to_bytes(4, "big")
    return (value | 0xC000000000000000).to_bytes(8, "big")


def _pull_varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, where it ends). `IndexError` when `data` ends before."""
    first = data[at]
    if first < 0x40:
        return first, at + 1
    end = at + (1 << (first >> 6))
    if end > len(data):
        raise IndexError(end)
    return int.from_bytes(data[at:end], "big") & ((1 << (8 * (end - at) - 2)) - 1), end
