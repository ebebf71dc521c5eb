"""The private attributes of aioquic that `lattica.transports.quic_engine` relies on, and what it makes of them.

When an upgrade of aioquic breaks one of these, the adapter has to be looked at before the pin in pyproject.toml moves.
"""

from __future__ import annotations

import inspect
import random

import pytest
from aioquic._buffer import Buffer
from aioquic.quic import connection, recovery, stream
from aioquic.quic.events import StreamDataReceived
from aioquic.quic.packet_builder import QuicPacketBuilder, QuicSentPacket

from lattica.transports import quic_bulk
from lattica.transports.quic import make_credentials
from lattica.transports.quic_congestion import BurstPacer, Cubic
from lattica.transports.quic_engine import ALPN, Credentials, Engine
from lattica_protocols.keys import PrivateKey
from lattica_protocols.limits import (
    MAX_QUIC_STREAMS,
    QUIC_CONNECTION_WINDOW_BYTES,
    QUIC_STREAM_WINDOW_BYTES,
)

CLIENT, SERVER = ("192.0.2.1", 1), ("192.0.2.2", 2)


class Wire:
    """Two engines and the datagrams between them, without loss and with a clock of its own."""

    def __init__(self) -> None:
        self.now = 1.0
        self.client = Engine(credentials(b"c"), is_client=True)
        self.client.connect(SERVER, self.now)
        self.server = Engine(
            credentials(b"s"),
            is_client=False,
            original_destination_connection_id=self.client.original_destination_connection_id,
        )

    def run(self) -> None:
        """Until neither has anything to say."""
        for _ in range(100):
            self.now += 0.01
            moved = False
            for sender, receiver, addr in ((self.client, self.server, CLIENT), (self.server, self.client, SERVER)):
                timer = sender.get_timer() if sender._network_paths else None
                if timer is not None and timer <= self.now:
                    sender.handle_timer(self.now)
                for data, _ in sender.transmit(self.now):
                    receiver.receive_datagram(data, addr, self.now)
                    moved = True
            if not moved:
                return


def credentials(seed: bytes) -> Credentials:
    return make_credentials(PrivateKey.generate(seed * 32))


@pytest.fixture
def wire() -> Wire:
    wire = Wire()
    wire.run()
    return wire


def test_handshake_with_both_certificates(wire: Wire) -> None:
    for engine in (wire.client, wire.server):
        assert engine.negotiated_alpn == ALPN
        assert len(engine.peer_certificates) == 1
        assert engine.can_probe_mtu
        assert engine.rtt is not None
        assert engine.close_reason is None
        assert not engine.ended
        assert not engine.awaits_acknowledgement
        assert engine.tls._receive_buffer == b""


def test_a_handshake_is_sent_again_without_waiting_for_the_timer() -> None:
    wire = Wire()
    assert len(wire.client.transmit(wire.now)) == 1  # lost
    wire.now += 0.04
    assert wire.client.transmit(wire.now) == []
    wire.client.resend_handshake(wire.now)
    ((again, _),) = wire.client.transmit(wire.now)
    assert len(again) >= 1200
    wire.server.receive_datagram(again, CLIENT, wire.now)
    wire.run()
    assert wire.client.peer_certificates
    assert wire.server.peer_certificates


def test_limits_that_the_peer_is_told(wire: Wire) -> None:
    assert wire.client._remote_max_streams_bidi == wire.server._remote_max_streams_bidi == MAX_QUIC_STREAMS
    assert wire.client._remote_max_streams_uni == 0
    assert wire.client._remote_max_data == QUIC_CONNECTION_WINDOW_BYTES
    assert wire.client._remote_max_stream_data_bidi_remote == QUIC_STREAM_WINDOW_BYTES
    assert wire.client.max_udp_payload_bytes == 65527


def test_windows_follow_consumption_and_not_arrival(wire: Wire) -> None:
    stream_id = wire.client.open_stream()
    half = QUIC_STREAM_WINDOW_BYTES // 2 + 1
    wire.client.write(stream_id, bytes(half))
    while wire.client.unsent_bytes(stream_id):
        wire.run()
    wire.run()
    assert wire.client._streams[stream_id].max_stream_data_remote == QUIC_STREAM_WINDOW_BYTES
    assert wire.client._remote_max_data == QUIC_CONNECTION_WINDOW_BYTES
    assert wire.server.consumed(stream_id, half)
    wire.run()
    assert wire.client._streams[stream_id].max_stream_data_remote == QUIC_STREAM_WINDOW_BYTES + half
    assert not wire.server.consumed(stream_id, 1)


