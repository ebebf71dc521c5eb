"""Dead and slow paths of real sockets, at a fiftieth of the usual pace: a proxy in between that stops, or dawdles."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from tcp_nodes import BOB_ID, Node, Pair, two_nodes
from waiting import remains

from lattica.errors import PathLost
from lattica.transports.muxed import MuxedConnection
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.paths.heartbeat import Pace

Run = Callable[..., Any]
PACE = Pace(probe=0.3, dead=0.65, keep_alive=2.5)
LATE = 1.0
"""What a machine that does much else may add. The machine's own tests have the exact times."""


class Proxy:
    """Passes bytes on in both directions, `rate` a second, until it is `cut`."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.rate = 1e9
        self.cut = False

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listener.socket.getsockname()[1]
        task_status.started()
        async with listener, trio.open_nursery() as nursery:
            while True:
                near = await listener.accept()
                far = await trio.open_tcp_stream("127.0.0.1", self.target)
                nursery.start_soon(self.carry, near, far)
                nursery.start_soon(self.carry, far, near)

    async def carry(self, source: trio.SocketStream, target: trio.SocketStream) -> None:
        try:
            while data := await source.receive_some(16384):
                if self.cut:
                    await trio.sleep_forever()
                await target.send_all(data)
                await trio.sleep(len(data) / self.rate)
        except trio.BrokenResourceError:
            pass
        finally:
            await trio.aclose_forcefully(target)


@asynccontextmanager
async def connected_by_proxy() -> AsyncIterator[tuple[Pair, Proxy]]:
    async with two_nodes(pace=PACE) as (alice, bob), trio.open_nursery() as nursery:
        target = bob.addr.host_port()
        assert target is not None
        proxy = Proxy(target[2])
        await nursery.start(proxy.run)
        yield await _dial(alice, bob, proxy), proxy
        nursery.cancel_scope.cancel()


async def _dial(alice: Node, bob: Node, proxy: Proxy) -> Pair:
    outbound = await alice.transport.dial(Multiaddr.parse(f"/ip4/127.0.0.1/tcp/{proxy.port}"), BOB_ID)
    inbound = await bob.inbound.receive()
    assert isinstance(inbound, MuxedConnection)
    return Pair(alice, bob, outbound, inbound)


@pytest.mark.parametrize("waits", ["data", "answer"])
def test_a_dead_path_is_noticed_where_somebody_waits(run: Run, waits: str) -> None:
    async def main() -> None:
        async with connected_by_proxy() as (pair, proxy):
            if waits == "answer":
                pair.outbound.expect(lambda: True)
            stream, theirs = await pair.streams()
            stream.write(b"ask")
            assert await theirs.receive_exactly(3) == b"ask"
            await remains(lambda: not pair.outbound.closed.is_set(), 2 * PACE.dead)  # nobody hurries who is asked
            proxy.cut = True
            started = trio.current_time()
            if waits == "data":
                stream.write(b"again")
            with trio.fail_after(PACE.dead + LATE):
                await pair.outbound.closed.wait()
            assert isinstance(pair.outbound.close_error, PathLost)
            assert trio.current_time() - started >= PACE.dead - PACE.probe

    run(main)


def test_a_saturated_slow_link_is_alive(run: Run) -> None:
    """Several times what the path carries until it would be dead waits in the buffers before it."""

    async def main() -> None:
        async with connected_by_proxy() as (pair, proxy):
            stream, theirs = await pair.streams()
            proxy.rate = 300_000
            size = 1_500_000
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, bytes(size))
                assert await theirs.receive_exactly(size) == bytes(size)
            assert not pair.outbound.closed.is_set()
            assert not pair.inbound.closed.is_set()

    run(main)
