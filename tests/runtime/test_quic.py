"""QUIC connections over real sockets on loopback: dials, what fails, and what strangers send."""

from __future__ import annotations

import datetime
import os
import random
import socket
import sys
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
from aioquic.quic.packet import QuicErrorCode
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from quic_pair import CLIENT_ID, LOOPBACK, SERVER_ID, echo, ignore, open_pair, target
from waiting import until

from lattica.errors import ConnectionLost, DialError, WrongPeer
from lattica.transports import quic_admission, quic_connection
from lattica.transports.quic import QuicTransport
from lattica.transports.quic_connection import QuicLink
from lattica.transports.quic_engine import Address, Credentials
from lattica_protocols.keys import PrivateKey
from lattica_protocols.multiaddr import Multiaddr

Run = Callable[..., Any]


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


class silent_socket:
    """A bound UDP socket that never answers."""

    def __enter__(self) -> Multiaddr:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        return Multiaddr.quic(*self.socket.getsockname())

    def __exit__(self, *_: object) -> None:
        self.socket.close()


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
