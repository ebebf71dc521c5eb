"""Peers on TCP that keep to the specifications in ways no implementation at hand does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from odd_peer import ACK, DATA, FIN, GO_AWAY, HEADER, PING, RST, SYN, WINDOW, YAMUX, OddPeer, dialled_by, frame
from tcp_nodes import BOB, BOB_ID

import lattica
from lattica.errors import DialError
from lattica.interfaces import Stream
from lattica.node import Node
from lattica_protocols.kad.messages import KadMessage, MessageType, PeerEntry
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.multistream import encode_message
from lattica_protocols.varint import encode_uvarint

Run = Callable[..., Any]
INITIAL_WINDOW = 256 * 1024
LAZY_ECHO = HEADER + encode_message("/echo/1")
ANSWER = len(LAZY_ECHO)


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.aclose()


async def pour(stream: Stream) -> None:
    await stream.send_all(bytes(range(256)) * 4096)
    await stream.aclose()


@asynccontextmanager
async def node(**settings: Any) -> AsyncIterator[tuple[Node, int]]:
    """A node, and the port it listens on."""
    config = lattica.NodeConfig(listen=["/ip4/127.0.0.1/tcp/0"], relay_use="never", punch=False, **settings)
    async with lattica.open_node(config) as ours:
        ours.host.handle("/echo/1", echo)
        ours.host.handle("/pour/1", pour)
        target = ours.host.listen_addrs()[0].host_port()
        assert target is not None
        yield ours, target[2]


@pytest.mark.parametrize("muxers", [(YAMUX,), (), ("/mplex/6.7.0",), ("/mplex/6.7.0", YAMUX)])
@pytest.mark.parametrize(
    "cut", [{}, {"piece": 1}, {"message": 1}, {"message": 1, "padded": True}, {"piece": 7, "message": 5}]
)
def test_cut_everywhere_and_asked_step_by_step(run: Run, muxers: tuple[str, ...], cut: dict[str, int]) -> None:
    """Byte for byte on the socket, Noise messages of one byte and of none, and a wait after each proposal."""

    async def main() -> None:
        async with node() as (_, port), dialled_by(BOB, port, muxers, **cut) as peer:
            await peer.write(frame(WINDOW, SYN, 1))
            await peer.write(frame(DATA, 0, 1, body=HEADER))
            assert await peer.received(1, len(HEADER)) == HEADER
            for text in ("/nothing/1", "/libp2p/simultaneous-connect"):
                await peer.write(frame(DATA, 0, 1, body=encode_message(text)))
                assert await peer.received(1, 4) == encode_message("na")
            await peer.write(frame(DATA, 0, 1, body=encode_message("ls")))
            assert encode_message("/echo/1") in await peer.received(1, 50)
            await peer.write(frame(DATA, 0, 1, body=encode_message("/echo/1")))
            assert await peer.received(1, 9) == encode_message("/echo/1")
            await peer.write(frame(DATA, FIN, 1, body=bytes(range(256))))
            assert await peer.received(1, 257) == bytes(range(256))

    run(main)


@pytest.mark.parametrize("first", ["data", "window", "ping"])
def test_a_stream_in_one_frame(run: Run, first: str) -> None:
    """SYN, everything there is to say and FIN."""

    async def main() -> None:
        async with node() as (_, port), dialled_by(BOB, port) as peer:
            if first == "window":  # which opens the stream with a larger window
                await peer.write(frame(WINDOW, SYN, 1, 1 << 20) + frame(DATA, FIN, 1, body=LAZY_ECHO + b"all"))
            else:
                await peer.write(frame(PING, SYN, 0, 7) if first == "ping" else b"")
                await peer.write(frame(DATA, SYN | FIN, 1, body=LAZY_ECHO + b"all"))
            assert (await peer.received(1, 1 << 20))[ANSWER:] == b"all"
            # and one that says nothing at all
            await peer.write(frame(DATA, SYN | FIN, 3))
            while not (await peer.frame_of(3)).flags & (FIN | RST):
                pass
            await peer.write(frame(DATA, SYN | FIN, 5, body=LAZY_ECHO + b"still here"))
            assert (await peer.received(5, 1 << 20))[ANSWER:] == b"still here"

    run(main)


@pytest.mark.parametrize("step", [1, 1000, INITIAL_WINDOW])
def test_a_window_that_is_only_extended_when_it_is_empty(run: Run, step: int) -> None:
    async def main() -> None:
        async with node() as (_, port), dialled_by(BOB, port) as peer:
            await peer.write(frame(DATA, SYN, 1, body=HEADER + encode_message("/pour/1")))
            data = await peer.received(1, INITIAL_WINDOW)
            assert len(data) == INITIAL_WINDOW
            for _ in range(min(200, INITIAL_WINDOW // step)):
                await peer.write(frame(WINDOW, 0, 1, step))
                more = await peer.received(1, step)
                assert len(more) == step
                data += more
            await peer.write(frame(WINDOW, 0, 1, 2 << 20))
            data += await peer.received(1, 2 << 20)
            assert data[ANSWER:] == bytes(range(256)) * 4096

    run(main)


def test_pings_within_what_is_reasonable_and_a_half_closed_stream(run: Run) -> None:
    async def main() -> None:
        async with node() as (_, port), dialled_by(BOB, port) as peer:
            await peer.write(b"".join(frame(PING, SYN, 0, value) for value in range(60)))
            answers: list[int] = []
            while len(answers) < 60:
                found = await peer.frame_of(0, kind=PING)
                answers += [found.length] if found.flags == ACK else []  # the others ask us
            assert answers == list(range(60))
            await peer.write(frame(DATA, SYN | FIN, 1, body=HEADER + encode_message("/pour/1")))
            assert len(await peer.received(1, 2 << 20, grant=True)) == ANSWER + (1 << 20)

    run(main)


def test_streams_are_acknowledged_late(run: Run) -> None:
    """We open as many as the peer may leave unacknowledged, and go on when it acknowledges."""
    count = 300

    async def main() -> None:
        async with node() as (ours, port), dialled_by(BOB, port) as peer:
            done = []

            async def one() -> None:
                connection = ours.host.connection(BOB_ID)
                assert connection is not None
                stream = await ours.host.open_stream(BOB_ID, ["/odd/1"], connection=connection)
                done.append(await stream.receive_exactly(2))
                await stream.aclose()

            async def serve() -> None:
                waiting: list[int] = []
                while len(done) < count:
                    found = await peer.frame()
                    if found.flags & SYN and found.stream:
                        waiting.append(found.stream)
                    if found.kind == DATA and b"/odd/1" in found.body:
                        # the SYN is answered only together with the last word
                        body = HEADER + encode_message("/odd/1") + b"ok"
                        await peer.write(frame(DATA, ACK | FIN, found.stream, body=body))

            while ours.host.connection(BOB_ID) is None:
                await trio.lowlevel.checkpoint()
            async with trio.open_nursery() as nursery:
                for _ in range(count):
                    nursery.start_soon(one)
                await serve()
            assert done == [b"ok"] * count

    run(main)


def test_go_away_leaves_open_streams_alone(run: Run) -> None:
    async def main() -> None:
        async with node() as (_, port), dialled_by(BOB, port) as peer:
            await peer.write(frame(DATA, SYN, 1, body=LAZY_ECHO))
            assert len(await peer.received(1, ANSWER)) == ANSWER
            await peer.write(frame(GO_AWAY, 0, 0, 0))
            await peer.write(frame(DATA, 0, 1, body=b"before") + frame(DATA, FIN, 1, body=b" the end"))
            assert await peer.received(1, 100) == b"before the end"

    run(main)


def test_kademlia_in_pieces_and_with_what_is_unknown(run: Run) -> None:
    """Requests one behind the other and byte by byte; fields, and kinds of addresses, that nobody has heard of."""
    key = b"\x12\x20" + bytes(range(32))
    addrs = [
        Multiaddr.parse("/ip4/127.0.0.1/tcp/4001").to_bytes(),
        Multiaddr.parse("/ip4/127.0.0.1/udp/4001/quic").to_bytes(),  # draft-29
        b"\x04\x7f\x00\x00\x01\xff\xff\x03whatever",  # a protocol number of the future
        b"",
    ]
    later = b"\xf2\x07\x05later"  # a field 126
    provider = KadMessage(
        type=MessageType.ADD_PROVIDER, key=key, provider_peers=(PeerEntry(id=BOB_ID.to_bytes(), addrs=addrs),)
    )
    requests = [
        provider,
        KadMessage(type=MessageType.GET_PROVIDERS, key=key),
        KadMessage(type=MessageType.FIND_NODE, key=BOB_ID.to_bytes()),
        KadMessage(type=MessageType.PING),
    ]
    said = b"".join(encode_uvarint(len(data)) + data for request in requests if (data := request.encode() + later))

    async def main() -> None:
        async with node(kad_mode="server") as (_, port), dialled_by(BOB, port, message=1) as peer:
            await peer.write(frame(WINDOW, SYN, 1))
            for byte in HEADER + encode_message("/lattica/kad/1.0.0") + said:
                await peer.write(frame(DATA, 0, 1, body=bytes([byte])))
            await peer.write(frame(DATA, FIN, 1))
            answer = (await peer.received(1, 1 << 20))[len(HEADER + encode_message("/lattica/kad/1.0.0")) :]
            messages = []
            while answer:
                size, start = (answer[0], 1) if answer[0] < 0x80 else (answer[0] & 0x7F | answer[1] << 7, 2)
                messages.append(KadMessage.decode_untrusted(answer[start : start + size]))
                answer = answer[start + size :]
            assert [message.type for message in messages] == [request.type for request in requests[1:]]
            (found,) = messages[0].provider_peers
            assert found.id == BOB_ID.to_bytes()
            assert addrs[0] in found.addrs

    run(main)


# -- we dial ---------------------------------------------------------------------------------------------------
@asynccontextmanager
async def listening(serve: Callable[[OddPeer], Any], **cut: int) -> AsyncIterator[Multiaddr]:
    """Somebody of BOB's key who does `serve` with each connection."""

    async def one(stream: trio.SocketStream) -> None:
        with trio.move_on_after(20):
            await serve(OddPeer(stream, BOB, **cut))

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, one, [listener])
        port = listener.socket.getsockname()[1]
        yield Multiaddr.parse(f"/ip4/127.0.0.1/tcp/{port}")
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("muxers", [(YAMUX,), (), ("/mplex/6.7.0",)])
@pytest.mark.parametrize("cut", [{}, {"piece": 1}, {"message": 1, "padded": True}])
def test_we_dial_one_that_cuts_everywhere(run: Run, muxers: tuple[str, ...], cut: dict[str, int]) -> None:
    async def serve(peer: OddPeer) -> None:
        await peer.secure(initiator=False, muxers=muxers)
        if peer.muxer is None:
            await peer.agree(YAMUX, initiator=False)
        while True:
            found = await peer.frame()
            if found.kind == PING and found.flags == SYN:
                await peer.write(frame(PING, ACK, 0, found.length))
            if found.kind == DATA and b"/odd/1" in found.body:
                await peer.write(frame(WINDOW, ACK, found.stream))
                await peer.write(frame(DATA, FIN, found.stream, body=HEADER + encode_message("/odd/1") + b"ok"))

    async def main() -> None:
        async with node() as (ours, _), listening(serve, **cut) as addr:
            connection = await ours.host.connect(BOB_ID, [addr])
            stream = await ours.host.open_stream(BOB_ID, ["/odd/1"], connection=connection)
            assert await stream.receive_exactly(2) == b"ok"
            assert await stream.receive_some() == b""

    run(main)


@pytest.mark.parametrize("secured", [False, True])
@pytest.mark.parametrize("answer", ["na", "reset"])
def test_one_that_speaks_nothing_of_ours(run: Run, secured: bool, answer: str) -> None:
    """Only TLS, or only mplex inside Noise: the error names what is missing."""

    async def serve(peer: OddPeer) -> None:
        if not secured:
            await peer.send(HEADER)
            await peer.expect("/multistream/1.0.0")
            await peer.expect("/noise")
            await peer.send(encode_message("na"))
            return  # with data that was not read, so that the connection is reset behind the answer
        await peer.secure(initiator=False, muxers=("/mplex/6.7.0",))
        assert await peer.plain(len(HEADER)) == HEADER
        if answer == "na":
            await peer.write(HEADER + encode_message("na"))

    async def main() -> None:
        async with node() as (ours, _), listening(serve) as addr:
            missing = "/yamux/1.0.0" if secured else "/noise"
            with pytest.raises(DialError, match=f"the peer does not speak {missing}"):
                await ours.host.connect(BOB_ID, [addr])

    run(main)
