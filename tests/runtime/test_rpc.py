"""Calls between two hosts on the in-memory network."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing
from waiting import elapse

import lattica.rpc
from lattica.errors import (
    CallCancelled,
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    InvalidArgument,
    RemoteError,
    ResourceExhausted,
    ServiceNotFound,
    StreamReset,
)
from lattica.host import Host, open_host
from lattica.rpc import RpcService
from lattica.testing import MemoryNetwork, open_memory_host
from lattica.transports.tcp import TcpTransport
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId
from lattica_protocols.rpc.connection import RpcLimits
from lattica_protocols.rpc.frames import (
    HELLO,
    PING,
    PROTOCOL_ID,
    REQUEST,
    Hello,
    encode_frame,
    encode_hello,
    encode_request_head,
)

Run = Callable[..., Any]


class Service:
    """One method of each style."""

    constant = 5

    def __init__(self) -> None:
        self.started = trio.Event()
        self.cancelled = trio.Event()
        self.release = trio.Event()
        self.produced = 0
        self.received: list[Any] = []
        self.running = 0
        self.most_running = 0

    async def echo(self, value: Any) -> Any:
        return value

    @lattica.rpc.nonblocking
    def quick(self, a: int, *, b: int = 1) -> int:
        return a + b

    def slow(self, text: str) -> str:
        return text.upper()

    async def who(self) -> str:
        return str(lattica.rpc.caller())

    def who_thread(self) -> str:
        return str(lattica.rpc.caller())

    async def fail(self, message: str) -> None:
        raise KeyError(message)

    async def fail_badly(self) -> None:
        raise asyncio.CancelledError

    def fail_badly_in_thread(self) -> None:
        raise KeyboardInterrupt

    async def type_error_inside(self) -> None:
        raise TypeError("inside")

    async def invalid(self) -> None:
        raise InvalidArgument("not like this")

    async def unsendable(self) -> object:
        return object()

    async def big(self, n: int) -> np.ndarray[Any, Any]:
        return np.full(n, 7, np.uint8)

    async def hang(self) -> None:
        self.started.set()
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self.release.wait()
        except trio.Cancelled:
            self.cancelled.set()
            raise
        finally:
            self.running -= 1

    async def count(self, n: int) -> AsyncIterator[int]:
        try:
            for i in range(n):
                self.produced = i + 1
                yield i
        finally:
            self.cancelled.set()

    async def count_then_fail(self, n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i
        raise ValueError("enough")

    def letters(self, text: str) -> Iterator[str]:
        yield from text

    @lattica.rpc.client_streaming
    async def total(self, items: AsyncIterator[int], start: int = 0) -> int:
        async for item in items:
            start += item
        return start

    async def sum_undecorated(self, items: AsyncIterator[int]) -> int:
        return sum([item async for item in items])

    @lattica.rpc.client_streaming
    async def never_reads(self, items: AsyncIterator[Any]) -> int:
        self.started.set()
        await self.release.wait()
        return sum([1 async for _ in items])

    @lattica.rpc.client_streaming
    async def chat(self, items: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for item in items:
            yield [item, item]

    async def _private(self) -> int:
        return 1


@dataclass
class Pair:
    a: Host
    b: Host
    rpc: RpcService
    """The caller's, on a."""
    rpc_b: RpcService
    service: Service
    peer: PeerId
    """b."""

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return await self.rpc.call(self.peer, f"test.{method}", *args, **kwargs)


@asynccontextmanager
async def open_pair(**limits: Any) -> AsyncIterator[Pair]:
    network = MemoryNetwork(latency=0.01)
    async with open_memory_host(network, 1) as a, open_memory_host(network, 2) as b:
        rpc_a, rpc_b = RpcService(a), RpcService(b, limits=RpcLimits(**limits))
        service = Service()
        rpc_b.serve("test", service)
        a.peerstore.add_addrs(b.peer_id, b.listen_addrs(), 3600)
        yield Pair(a, b, rpc_a, rpc_b, service, b.peer_id)


