"""The TCP transport over real loopback sockets."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.lowlevel
import trio.testing
from tcp_nodes import ALICE, ALICE_ID, BOB, BOB_ID, Node, Recorder, connected, send_forever, two_nodes

from lattica.errors import ConnectionLost, DialError, PathAltered, PeerMisbehaved, WrongPeer
from lattica.interfaces import Stream
from lattica.transports import muxed, tcp, upgrade
from lattica.transports.channel import SocketChannel, StreamChannel
from lattica.transports.muxed import MuxedConnection
from lattica.transports.tcp import TcpTransport
from lattica.transports.upgrade import ConnectionFacts
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.noise_transport import Cipher
from lattica_protocols.paths.heartbeat import Pace
from lattica_protocols.peer_id import PeerId

Run = Callable[..., Any]


# -- dialling and listening ----------------------------------------------------------------------------------
def test_dial_and_talk(run: Run) -> None:
    async def main() -> None:
        async with connected() as pair:
            assert pair.outbound.peer_id == BOB_ID
            assert pair.inbound.peer_id == ALICE_ID
            assert pair.outbound.direction == "outbound"
            assert pair.inbound.direction == "inbound"
            assert pair.outbound.remote_addr == pair.inbound.local_addr == pair.bob.addr
            assert pair.outbound.local_addr == pair.inbound.remote_addr
            ours = await pair.outbound.open_stream()
            ours.write(b"hello ", bytearray(b"world"))
            theirs = await pair.inbound.accept_stream()
            assert await theirs.receive_exactly(11) == b"hello world"
            await theirs.send_frame(b"answer")
            assert await ours.receive_frame(100) == b"answer"
            assert pair.outbound.stream_count() == pair.inbound.stream_count() == 1
            assert pair.outbound.sent_bytes > 0
            assert pair.inbound.received_bytes > 0

    run(main)


@pytest.mark.parametrize("host", ["/ip6/::1", "/dns4/localhost", "/dns/localhost"])
def test_addresses(run: Run, host: str) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            alice, bob = Node(ALICE, nursery), Node(BOB, nursery)
            await bob.listen(Multiaddr.parse("/ip6/::1/tcp/0" if "ip6" in host else "/ip4/127.0.0.1/tcp/0"))
            addr = Multiaddr.parse(f"{host}/tcp/{bob.addr.value('tcp')}")
            assert alice.transport.can_dial(addr)
            connection = await alice.transport.dial(addr.with_peer(BOB_ID), None)
            assert connection.remote_addr == bob.addr
            nursery.cancel_scope.cancel()

    run(main)


def test_which_addresses_are_ours(run: Run) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            transport = TcpTransport(ALICE, nursery)
            for text in ("/ip4/1.2.3.4/udp/5/quic-v1", "/ip4/1.2.3.4/tcp/5/ws", "/ip4/1.2.3.4/tcp/5/p2p-circuit"):
                assert not transport.can_dial(Multiaddr.parse(text))
                assert not transport.can_listen(Multiaddr.parse(text))
            assert not transport.can_listen(Multiaddr.parse("/dns4/localhost/tcp/1"))
            with pytest.raises(DialError):
                await transport.dial(Multiaddr.parse("/ip4/127.0.0.1/udp/5/quic-v1"), None)
            with pytest.raises(ValueError, match="listens on"):
                await Node(ALICE, nursery).listen(Multiaddr.parse("/dns4/localhost/tcp/1"))

    run(main)


def test_a_wrong_peer_is_refused_and_named(run: Run) -> None:
    async def main() -> None:
        async with two_nodes() as (alice, bob):
            with pytest.raises(WrongPeer, match=str(BOB_ID)):
                await alice.transport.dial(bob.addr, ALICE_ID)

    run(main)


def test_dialling_ourselves_is_refused(run: Run) -> None:
    async def main() -> None:
        async with two_nodes() as (_, bob):
            with pytest.raises(DialError, match="itself"):
                await bob.transport.dial(bob.addr, None)

    run(main)


def test_nobody_listening(run: Run) -> None:
    async def main() -> None:
        async with two_nodes() as (alice, bob):
            await bob.listener.aclose()
            with pytest.raises(DialError, match="refused"):
                await alice.transport.dial(bob.addr, BOB_ID)
            with pytest.raises(DialError, match="resolve"):
                await alice.transport.dial(Multiaddr.parse("/dns4/nothing.invalid/tcp/1"), None)

    run(main)


def test_a_port_that_is_taken(run: Run) -> None:
    async def main() -> None:
        async with two_nodes() as (alice, bob):
            with pytest.raises(OSError, match="cannot listen"):
                await alice.listen(bob.addr)

    run(main)


def test_closing_the_listener_keeps_the_connections(run: Run) -> None:
    async def main() -> None:
        async with connected() as pair:
            await pair.bob.listener.aclose()
            ours, theirs = await pair.streams()
            await ours.send_all(b"x")
            assert await theirs.receive_exactly(1) == b"x"

    run(main)


def test_dialling_from_the_listening_port_with_the_roles_swapped(run: Run) -> None:
    async def main() -> None:
        async with two_nodes() as (alice, bob):
            await alice.listen()
            port = int(alice.addr.value("tcp") or 0)
            # What hole punching does, here without the other side's SYN: a plain acceptor that takes the
            # dialler's part.
            acceptor = socket.create_server(("127.0.0.1", 0))
            acceptor.setblocking(False)
            addr = Multiaddr.tcp("127.0.0.1", acceptor.getsockname()[1])
            made: dict[str, MuxedConnection] = {}

            async def dial() -> None:
                made["alice"] = await alice.transport.dial(addr, BOB_ID, bind_port=port, initiator=False)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(dial)
                await trio.lowlevel.wait_readable(acceptor)
                sock, peer = acceptor.accept()
                assert peer[1] == port
                sock.setblocking(False)
                facts = ConnectionFacts(addr, alice.addr, "inbound", "tcp")
                channel = SocketChannel(sock)
                made["bob"] = await bob.transport.upgrader.upgrade(channel, facts, ALICE_ID, initiator=True)
            bob.transport.adopt(made["bob"])
            stream = await made["bob"].open_stream()
            await stream.send_all(b"punched")
            assert await (await made["alice"].accept_stream()).receive_exactly(7) == b"punched"
            acceptor.close()

    run(main)


def test_cancelling_a_dial_leaves_nothing(run: Run) -> None:
    async def main() -> None:
        silent = socket.create_server(("127.0.0.1", 0))
        async with two_nodes() as (alice, _):
            with trio.move_on_after(0.05) as scope:
                await alice.transport.dial(Multiaddr.tcp("127.0.0.1", silent.getsockname()[1]), None)
            assert scope.cancelled_caught
            accepted, _ = silent.accept()
            accepted.settimeout(5)
            while accepted.recv(4096):
                pass  # the proposal, then the end: the dialler's socket is closed
            accepted.close()
        silent.close()

    run(main)


# -- bad input -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00",
        b"\xff" * 100,
        b"\x13/multistream/1.0.0\n\x07/noise\n\x00\x20" + bytes(32),
        b"\x13/multistream/1.0.0\n\x07/noise\n\xff\xff" + bytes(100),
        b"\x13/multistream/1.0.0\n" + b"\x0d/tls/1.0.0/x\n" * 30,
        b"",
    ],
)
def test_garbage_to_the_port(run: Run, garbage: bytes) -> None:
    async def main() -> None:
        async with two_nodes() as (alice, bob):
            stranger = await trio.open_tcp_stream("127.0.0.1", int(bob.addr.value("tcp") or 0))
            await stranger.send_all(garbage)
            await stranger.send_eof()
            with trio.fail_after(5):
                try:
                    while await stranger.receive_some():
                        pass
                except trio.BrokenResourceError:
                    pass
            await stranger.aclose()
            assert not bob.transport._unfinished
            await alice.transport.dial(bob.addr, BOB_ID)

    run(main)


def test_a_silent_stranger_is_dropped_in_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upgrade, "HANDSHAKE_TIMEOUT", 0.05)

    async def main() -> None:
        async with two_nodes() as (alice, bob):
            stranger = await trio.open_tcp_stream("127.0.0.1", int(bob.addr.value("tcp") or 0))
            assert await stranger.receive_some() == b""
            await stranger.aclose()
            silent = socket.create_server(("127.0.0.1", 0))
            with pytest.raises(DialError, match="no handshake within"):
                await alice.transport.dial(Multiaddr.tcp("127.0.0.1", silent.getsockname()[1]), None)
            silent.close()

    run(main)


def test_unfinished_handshakes_are_bounded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "MAX_UNFINISHED_HANDSHAKES_PER_IP", 2)

    async def main() -> None:
        async with two_nodes() as (alice, bob):
            port = int(bob.addr.value("tcp") or 0)
            waiting = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(2)]
            while bob.transport._unfinished.total() < 2:
                await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(DialError):
                await alice.transport.dial(bob.addr, BOB_ID)
            await waiting[0].aclose()
            while bob.transport._unfinished.total() > 1:
                await trio.testing.wait_all_tasks_blocked()
            await alice.transport.dial(bob.addr, BOB_ID)
            await waiting[1].aclose()

    run(main)


def test_one_customer_of_an_ipv6_provider_is_one_stranger(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "MAX_UNFINISHED_HANDSHAKES_PER_IP", 2)

    async def main() -> None:
        async with two_nodes() as (_, bob):
            ips = ("2001:db8::1", "2001:db8::2", "2001:db8::3", "2001:db8:0:1::1")
            callers = [socket.socket() for _ in ips]
            for caller, ip in zip(callers, ips, strict=True):
                bob.transport.serve_inbound(caller, ip, bob._on_connection)
            assert [caller.fileno() == -1 for caller in callers] == [False, False, True, False]

    run(main)


def test_a_caller_that_is_gone_before_it_is_served_leaves_no_socket(run: Run) -> None:
    async def main() -> None:
        async with two_nodes() as (_, bob):
            gone = socket.socket()
            bob.transport.serve_inbound(gone, "127.0.0.1", bob._on_connection)
            while bob.transport._unfinished:
                await trio.testing.wait_all_tasks_blocked()
            assert gone.fileno() == -1

    run(main)


def test_garbage_after_the_handshake_ends_the_connection_only(run: Run) -> None:
    async def main() -> None:
        async with connected() as pair:
            ours, theirs = await pair.streams()
            pair.outbound._channel.send_now(memoryview(b"\x00\x20" + bytes(32)))
            await pair.inbound.closed.wait()
            assert isinstance(pair.inbound.close_error, PathAltered)
            with pytest.raises(ConnectionLost):
                await theirs.receive_some()
            with pytest.raises(ConnectionLost):
                await ours.receive_some()
            await pair.alice.transport.dial(pair.bob.addr, BOB_ID)

    run(main)


def test_broken_yamux_is_answered_with_the_reason(run: Run) -> None:
    async def main() -> None:
        async with connected() as pair:
            pair.outbound.session._control.append(struct.pack(">BBHII", 9, 0, 0, 0, 0))
            pair.outbound.session.ping(0.0)
            pair.outbound.wake_writer()
            await pair.inbound.closed.wait()
            await pair.outbound.closed.wait()
            assert isinstance(pair.inbound.close_error, PeerMisbehaved)
            assert "error code 1" in str(pair.outbound.close_error)

    run(main)


# -- connections ---------------------------------------------------------------------------------------------
def test_closing_in_order(run: Run) -> None:
    async def main() -> None:
        async with connected() as pair:
            ours, theirs = await pair.streams()
            recorder = Recorder()
            theirs.set_sink(recorder)
            ours.write(b"the last words")
            await pair.outbound.aclose()
            await pair.outbound.aclose()
            await pair.inbound.closed.wait()
            assert pair.outbound.close_error is None
            assert pair.inbound.close_error is None
            assert recorder.data == b"the last words"
            assert isinstance(recorder.log[0], ConnectionLost)
            for connection in (pair.outbound, pair.inbound):
                with pytest.raises(ConnectionLost):
                    await connection.open_stream()
                with pytest.raises(ConnectionLost):
                    await connection.accept_stream()

    run(main)


def test_a_peer_that_vanishes(run: Run) -> None:
    async def main() -> None:
        async with connected() as pair:
            ours, theirs = await pair.streams()

            async def send() -> None:
                with pytest.raises(ConnectionLost):
                    await send_forever(theirs)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                await trio.testing.wait_all_tasks_blocked(0.05)
                pair.outbound.abort()
            assert isinstance(pair.inbound.close_error, ConnectionLost)
            with pytest.raises(ConnectionLost):
                await ours.receive_exactly(10_000_000)

    run(main)


def test_a_peer_that_answers_nothing_is_given_up(run: Run) -> None:
    async def main() -> None:
        async with connected(pace=Pace(probe=0.05, dead=0.15, keep_alive=0.05)) as pair:
            # From here on the peer takes everything and says nothing, like a machine behind a dead link.
            pair.inbound._flush = lambda: muxed._Flushed.ALL  # type: ignore[method-assign]
            await pair.outbound.closed.wait()
            # neither is answered from now on: whichever gave up first ended it for the other
            assert "silent" in f"{pair.outbound.close_error} {pair.inbound.close_error}"

    run(main)


def test_the_round_trip_is_measured(run: Run) -> None:
    async def main() -> None:
        async with connected() as pair:
            while pair.outbound.rtt is None:
                await trio.testing.wait_all_tasks_blocked()
            assert 0 < pair.outbound.rtt < 5

    run(main)


def test_a_connection_inside_a_stream(run: Run) -> None:
    """What a relayed circuit is: the same upgrade, over a stream of another connection."""

    async def main() -> None:
        async with connected() as pair:
            ours, theirs = await pair.streams()
            circuit = pair.bob.addr.with_peer(BOB_ID).encapsulate("/p2p-circuit")
            made: dict[str, MuxedConnection] = {}

            async def secure(name: str, node: Node, stream: Stream, peer: PeerId, initiator: bool) -> None:
                facts = ConnectionFacts(circuit, circuit, "outbound" if initiator else "inbound", "relay")
                upgrader = node.transport.upgrader
                made[name] = await upgrader.upgrade(StreamChannel(stream), facts, peer, initiator=initiator)
                node.transport.adopt(made[name])

            async with trio.open_nursery() as nursery:
                nursery.start_soon(secure, "alice", pair.alice, ours, BOB_ID, True)
                nursery.start_soon(secure, "bob", pair.bob, theirs, ALICE_ID, False)
            inner = await made["alice"].open_stream()
            peer_inner = await made["bob"].accept_stream()
            sent = os.urandom(2_000_000)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(inner.send_all, sent)
                assert await peer_inner.receive_exactly(len(sent)) == sent
            assert made["alice"].path == "relay"
            await made["alice"].aclose()
            await made["bob"].closed.wait()

    run(main)


def test_a_peer_without_inlined_muxers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As rust-libp2p: the muxer is negotiated inside the encryption."""
    monkeypatch.setattr(upgrade, "MUXERS", ())

    async def main() -> None:
        async with connected() as pair:
            ours, theirs = await pair.streams()
            await ours.send_all(b"x")
            assert await theirs.receive_exactly(1) == b"x"

    run(main)