def test_connection_window_follows_consumption(wire: Wire) -> None:
    count = QUIC_CONNECTION_WINDOW_BYTES // 4
    stream_id = wire.client.open_stream()
    wire.client.write(stream_id, bytes(count))
    while wire.client.unsent_bytes(stream_id):
        wire.run()
    wire.server.consumed(stream_id, count)
    wire.run()
    assert wire.client._remote_max_data == QUIC_CONNECTION_WINDOW_BYTES + count


def test_reset_gives_back_what_was_not_read(wire: Wire) -> None:
    stream_id = wire.client.open_stream()
    wire.client.write(stream_id, bytes(5000))
    wire.run()
    wire.client.abort_stream(stream_id, 0)
    wire.run()
    wire.server.reset_received(stream_id, 5000)
    assert wire.server._consumed_total == wire.server._local_max_data.used == 5000


def test_unsent_bytes(wire: Wire) -> None:
    stream_id = wire.client.open_stream()
    assert wire.client.unsent_bytes(stream_id) == 0
    wire.client.write(stream_id, bytes(300))
    assert wire.client.unsent_bytes(stream_id) == 300
    wire.run()
    assert wire.client.unsent_bytes(stream_id) == 0
    assert not wire.client.cannot_send(stream_id)
    wire.client.finish(stream_id)
    assert wire.client.cannot_send(stream_id)
    assert wire.client.cannot_send(400)
    wire.client.finish(stream_id)


def test_mtu_probe(wire: Wire) -> None:
    data, addr = wire.client.build_mtu_probe(9000, wire.now)
    assert (len(data), addr) == (9000, SERVER)
    flight = wire.client._loss.bytes_in_flight
    wire.server.receive_datagram(data, CLIENT, wire.now)
    wire.run()
    assert wire.client.take_mtu_results() == [(9000, True)]
    assert wire.client.take_mtu_results() == []
    assert wire.client._loss.bytes_in_flight == flight

    wire.client.build_mtu_probe(9500, wire.now)
    wire.client.cancel_mtu_probe()
    wire.run()
    assert wire.client.take_mtu_results() == []

    wire.client.build_mtu_probe(9500, wire.now)  # and it is lost
    for _ in range(20):
        wire.now += 0.1
        wire.run()
    assert wire.client.take_mtu_results() == [(9500, False)]


@pytest.mark.parametrize("size", [1200, 9000, 16384])
def test_large_datagrams(wire: Wire, size: int) -> None:
    wire.client.set_datagram_bytes(size)
    stream_id = wire.client.open_stream()
    data = bytes(range(256)) * 1000
    wire.client.write(stream_id, data)
    sizes = set()
    received = bytearray()
    while wire.client.unsent_bytes(stream_id):
        wire.now += 0.01
        for datagram, _ in wire.client.transmit(wire.now):
            sizes.add(len(datagram))
            wire.server.receive_datagram(datagram, CLIENT, wire.now)
        wire.run()
    while (event := wire.server.next_event()) is not None:
        received += getattr(event, "data", b"")
    assert received == data
    assert max(sizes) == size


def test_reset_tokens_can_be_computed_again(wire: Wire) -> None:
    again = credentials(b"s")
    assert wire.client.is_reset_token(again.reset_token(wire.client._peer_cid.cid))
    assert not wire.client.is_reset_token(bytes(16))
    for connection_id in wire.server._host_cids:
        assert connection_id.stateless_reset_token == again.reset_token(connection_id.cid)


def test_congestion_and_pacing_are_ours(wire: Wire) -> None:
    assert isinstance(wire.client._loss._cc, Cubic)
    assert isinstance(wire.client._loss._pacer, BurstPacer)
    assert wire.client.large_loss_events == 0


def test_terminate(wire: Wire) -> None:
    wire.client.terminate()
    assert wire.client.ended
    assert wire.client.get_timer() is None
    assert wire.client.transmit(wire.now) == []


@pytest.mark.parametrize(
    ("owner", "names"),
    [
        (
            connection.QuicConnection,
            "_initialize _handle_crypto_frame _handle_padding_frame _parse_transport_parameters _flush_builder "
            "_replenish_connection_ids _discard_epoch _set_state _get_or_create_stream_for_send _write_stream_frame "
            "_write_connection_limits _write_stream_limits _on_max_stream_data_delivery",
        ),
        (recovery.QuicPacketPacer, "next_send_time update_after_send update_bucket update_rate"),
        (stream.QuicStreamReceiver, "starting_offset stop"),
        (stream.QuicStreamSender, "get_frame on_data_delivery next_offset reset"),
        (QuicPacketBuilder, "start_packet start_frame remaining_flight_space remaining_buffer_space packet_number"),
        (Cubic, "on_packet_acked on_packets_lost on_packets_expired on_rtt_measurement"),
    ],
)
def test_names_that_are_overridden_or_called(owner: type, names: str) -> None:
    for name in names.split():
        assert hasattr(owner, name), f"aioquic's {owner.__name__} has no {name} any more"