def _with_pair(run: Run) -> Callable[..., None]:
    def runner(test: Callable[[Pair], Awaitable[None]], **limits: Any) -> None:
        async def main() -> None:
            async with open_pair(**limits) as pair:
                await test(pair)

        run(main)

    return runner


@pytest.fixture
def with_pair(run_mocked: Run) -> Callable[..., None]:
    """Run a test function with a `Pair` under the mock clock."""
    return _with_pair(run_mocked)


@pytest.fixture
def with_pair_and_threads(run: Run) -> Callable[..., None]:
    """The same on the wall clock: the mock clock jumps while a thread works."""
    return _with_pair(run)


async def drain(items: AsyncIterator[Any], pause: float = 0) -> list[Any]:
    got = []
    async for item in items:
        got.append(item)
        if pause:
            await elapse(pause)
    return got


def same_array(got: Any, expected: Any) -> bool:
    return bool(got.dtype == expected.dtype and got.shape == expected.shape and (got == expected).all())


# -- unary ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [None, True, 7, -1.5, "text", b"bytes", [1, [2]], {"a": {"b": None}}, {1: 2}])
def test_values_come_back(with_pair: Any, value: Any) -> None:
    async def test(pair: Pair) -> None:
        assert await pair.call("echo", value) == value

    with_pair(test)


@pytest.mark.parametrize("size", [0, 1, 64, 65, 4096, 65536, 65537, 5_000_000])
def test_arrays_of_all_sizes_come_back(with_pair: Any, size: int) -> None:
    async def test(pair: Pair) -> None:
        array = np.arange(size, dtype=np.uint8)
        assert same_array(await pair.call("echo", array), array)
        nested = await pair.call("echo", {"x": [array, b"z" * size]})
        assert same_array(nested["x"][0], array)
        assert nested["x"][1] == b"z" * size

    with_pair(test)


def test_every_style_runs(with_pair_and_threads: Any) -> None:
    async def test(pair: Pair) -> None:
        assert await pair.call("quick", 2, b=5) == 7
        assert await pair.call("quick", 2) == 3
        assert await pair.call("slow", "abc") == "ABC"
        assert await pair.call("who") == str(pair.a.peer_id)
        assert await pair.call("who_thread") == str(pair.a.peer_id)

    with_pair_and_threads(test)


def test_many_calls_at_once_in_both_directions(with_pair: Any) -> None:
    async def test(pair: Pair) -> None:
        results: dict[int, Any] = {}
        back: dict[int, Any] = {}
        pair.rpc.serve("test", Service())
        await pair.call("echo", 0)

        async def one(i: int) -> None:
            size = 100_000 if i % 7 == 0 else 10
            results[i] = await pair.call("echo", [i, b"x" * size])

        async def other(i: int) -> None:
            back[i] = await pair.rpc_b.call(pair.a.peer_id, "test.echo", i)

        async with trio.open_nursery() as nursery:
            for i in range(300):
                nursery.start_soon(one, i)
                nursery.start_soon(other, i)
        assert {i: r[0] for i, r in results.items()} == {i: i for i in range(300)} == back
        assert len(pair.rpc._sessions) == len(pair.rpc_b._sessions) == 1

    with_pair(test)


# -- errors -----------------------------------------------------------------------------------------------
def test_handler_errors_are_typed(with_pair_and_threads: Any) -> None:
    async def test(pair: Pair) -> None:
        with pytest.raises(RemoteError, match="broken") as caught:
            await pair.call("fail", "broken")
        assert caught.value.kind == "KeyError"
        for method, kind in (("fail_badly", "CancelledError"), ("fail_badly_in_thread", "KeyboardInterrupt")):
            with pytest.raises(RemoteError) as caught:
                await pair.call(method)
            assert caught.value.kind == kind
        with pytest.raises(RemoteError, match="inside"):
            await pair.call("type_error_inside")
        with pytest.raises(InvalidArgument, match="not like this"):
            await pair.call("invalid")
        with pytest.raises(InvalidArgument, match="missing"):
            await pair.call("quick")
        with pytest.raises(InvalidArgument, match="unexpected"):
            await pair.call("echo", 1, nonsense=2)
        with pytest.raises(ResourceExhausted, match="object"):
            await pair.call("unsendable")
        with pytest.raises(InvalidArgument, match="object cannot be sent"):
            await pair.call("echo", object())
        assert await pair.call("echo", 1) == 1

    with_pair_and_threads(test)


