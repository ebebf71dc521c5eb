"""Hostile peers against a node in a process of its own. After each attack it serves an honest peer, its memory and its
file descriptors are bounded, and no handler had a bug.

All tests share one victim: what one attack leaves behind is there when the next begins.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from driven import driven
from hostile_peer import (
    ACK,
    AWAY,
    DATA,
    ELSEWHERE,
    HEADER,
    PING,
    RST,
    SYN,
    WINDOW,
    RawPeer,
    Watched,
    connect,
    frame,
    length_prefix,
    open_hostile_stream,
    open_protocol,
    until_closed,
)
from waiting import wait_until

import lattica
from lattica.blobs.service import PROTOCOL as BLOBS
from lattica.errors import ConnectionLost, LatticaError, RemoteError, StreamReset
from lattica.node import Node
from lattica_protocols.blobs.messages import Kind, encode_frame, encode_header, encode_ranges
from lattica_protocols.cid import Cid
from lattica_protocols.limits import MAX_CONNECTIONS_PER_PEER, MAX_UNFINISHED_HANDSHAKES_PER_IP, MAX_UNREAD_BYTES
from lattica_protocols.multistream import encode_message
from lattica_protocols.rpc import frames as rpc
from lattica_protocols.rpc.tensors import encode_args

LISTEN = ["/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"]
SHARED_BYTES = 64 << 20
BURST_PAUSE = 0.01
"""Seconds between bursts of 200 datagrams, or the kernel would drop most of them."""
DRIP_SECONDS = 0.7
"""From one byte to the next: never silent for long, never done in time."""
SAMPLE_SECONDS = 0.05
"""How often memory is looked at."""
GROWTH = 64 << 20
"""Bytes that the victim may have more after an attack than before it: allocators keep some, Python's arenas do."""
KAD = "/lattica/kad/1.0.0"


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("victim")
    source = folder / "shared.bin"
    with source.open("wb") as file:
        for number in range(SHARED_BYTES >> 20):
            file.write(number.to_bytes(8, "big") * (1 << 17))
    settings = {"listen": LISTEN, "home": str(folder / "home"), "share": str(source)}
    script = Path(__file__).with_name("hostile_victim.py")
    with driven(sys.executable, script, settings, log=folder / "victim.log") as process:
        watched = Watched(process)
        trio.run(_serves, watched)  # so that what is loaded on first use does not count as growth
        yield watched
        log = (folder / "victim.log").read_text()
        assert "Traceback" not in log, log[-4000:]


@asynccontextmanager
async def honest(*listen: str) -> AsyncIterator[Node]:
    async with lattica.open_node(lattica.NodeConfig(listen=list(listen))) as node:
        yield node


async def _serves(victim: Watched) -> None:
    """An honest peer can use everything, over both transports."""
    for addr in victim.addrs:
        async with honest() as node:
            with trio.fail_after(10):
                await node.host.connect(victim.peer, [addr])
                data = os.urandom(100_000)
                assert await node.rpc.call(victim.peer, "victim.echo", data, timeout=10) == data
                await node.ping.ping(victim.peer)
                stream = await node.host.open_stream(victim.peer, BLOBS)
                stream.write(encode_frame(Kind.WANT, 1, Cid.parse(victim.cid).multihash.to_bytes()))
                assert (await stream.receive_exactly(16))[0] == Kind.HAVE
                stream.reset()


@pytest.fixture
def attack(victim: Watched, run: Callable[..., Any]) -> Callable[..., None]:
    """`attack(function)`: run it against the victim and look at the victim afterwards."""

    def runner(function: Callable[[Watched], Awaitable[None]], *, growth: int = GROWTH) -> None:
        resident, descriptors = victim.resident(), victim.descriptors()

        async def main() -> None:
            await function(victim)
            await _serves(victim)

        run(main, seconds=60)
        wait_until(lambda: victim.descriptors() <= descriptors + 8, 15, lambda: "file descriptors were left open")
        wait_until(lambda: victim.state()["connections"] <= 2, 15, lambda: "connections were left open")
        assert victim.resident() - resident < growth, f"{victim.resident() - resident >> 20} MiB more than before"
        assert victim.state()["handler_bugs"] == 0

    return runner


