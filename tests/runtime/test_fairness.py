"""Many requests that came at once on one stream: other tasks have their turn in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio

import lattica
from lattica_protocols.kad.messages import KadMessage, MessageType, encode_answer
from lattica_protocols.varint import encode_uvarint

FIND = encode_answer(KadMessage(type=MessageType.FIND_NODE, key=bytes(32)))


@pytest.mark.parametrize(
    ("protocol", "request_", "count"),
    [("/ipfs/ping/1.0.0", bytes(32), 2000), ("/lattica/kad/1.0.0", encode_uvarint(len(FIND)) + FIND, 300)],
    ids=["ping", "kad"],
)
def test_others_have_their_turn(run: Callable[..., Any], protocol: str, request_: bytes, count: int) -> None:
    async def main() -> None:
        listen = ["/ip4/127.0.0.1/tcp/0"]
        async with (
            lattica.open_node(lattica.NodeConfig(listen=listen, kad_mode="server")) as node,
            lattica.open_node(lattica.NodeConfig(listen=[])) as peer,
        ):
            await peer.host.connect(node.peer_id, node.host.listen_addrs())
            stream = await peer.host.open_stream(node.peer_id, protocol)
            stream.write(request_)
            size = len(await stream.receive_some())
            turns = 0
            async with trio.open_nursery() as nursery:

                async def count_turns() -> None:
                    nonlocal turns
                    while True:
                        await trio.lowlevel.checkpoint()
                        turns += 1

                nursery.start_soon(count_turns)
                stream.write(request_ * count)
                await stream.receive_exactly(size * count)
                nursery.cancel_scope.cancel()
            assert turns >= count
            stream.reset()

    run(main)
