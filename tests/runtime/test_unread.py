"""The bound on bytes that arrived over all connections and that nobody reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio

import lattica
from lattica.interfaces import Stream

PROTOCOL = "/deaf/1"


@pytest.mark.parametrize("listen", ["/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"])
def test_the_connection_that_holds_the_most_is_closed(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, listen: str
) -> None:
    monkeypatch.setattr("lattica.unread.MAX_UNREAD_BYTES", 1 << 20)
    monkeypatch.setattr("lattica.unread.STEP", 1 << 16)

    async def deaf(stream: Stream) -> None:
        await stream.connection.closed.wait()

    async def main() -> None:
        async with (
            lattica.open_node(lattica.NodeConfig(listen=[listen])) as node,
            lattica.open_node(lattica.NodeConfig(listen=[])) as modest,
            lattica.open_node(lattica.NodeConfig(listen=[])) as greedy,
        ):
            node.host.handle(PROTOCOL, deaf)
            connections = []
            for peer, streams in ((modest, 1), (greedy, 6)):
                connections.append(await peer.host.connect(node.peer_id, node.host.listen_addrs()))
                for _ in range(streams):
                    stream = await peer.host.open_stream(node.peer_id, PROTOCOL)
                    stream.write(bytes(200 << 10))
            await connections[1].closed.wait()
            assert not connections[0].closed.is_set()
            assert (await modest.ping.ping(node.peer_id)) > 0
            (left,) = node.host.connections()
            assert left.peer_id == modest.peer_id
            assert 0 < left.unread() <= 200 << 10

    run(main)


@pytest.mark.parametrize("listen", ["/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"])
def test_what_is_read_does_not_count(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, listen: str) -> None:
    monkeypatch.setattr("lattica.unread.MAX_UNREAD_BYTES", 1 << 20)
    monkeypatch.setattr("lattica.unread.STEP", 1 << 16)
    received = trio.Event()

    async def reads(stream: Stream) -> None:
        total = 0
        while data := await stream.receive_some(1 << 16):
            total += len(data)
        assert total == 8 << 20
        assert stream.connection.unread() == 0
        received.set()
        await stream.aclose()

    async def main() -> None:
        async with (
            lattica.open_node(lattica.NodeConfig(listen=[listen])) as node,
            lattica.open_node(lattica.NodeConfig(listen=[])) as peer,
        ):
            node.host.handle(PROTOCOL, reads)
            connection = await peer.host.connect(node.peer_id, node.host.listen_addrs())
            stream = await peer.host.open_stream(node.peer_id, PROTOCOL)
            for _ in range(64):
                await stream.send_all(bytes(128 << 10))
            await stream.aclose()
            await received.wait()
            assert not connection.closed.is_set()

    run(main)