# -- before there is a connection -------------------------------------------------------------------------------------
def test_garbage_on_the_tcp_port(attack: Callable[..., None]) -> None:
    rng = random.Random(1)
    noise = HEADER + encode_message("/noise")
    openings = [b"", HEADER, noise, noise + b"\x00\x20", b"GET /"]

    async def one(victim: Watched) -> None:
        stream = await connect(victim)
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(rng.choice(openings) + rng.randbytes(rng.choice((10, 1000, 100_000))))
            await stream.send_eof()
            await until_closed(stream, 15)
        await stream.aclose()

    async def attacker(victim: Watched) -> None:
        for _ in range(10):
            async with trio.open_nursery() as nursery:
                for _ in range(MAX_UNFINISHED_HANDSHAKES_PER_IP - 2):
                    nursery.start_soon(one, victim)

    attack(attacker)


def test_garbage_on_the_udp_port(attack: Callable[..., None]) -> None:
    rng = random.Random(2)

    async def attacker(victim: Watched) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((ELSEWHERE, 0))
            target = ("127.0.0.1", victim.port("udp"))
            for number in range(3000):
                size = rng.choice((1, 20, 100, 1200, 1472, 9000))
                data = bytearray(rng.randbytes(size))
                if number % 3 == 0 and size >= 20:  # looks like an Initial, or like a version nobody speaks
                    data[0] = 0xC0 | data[0] & 0x3F
                    data[1:5] = rng.choice((b"\x00\x00\x00\x01", b"\x0a\x0a\x0a\x0a", b"\x00\x00\x00\x00"))
                    data[5] = 8
                sock.sendto(data, target)
                if number % 200 == 0:
                    await trio.sleep(BURST_PAUSE)

    attack(attacker)


def test_half_handshakes_are_bounded(attack: Callable[..., None]) -> None:
    """300 connections that begin a handshake and stay: a few are kept, and honest peers get through meanwhile."""

    async def attacker(victim: Watched) -> None:
        before = victim.descriptors()
        streams = []
        for number in range(300):
            stream = await connect(victim)
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all((b"", HEADER[:3], HEADER + encode_message("/noise"))[number % 3])
            streams.append(stream)
        kept = before + MAX_UNFINISHED_HANDSHAKES_PER_IP + 4
        wait_until(lambda: victim.descriptors() <= kept, 5, lambda: "all handshakes are kept")
        await _serves(victim)
        for stream in streams:
            await stream.aclose()

    attack(attacker)


def test_half_quic_handshakes_are_bounded(attack: Callable[..., None]) -> None:
    """First flights from 300 ports, and never a second one."""
    from aioquic.quic.configuration import QuicConfiguration
    from aioquic.quic.connection import QuicConnection

    async def attacker(victim: Watched) -> None:
        target = ("127.0.0.1", victim.port("udp"))
        with contextlib.ExitStack() as stack:
            for _ in range(300):
                sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                sock.bind((ELSEWHERE, 0))
                client = QuicConnection(configuration=QuicConfiguration(is_client=True, alpn_protocols=["libp2p"]))
                client.connect(target, now=0.0)
                for data, _ in client.datagrams_to_send(now=0.0):
                    sock.sendto(data, target)
            await _serves(victim)

    attack(attacker)


# -- connections ------------------------------------------------------------------------------------------------------
def test_a_flood_of_connections(attack: Callable[..., None]) -> None:
    """150 identities connect and stay; another one connects far too often."""
    from lattica_protocols.keys import PrivateKey

    async def attacker(victim: Watched) -> None:
        before = victim.resident()
        peers = [await RawPeer.dial(victim) for _ in range(150)]
        assert victim.resident() - before < 150 * (256 << 10), "a connection costs over 256 KiB"
        key = PrivateKey.generate(b"f" * 32)
        same = [await RawPeer.dial(victim, key) for _ in range(MAX_CONNECTIONS_PER_PEER + 10)]
        refused = 0
        async with trio.open_nursery() as nursery:

            async def look(peer: RawPeer) -> None:
                nonlocal refused
                closed = await peer.closed_within(2)
                refused += closed

            for peer in same:
                nursery.start_soon(look, peer)
        assert refused == 10
        await _serves(victim)
        for peer in peers + same:
            await peer.stream.aclose()

    attack(attacker)