@pytest.mark.parametrize(
    "method",
    [
        "nope.echo",
        "test.nope",
        "test._private",
        "test.__init__",
        "test.echo.__call__",
        "test.constant",
        "test",
    ],
)
def test_only_public_methods_can_be_called(with_pair: Any, method: str) -> None:
    async def test(pair: Pair) -> None:
        with pytest.raises(ServiceNotFound):
            await pair.rpc.call(pair.peer, method)

    with_pair(test)


def test_the_kind_of_call_has_to_fit(with_pair: Any) -> None:
    async def test(pair: Pair) -> None:
        with pytest.raises(InvalidArgument, match="yields items"):
            await pair.call("count", 3)
        with pytest.raises(InvalidArgument, match="takes a stream"):
            await pair.call("total", 3)
        with pytest.raises(InvalidArgument, match="missing"):
            await pair.call("sum_undecorated")
        async with pair.rpc.open_call(pair.peer, "test.count", 3) as call:
            await call.send(1)
            with pytest.raises(InvalidArgument, match="takes no items"):
                await drain(call)


def test_a_caller_may_ask_for_more_streaming_than_the_method_does(with_pair: Any) -> None:
    async def test(pair: Pair) -> None:
        assert await drain(pair.rpc.stream(pair.peer, "test.echo", 1)) == [1]
        async with pair.rpc.open_call(pair.peer, "test.echo", 2) as call:
            assert await call.result() == 2
        async with pair.rpc.open_call(pair.peer, "test.sum_undecorated") as call:
            await call.send(3)
            await call.send(4)
            assert await call.result() == 7

    with_pair(test)


def test_no_connection_is_a_connect_error(with_pair: Any) -> None:
    async def test(pair: Pair) -> None:
        with pytest.raises(ConnectError):
            await pair.rpc_b.call(PeerId.from_public_key(_key(9).public_key), "test.echo", 1)

    with_pair(test)


def _key(seed: int) -> Any:
    from lattica_protocols.keys import PrivateKey

    return PrivateKey.generate(bytes([seed]) * 32)


# -- streams ------------------------------------------------------------------------------------------------
def test_server_streams(with_pair: Any) -> None:
    async def test(pair: Pair) -> None:
        assert [i async for i in pair.rpc.stream(pair.peer, "test.count", 300)] == list(range(300))
        assert [i async for i in pair.rpc.stream(pair.peer, "test.count", 0)] == []

    with_pair(test)


def test_a_plain_generator_streams_from_a_thread(with_pair_and_threads: Any) -> None:
    async def test(pair: Pair) -> None:
        assert [c async for c in pair.rpc.stream(pair.peer, "test.letters", "abc")] == ["a", "b", "c"]

    with_pair_and_threads(test)


def test_a_stream_fails_after_its_items(with_pair: Any) -> None:
    async def test(pair: Pair) -> None:
        items = pair.rpc.stream(pair.peer, "test.count_then_fail", 100)
        assert [await anext(items) for _ in range(100)] == list(range(100))
        with pytest.raises(RemoteError, match="enough"):
            await anext(items)

    with_pair(test)


def test_client_stream(with_pair: Any) -> None:
    async def test(pair: Pair) -> None:
        async with pair.rpc.open_call(pair.peer, "test.total", 1000, receives=False) as call:
            for i in range(200):
                await call.send(i)
            with pytest.raises(InvalidArgument, match=r"an item of test\.total: a builtins\.set cannot be sent"):
                await call.send({1})
            assert await call.result() == 1000 + sum(range(200))

    with_pair(test)


