"""Sessions that outlive their path: every call is answered once, whatever was on the way when it was lost."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import trio
from waiting import elapse

import lattica.rpc
from lattica.errors import ConnectionLost, DeadlineExceeded, PathLost
from lattica.host import Host
from lattica.rpc import RpcService
from lattica.rpc.peer_channel import SILENT_SECONDS, TOLD_SECONDS
from lattica.testing import MemoryNetwork, open_memory_host
from lattica.testing.memory import MemoryConnection
from lattica_protocols.limits import RPC_MAX_SUSPENDED
from lattica_protocols.rpc import frames, resume
from lattica_protocols.rpc.frames import PROTOCOL_ID, RESUME, encode_frame

Run = Callable[..., Any]
HEARTBEAT = 6.5


class Service:
    """Counts what it was asked, and is slow enough to be interrupted."""

    def __init__(self) -> None:
        self.asked: Counter[int] = Counter()

    async def echo(self, number: int, value: Any = None, pause: float = 0.0) -> list[Any]:
        self.asked[number] += 1
        await elapse(pause)
        return [number, value]

    async def count(self, n: int, size: int) -> AsyncIterator[list[Any]]:
        for i in range(n):
            yield [i, bytes(size)]
            await elapse(0.05)

    @lattica.rpc.client_streaming
    async def collect(self, items: AsyncIterator[list[Any]]) -> list[int]:
        return [item[0] async for item in items]

    @lattica.rpc.client_streaming
    async def chat(self, items: AsyncIterator[int]) -> AsyncIterator[int]:
        async for item in items:
            yield item


class Pair:
    def __init__(self, network: MemoryNetwork, a: Host, b: Host) -> None:
        self.network, self.a, self.b = network, a, b
        self.rpc, self.rpc_b = RpcService(a), RpcService(b)
        self.service, self.service_a = Service(), Service()
        self.rpc_b.serve("test", self.service)
        self.rpc.serve("test", self.service_a)
        a.peerstore.add_addrs(b.peer_id, b.listen_addrs(), 1e6)
        b.peerstore.add_addrs(a.peer_id, a.listen_addrs(), 1e6)

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return await self.rpc.call(self.b.peer_id, f"test.{method}", *args, **kwargs)

    def connections(self) -> list[MemoryConnection]:
        """Both ends of every connection between the two."""
        found = [*self.a.connections(self.b.peer_id), *self.b.connections(self.a.peer_id)]
        return [c for c in found if isinstance(c, MemoryConnection)]

    async def lose_path(self, noticed: float = HEARTBEAT, first: str = "both") -> None:
        """Cut it silently; both ends notice, one of them a second later."""
        connections = self.connections()
        for connection in connections:
            connection.cut()
        await elapse(noticed)
        late = [c for c in connections if first == "both" or (first == "a") == (c.peer_id == self.a.peer_id)]
        for connection in connections:
            if first == "both" or connection not in late:
                connection.abort(PathLost("no answer"))
        if first != "both":
            await elapse(1)
            for connection in late:
                connection.abort(PathLost("no answer"))


@asynccontextmanager
async def open_pair() -> AsyncIterator[Pair]:
    network = MemoryNetwork(latency=0.01)
    async with open_memory_host(network, 1) as a, open_memory_host(network, 2) as b:
        pair = Pair(network, a, b)
        await pair.call("echo", -1)
        yield pair


async def run_everything(pair: Pair, seconds: float) -> None:
    """Calls of all kinds, one behind the other and at once, for so long; checks each answer."""
    until = trio.current_time() + seconds
    numbers = iter(range(1, 1 << 30))

    async def unary(size: int) -> None:
        while trio.current_time() < until:
            number, value = next(numbers), np.full(size, len(pair.service.asked) % 251, np.uint8)
            answer = await pair.call("echo", number, value, 0.03)
            assert answer[0] == number
            assert (answer[1] == value).all()

    async def back() -> None:
        while trio.current_time() < until:
            number = next(numbers)
            assert await pair.rpc_b.call(pair.a.peer_id, "test.echo", number, None, 0.03) == [number, None]

    async def down(size: int) -> None:
        n = int(seconds / 0.05)
        got = [item[0] async for item in pair.rpc.stream(pair.b.peer_id, "test.count", n, size)]
        assert got == list(range(n))

    async def up(size: int) -> None:
        async with pair.rpc.open_call(pair.b.peer_id, "test.collect", receives=False) as call:
            sent = 0
            while trio.current_time() < until:
                await call.send([sent, bytes(size)])
                sent += 1
                await elapse(0.02)
            assert await call.result() == list(range(sent))

    async def both() -> None:
        async with pair.rpc.open_call(pair.b.peer_id, "test.chat") as call:
            sent = 0
            while trio.current_time() < until:
                await call.send(sent)
                assert await call.__anext__() == sent
                sent += 1

    async with trio.open_nursery() as nursery:
        for size in (10, 50_000, 300_000):
            nursery.start_soon(unary, size)
            nursery.start_soon(down, size)
            nursery.start_soon(up, size)
        nursery.start_soon(back)
        nursery.start_soon(both)
    asked = pair.service.asked + pair.service_a.asked
    assert set(asked.values()) == {1}, "a call ran twice"


@pytest.mark.parametrize("first", ["a", "b", "both"])
def test_everything_goes_on_when_the_path_falls_silent(run_mocked: Run, first: str) -> None:
    async def main() -> None:
        async with open_pair() as pair, trio.open_nursery() as nursery:
            nursery.start_soon(run_everything, pair, 12.0)
            await elapse(1.007)
            await pair.lose_path(first=first)

    run_mocked(main)


@pytest.mark.parametrize("seed", range(6))
def test_everything_goes_on_over_paths_that_come_and_go(run_mocked: Run, seed: int) -> None:
    rng = random.Random(seed)

    async def flap(pair: Pair) -> None:
        while True:
            await elapse(rng.uniform(0.0, 1.5))
            if rng.random() < 0.5:
                await pair.lose_path(rng.uniform(0, HEARTBEAT), rng.choice(["a", "b", "both"]))
            elif connections := pair.connections():
                rng.choice(connections).abort(PathLost("gone"))  # the other end is told

    async def main() -> None:
        async with open_pair() as pair, trio.open_nursery() as nursery:
            nursery.start_soon(flap, pair)
            await run_everything(pair, 40.0)
            nursery.cancel_scope.cancel()

    run_mocked(main)


def test_streams_move_from_a_relay_to_a_direct_path_and_back(run_mocked: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair, trio.open_nursery() as nursery:
            for connection in pair.connections():
                connection.path = "relay"
            channel = pair.rpc.open_channel(pair.b.peer_id)
            assert channel is not None
            nursery.start_soon(run_everything, pair, 12.0)
            await elapse(1.003)
            relayed = pair.connections()
            await pair.a.dial(pair.b.peer_id, pair.b.listen_addrs())
            await elapse(0.2)
            assert channel.stream.connection.path == "memory"
            assert [c.stream_count() for c in relayed] == [0, 0]
            direct = [c for c in pair.connections() if c.path == "memory"]
            for connection in direct:
                connection.cut()
            await elapse(HEARTBEAT)
            for connection in direct:
                connection.abort(PathLost("no answer"))
            await elapse(0.5)
            assert channel.stream.connection.path == "relay"
            assert pair.rpc.open_channel(pair.b.peer_id) is channel

    run_mocked(main)


@pytest.mark.parametrize("news", [False, True])
def test_a_move_that_failed_is_tried_again(run_mocked: Run, news: bool) -> None:
    """After ever longer pauses, and soon when the network changes; one call runs all the time."""

    async def main() -> None:
        async with open_pair() as pair, trio.open_nursery() as nursery:
            for connection in pair.connections():
                connection.path = "relay"
            channel = pair.rpc.open_channel(pair.b.peer_id)
            assert channel is not None
            nursery.start_soon(pair.call, "echo", 1, None, 400)
            direct = await pair.a.dial(pair.b.peer_id, pair.b.listen_addrs())
            refused: list[float] = []
            works, open_stream = trio.Event(), direct.open_stream

            async def refuse() -> Any:
                if works.is_set():
                    return await open_stream()
                refused.append(trio.current_time())
                raise ConnectionLost("no streams now")

            direct.open_stream = refuse  # type: ignore[method-assign]
            await elapse(300)
            assert channel.stream.connection.path == "relay"
            gaps = [later - before for before, later in itertools.pairwise(refused)]
            assert gaps[0] < 1.5
            assert all(0.74 * 2**i <= gap <= 1.26 * 2**i for i, gap in enumerate(gaps[:5]))
            assert 44 < max(gaps) < 76
            works.set()
            if news:
                pair.a.network_changed()
            await elapse(2.5 if news else 76)
            assert channel.stream.connection.path == "memory"
            await pair.call("echo", 2)

    run_mocked(main)


def test_a_direct_path_that_comes_up_while_a_session_opens_is_taken(run_mocked: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair:
            await pair.a.disconnect(pair.b.peer_id)
            await elapse(1)
            await pair.a.connect(pair.b.peer_id)
            await elapse(0.1)
            for connection in pair.connections():
                connection.path = "relay"
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pair.call, "echo", 1, None, 5)
                nursery.start_soon(pair.a.dial, pair.b.peer_id, pair.b.listen_addrs())
            channel = pair.rpc.open_channel(pair.b.peer_id)
            assert channel is not None
            assert channel.stream.connection.path == "memory"
            assert pair.service.asked[1] == 1

    run_mocked(main)


def test_only_the_side_that_was_called_can_dial(run_mocked: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair, trio.open_nursery() as nursery:
            pair.network.listeners.pop(str(pair.b.listen_addrs()[0]))
            nursery.start_soon(run_everything, pair, 12.0)
            await elapse(1.0)
            await pair.lose_path()

    run_mocked(main)


@pytest.mark.parametrize("told", [False, True])
def test_without_a_path_calls_fail_in_bounded_time(run_mocked: Run, told: bool) -> None:
    async def main() -> None:
        async with open_pair() as pair, trio.open_nursery() as nursery:
            await pair.a.stop_listening()
            await pair.b.stop_listening()

            async def call() -> None:
                started = trio.current_time()
                with pytest.raises(ConnectionLost):
                    await pair.call("echo", 1, None, 1000)
                limit = TOLD_SECONDS if told else HEARTBEAT + SILENT_SECONDS
                assert trio.current_time() - started <= limit + 1.5

            nursery.start_soon(call)
            await elapse(1)
            if told:
                pair.b.connections()[0].abort(PathLost("no answer"))
            else:
                await pair.lose_path()
            await elapse(60)
            assert not pair.rpc._sessions
            assert not pair.rpc_b._sessions

    run_mocked(main)


def test_deadlines_pass_while_there_is_no_path(run_mocked: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair, trio.open_nursery() as nursery:
            await pair.b.stop_listening()
            await pair.a.stop_listening()

            async def call() -> None:
                started = trio.current_time()
                with pytest.raises(DeadlineExceeded):
                    await pair.call("echo", 1, None, 1000, timeout=9)
                assert trio.current_time() - started < 9.1

            nursery.start_soon(call)
            await elapse(1)
            await pair.lose_path()

    run_mocked(main)


def test_calls_made_without_a_path_wait_for_it(run_mocked: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair, trio.open_nursery() as nursery:
            nursery.start_soon(pair.call, "echo", 1, None, 20)
            await elapse(0.1)
            channel = pair.rpc.open_channel(pair.b.peer_id)
            assert channel is not None
            listeners = dict(pair.network.listeners)
            pair.network.listeners.clear()
            await pair.lose_path(0)
            await elapse(0.1)
            assert channel.machine.suspended
            nursery.start_soon(pair.call, "echo", 2)
            await elapse(3)
            assert pair.service.asked == {-1: 1, 1: 1}
            pair.network.listeners.update(listeners)
            await elapse(4)
            assert pair.service.asked == {-1: 1, 1: 1, 2: 1}

    run_mocked(main)


def test_a_peer_that_was_restarted_does_not_know_the_session(run_mocked: Run) -> None:
    async def main() -> None:
        network = MemoryNetwork(latency=0.01)
        async with open_memory_host(network, 1) as a, trio.open_nursery() as nursery:
            async with open_memory_host(network, 2, listen=["/memory/77"]) as b:
                pair = Pair(network, a, b)
                await pair.call("echo", 0)
                lost: list[float] = []

                async def call() -> None:
                    with pytest.raises(ConnectionLost, match="restarted"):
                        await pair.call("echo", 1, None, 1000)
                    lost.append(trio.current_time())

                nursery.start_soon(call)
                await elapse(1)
                for connection in pair.connections():
                    connection.cut()
            async with open_memory_host(network, 2, listen=["/memory/77"]) as b:
                rpc = RpcService(b)
                rpc.serve("test", Service())
                for connection in a.connections():
                    connection.abort(PathLost("no answer"))
                noticed = trio.current_time()
                await elapse(1)
                assert lost[0] - noticed < 0.5
                assert await pair.call("echo", 2) == [2, None]

    run_mocked(main)


def test_a_peer_that_cannot_resume_is_lost_at_once(run_mocked: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair:
            pass
        network = MemoryNetwork(latency=0.01)
        async with open_memory_host(network, 1) as a, open_memory_host(network, 2) as b:
            pair = Pair(network, a, b)
            make = pair.rpc_b._machine

            def old(**arguments: Any) -> Any:
                machine = make(**arguments)
                machine.outbox.clear()
                machine.outbox.add_encoded(frames.encode_hello(frames.Hello()))
                machine.resumption = None
                return machine

            pair.rpc_b._machine = old  # type: ignore[method-assign]
            await pair.call("echo", 0)
            channel = pair.rpc.open_channel(b.peer_id)
            assert channel is not None
            assert channel.machine.resumption is None

            async def call() -> None:
                with pytest.raises(ConnectionLost):
                    await pair.call("echo", 1, None, 1000)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(call)
                await elapse(1)
                started = trio.current_time()
                await pair.lose_path(0)
            assert trio.current_time() == started

    run_mocked(main)


def test_nobody_else_can_take_a_session(run_mocked: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair, open_memory_host(pair.network, 3) as thief:
            channel = pair.rpc.open_channel(pair.b.peer_id)
            assert channel is not None
            thief.peerstore.add_addrs(pair.b.peer_id, pair.b.listen_addrs(), 1e6)
            stream = await thief.open_stream(pair.b.peer_id, PROTOCOL_ID)
            head = resume.Resume(channel.session, 5, resume.Account()).encode()
            stream.write(encode_frame(RESUME, 0, 0, head))
            header = await stream.receive_exactly(frames.HEADER_SIZE)
            body, kind, *_ = frames.HEADER.unpack(header)
            assert kind == frames.ERROR
            assert frames.decode_error_head_untrusted(await stream.receive_exactly(body))[0] == frames.CONNECTION_LOST
            assert await pair.call("echo", 1) == [1, None]
            assert (channel.epoch, channel.closed.is_set()) == (0, False)

    run_mocked(main)


def test_an_account_that_is_wrong_ends_the_session_and_not_the_node(run_mocked: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair:
            channel = pair.rpc.open_channel(pair.b.peer_id)
            assert channel is not None
            stream = await pair.a.open_stream(pair.b.peer_id, PROTOCOL_ID)
            account = resume.Account(control_bytes=1 << 40)
            stream.write(encode_frame(RESUME, 0, 0, resume.Resume(channel.session, 5, account).encode()))
            await channel.closed.wait()
            assert await pair.call("echo", 1) == [1, None]
            assert len(pair.rpc_b._sessions) == 1

    run_mocked(main)


def test_sessions_without_a_path_are_bounded(run_mocked: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair:
            for number in range(20):
                await pair.call("echo", number)
                await pair.lose_path(0)
            await elapse(0.1)
            assert len(pair.rpc_b._sessions) <= RPC_MAX_SUSPENDED + 1
            await elapse(40)
            assert not pair.rpc_b._sessions

    run_mocked(main)