@pytest.mark.parametrize(
    "plaintext",
    [
        frame(DATA, 0, 1, 5, b"hello"),
        frame(DATA, SYN, 2, 0),
        frame(DATA, SYN, 1, 0) + frame(DATA, SYN, 1, 0),
        frame(DATA, SYN, 1, 1 << 24),
        frame(DATA, SYN, 0, 0),
        frame(DATA, 0xFFF0, 1, 0),
        frame(7, 0, 1, 0),
        frame(DATA, SYN, 1, 0, version=9),
        frame(WINDOW, SYN, 1, 0xFFFFFFFF),
        frame(PING, SYN, 0, 1) * 20_000,
        frame(PING, SYN, 3, 1),
        frame(AWAY, 0, 0, 1),
        os.urandom(65536),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=lambda data: data[:12].hex(),
)
def test_yamux_that_breaks_the_rules(attack: Callable[..., None], plaintext: bytes) -> None:
    async def attacker(victim: Watched) -> None:
        peer = await RawPeer.dial(victim)
        with contextlib.suppress(trio.BrokenResourceError):
            await peer.send(plaintext)
        assert await peer.closed_within(3)
        await peer.stream.aclose()

    attack(attacker)


def test_a_message_that_does_not_decrypt(attack: Callable[..., None]) -> None:
    async def attacker(victim: Watched) -> None:
        peer = await RawPeer.dial(victim)
        await peer.stream.send_all(b"\xff\xff" + bytes(65535))
        assert await peer.closed_within(3)
        await peer.stream.aclose()

    attack(attacker)


# -- streams ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("opening", [b"", b"\x13", HEADER, HEADER + encode_message("/nobody/speaks/this")])
def test_streams_without_an_end(attack: Callable[..., None], opening: bytes) -> None:
    """5,000 streams of one connection: most are reset at once, the others when they do not negotiate."""

    async def attacker(victim: Watched) -> None:
        before, tasks = victim.resident(), victim.state()["tasks"]
        peer = await RawPeer.dial(victim)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.closed_within, 60)  # keeps reading
            for start in range(0, 5000, 100):
                await peer.send(
                    b"".join(frame(DATA, SYN, 2 * n + 1, len(opening), opening) for n in range(start, start + 100))
                )
            assert victim.state()["tasks"] - tasks < 600
            assert victim.resident() - before < GROWTH
            await _serves(victim)
            nursery.cancel_scope.cancel()
        await peer.stream.aclose()

    attack(attacker)


def test_answers_that_nobody_reads(attack: Callable[..., None]) -> None:
    """Streams and refused proposals for ever, and not one byte read."""

    async def attacker(victim: Watched) -> None:
        before = victim.resident()
        peer = await RawPeer.dial(victim)
        proposals = HEADER + encode_message("ls") * 15
        with trio.move_on_after(4), contextlib.suppress(trio.BrokenResourceError):
            for number in range(50_000):
                await peer.send(
                    frame(DATA, SYN, 2 * number + 1, len(proposals), proposals) + frame(DATA, RST, 2 * number + 1, 0)
                )
        assert victim.resident() - before < GROWTH
        await _serves(victim)
        await peer.stream.aclose()

    attack(attacker)