@pytest.mark.parametrize("alice_asks", [True, False])
@pytest.mark.parametrize("bob_asks", [True, False])
def test_machines_with_and_without_aes(
    run: Run, monkeypatch: pytest.MonkeyPatch, alice_asks: bool, bob_asks: bool
) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nodes = []
            for key, asks in ((ALICE, alice_asks), (BOB, bob_asks)):
                monkeypatch.setattr(upgrade, "preferred_ciphers", lambda asks=asks: (Cipher.AESGCM,) if asks else ())
                nodes.append(Node(key, nursery))
            alice, bob = nodes
            await bob.listen()
            outbound = await alice.transport.dial(bob.addr, BOB_ID)
            inbound = await bob.inbound.receive()
            assert isinstance(inbound, MuxedConnection)
            used = Cipher.AESGCM if alice_asks and bob_asks else Cipher.CHACHAPOLY
            assert outbound.cipher is inbound.cipher is used
            ours, message = await outbound.open_stream(), os.urandom(200_000)
            ours.write(message)
            theirs = await inbound.accept_stream()
            assert await theirs.receive_exactly(len(message)) == message
            nursery.cancel_scope.cancel()

    run(main)


def test_idle_connections_hold_no_buffers(run: Run) -> None:
    async def main() -> None:
        async with connected() as pair:
            ours, theirs = await pair.streams()
            await ours.send_all(b"x")
            assert await theirs.receive_exactly(1) == b"x"
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert pair.outbound._out is None
            assert len(pair.alice.transport.upgrader.memory._free) == 1

    run(main)