def test_bidirectional_stream_keeps_order_with_large_items(with_pair: Any) -> None:
    async def test(pair: Pair) -> None:
        sizes = [10, 100_000, 20, 70_000, 0, 300_000, 5] * 5
        async with pair.rpc.open_call(pair.peer, "test.chat") as call:

            async def send() -> None:
                for n, size in enumerate(sizes):
                    await call.send(np.full(size, n % 256, np.uint8))
                await call.end()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                got = [item async for item in call]
        assert [len(x) for x, _ in got] == sizes
        assert all((y == n % 256).all() for n, (_, y) in enumerate(got))

    with_pair(test)


def test_a_slow_consumer_bounds_the_producer(with_pair: Any) -> None:
    async def test(pair: Pair) -> None:
        async with aclosing(pair.rpc.stream(pair.peer, "test.count", 10_000)) as items:
            assert await anext(items) == 0
            await trio.testing.wait_all_tasks_blocked(0.5)
            assert pair.service.produced <= 66  # 64 items of credit, one refused, one consumed
            for expected in range(1, 500):
                assert await anext(items) == expected
        await pair.service.cancelled.wait()
        assert pair.service.produced < 700

    with_pair(test)


def test_a_handler_that_does_not_read_bounds_the_sender(with_pair: Any) -> None:
    async def test(pair: Pair) -> None:
        sent = 0

        async with pair.rpc.open_call(pair.peer, "test.never_reads", receives=False) as call:

            async def send() -> None:
                nonlocal sent
                while sent < 100:
                    await call.send(np.zeros(1 << 20, np.uint8))
                    sent += 1

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                await trio.testing.wait_all_tasks_blocked(0.5)
                assert 4 <= sent <= 5  # 4 MiB, overdrawn by one at the most
                pair.service.release.set()
            assert await call.result() == 100

    with_pair(test)


# -- ending --------------------------------------------------------------------------------------------------
def test_cancelling_a_call_cancels_its_handler(with_pair: Any) -> None:
    async def test(pair: Pair) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pair.call, "hang")
            await pair.service.started.wait()
            nursery.cancel_scope.cancel()
        await pair.service.cancelled.wait()
        for _ in range(5):  # the pooled task that was cancelled works again
            assert await pair.call("echo", 1) == 1

    with_pair(test)


def test_leaving_a_stream_cancels_its_handler(with_pair: Any) -> None:
    async def test(pair: Pair) -> None:
        async with pair.rpc.open_call(pair.peer, "test.count", 10_000, sends=False) as call:
            async for i in call:
                if i == 3:
                    break
        await pair.service.cancelled.wait()
        with pytest.raises(CallCancelled):
            await call.send(1)

    with_pair(test)


def test_dropping_a_stream_cancels_its_handler(with_pair: Any) -> None:
    async def test(pair: Pair) -> None:
        async for i in pair.rpc.stream(pair.peer, "test.count", 10_000):
            if i == 3:
                break
        await pair.service.cancelled.wait()
        await pair.rpc.stream(pair.peer, "test.count", 3).aclose()  # never started

    with_pair(test)


def test_nothing_stays_behind_when_a_session_ends(with_pair: Any) -> None:
    async def test(pair: Pair) -> None:
        pair.rpc.serve("test", Service())
        await pair.call("echo", np.zeros(300_000, np.uint8))
        await pair.rpc_b.call(pair.a.peer_id, "test.echo", np.zeros(300_000, np.uint8))
        connections = [*pair.a.connections(pair.peer), *pair.b.connections(pair.a.peer_id)]
        assert all(connection.stream_count() >= 2 for connection in connections)
        channel = pair.rpc.open_channel(pair.peer)
        assert channel is not None
        channel.abort("test")
        await elapse(1)
        assert [connection.stream_count() for connection in connections] == [0, 0]
        assert not pair.rpc._sessions
        assert not pair.rpc_b._sessions
        assert len(await pair.call("echo", np.zeros(300_000, np.uint8))) == 300_000

    with_pair(test)