HUGE = length_prefix(1 << 40)
OVERSIZE = {
    "identify push": ("/ipfs/id/push/1.0.0", HUGE),
    "identify push, many": ("/ipfs/id/push/1.0.0", length_prefix(8000) + bytes(8000)),
    "kad": (KAD, HUGE),
    "kad, a little": (KAD, length_prefix(16 * 1024 + 1)),
    "rpc, no hello": ("/lattica/rpc/1", b"\xff" * 12),
    "rpc, long hello": ("/lattica/rpc/1", rpc.HEADER.pack(60_000, rpc.HELLO, 0, 60_000, 0)),
    "rpc, long frame": (
        "/lattica/rpc/1",
        rpc.encode_hello(rpc.Hello(b"s" * 16)) + rpc.HEADER.pack(5, rpc.REQUEST, 0, 9, 1) + bytes(9),
    ),
    "rpc, unknown kind": ("/lattica/rpc/1", rpc.encode_hello(rpc.Hello(b"t" * 16)) + rpc.encode_frame(99, 0, 1)),
    "rpc, bulk without session": ("/lattica/rpc/1", rpc.encode_hello(rpc.Hello(b"u" * 16, bulk=True))),
    "blobs, kind": (BLOBS, bytes([Kind.CHUNK]) + bytes(15)),
    "blobs, long want": (BLOBS, encode_header(Kind.WANT, 1, length=1 << 20)),
    "blobs, chunks of nothing": (BLOBS, encode_frame(Kind.CHUNKS, 5, encode_ranges([(0, 1)]))),
    "ping, then silence": ("/ipfs/ping/1.0.0", b"short"),
}


@pytest.mark.parametrize("case", OVERSIZE)
def test_frames_over_the_limits(attack: Callable[..., None], case: str) -> None:
    """The stream is reset, its connection stays."""
    protocol, data = OVERSIZE[case]

    async def attacker(victim: Watched) -> None:
        async with honest() as node:
            stream = await open_hostile_stream(node.host, victim, protocol)
            with contextlib.suppress(StreamReset, ConnectionLost):
                await stream.send_all(data)
                if "ping" in case or "many" in case:
                    await stream.close_write()
            with trio.fail_after(5), contextlib.suppress(StreamReset):
                while await stream.receive_some():
                    pass
            assert len(node.host.connections(victim.peer)) == 1
            await node.ping.ping(victim.peer)

    attack(attacker)


# -- peers that stop reading ------------------------------------------------------------------------------------------
async def _calls(victim: Watched, method: str, args: tuple[Any, ...], count: int, flags: int = 0) -> RawPeer:
    """A connection with `count` calls under way, nothing of which will be read."""
    peer = await RawPeer.dial(victim)
    head, _, _ = encode_args(args, {})
    hello = rpc.encode_hello(rpc.Hello(os.urandom(16), calls=64, tail=1 << 30))
    await peer.send(open_protocol(1, "/lattica/rpc/1", hello))
    await peer.send(frame(WINDOW, 0, 1, 1 << 30))
    for start in range(0, count, 50):
        body = b"".join(
            rpc.encode_frame(rpc.REQUEST, flags, 2 * n + 1, rpc.encode_request_head(method.encode(), head, 0))
            for n in range(start, min(count, start + 50))
        )
        await peer.send(frame(DATA, 0, 1, len(body), body))
    return peer


def test_results_that_nobody_reads(attack: Callable[..., None]) -> None:
    """4,000 calls whose results come to 200 MB."""

    async def attacker(victim: Watched) -> None:
        before = victim.resident()
        peer = await _calls(victim, "victim.big", (50_000,), 4000)
        for _ in range(4):
            await _serves(victim)
            assert victim.resident() - before < 2 * GROWTH, f"{victim.resident() - before >> 20} MiB held for one peer"
        await peer.stream.aclose()

    attack(attacker, growth=2 * GROWTH)


def test_long_results_that_nobody_reads(attack: Callable[..., None]) -> None:
    """200 calls whose results of 4 MiB each would be 800 MiB."""

    async def attacker(victim: Watched) -> None:
        before = victim.resident()
        peer = await _calls(victim, "victim.big", (4 << 20,), 200)
        for _ in range(4):
            await _serves(victim)
            assert victim.resident() - before < 2 * GROWTH, f"{victim.resident() - before >> 20} MiB held for one peer"
        await peer.stream.aclose()

    attack(attacker, growth=2 * GROWTH)


def test_streams_of_items_that_nobody_reads(attack: Callable[..., None]) -> None:
    async def attacker(victim: Watched) -> None:
        before = victim.resident()
        peer = await _calls(victim, "victim.flood", (), 50, rpc.SERVER_STREAM)
        for _ in range(4):
            await _serves(victim)
            assert victim.resident() - before < 2 * GROWTH, f"{victim.resident() - before >> 20} MiB held for one peer"
        await peer.stream.aclose()

    attack(attacker, growth=2 * GROWTH)


