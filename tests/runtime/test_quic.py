"""The QUIC transport over real sockets on loopback."""

from __future__ import annotations

import datetime
import os
import random
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import trio
import trio.testing
from aioquic.quic.packet import QuicErrorCode
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from waiting import remains, until

from lattica.errors import ConnectionLost, DialError, PathLost, StreamReset, WrongPeer
from lattica.transports import quic_admission, quic_connection
from lattica.transports.quic import QuicListener, QuicTransport
from lattica.transports.quic_connection import QuicLink
from lattica.transports.quic_engine import Address, Credentials
from lattica.transports.quic_stream import HIGH_WATER_BYTES, QuicStream
from lattica_protocols.keys import PrivateKey
from lattica_protocols.limits import MAX_QUIC_STREAMS, QUIC_CONNECTION_WINDOW_BYTES, QUIC_STREAM_WINDOW_BYTES
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.paths.heartbeat import Pace
from lattica_protocols.peer_id import PeerId

Run = Callable[..., Any]
SERVER_KEY = PrivateKey.generate(b"s" * 32)
CLIENT_KEY = PrivateKey.generate(b"c" * 32)
SERVER_ID = PeerId.from_public_key(SERVER_KEY.public_key)
CLIENT_ID = PeerId.from_public_key(CLIENT_KEY.public_key)
LOOPBACK = "/ip4/127.0.0.1/udp/0/quic-v1"
PACE = Pace(probe=0.1, dead=0.3, keep_alive=0.2)


@dataclass
class Pair:
    nursery: trio.Nursery
    server: QuicTransport
    client: QuicTransport
    listener: QuicListener
    inbound: trio.MemoryReceiveChannel[QuicLink]

    @property
    def addr(self) -> Multiaddr:
        return self.listener.addrs[0]

    async def connect(self, addr: Multiaddr | None = None) -> tuple[QuicLink, QuicLink]:
        """(the client's end, the server's end)"""
        ours = await self.client.dial(addr or self.addr, SERVER_ID)
        return ours, await self.inbound.receive()

    async def streams(self) -> tuple[QuicStream, QuicStream]:
        ours, theirs = await self.connect()
        stream = await ours.open_stream()
        stream.write(b"!")
        other = await theirs.accept_stream()
        assert await other.receive_exactly(1) == b"!"
        return stream, other


@asynccontextmanager
async def open_pair(listen: str = LOOPBACK) -> AsyncIterator[Pair]:
    send, receive = trio.open_memory_channel[QuicLink](1000)

    async def on_connection(connection: Any) -> None:
        await send.send(connection)

    async with trio.open_nursery() as nursery:
        server, client = QuicTransport(nursery, SERVER_KEY), QuicTransport(nursery, CLIENT_KEY)
        listener = await server.listen(Multiaddr.parse(listen), on_connection)
        yield Pair(nursery, server, client, listener, receive)
        nursery.cancel_scope.cancel()


async def echo(connection: QuicLink) -> None:
    async def one(stream: QuicStream) -> None:
        while data := await stream.receive_some():
            await stream.send_all(data)
        await stream.close_write()

    async with trio.open_nursery() as nursery:
        while True:
            try:
                nursery.start_soon(one, await connection.accept_stream())
            except ConnectionLost:
                return


async def read_all(stream: QuicStream) -> bytes:
    parts = []
    while data := await stream.receive_some():
        parts.append(data)
    return b"".join(parts)


@pytest.mark.parametrize(
    ("listen", "dial"),
    [
        (LOOPBACK, None),
        ("/ip6/::1/udp/0/quic-v1", None),
        ("/ip4/0.0.0.0/udp/0/quic-v1", "/ip4/127.0.0.1/udp/{port}/quic-v1"),
        ("/ip4/0.0.0.0/udp/0/quic-v1", "/ip4/127.0.0.2/udp/{port}/quic-v1"),
        ("/ip6/::/udp/0/quic-v1", "/ip6/::1/udp/{port}/quic-v1"),
        (LOOPBACK, "/dns4/localhost/udp/{port}/quic-v1"),
        (LOOPBACK, "/dns/localhost/udp/{port}/quic-v1"),
    ],
)
def test_echo(run: Run, listen: str, dial: str | None) -> None:
    async def main() -> None:
        async with open_pair(listen) as pair:
            port = pair.addr.value("udp")
            ours, theirs = await pair.connect(Multiaddr.parse(dial.format(port=port)) if dial else None)
            pair.nursery.start_soon(echo, theirs)
            assert (ours.peer_id, theirs.peer_id) == (SERVER_ID, CLIENT_ID)
            assert (ours.direction, theirs.direction) == ("outbound", "inbound")
            assert ours.path == "quic"
            data = random.Random(1).randbytes(1_000_000)
            stream = await ours.open_stream()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, data)
                assert await stream.receive_exactly(len(data)) == data
            await stream.close_write()
            assert await stream.receive_some() == b""
            assert ours.sent_bytes > len(data) < ours.received_bytes
            assert ours.rtt is not None
            assert 0 < ours.rtt < 1
            assert ours.stream_count() == 0

    run(main)