def test_sessions_that_come_and_go_leave_no_tasks_behind(with_pair: Any) -> None:
    async def test(pair: Pair) -> None:
        counts = []
        for _ in range(5):
            await pair.call("echo", 1)
            counts.append(len(pair.b.nursery.child_tasks))
            channel = pair.rpc.open_channel(pair.peer)
            assert channel is not None
            channel.abort("test")
            await elapse(1)
        assert len(set(counts)) == 1

    with_pair(test)


def test_calls_that_wait_for_room_move_to_a_new_session(with_pair: Any) -> None:
    async def test(pair: Pair) -> None:
        await pair.call("echo", 1)
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(pair.call, "hang")
            await pair.service.started.wait()
            nursery.start_soon(pair.call, "hang")
            await elapse(1)
            assert pair.service.running == 2
            channel = pair.rpc.open_channel(pair.peer)
            assert channel is not None
            channel.retire()
            await elapse(1)
            assert pair.service.running == 4
            pair.service.release.set()

    with_pair(test, calls=2)


def test_deadline_ends_the_call_on_both_sides(with_pair: Any) -> None:
    async def test(pair: Pair) -> None:
        await pair.call("echo", 1)
        before = trio.current_time()
        with pytest.raises(DeadlineExceeded):
            await pair.call("hang", timeout=5)
        assert trio.current_time() - before == pytest.approx(5)
        await pair.service.cancelled.wait()
        with pytest.raises(TimeoutError):
            await drain(pair.rpc.stream(pair.peer, "test.count", 10**9, timeout=0.5), pause=0.01)
        assert await pair.call("echo", 1, timeout=5) == 1

    with_pair(test)


def test_deadline_counts_connecting(with_pair: Any) -> None:
    async def test(pair: Pair) -> None:
        with pytest.raises(DeadlineExceeded):
            await pair.call("echo", 1, timeout=0.001)

    with_pair(test)


def test_peer_that_vanishes_fails_calls_at_once(with_pair: Any) -> None:
    async def test(pair: Pair) -> None:
        async def hang() -> None:
            with pytest.raises(ConnectionLost):
                await pair.call("hang")
            ended.append(trio.current_time())

        async def read() -> None:  # gets the items that have come, then the error
            with pytest.raises(ConnectionLost):
                await drain(pair.rpc.stream(pair.peer, "test.count", 10**9), pause=1)

        ended: list[float] = []

        async with trio.open_nursery() as nursery:
            nursery.start_soon(hang)
            nursery.start_soon(read)
            await pair.service.started.wait()
            await elapse(1)
            before = trio.current_time()
            for connection in pair.b.connections(pair.a.peer_id):
                connection.abort()
        assert ended[0] - before < 0.1
        assert pair.service.cancelled.is_set()
        assert await pair.call("echo", 2) == 2  # a new session

    with_pair(test)


def test_calls_over_the_peers_limit_wait_their_turn(with_pair: Any) -> None:
    async def test(pair: Pair) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(pair.call, "hang")
            await pair.service.started.wait()
            await elapse(1)
            assert pair.service.running <= 4
            pair.service.release.set()
        assert pair.service.most_running <= 4

    async def warm(pair: Pair) -> None:
        await pair.call("echo", 1)  # the peer's HELLO, with its limit
        await test(pair)

    with_pair(warm, calls=4)


def test_messages_over_the_limit_are_refused_and_nothing_else_happens(with_pair: Any) -> None:
    async def test(pair: Pair) -> None:
        await pair.call("echo", 1)
        with pytest.raises(InvalidArgument, match="over the limit"):
            await pair.call("echo", np.zeros(2_000_000, np.uint8))  # known from the HELLO
        channel = await pair.rpc.channel(pair.peer)
        channel.machine.outbox.peer_tail = 1 << 30  # as if we did not know
        with pytest.raises(ResourceExhausted, match="limit"):
            await pair.call("echo", np.zeros(2_000_000, np.uint8))
        assert len(await pair.call("big", 900_000)) == 900_000

    with_pair(test, tail=1_000_000)