async def _answered(peer: RawPeer, streams: set[int], size: int) -> None:
    """Read until each stream got `size` bytes behind the answer to its proposal."""
    awaited = dict.fromkeys(streams, len(HEADER + encode_message(BLOBS)) + size)
    data = b""
    while any(left > 0 for left in awaited.values()):
        data += await peer.receive()
        while len(data) >= 12:
            _, kind, _, stream, length = struct.unpack_from(">BBHII", data)
            end = 12 + (length if kind == DATA else 0)
            if len(data) < end:
                break
            if kind == DATA and stream in awaited:  # the victim opens some of its own
                awaited[stream] -= length
            data = data[end:]


def test_chunks_that_nobody_reads(attack: Callable[..., None]) -> None:
    """Every chunk of a blob on 30 streams."""
    chunks = SHARED_BYTES >> 20

    async def attacker(victim: Watched) -> None:
        before = victim.resident()
        peer = await RawPeer.dial(victim)
        want = encode_frame(Kind.WANT, 1, Cid.parse(victim.cid).multihash.to_bytes())
        for number in range(30):
            await peer.send(open_protocol(2 * number + 1, BLOBS, want))
        with trio.fail_after(10):
            await _answered(peer, {2 * number + 1 for number in range(30)}, len(encode_header(Kind.HAVE, 1, 0)))
        request = encode_frame(Kind.CHUNKS, 1, encode_ranges([(0, chunks)]))
        for number in range(30):
            grant = frame(WINDOW, 0, 2 * number + 1, 1 << 30)
            await peer.send(grant + frame(DATA, 0, 2 * number + 1, len(request), request))
        for _ in range(3):
            await _serves(victim)
            assert victim.resident() - before < 2 * GROWTH, f"{victim.resident() - before >> 20} MiB held for one peer"
        await peer.stream.aclose()

    attack(attacker, growth=2 * GROWTH)


def test_objects_that_nobody_reads(attack: Callable[..., None]) -> None:
    """Requests for the manifest, again and again."""

    async def attacker(victim: Watched) -> None:
        before = victim.resident()
        peer = await RawPeer.dial(victim)
        request = encode_frame(Kind.OBJECT, 1, Cid.parse(victim.cid).multihash.to_bytes())
        await peer.send(open_protocol(1, BLOBS))
        batch = request * 400
        # The victim stops reading, or ends the connection because its window is overrun: both are right.
        with trio.move_on_after(5), contextlib.suppress(trio.BrokenResourceError):
            for _ in range(2000):
                await peer.send(frame(DATA, 0, 1, len(batch), batch))
        assert victim.resident() - before < 2 * GROWTH, f"{victim.resident() - before >> 20} MiB held for one peer"
        await _serves(victim)
        await peer.stream.aclose()

    attack(attacker, growth=2 * GROWTH)


# -- what handlers do -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["value", "recursion", "stop", "lattica", "long", "exit"])
def test_a_handler_that_raises(attack: Callable[..., None], kind: str) -> None:
    async def attacker(victim: Watched) -> None:
        async with honest() as node:
            await node.host.connect(victim.peer, victim.addrs[:1])
            with pytest.raises(LatticaError) as caught:
                await node.rpc.call(victim.peer, "victim.fail", kind, timeout=5)
            assert len(str(caught.value)) < 5000
            assert "Traceback" not in str(caught.value)
            with pytest.raises(LatticaError):
                await node.rpc.call(victim.peer, "victim.unsendable", timeout=5)

    attack(attacker)


def test_a_handler_that_raises_says_what(victim: Watched, run: Callable[..., Any]) -> None:
    async def main() -> None:
        async with honest() as node:
            await node.host.connect(victim.peer, victim.addrs[:1])
            with pytest.raises(RemoteError, match="no") as caught:
                await node.rpc.call(victim.peer, "victim.fail", "value", timeout=5)
            assert caught.value.kind == "ValueError"

    run(main)