def test_signatures_of_overridden_methods() -> None:
    for name in ("_write_stream_frame", "_write_stream_limits", "_write_connection_limits", "_handle_padding_frame"):
        theirs = inspect.signature(getattr(connection.QuicConnection, name))
        assert list(theirs.parameters) == list(inspect.signature(getattr(Engine, name)).parameters)
    assert {"in_flight", "is_ack_eliciting", "sent_bytes"} <= set(QuicSentPacket.__dataclass_fields__)


class Receiver:
    """Collects the streams of one engine as the connection would, granting window as data is read."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.streams: dict[int, bytearray] = {}

    def read(self) -> None:
        while (event := self.engine.next_event()) is not None:
            if isinstance(event, StreamDataReceived):
                self.streams.setdefault(event.stream_id, bytearray()).extend(event.data)
                self.engine.consumed(event.stream_id, len(event.data))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("loss", [0.0, 0.1])
def test_bulk_paths_under_loss_reordering_and_key_updates(wire: Wire, seed: int, loss: float) -> None:
    rng = random.Random(seed)
    client, server = wire.client, wire.server
    client.set_datagram_bytes(rng.choice((1200, 1452, 9000)))
    receiver = Receiver(server)
    sent = {}
    for _ in range(3):
        stream_id = client.open_stream()
        sent[stream_id] = rng.randbytes(rng.randrange(1, 400_000))
        client.write(stream_id, sent[stream_id])
        client.finish(stream_id)
    for turn in range(3000):
        wire.now += 0.003
        for sender, other, addr in ((client, server, CLIENT), (server, client, SERVER)):
            timer = sender.get_timer()
            if timer is not None and timer <= wire.now:
                sender.on_timer(wire.now)
            datagrams = [data for data, _ in sender.transmit(wire.now) if rng.random() >= loss]
            if loss and rng.random() < 0.2:
                rng.shuffle(datagrams)
            for data in datagrams:
                other.receive(data, addr, wire.now)
                if rng.random() < 0.02:
                    other.receive(data, addr, wire.now)
                    other.receive(data[:-1] + bytes((data[-1] ^ 1,)), addr, wire.now)
        receiver.read()
        if turn in (5, 40):
            client.request_key_update()
        if all(len(receiver.streams.get(key, b"")) == len(value) for key, value in sent.items()):
            break
    assert receiver.streams == sent
    assert client.close_reason is None
    assert server.close_reason is None


def test_bulk_paths_are_used(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly all packets of a transfer go the quick way; the test above says that it is right."""
    quick = {"sent": 0, "received": 0}
    seal, take = Engine._seal, Engine._take_stream_frame

    def counting_seal(self: Engine, peer_cid: bytes, number: int, plain: bytes) -> bytes:
        quick["sent"] += 1
        return seal(self, peer_cid, number, plain)

    def counting_take(self: Engine, plain: bytes) -> bool:
        taken = take(self, plain)
        quick["received"] += taken
        return taken

    monkeypatch.setattr(Engine, "_seal", counting_seal)
    monkeypatch.setattr(Engine, "_take_stream_frame", counting_take)
    stream_id = wire.client.open_stream()
    wire.client.write(stream_id, bytes(1_000_000))
    total = 0
    while wire.client.unsent_bytes(stream_id):
        wire.now += 0.01
        for data, _ in wire.client.transmit(wire.now):
            total += 1
            wire.server.receive(data, CLIENT, wire.now)
        for data, _ in wire.server.transmit(wire.now):
            wire.client.receive(data, SERVER, wire.now)
    assert quick["sent"] > 0.8 * total
    assert quick["received"] > 0.8 * total


@pytest.mark.parametrize("value", [0, 63, 64, 16383, 16384, 2**30 - 1, 2**30, 2**62 - 1])
def test_varints(value: int) -> None:
    encoded = quic_bulk._push_varint(value)
    buffer = Buffer(capacity=8)
    buffer.push_uint_var(value)
    assert encoded == buffer.data
    assert quic_bulk._pull_varint(b"x" + encoded + b"y", 1) == (value, 1 + len(encoded))
    for cut in range(len(encoded)):
        with pytest.raises(IndexError):
            quic_bulk._pull_varint(encoded[:cut], 0)


def test_failures_inside_the_engine_end_the_connection_only(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bool:
        raise AssertionError("a bug")

    monkeypatch.setattr(wire.server, "_receive_stream_packet", fail)
    wire.server.receive(b"@" + bytes(50), CLIENT, wire.now)
    assert wire.server.ended
    assert wire.server.close_reason is not None
    assert wire.server.transmit(wire.now) == []