def test_a_session_leaves_the_relay_and_calls_in_flight_finish(with_pair: Any) -> None:
    async def test(pair: Pair) -> None:
        await pair.call("echo", 1)
        for connection in (*pair.a.connections(pair.peer), *pair.b.connections(pair.a.peer_id)):
            connection.path = "relay"
        old = pair.rpc.open_channel(pair.peer)
        assert old is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pair.call, "hang")
            await pair.service.started.wait()
            await pair.a._dial(pair.peer, pair.b.listen_addrs())
            await elapse(0.1)
            assert await pair.call("echo", 2) == 2
            new = pair.rpc.open_channel(pair.peer)
            assert new is not None
            assert new.stream.connection.path == "memory"
            assert not old.closed.is_set()
            pair.service.release.set()
        await old.closed.wait()
        assert await pair.rpc_b.call(pair.a.peer_id, "test.echo", 3) == 3
        assert len(pair.rpc._sessions) == len(pair.rpc_b._sessions) == 1

    async def with_service(pair: Pair) -> None:
        pair.rpc.serve("test", Service())
        await test(pair)

    with_pair(with_service)


def test_idle_sessions_close_in_order(with_pair: Any) -> None:
    async def test(pair: Pair) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pair.call, "hang")
            await elapse(1000)
            assert (pair.rpc.calls_in_flight(), pair.rpc_b.calls_in_flight()) == (0, 1)
            channel = pair.rpc.open_channel(pair.peer)
            assert channel is not None
            pair.service.release.set()
        await channel.closed.wait()
        await elapse(1)
        assert pair.rpc._sessions == pair.rpc_b._sessions == {}
        assert await pair.call("echo", 1) == 1

    with_pair(test)


SESSION = Hello(bytes(16))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(100),
        encode_frame(PING, 0, 0),
        encode_frame(HELLO, 0, 0, b"x" * 2000),
        encode_hello(Hello()),
        encode_hello(Hello(b"unknown session!", bulk=True)),
        encode_hello(SESSION) + encode_hello(SESSION),
        encode_hello(SESSION) + bytes(1000),
        encode_hello(SESSION) + encode_frame(REQUEST, 0, 2, encode_request_head(b"test.echo", b"\x91\x01", 0)),
    ],
)
def test_garbage_ends_its_stream_and_nothing_else(with_pair: Any, data: bytes) -> None:
    async def test(pair: Pair) -> None:
        await pair.call("echo", 1)
        stream = await pair.a.open_stream(pair.peer, PROTOCOL_ID)
        await stream.send_all(data)
        await elapse(20)  # longer than a HELLO may take
        with pytest.raises(StreamReset):
            await stream.receive_exactly(1000)
        assert await pair.call("echo", 1) == 1
        assert len(pair.rpc_b._sessions) == 1

    with_pair(test)


def test_arguments_that_cannot_be_decoded_fail_their_call_only(with_pair: Any) -> None:
    async def test(pair: Pair) -> None:
        await pair.call("echo", 1)
        stream = await pair.a.open_stream(pair.peer, PROTOCOL_ID)
        request = encode_frame(REQUEST, 0, 1, encode_request_head(b"test.echo", b"\xc1garbage", 0))
        await stream.send_all(encode_hello(SESSION) + request)
        data = b""
        while b"InvalidArgument" not in data:
            data += await stream.receive_some()
        await stream.aclose()

    with_pair(test)