def test_a_peer_that_vanishes_during_calls(attack: Callable[..., None]) -> None:
    """Handlers that would run for ever end with the connection of their caller."""

    async def attacker(victim: Watched) -> None:
        peer = await _calls(victim, "victim.hang", (), 500)
        wait_until(lambda: victim.state()["hanging"] == 500, 10, lambda: "the handlers do not run")
        await peer.stream.aclose()
        wait_until(lambda: victim.state()["hanging"] == 0, 10, lambda: "handlers of a caller that is gone go on")

    attack(attacker)


def test_a_peer_that_vanishes_on_any_protocol(attack: Callable[..., None]) -> None:
    """Without a word, in the middle of one, and after nonsense: it is no bug of the handler, however it is built."""

    async def attacker(victim: Watched) -> None:
        async with honest() as node:
            protocols = node.host.protocols()
        assert len(protocols) >= 10
        for opening in (b"", b"\x00", b"\x00\x00\x00\x10", b"\x05\x00\x00\x00\x00\x00", bytes(4096), b"\xff" * 4096):
            async with honest() as node:
                await node.host.connect(victim.peer, victim.addrs[:1])
                for protocol in protocols:
                    with contextlib.suppress(LatticaError):
                        stream = await node.host.open_stream(victim.peer, protocol)
                        stream.write(opening)
                        with trio.move_on_after(0.1):
                            await stream.receive_some(65536)

    attack(attacker)


def test_what_nobody_reads_is_bounded_over_all_connections(attack: Callable[..., None]) -> None:
    """Ids are free: each of many peers sends pings until its windows are full and takes no answer."""

    async def fill(victim: Watched, peak: list[int]) -> None:
        async with honest() as node:
            connection = await node.host.connect(victim.peer, victim.addrs[:1])
            with contextlib.suppress(LatticaError):  # it may be over before all of them are open
                for _ in range(100):
                    stream = await node.host.open_stream(victim.peer, "/ipfs/ping/1.0.0", connection=connection)
                    stream.pause_sink()
                    stream.set_sink(Deaf())
                    stream.write(bytes(250 << 10))
            with trio.move_on_after(6):
                while not connection.closed.is_set():
                    peak.append(victim.resident())
                    await trio.sleep(SAMPLE_SECONDS)

    async def attacker(victim: Watched) -> None:
        before, peak = victim.resident(), [0]
        async with trio.open_nursery() as nursery:
            for _ in range(12):
                nursery.start_soon(fill, victim, peak)
        assert max(peak) - before < 2 * MAX_UNREAD_BYTES, f"{max(peak) - before >> 20} MiB more"

    attack(attacker, growth=2 * MAX_UNREAD_BYTES)


class Deaf:
    """A sink that is never asked for more."""

    def data_received(self, data: memoryview) -> None: ...

    def eof_received(self) -> None: ...

    def stream_closed(self, error: Exception | None) -> None: ...


# -- slowness ---------------------------------------------------------------------------------------------------------
def test_slow_loris(attack: Callable[..., None]) -> None:
    """A byte now and then keeps neither a handshake nor a negotiation alive."""

    async def drip(stream: trio.SocketStream, data: bytes) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            for byte in data:
                await stream.send_all(bytes([byte]))
                await trio.sleep(DRIP_SECONDS)

    async def attacker(victim: Watched) -> None:
        streams = [await connect(victim) for _ in range(20)]
        muxed = await RawPeer.dial(victim)
        await muxed.send(b"".join(frame(DATA, SYN, 2 * n + 1, 3, HEADER[:3]) for n in range(20)))
        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(drip, stream, HEADER + encode_message("/noise") + bytes(100))
                nursery.start_soon(until_closed, stream, 20)
            await _serves(victim)
            resets = 0
            with trio.fail_after(20):
                while resets < 20:
                    data = await muxed.receive()
                    if data[1] == PING and data[3] & SYN:  # whoever answers none is sent away before
                        await muxed.send(data[:2] + bytes((0, ACK)) + data[4:12])
                    resets += sum(data[i + 1] == WINDOW and data[i + 3] & RST > 0 for i in range(0, len(data), 12))
            nursery.cancel_scope.cancel()
        for stream in streams:
            await stream.aclose()
        await muxed.stream.aclose()

    attack(attacker)