def test_listening_socket_is_used_to_dial(run: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair:
            own = await pair.client.listen(Multiaddr.parse(LOOPBACK), ignore)
            ours, theirs = await pair.connect()
            assert theirs.remote_addr == own.addrs[0] == ours.local_addr
            assert len(pair.client.endpoints) == 1

    run(main)


def test_both_dial_each_other_at_once(run: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair:
            done: list[QuicLink] = []

            async def on_connection(connection: Any) -> None:
                done.append(connection)

            own = await pair.client.listen(Multiaddr.parse(LOOPBACK), on_connection)

            async def back() -> None:
                done.append(await pair.server.dial(own.addrs[0], CLIENT_ID))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(back)
                await pair.connect()
            assert len(done) >= 1
            assert {link.peer_id for link in done} == {CLIENT_ID, SERVER_ID} or done[0].peer_id == CLIENT_ID

    run(main)


# -- dials that fail ----------------------------------------------------------------------------------------------
def test_wrong_peer_is_named(run: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair:
            with pytest.raises(WrongPeer, match=str(SERVER_ID)):
                await pair.client.dial(pair.addr, CLIENT_ID)
            with pytest.raises(WrongPeer):
                await pair.client.dial(pair.addr.with_peer(CLIENT_ID), None)
            await until(lambda: not pair.client.endpoints[0].links)

    run(main)


def test_nobody_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quic_connection, "HANDSHAKE_TIMEOUT_SECONDS", 0.3)

    async def main() -> None:
        async with open_pair() as pair:
            with silent_socket() as addr, pytest.raises(DialError, match="no answer"):
                await pair.client.dial(addr, None)
            with pytest.raises(DialError):
                await pair.client.dial(Multiaddr.parse("/dns4/does-not-exist.invalid/udp/1/quic-v1"), None)
            with pytest.raises(DialError):
                await pair.client.dial(Multiaddr.parse("/ip4/127.0.0.1/tcp/1"), None)

    run(main)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which datagram an ICMP error is about")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_refused_by_icmp(run: Run, host: str) -> None:
    async def main() -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.bind((host, 0))
            port = sock.getsockname()[1]
        addr = Multiaddr.parse(f"/ip{6 if ':' in host else 4}/{host}/udp/{port}/quic-v1")
        async with open_pair() as pair:
            with trio.fail_after(2), pytest.raises(DialError, match="nobody listens there"):
                await pair.client.dial(addr, None)
            for endpoint in pair.client.endpoints:
                await until(lambda endpoint=endpoint: not endpoint.links)
            punching = pair.client.endpoint_for((host, port)).connect((host, port), None)
            with trio.move_on_after(0.5):
                await punching.settled.wait()
            assert not punching.settled.is_set(), "holes being punched are refused at first"
            punching.abort()
            stranger = pair.client.endpoint_for((host, port)).connect((host, port), None, refusable=True)
            stranger._endpoint._by_id.clear()  # an error that quotes no id of ours
            with trio.move_on_after(0.3):
                await stranger.settled.wait()
            assert not stranger.settled.is_set()
            stranger.abort()

    run(main)


def test_cancelled_dial_leaves_nothing(run: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair:
            with silent_socket() as addr:
                with trio.move_on_after(0.05) as scope:
                    await pair.client.dial(addr, None)
                assert scope.cancelled_caught
            (endpoint,) = pair.client.endpoints
            await until(lambda: not endpoint.links)
            assert not endpoint._by_id

    run(main)


def test_client_without_certificate_is_refused(run: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair:
            credentials: Any = Credentials(None, None, b"x" * 32)  # type: ignore[arg-type]
            pair.client._credentials = credentials
            ours = await pair.client.dial(pair.addr, SERVER_ID)
            await ours.closed.wait()
            assert "certificate" in str(ours.close_error)
            with pytest.raises(trio.WouldBlock):
                pair.inbound.receive_nowait()
            assert pair.server._admission.half_open == 0

    run(main)


def test_client_with_a_plain_certificate_is_refused(run: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair:
            pair.client._credentials = without_libp2p_extension()
            ours = await pair.client.dial(pair.addr, SERVER_ID)
            await ours.closed.wait()
            with pytest.raises(trio.WouldBlock):
                pair.inbound.receive_nowait()

    run(main)


def test_closed_listener_accepts_no_more(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quic_connection, "HANDSHAKE_TIMEOUT_SECONDS", 0.3)

    async def main() -> None:
        async with open_pair() as pair:
            ours, theirs = await pair.connect()
            await pair.listener.aclose()
            pair.nursery.start_soon(echo, theirs)
            with pytest.raises(DialError):
                await pair.client.dial(pair.addr, SERVER_ID)
            stream = await ours.open_stream()
            stream.write(b"still here")
            assert await stream.receive_exactly(10) == b"still here"

    run(main)


# -- what strangers send ------------------------------------------------------------------------------------------
def test_garbage_is_ignored(run: Run) -> None:
    async def main() -> None:
        rng = random.Random(7)
        async with open_pair() as pair:
            ours, theirs = await pair.connect()
            pair.nursery.start_soon(echo, theirs)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as noise:
                for _ in range(300):
                    noise.sendto(rng.randbytes(rng.choice((0, 1, 7, 30, 64, 1200, 1400))), target(pair.addr))
                for connection_id in list(ours.connection_ids | theirs.connection_ids):
                    for first in (0x40, 0xC0, 0xFF):
                        head = bytes((first,)) + (b"\0\0\0\1\x08" if first > 0x7F else b"")
                        noise.sendto(head + connection_id + rng.randbytes(1300), target(pair.addr))
            stream = await ours.open_stream()
            stream.write(b"alive")
            assert await stream.receive_exactly(5) == b"alive"
            assert not ours.closed.is_set()

    run(main)


def test_stun_goes_to_its_handler(run: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair:
            seen: list[tuple[bytes, Address]] = []
            endpoint = pair.listener.endpoint
            endpoint.on_other_datagram = lambda data, addr, source: seen.append((data, addr))
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
                other.bind(("127.0.0.1", 0))
                other.setblocking(False)
                other.sendto(b"\x00\x01" + bytes(18), target(pair.addr))
                other.sendto(b"\x20" + bytes(63), target(pair.addr))
                await until(lambda: bool(seen))
                assert seen == [(b"\x00\x01" + bytes(18), other.getsockname())]
                endpoint.send_datagram(b"\x01\x01answer", seen[0][1])
                await trio.lowlevel.wait_readable(other)
                assert other.recv(100) == b"\x01\x01answer"

    run(main)


def test_unknown_version_is_negotiated(run: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
                other.setblocking(False)
                hello = b"\xc0\x0a\x0a\x0a\x0a\x08destsrcs\x04cids"
                other.sendto(hello.ljust(1100, b"\0"), target(pair.addr))
                other.sendto(hello.ljust(1200, b"\0"), target(pair.addr))
                await trio.lowlevel.wait_readable(other)
                answer = other.recv(1000)
                assert answer[1:5] == bytes(4)
                assert answer[5:] == b"\x04cids\x08destsrcs\0\0\0\1"

    run(main)


def test_retry_proves_the_address(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quic_admission, "QUIC_RETRY_THRESHOLD", 0)

    async def main() -> None:
        async with open_pair() as pair:
            ours, theirs = await pair.connect()
            assert ours.engine._retry_count == 1
            assert theirs.peer_id == CLIENT_ID

    run(main)


def test_half_open_handshakes_are_bounded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quic_admission, "MAX_QUIC_HALF_OPEN_PER_IP", 3)
    monkeypatch.setattr(quic_connection, "HANDSHAKE_TIMEOUT_SECONDS", 0.5)

    async def main() -> None:
        async with open_pair() as pair:
            endpoint = pair.listener.endpoint
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
                for number in range(10):
                    initial = b"\xc0\0\0\0\1\x08dest%04d\x04cids\0\x44\x80" % number
                    other.sendto(initial.ljust(1200, b"\0"), target(pair.addr))
                await until(lambda: pair.server._admission.half_open == 3)
                await trio.testing.wait_all_tasks_blocked()
                assert len(endpoint.links) == 3
                await until(lambda: not endpoint.links)
                assert pair.server._admission.half_open == 0
            await pair.connect()

    run(main)


def test_restarted_peer_is_noticed_at_once(run: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair:
            ours, theirs = await pair.connect()
            await trio.testing.wait_all_tasks_blocked(0.05)
            pair.listener.endpoint._forget(theirs)  # as if the process had been replaced by another with its key
            stream = await ours.open_stream()
            stream.write(bytes(100))
            await ours.closed.wait()
            assert isinstance(ours.close_error, ConnectionLost)
            with pytest.raises(ConnectionLost):
                await stream.receive_some()

    run(main)


def test_unidirectional_streams_are_refused(run: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair:
            ours, theirs = await pair.connect()
            ours.engine._remote_max_streams_uni = 10
            ours.engine.send_stream_data(2, b"x")
            ours.mark_dirty()
            await theirs.closed.wait()
            assert f"{int(QuicErrorCode.STREAM_LIMIT_ERROR):#x}" in str(theirs.close_error)

    run(main)


# -- streams ------------------------------------------------------------------------------------------------------
def test_half_close(run: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair:
            stream, other = await pair.streams()
            await stream.send_all(b"question")
            await stream.close_write()
            await stream.close_write()
            with pytest.raises(StreamReset):
                stream.write(b"more")
            assert await read_all(other) == b"question"
            await other.send_all(b"answer")
            await other.close_write()
            assert await read_all(stream) == b"answer"
            assert stream.connection.stream_count() == other.connection.stream_count() == 0

    run(main)


def test_reset_ends_both_directions(run: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair:
            stream, other = await pair.streams()
            other.write(b"never read")
            stream.reset()
            stream.reset()
            for end in (stream, other):
                with pytest.raises(StreamReset):
                    await read_all(end)
                with pytest.raises(StreamReset):
                    end.write(b"x")
                with pytest.raises(StreamReset):
                    await end.send_all(b"x")
                end.reset()
            await until(lambda: stream.connection.stream_count() == other.connection.stream_count() == 0)

    run(main)


def test_peer_that_stops_reading(run: Run) -> None:
    """Rust sends STOP_SENDING when it drops a read half, while it may still write."""

    async def main() -> None:
        async with open_pair() as pair:
            stream, other = await pair.streams()
            stream.stop_lingering()
            await until(lambda: other._peer_stopped)
            with pytest.raises(StreamReset, match="stopped reading"):
                other.write(b"x")
            await other.close_write()
            stream.write(b"still")
            assert await other.receive_exactly(5) == b"still"

    run(main)


def test_closed_stream_throws_away_what_comes(run: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair:
            stream, other = await pair.streams()
            await other.aclose()
            assert await stream.receive_some() == b""
            with pytest.raises(StreamReset, match="stopped reading"):
                await stream.send_all(bytes(32 * 1024 * 1024))
            assert other._buffered == 0
            stream.reset()
            await until(lambda: not other.connection.stream_count())

    run(main)


def test_back_pressure(run: Run) -> None:
    """A reader that does not read holds up the sender, and one window at most waits on its side."""

    async def main() -> None:
        async with open_pair() as pair:
            stream, other = await pair.streams()
            data = random.Random(2).randbytes(QUIC_STREAM_WINDOW_BYTES * 2)
            finished = trio.Event()

            async def send() -> None:
                await stream.send_all(data)
                await stream.close_write()
                finished.set()

            pair.nursery.start_soon(send)
            await until(lambda: other._buffered == QUIC_STREAM_WINDOW_BYTES - 1)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert not finished.is_set()
            assert other._buffered == QUIC_STREAM_WINDOW_BYTES - 1
            assert stream.queued_bytes() < 2 * HIGH_WATER_BYTES
            assert await read_all(other) == data
            await finished.wait()

    run(main)


def test_stalled_streams_do_not_exceed_the_connection_window(run: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair:
            ours, theirs = await pair.connect()
            for _ in range(6):
                stream = await ours.open_stream()
                pair.nursery.start_soon(ignore_loss, stream.send_all, bytes(QUIC_STREAM_WINDOW_BYTES))
            await until(lambda: buffered(theirs) == QUIC_CONNECTION_WINDOW_BYTES)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert buffered(theirs) == QUIC_CONNECTION_WINDOW_BYTES

    run(main)


def test_reset_streams_give_their_window_back(run: Run) -> None:
    """Bytes nobody read must not eat up the connection's window."""

    async def main() -> None:
        async with open_pair() as pair:
            ours, theirs = await pair.connect()
            for number in range(12):
                stream = await ours.open_stream()
                with trio.move_on_after(5) as scope:
                    await stream.send_all(bytes(4 * 1024 * 1024))
                assert not scope.cancelled_caught
                other = await theirs.accept_stream()
                (stream if number % 2 else other).reset()
            pair.nursery.start_soon(echo, theirs)
            stream = await ours.open_stream()
            stream.write(b"on")
            assert await stream.receive_exactly(2) == b"on"

    run(main)


class Sink:
    def __init__(self) -> None:
        self.data = bytearray()
        self.ended = False
        self.closed: list[Exception | None] = []

    def data_received(self, data: memoryview) -> None:
        self.data += data

    def eof_received(self) -> None:
        self.ended = True

    def stream_closed(self, error: Exception | None) -> None:
        self.closed.append(error)


def test_sink(run: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair:
            stream, other = await pair.streams()
            await stream.send_all(b"head-body")
            assert await other.receive_some(6) == b"head-b"
            other.push_back(b"-b")
            sink = Sink()
            other.set_sink(sink)
            assert sink.data == b"-body"
            await stream.send_all(b"-tail")
            await stream.close_write()
            await until(lambda: sink.ended)
            assert sink.data == b"-body-tail"
            assert sink.closed == []
            await other.close_write()
            assert sink.closed == [None]

    run(main)


def test_paused_sink_gets_one_window(run: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair:
            stream, other = await pair.streams()
            sink = Sink()
            other.set_sink(sink)
            other.pause_sink()
            size = 2 * QUIC_STREAM_WINDOW_BYTES
            pair.nursery.start_soon(ignore_loss, stream.send_all, bytes(size))
            # The byte that `streams` exchanged before was consumed, but is too little for an update.
            await until(lambda: len(sink.data) == QUIC_STREAM_WINDOW_BYTES - 1)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert len(sink.data) == QUIC_STREAM_WINDOW_BYTES - 1
            other.resume_sink()
            await until(lambda: len(sink.data) == size)

    run(main)


def test_lost_connection_ends_sinks_and_readers(run: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair:
            stream, other = await pair.streams()
            sink = Sink()
            other.set_sink(sink)
            other.write(b"last words")
            await other.close_write()
            await until(lambda: stream._eof)
            await other.connection.aclose()
            await stream.connection.closed.wait()
            assert stream.connection.close_error is None
            assert [type(error) for error in sink.closed] == [ConnectionLost]
            assert await read_all(stream) == b"last words"
            with pytest.raises(ConnectionLost):
                stream.write(b"x")
            with pytest.raises(ConnectionLost):
                await stream.connection.open_stream()
            with pytest.raises(ConnectionLost):
                await stream.connection.accept_stream()

    run(main)


def test_many_streams(run: Run) -> None:
    """More streams than may be open at once: opening waits, and places become free."""

    async def main() -> None:
        async with open_pair() as pair:
            ours, theirs = await pair.connect()
            held = [await ours.open_stream() for _ in range(MAX_QUIC_STREAMS)]
            for stream in held:
                stream.write(b"x")
            with trio.move_on_after(0.1) as scope:
                await ours.open_stream()
            assert scope.cancelled_caught
            pair.nursery.start_soon(echo, theirs)

            async def use(stream: QuicStream) -> None:
                await stream.close_write()
                assert await read_all(stream) == b"x"

            async def one() -> None:
                stream = await ours.open_stream()
                await stream.send_all(b"x")
                await use(stream)

            async with trio.open_nursery() as nursery:
                for _ in range(400):
                    nursery.start_soon(one)
                for stream in held:
                    nursery.start_soon(use, stream)
            assert ours.stream_count() == 0
            await until(lambda: theirs.stream_count() == 0)

    run(main)


def test_streams_that_nobody_accepts_are_bounded(run: Run) -> None:
    """Finished and not to be answered, a stream makes room for the next one at once."""

    async def main() -> None:
        async with open_pair() as pair:
            ours, theirs = await pair.connect()

            async def flood() -> None:
                while True:
                    stream = await ours.open_stream()
                    stream.write(b"x")
                    await stream.close_write()
                    stream.stop_lingering()

            with pytest.raises(ConnectionLost):
                await flood()
            await theirs.closed.wait()
            assert "accepted" in str(theirs.close_error)

    run(main)


def test_reset_streams_are_not_accepted(run: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair:
            ours, theirs = await pair.connect()
            first, second = await ours.open_stream(), await ours.open_stream()
            first.write(b"first")
            await until(lambda: theirs.stream_count() == 1)
            first.reset()
            await until(lambda: theirs.stream_count() == 0)
            second.write(b"second")
            assert await (await theirs.accept_stream()).receive_some() == b"second"

    run(main)


# -- the path -----------------------------------------------------------------------------------------------------
class Network:
    """A UDP middlebox between a client and `target`: loses, limits sizes, and changes its port like a NAT."""

    def __init__(self, target: Address) -> None:
        self.target = target
        self.rng = random.Random(3)
        self.loss = 0.0
        self.max_size = 100_000
        self.client: Address | None = None
        self.stolen: Any = None
        """A socket from which whatever the client sends reaches the server first."""
        self.front = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.other_front: Any = None
        """Where the server seems to be after its NAT changed its port; what is sent to the old one is lost."""
        self.scope: trio.CancelScope | None = None

    @property
    def addr(self) -> Multiaddr:
        return Multiaddr.quic(*self.front.getsockname())

    async def run(self, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        await self.front.bind(("127.0.0.1", 0))
        with self.front:
            task_status.started()
            while True:
                with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as back, trio.CancelScope() as self.scope:
                    await back.bind(("127.0.0.1", 0))

                    async def backwards(back: Any = back) -> None:
                        while True:
                            data = await back.recv(65536)
                            if self.client is not None and self.passes(data):
                                await (self.other_front or self.front).sendto(data, self.client)

                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(backwards)
                        while True:
                            data, self.client = await self.front.recvfrom(65536)
                            if self.other_front is not None:
                                continue
                            if self.stolen is not None:
                                await self.stolen.sendto(data, self.target)
                            if self.passes(data):
                                await back.sendto(data, self.target)

    def passes(self, data: bytes) -> bool:
        return len(data) <= self.max_size and self.rng.random() >= self.loss

    def rebind(self) -> None:
        assert self.scope is not None
        self.scope.cancel()


@asynccontextmanager
async def open_network() -> AsyncIterator[tuple[Pair, Network]]:
    async with open_pair() as pair:
        network = Network(target(pair.addr))
        await pair.nursery.start(network.run)
        yield pair, network


def test_peer_behind_a_nat_that_changes_its_port(run: Run) -> None:
    async def main() -> None:
        async with open_network() as (pair, network):
            ours, theirs = await pair.connect(network.addr)
            pair.nursery.start_soon(echo, theirs)
            stream = await ours.open_stream()
            stream.write(b"one")
            assert await stream.receive_exactly(3) == b"one"
            before = theirs.remote_addr
            network.rebind()
            await trio.testing.wait_all_tasks_blocked()
            stream.write(b"two")
            assert await stream.receive_exactly(3) == b"two"
            assert theirs.remote_addr != before

    run(main)


def test_who_copies_packets_does_not_get_the_connection(run: Run) -> None:
    """A copy that arrives before the original looks like a move; nobody answers the challenge there."""

    async def main() -> None:
        async with open_network() as (pair, network):
            ours, theirs = await pair.connect(network.addr)
            pair.nursery.start_soon(echo, theirs)
            stream = await ours.open_stream()
            stream.write(b"one")
            assert await stream.receive_exactly(3) == b"one"
            before = theirs.remote_addr
            with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as thief:
                await thief.bind(("127.0.0.1", 0))
                network.stolen = thief
                stream.write(b"two")
                await until(lambda: theirs.remote_addr != before)
                network.stolen = None
                assert await stream.receive_exactly(3) == b"two"
                for _ in range(20):
                    stream.write(b"again")
                    assert await stream.receive_exactly(5) == b"again"
                await until(lambda: theirs.remote_addr == before)
                taken = 0
                thief._sock.setblocking(False)
                while True:
                    try:
                        taken += len(thief._sock.recv(65536))
                    except BlockingIOError:
                        break
                assert taken <= 3 * 1500, "more than three times what came from there"
            assert not ours.closed.is_set()

    run(main)


def test_the_dialled_side_changes_its_port(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the dialler may move (RFC 9000 section 9): what comes from elsewhere is not the server's, and the silence of
    its address ends the connection, so that the session can go on over another (`tests/nat/test_moving.py`)."""
    monkeypatch.setattr(quic_connection, "PACE", Pace(probe=0.1, dead=0.3, keep_alive=0.2))

    async def main() -> None:
        async with open_network() as (pair, network):
            ours, theirs = await pair.connect(network.addr)
            stream = await ours.open_stream()
            stream.write(b"one")
            assert await (await theirs.accept_stream()).receive_exactly(3) == b"one"
            with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as elsewhere:
                await elsewhere.bind(("127.0.0.1", 0))
                network.other_front = elsewhere
                before, received = ours.remote_addr, ours.received_bytes
                push = await theirs.open_stream()
                push.write(b"from elsewhere")
                stream.write(b"two")
                await until(lambda: ours.received_bytes > received)  # it did come
                await ours.closed.wait()
                assert ours.remote_addr == before
            assert isinstance(ours.close_error, PathLost)
            await theirs.closed.wait()
            network.other_front = None
            again, _ = await pair.connect(network.addr)
            assert again.established

    run(main)


def test_lossy_path(run: Run) -> None:
    async def main() -> None:
        async with open_network() as (pair, network):
            network.loss = 0.05
            ours, theirs = await pair.connect(network.addr)
            pair.nursery.start_soon(echo, theirs)
            data = random.Random(5).randbytes(300_000)
            stream = await ours.open_stream()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, data)
                assert await stream.receive_exactly(len(data)) == data

    run(main)


def test_path_mtu_is_found(run: Run) -> None:
    async def main() -> None:
        async with open_network() as (pair, network):
            network.max_size = 1400
            ours, theirs = await pair.connect(network.addr)
            pair.nursery.start_soon(echo, theirs)
            await until(lambda: ours.engine.datagram_bytes == 1400 - 8)  # the largest of the table that fits
            direct, _ = await pair.connect()
            await until(lambda: direct.engine.datagram_bytes == 16384)

    run(main)


def test_black_hole(run: Run) -> None:
    """The path's MTU shrinks and nobody tells us."""

    async def main() -> None:
        async with open_network() as (pair, network):
            ours, theirs = await pair.connect(network.addr)
            pair.nursery.start_soon(echo, theirs)
            await until(lambda: ours.engine.datagram_bytes == theirs.engine.datagram_bytes == 16384)
            network.max_size = 1300
            data = random.Random(5).randbytes(100_000)
            stream = await ours.open_stream()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, data)
                assert await stream.receive_exactly(len(data)) == data
            assert ours.engine.datagram_bytes < 1300

    run(main)


def test_dead_path(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quic_connection, "PACE", PACE)

    async def main() -> None:
        async with open_network() as (pair, network):
            ours, theirs = await pair.connect(network.addr)
            await remains(lambda: not ours.closed.is_set() and not theirs.closed.is_set(), 2 * PACE.dead)  # idle
            network.loss = 1.0
            await ours.closed.wait()
            await theirs.closed.wait()
            assert isinstance(ours.close_error, ConnectionLost)

    run(main)


def test_leaving_the_nursery_says_goodbye(run: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair:
            async with trio.open_nursery() as nursery:
                transport = QuicTransport(nursery, PrivateKey.generate(os.urandom(32)))
                await transport.dial(pair.addr, SERVER_ID)
                theirs = await pair.inbound.receive()
                nursery.cancel_scope.cancel()
            await theirs.closed.wait()
            assert theirs.close_error is None

    run(main)


# -- small things -------------------------------------------------------------------------------------------------
def target(addr: Multiaddr) -> tuple[str, int]:
    found = addr.host_port()
    assert found is not None
    return found[1], found[2]


class silent_socket:
    """A bound UDP socket that never answers."""

    def __enter__(self) -> Multiaddr:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        return Multiaddr.quic(*self.socket.getsockname())

    def __exit__(self, *_: object) -> None:
        self.socket.close()


async def ignore(connection: Any) -> None:
    """Accept a connection and leave it alone."""


async def ignore_loss(function: Callable[..., Any], *args: Any) -> None:
    try:
        await function(*args)
    except (ConnectionLost, StreamReset):
        pass


def buffered(link: QuicLink) -> int:
    return sum(stream._buffered for stream in link._streams.values())


def without_libp2p_extension() -> Credentials:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    return Credentials(certificate, key, b"x" * 32)