def test_a_service_with_a_small_bound_for_values_decodes_nothing_above_it(with_pair: Any) -> None:
    """Arguments and items; arrays and bytes of any size still come, and other services take long values."""
    long = ["x"] * 100_000

    async def test(pair: Pair) -> None:
        pair.rpc_b.serve("small", pair.service, max_value=65536)
        assert len(await pair.call("echo", long)) == len(long)
        assert await pair.rpc.call(pair.peer, "small.echo", bytes(300_000)) == bytes(300_000)
        assert (await pair.rpc.call(pair.peer, "small.echo", np.zeros(100_000))).shape == (100_000,)
        assert len(await pair.rpc.call(pair.peer, "small.echo", long[:20_000])) == 20_000
        with pytest.raises(InvalidArgument, match="over the limit of 65536 here"):
            await pair.rpc.call(pair.peer, "small.echo", long)
        with pytest.raises(InvalidArgument, match="over the limit of 65536 here"):
            await pair.rpc.call(pair.peer, "small.quick", 1, b=long)
        async with pair.rpc.open_call(pair.peer, "small.total", receives=False) as call:
            await call.send(long)
            with pytest.raises(RemoteError, match="over the limit of 65536 here"):
                await call.result()
        assert await pair.rpc.call(pair.peer, "small.echo", 1) == 1

    with_pair(test)


def test_sessions_of_one_peer_are_bounded(with_pair: Any) -> None:
    async def test(pair: Pair) -> None:
        await pair.call("echo", 1)
        streams = []
        for n in range(12):
            stream = await pair.a.open_stream(pair.peer, PROTOCOL_ID)
            await stream.send_all(encode_hello(Hello(bytes([n]) * 16)))
            streams.append(stream)
        await elapse(1)
        assert len(pair.rpc_b._sessions) == 8
        for stream in streams:
            stream.reset()
        await elapse(1)
        assert len(pair.rpc_b._sessions) == 1

    with_pair(test)


def test_a_peer_that_asks_and_never_reads_loses_its_session(with_pair: Any) -> None:
    async def test(pair: Pair) -> None:
        await pair.call("echo", 1)
        stream = await pair.a.open_stream(pair.peer, PROTOCOL_ID)
        stream.set_sink(Deaf())
        stream.pause_sink()
        await stream.send_all(encode_hello(SESSION))
        with pytest.raises(StreamReset):  # noqa: PT012 - the answers pile up until one of the writes finds out
            for _ in range(100):
                await stream.send_all(encode_frame(PING, 0, 0, bytes(64)) * 10_000)
                await elapse(0.1)
        assert await pair.call("echo", 1) == 1

    with_pair(test)


class Deaf:
    def data_received(self, data: memoryview) -> None:
        pass

    def eof_received(self) -> None:
        pass

    def stream_closed(self, error: Exception | None) -> None:
        pass


def test_calls_over_tcp(run: Run) -> None:
    async def main() -> None:
        listen = [Multiaddr.parse("/ip4/127.0.0.1/tcp/0")]

        def transports(host: Host) -> list[Any]:
            return [TcpTransport(host.key, host.nursery)]

        async with open_host(_key(1), transports) as a, open_host(_key(2), transports, listen=listen) as b:
            rpc, rpc_b = RpcService(a), RpcService(b)
            rpc_b.serve("test", Service())
            a.peerstore.add_addrs(b.peer_id, b.listen_addrs(), 3600)
            for size in (0, 10, 70_000, 3_000_000):
                array = np.arange(size, dtype=np.uint8)
                results: list[Any] = []

                async def one(array: Any = array, results: list[Any] = results) -> None:
                    results.append(await rpc.call(b.peer_id, "test.echo", array, timeout=20))

                async with trio.open_nursery() as nursery:
                    for _ in range(20):
                        nursery.start_soon(one)
                assert all(same_array(result, array) for result in results)
            assert await drain(rpc.stream(b.peer_id, "test.count", 1000)) == list(range(1000))

    run(main)


def test_unserve(with_pair_and_threads: Any) -> None:
    async def test(pair: Pair) -> None:
        assert "test.echo" in pair.rpc_b.services()["test"]
        with pytest.raises(ValueError, match="already"):
            pair.rpc_b.serve("test", Service())
        pair.rpc_b.unserve("test")
        with pytest.raises(ServiceNotFound):
            await pair.call("echo", 1)
        pair.rpc_b.serve("test", {"plain": lambda: 3})
        assert await pair.call("plain") == 3

    with_pair_and_threads(test)
