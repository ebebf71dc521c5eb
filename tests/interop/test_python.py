"""Against py-libp2p: TCP + Noise + yamux, QUIC, identify, ping and streams, in both directions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from driven import Driven, driven

import lattica
from lattica.interfaces import Stream
from lattica.node import Node
from lattica_protocols.multiaddr import Multiaddr

pytestmark = pytest.mark.interop

LISTEN = {"tcp": "/ip4/127.0.0.1/tcp/0", "quic": "/ip4/127.0.0.1/udp/0/quic-v1"}


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.aclose()


@asynccontextmanager
async def node(transport: str) -> AsyncIterator[Node]:
    config = lattica.NodeConfig(listen=[LISTEN[transport]], relay_use="never", punch=False)
    async with lattica.open_node(config) as opened:
        opened.host.handle("/echo/1", echo)
        yield opened


@pytest.mark.parametrize("transport", ["tcp", "quic"])
def test_py_libp2p_in_both_directions(run, py_libp2p_python: Path, transport: str) -> None:
    async def main(theirs: Driven) -> None:
        addr = Multiaddr.parse(theirs.hello["addrs"][0])
        peer = addr.peer_id()
        assert peer is not None
        async with node(transport) as ours:
            connection = await ours.host.connect(peer, [addr])
            assert connection.path == transport
            assert (await ours.wait_identified(peer)).agent.startswith("py-libp2p")
            assert 0 < await ours.ping.ping(peer) < 5
            stream = await ours.host.open_stream(peer, "/echo/1")
            await stream.send_all(bytes(range(256)) * 400)
            assert await stream.receive_exactly(102_400) == bytes(range(256)) * 400
            await ours.host.disconnect(peer)
        async with node(transport) as ours:
            there = f"{ours.host.listen_addrs()[0]}/p2p/{ours.peer_id}"
            assert await trio.to_thread.run_sync(theirs.do, "echo", there, 100_000)
            inbound = ours.host.connection(peer)
            assert inbound is not None
            assert inbound.direction == "inbound"

    script = Path(__file__).with_name("py_worker.py")
    with driven(py_libp2p_python, script, LISTEN[transport]) as theirs:
        run(main, theirs)
