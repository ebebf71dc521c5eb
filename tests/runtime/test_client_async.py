"""The async client under trio and under asyncio, against daemons in another thread."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest
import trio
from sniffio import current_async_library

import lattica
from lattica.client.async_items import ItemReader
from lattica.errors import (
    ConnectionLost,
    ContentNotFound,
    DaemonNotRunning,
    DeadlineExceeded,
    InvalidArgument,
    RemoteError,
    ServiceNotFound,
)
from lattica.rpc import caller, client_streaming
from lattica.testing.local import DaemonThread

Run = Callable[[Callable[[], Awaitable[None]]], None]


async def echo(value: object) -> object:
    return value


async def lost(cid: str) -> None:
    raise ContentNotFound(f"nobody has {cid}")


async def forever() -> None:
    await trio.sleep_forever()


async def share(path: str) -> AsyncIterator[dict[str, object]]:
    yield {"state": "hashing", "bytes": 5}
    yield {"state": "done", "cid": "bafy", "bytes": 10}


CONTROL = {"echo": echo, "lost": lost, "forever": forever, "share": share}


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Expert:
    """One method of each kind."""

    def __init__(self) -> None:
        self.cancelled = anyio.Event()
        self.closed = anyio.Event()

    async def double(self, x: Any) -> Any:
        return x * 2

    def in_thread(self, x: Any) -> Any:
        return x * 3

    @lattica.nonblocking
    def quick(self, x: int) -> int:
        return x + 1

    async def count(self, n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i

    def count_in_thread(self, n: int) -> Iterator[int]:
        yield from range(n)

    async def endless(self) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x" * 1000
        finally:
            self.closed.set()

    async def sleep(self) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            self.cancelled.set()

    async def fail(self) -> None:
        raise KeyError("gone")

    async def fails_badly(self, kind: str) -> None:
        raise {"CancelledError": asyncio.CancelledError, "Mute": Mute}[kind]

    def fails_badly_in_thread(self, kind: str) -> None:
        raise {"KeyboardInterrupt": KeyboardInterrupt, "CancelledError": asyncio.CancelledError, "Mute": Mute}[kind]

    async def waits_for_a_cancelled_task(self) -> None:
        task = asyncio.get_running_loop().create_task(asyncio.Event().wait())
        task.cancel()
        await task

    async def who(self) -> str:
        return str(caller())

    @client_streaming
    async def total(self, items: ItemReader, factor: int = 1) -> int:
        return factor * sum([item async for item in items])

    @client_streaming
    async def chat(self, items: ItemReader) -> AsyncIterator[int]:
        async for item in items:
            yield -item


STARTS: dict[str, Callable[[Callable[[], Coroutine[Any, Any, None]]], None]] = {
    "trio": trio.run,
    "asyncio": lambda main: asyncio.run(main()),
    "anyio": anyio.run,
}
"""The ways to start a loop. `anyio.run` is asyncio that says so, and asyncio started by itself does not everywhere."""


@pytest.fixture(params=[*STARTS])
def run_in(request: pytest.FixtureRequest) -> Run:
    """Runs an async function in one of the libraries, with a bound."""

    def run(main: Callable[[], Awaitable[None]]) -> None:
        async def bounded() -> None:
            with anyio.fail_after(30):
                await main()

        STARTS[request.param](bounded)

    return run


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[DaemonThread]:
    with DaemonThread([tmp_path / "a", tmp_path / "b"], control=CONTROL) as thread:
        yield thread


Main = Callable[[lattica.AsyncClient, str, Expert], Awaitable[None]]


def pair(run_in: Run, daemons: DaemonThread, main: Main) -> None:
    """A client of one daemon, and a worker of the other that serves "expert", in one event loop."""
    finished = False  # asyncio takes a CancelledError from anywhere for the end, and goes on after the block

    async def both() -> None:
        nonlocal finished
        a, b = daemons.daemons
        async with lattica.aconnect(a.home) as alice, lattica.aconnect(b.home) as worker:
            expert = Expert()
            await worker.serve("expert", expert)
            await main(alice, b.peer_id, expert)
            finished = True

    run_in(both)
    assert finished


def test_all_kinds_of_methods(run_in: Run, daemons: DaemonThread) -> None:
    async def main(alice: lattica.AsyncClient, bob: str, expert: Expert) -> None:
        assert await alice.call(bob, "expert.double", 4, timeout=10) == 8
        assert await alice.call(bob, "expert.in_thread", 4, timeout=10) == 12
        assert await alice.call(bob, "expert.quick", 4, timeout=10) == 5
        assert [x async for x in alice.stream(bob, "expert.count", 200, timeout=10)] == list(range(200))
        assert [x async for x in alice.stream(bob, "expert.count_in_thread", 20, timeout=10)] == list(range(20))
        assert [x async for x in alice.stream(bob, "expert.double", 4, timeout=10)] == [8]
        assert await alice.call(bob, "expert.who", timeout=10) == daemons.daemons[0].peer_id

    pair(run_in, daemons, main)


def test_streams_in_both_directions(run_in: Run, daemons: DaemonThread) -> None:
    async def main(alice: lattica.AsyncClient, bob: str, expert: Expert) -> None:
        async with alice.open_call(bob, "expert.chat", timeout=20) as call:
            for n in range(200):
                await call.send(n)
                assert await call.__anext__() == -n
            await call.end()
            assert [item async for item in call] == []
        async with alice.open_call(bob, "expert.total", 2, receives=False, timeout=20) as call:
            for n in range(200):
                await call.send(n)
            with pytest.raises(InvalidArgument, match=r"an item of expert\.total: a builtins\.set cannot be sent"):
                await call.send({1})
            assert await call.result() == 2 * sum(range(200))

    pair(run_in, daemons, main)


@pytest.mark.parametrize("megabytes", [0.1, 0.9, 3, 20])
def test_tensors_of_all_sizes(run_in: Run, daemons: DaemonThread, megabytes: float) -> None:
    async def main(alice: lattica.AsyncClient, bob: str, expert: Expert) -> None:
        x = np.random.default_rng(0).random(int(megabytes * 131072))
        y = await alice.call(bob, "expert.double", x, timeout=20)
        np.testing.assert_array_equal(y, x * 2)

    pair(run_in, daemons, main)


def test_many_calls_at_once(run_in: Run, daemons: DaemonThread) -> None:
    async def main(alice: lattica.AsyncClient, bob: str, expert: Expert) -> None:
        results: dict[int, int] = {}

        async def one(n: int) -> None:
            results[n] = await alice.call(bob, "expert.double", n, timeout=20)

        async with anyio.create_task_group() as group:
            for n in range(300):
                group.start_soon(one, n)
        assert results == {n: 2 * n for n in range(300)}

    pair(run_in, daemons, main)


def test_errors_arrive_typed(run_in: Run, daemons: DaemonThread) -> None:
    async def main(alice: lattica.AsyncClient, bob: str, expert: Expert) -> None:
        with pytest.raises(RemoteError, match="gone") as caught:
            await alice.call(bob, "expert.fail", timeout=10)
        assert caught.value.kind == "KeyError"
        with pytest.raises(ServiceNotFound):
            await alice.call(bob, "expert.missing", timeout=10)
        with pytest.raises(InvalidArgument):
            await alice.call(bob, "expert.double", timeout=10)
        with pytest.raises(InvalidArgument):
            await alice.call(bob, "expert.double", object(), timeout=10)
        with pytest.raises(InvalidArgument, match="takes a stream"):
            await alice.call(bob, "expert.total", timeout=10)
        with pytest.raises(ContentNotFound):
            await alice.daemon("lost", "xyz")

    pair(run_in, daemons, main)


def test_whatever_a_handler_raises_is_an_answer(run_in: Run, daemons: DaemonThread) -> None:
    async def main(alice: lattica.AsyncClient, bob: str, expert: Expert) -> None:
        cases = [("fails_badly", "CancelledError"), ("fails_badly", "Mute")]
        cases += [("fails_badly_in_thread", kind) for kind in ("KeyboardInterrupt", "CancelledError", "Mute")]
        for method, kind in cases:
            with pytest.raises(RemoteError) as caught:
                await alice.call(bob, f"expert.{method}", kind, timeout=5)
            assert caught.value.kind == kind
        if current_async_library() == "asyncio":
            with pytest.raises(RemoteError) as caught:
                await alice.call(bob, "expert.waits_for_a_cancelled_task", timeout=5)
            assert caught.value.kind == "CancelledError"
        assert await alice.call(bob, "expert.double", 2, timeout=5) == 4

    pair(run_in, daemons, main)


def test_deadlines_at_the_edges(run_in: Run, daemons: DaemonThread) -> None:
    async def main(alice: lattica.AsyncClient, bob: str, expert: Expert) -> None:
        for timeout in (float("inf"), 1e300, 2.0**33):
            assert await alice.call(bob, "expert.double", 2, timeout=timeout) == 4
        for timeout in (0, -1, float("-inf")):
            with pytest.raises(DeadlineExceeded):
                await alice.call(bob, "expert.sleep", timeout=timeout)
        with pytest.raises(InvalidArgument, match="not a number"):
            await alice.call(bob, "expert.double", 2, timeout=float("nan"))
        assert await alice.call(bob, "expert.double", 2, timeout=5) == 4

    pair(run_in, daemons, main)


def test_cancelling_a_call_cancels_the_handler(run_in: Run, daemons: DaemonThread) -> None:
    async def main(alice: lattica.AsyncClient, bob: str, expert: Expert) -> None:
        assert await alice.call(bob, "expert.quick", 1, timeout=10) == 2
        with anyio.move_on_after(0.05):
            await alice.call(bob, "expert.sleep")
        await expert.cancelled.wait()
        assert await alice.call(bob, "expert.double", 1, timeout=10) == 2

    pair(run_in, daemons, main)


def test_a_deadline_ends_the_call_on_both_sides(run_in: Run, daemons: DaemonThread) -> None:
    async def main(alice: lattica.AsyncClient, bob: str, expert: Expert) -> None:
        with pytest.raises(DeadlineExceeded):
            await alice.call(bob, "expert.sleep", timeout=0.05)
        await expert.cancelled.wait()

    pair(run_in, daemons, main)


def test_a_caller_that_gives_up_does_not_take_the_turn_of_the_next(run_in: Run, daemons: DaemonThread) -> None:
    async def main(alice: lattica.AsyncClient, bob: str, expert: Expert) -> None:
        await alice.call(bob, "expert.quick", 1, timeout=10)
        assert alice._link is not None
        alice._link.machine.peer_calls = 1
        held, gave_up = anyio.CancelScope(), anyio.Event()

        async def hold() -> None:
            with held:
                await alice.call(bob, "expert.sleep")

        async def give_up() -> None:
            with pytest.raises(DeadlineExceeded):
                await alice.call(bob, "expert.quick", 1, timeout=0.05)
            gave_up.set()

        async def wait() -> None:
            assert await alice.call(bob, "expert.quick", 1, timeout=5) == 2

        async with anyio.create_task_group() as group:
            for work in (hold, give_up, wait):
                group.start_soon(work)
                await anyio.wait_all_tasks_blocked()
            await gave_up.wait()
            held.cancel()

    pair(run_in, daemons, main)


def test_leaving_a_stream_closes_the_generator(run_in: Run, daemons: DaemonThread) -> None:
    async def main(alice: lattica.AsyncClient, bob: str, expert: Expert) -> None:
        async with aclosing(alice.stream(bob, "expert.endless", timeout=20)) as stream:  # type: ignore[type-var]
            async for _ in stream:
                break
        await expert.closed.wait()

    pair(run_in, daemons, main)


def test_share_gives_the_content_id(run_in: Run, daemons: DaemonThread) -> None:
    async def main(alice: lattica.AsyncClient, bob: str, expert: Expert) -> None:
        seen: list[dict[str, Any]] = []
        assert await alice.share("x", progress=seen.append) == "bafy"
        assert seen == [{"state": "hashing", "bytes": 5}]

    pair(run_in, daemons, main)


def test_an_exception_in_the_block_comes_out_as_it_is(run_in: Run, daemons: DaemonThread) -> None:
    async def main() -> None:
        with pytest.raises(ZeroDivisionError):
            async with lattica.aconnect(daemons.daemons[0].home):
                raise ZeroDivisionError

    run_in(main)


def test_no_daemon(run_in: Run, tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(DaemonNotRunning, match="start one with 'lattica up'"):
            async with lattica.aconnect(tmp_path):
                pass
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
            silent.bind(str(tmp_path / "lattica.sock"))
            silent.listen()
            with pytest.raises(DaemonNotRunning):
                async with lattica.aconnect(tmp_path, timeout=0.05):
                    pass

    run_in(main)


def test_a_daemon_that_dies_and_its_successor(run_in: Run, tmp_path: Path) -> None:
    first = DaemonThread([tmp_path], control=CONTROL).__enter__()

    async def main() -> None:
        async with lattica.aconnect(tmp_path) as lat, anyio.create_task_group() as group:
            await lat.serve("mine", {"length": len})

            async def lose() -> None:
                with pytest.raises(ConnectionLost):
                    await lat.daemon("forever")

            group.start_soon(lose)
            assert await lat.daemon("echo", 1) == 1
            await anyio.to_thread.run_sync(first.stop)
            with DaemonThread([tmp_path], control=CONTROL):
                while True:
                    try:
                        assert await lat.daemon("echo", 2) == 2
                        break
                    except ConnectionLost:  # the end of the first one was not seen yet
                        await anyio.lowlevel.checkpoint()
                assert await lat.call(None, "mine.length", "abc", timeout=10) == 3

    try:
        run_in(main)
    finally:
        first.stop()


def test_descriptors_are_given_back(run_in: Run, daemons: DaemonThread) -> None:
    async def main() -> None:
        async def once() -> None:
            async with lattica.aconnect(daemons.daemons[0].home) as lat:
                assert len(await lat.daemon("echo", b"x" * (2 << 20), timeout=10)) == 2 << 20

        await once()
        gc.collect()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            await once()
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) <= before + 2  # the daemon may keep a segment or two

    run_in(main)
