"""The sync client against daemons in another thread."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

import lattica
from lattica.errors import (
    CallCancelled,
    ConnectionLost,
    ContentNotFound,
    DaemonNotRunning,
    DeadlineExceeded,
    InvalidArgument,
    RemoteError,
    ServiceNotFound,
)
from lattica.rpc import caller
from lattica.testing.local import DaemonThread


async def echo(value: object) -> object:
    return value


async def lost(cid: str) -> None:
    raise ContentNotFound(f"nobody has {cid}")


async def forever() -> None:
    await trio.sleep_forever()


async def share(path: str) -> AsyncIterator[dict[str, object]]:
    yield {"state": "hashing", "bytes": 5}
    yield {"state": "done", "cid": "bafy", "bytes": 10}


async def ping(peer: str, count: int, timeout: float) -> AsyncIterator[dict[str, object]]:
    for _ in range(count):
        yield {"rtt_ms": 1.0, "path": "memory"}


CONTROL = {"echo": echo, "lost": lost, "forever": forever, "share": share, "ping": ping}


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Expert:
    def __init__(self) -> None:
        self.closed = threading.Event()
        self.release = threading.Event()
        self.together = threading.Barrier(8)

    def double(self, x: Any) -> Any:
        return x * 2

    @lattica.nonblocking
    def quick(self, x: int) -> int:
        return x + 1

    def count(self, n: int) -> Iterator[int]:
        yield from range(n)

    def endless(self) -> Iterator[bytes]:
        try:
            while True:
                yield b"x" * 1000
        finally:
            self.closed.set()

    def fail(self) -> None:
        raise KeyError("gone")

    def fails_badly(self, kind: str) -> None:
        raise {"KeyboardInterrupt": KeyboardInterrupt, "CancelledError": asyncio.CancelledError, "Mute": Mute}[kind]

    def fails_halfway(self) -> Iterator[int]:
        yield 1
        raise ValueError("halfway")

    def hold(self) -> str:
        self.release.wait(20)
        return "held"

    def meet(self) -> int:
        return self.together.wait(20)

    def who(self) -> str:
        return str(caller())

    def unsendable(self) -> object:
        return object()

    def keywords(self, a: int, *, b: int = 0) -> int:
        return a - b


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[DaemonThread]:
    with DaemonThread([tmp_path / "a", tmp_path / "b"], control=CONTROL) as thread:
        yield thread


@pytest.fixture
def alice(daemons: DaemonThread) -> Iterator[lattica.Client]:
    with lattica.connect(daemons.daemons[0].home) as client:
        yield client


@pytest.fixture
def expert() -> Iterator[Expert]:
    expert = Expert()
    yield expert
    expert.release.set()


@pytest.fixture
def bob(daemons: DaemonThread, expert: Expert) -> Iterator[str]:
    """The id of a peer that serves "expert" by a worker."""
    with lattica.connect(daemons.daemons[1].home) as client:
        client.serve("expert", expert)
        yield daemons.daemons[1].peer_id


# -- the daemon -------------------------------------------------------------------------------------------------
def test_the_daemons_own_methods(alice: lattica.Client) -> None:
    assert alice.daemon("echo", {"a": [1, "b"]}) == {"a": [1, "b"]}
    assert alice.ping("somebody", 3) == [{"rtt_ms": 1.0, "path": "memory"}] * 3


def test_share_reports_progress_and_gives_the_content_id(alice: lattica.Client) -> None:
    seen: list[dict[str, Any]] = []
    assert alice.share("x", progress=seen.append) == "bafy"
    assert seen == [{"state": "hashing", "bytes": 5}]
    assert alice.share_details("x") == {"cid": "bafy", "bytes": 10}


def test_errors_of_the_daemon_keep_their_class(alice: lattica.Client) -> None:
    with pytest.raises(ContentNotFound, match="nobody has xyz"):
        alice.daemon("lost", "xyz")


def test_no_daemon(tmp_path: Path) -> None:
    with pytest.raises(DaemonNotRunning, match=r"no daemon answers at .*; start one with 'lattica up'"):
        lattica.connect(tmp_path)


def test_somebody_who_accepts_and_says_nothing_is_no_daemon(tmp_path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.bind(str(tmp_path / "lattica.sock"))
        silent.listen()
        with pytest.raises(DaemonNotRunning):
            lattica.connect(tmp_path, timeout=0.05)


# -- calls ------------------------------------------------------------------------------------------------------
def test_a_worker_is_called_through_both_daemons(alice: lattica.Client, bob: str) -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(alice.call(bob, "expert.double", x, timeout=10), x * 2)
    assert alice.call(bob, "expert.quick", 4, timeout=10) == 5
    assert alice.call(bob, "expert.keywords", 5, b=2, timeout=10) == 3


def test_the_handler_knows_who_calls(alice: lattica.Client, bob: str, daemons: DaemonThread) -> None:
    assert alice.call(bob, "expert.who", timeout=10) == daemons.daemons[0].peer_id


@pytest.mark.parametrize("megabytes", [0.1, 0.9, 3, 20])
def test_tensors_of_all_sizes(alice: lattica.Client, bob: str, megabytes: float) -> None:
    x = np.random.default_rng(0).random(int(megabytes * 131072))
    for _ in range(3):
        y = alice.call(bob, "expert.double", x, timeout=20)
        np.testing.assert_array_equal(y, x * 2)
        y[0] = 1.0  # it is ours to write


def test_calls_from_many_threads(alice: lattica.Client, bob: str) -> None:
    wrong: list[int] = []

    def work(base: int) -> None:
        for n in range(base, base + 50):
            if alice.call(bob, "expert.double", n, timeout=20) != 2 * n:
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(1000 * i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_many_calls_in_flight_from_one_thread(alice: lattica.Client, bob: str) -> None:
    futures = [alice.submit(bob, "expert.double", n, timeout=20) for n in range(300)]
    assert [future.result(20) for future in futures] == [2 * n for n in range(300)]


def test_slow_handlers_run_at_the_same_time(alice: lattica.Client, bob: str) -> None:
    futures = [alice.submit(bob, "expert.meet", timeout=20) for _ in range(8)]
    assert sorted(future.result(20) for future in futures) == list(range(8))


def test_a_slow_handler_does_not_hold_up_a_quick_one(alice: lattica.Client, bob: str, expert: Expert) -> None:
    held = alice.submit(bob, "expert.hold", timeout=20)
    assert [alice.call(bob, "expert.double", n, timeout=10) for n in range(5)] == [0, 2, 4, 6, 8]
    expert.release.set()
    assert held.result(10) == "held"


def test_errors_arrive_typed(alice: lattica.Client, bob: str) -> None:
    with pytest.raises(RemoteError, match="gone") as caught:
        alice.call(bob, "expert.fail", timeout=10)
    assert caught.value.kind == "KeyError"
    with pytest.raises(ServiceNotFound):
        alice.call(bob, "nobody.home", timeout=10)
    with pytest.raises(ServiceNotFound):
        alice.call(bob, "expert.missing", timeout=10)
    with pytest.raises(InvalidArgument):
        alice.call(bob, "expert.double", timeout=10)
    with pytest.raises(InvalidArgument):
        alice.call(bob, "expert.double", object(), timeout=10)
    with pytest.raises(InvalidArgument):
        alice.call("not a peer id", "expert.double", 1, timeout=10)
    with pytest.raises(lattica.ResourceExhausted, match="cannot be sent"):
        alice.call(bob, "expert.unsendable", timeout=10)
    with pytest.raises(InvalidArgument, match="yields"):
        alice.call(bob, "expert.count", 3, timeout=10)


@pytest.mark.parametrize("kind", ["KeyboardInterrupt", "CancelledError", "Mute"])
def test_whatever_a_handler_raises_is_an_answer(alice: lattica.Client, bob: str, kind: str) -> None:
    for _ in range(20):  # more than there are threads: none of them may be lost
        with pytest.raises(RemoteError) as caught:
            alice.call(bob, "expert.fails_badly", kind, timeout=5)
        assert caught.value.kind == kind
    assert alice.call(bob, "expert.double", 2, timeout=5) == 4


def test_deadlines_at_the_edges(alice: lattica.Client, bob: str) -> None:
    for timeout in (float("inf"), 1e300, 2.0**33):
        assert alice.call(bob, "expert.double", 2, timeout=timeout) == 4
        assert list(alice.stream(bob, "expert.count", 2, timeout=timeout)) == [0, 1]
    for timeout in (0, -1, float("-inf")):
        with pytest.raises(DeadlineExceeded):
            alice.call(bob, "expert.hold", timeout=timeout)
    with pytest.raises(InvalidArgument, match="not a number"):
        alice.call(bob, "expert.double", 2, timeout=float("nan"))
    with pytest.raises(InvalidArgument, match="not UTF-8"):
        alice.call(bob, "expert.\ud800", 2, timeout=5)
    assert alice.call(bob, "expert.double", 2, timeout=5) == 4


def test_a_peer_that_cannot_be_reached(alice: lattica.Client) -> None:
    from lattica_protocols.keys import PrivateKey
    from lattica_protocols.peer_id import PeerId

    nobody = PeerId.from_public_key(PrivateKey.generate(bytes(32)).public_key)
    with pytest.raises(lattica.ConnectError):
        alice.call(nobody, "expert.double", 1, timeout=10)


def test_a_deadline_ends_the_call_here(alice: lattica.Client, bob: str) -> None:
    with pytest.raises(DeadlineExceeded):
        alice.call(bob, "expert.hold", timeout=0.05)
    assert alice.call(bob, "expert.quick", 1, timeout=10) == 2


def test_cancelling_a_future_cancels_the_call(alice: lattica.Client, bob: str) -> None:
    future = alice.submit(bob, "expert.hold", timeout=20)
    assert future.cancel()
    with pytest.raises(CancelledError):
        future.result(1)
    assert alice.call(bob, "expert.quick", 1, timeout=10) == 2


def test_a_nonblocking_handler_may_not_call(daemons: DaemonThread) -> None:
    home = daemons.daemons[0].home
    with lattica.connect(home) as worker, lattica.connect(home) as caller_client:

        @lattica.nonblocking
        def calls() -> Any:
            return worker.daemon("echo", 1)

        worker.serve("w", {"calls": calls})
        with pytest.raises(RemoteError, match="nonblocking handler"):
            caller_client.call(None, "w.calls", timeout=10)


# -- streams ----------------------------------------------------------------------------------------------------
def test_a_generator_streams(alice: lattica.Client, bob: str) -> None:
    assert list(alice.stream(bob, "expert.count", 500, timeout=20)) == list(range(500))


def test_an_error_comes_after_the_items(alice: lattica.Client, bob: str) -> None:
    stream = alice.stream(bob, "expert.fails_halfway", timeout=10)
    assert next(stream) == 1
    with pytest.raises(RemoteError, match="halfway"):
        next(stream)


def test_leaving_a_stream_closes_the_generator(alice: lattica.Client, bob: str, expert: Expert) -> None:
    for n, item in enumerate(alice.stream(bob, "expert.endless", timeout=20)):
        assert item == b"x" * 1000
        if n == 200:
            break
    gc.collect()
    assert expert.closed.wait(10)


def test_the_one_result_of_a_plain_method_is_the_one_item(alice: lattica.Client, bob: str) -> None:
    assert list(alice.stream(bob, "expert.double", 4, timeout=10)) == [8]


def test_both_directions(alice: lattica.Client, daemons: DaemonThread) -> None:
    async def chat(items: AsyncIterator[int], factor: int) -> AsyncIterator[int]:
        async for item in items:
            yield item * factor

    async def total(items: AsyncIterator[int]) -> int:
        return sum([item async for item in items])

    b = daemons.daemons[1]
    methods = {"chat": lattica_client_streaming(chat), "total": lattica_client_streaming(total)}
    daemons.do(b.rpc.serve, "talk", methods)
    with alice.open_call(b.peer_id, "talk.chat", 3, timeout=20) as call:
        for n in range(200):
            call.send(n)
            assert next(call) == 3 * n
        call.end()
        assert list(call) == []
    with alice.open_call(b.peer_id, "talk.total", receives=False, timeout=20) as call:
        for n in range(200):
            call.send(n)
        with pytest.raises(InvalidArgument, match=r"an item of talk\.total: a builtins\.set cannot be sent"):
            call.send({1})
        assert call.result() == sum(range(200))


def lattica_client_streaming(function: Any) -> Any:
    from lattica.rpc import client_streaming

    return client_streaming(function)


def test_a_cancelled_call_says_so(alice: lattica.Client, bob: str) -> None:
    with alice.open_call(bob, "expert.endless", sends=False, timeout=20) as call:
        next(call)
        call.cancel()
        with pytest.raises(CallCancelled):
            list(call)


# -- services ---------------------------------------------------------------------------------------------------
def test_async_methods_need_the_async_client(alice: lattica.Client) -> None:
    with pytest.raises(ValueError, match="aconnect"):
        alice.serve("x", {"echo": echo})


def test_names_that_are_taken_or_wrong(alice: lattica.Client) -> None:
    for name in ("", "_x", "a.b", "x" * 200):
        with pytest.raises(ValueError):
            alice.serve(name, {"f": len})
    with pytest.raises(InvalidArgument, match="daemon's own"):
        alice.serve("daemon", {"f": len})
    alice.serve("mine", {"f": len})
    with pytest.raises(ValueError, match="already"):
        alice.serve("mine", {"f": len})


def test_unserve(alice: lattica.Client, daemons: DaemonThread) -> None:
    alice.serve("mine", {"length": len})
    assert alice.call(daemons.daemons[0].peer_id, "mine.length", "abc", timeout=10) == 3
    alice.unserve("mine")
    with pytest.raises(ServiceNotFound):
        alice.call(None, "mine.length", "abc", timeout=10)


# -- ends -------------------------------------------------------------------------------------------------------
def test_a_daemon_that_dies_ends_calls_at_once_and_its_successor_is_found(tmp_path: Path) -> None:
    with lattica_connected(tmp_path) as (client, thread):
        client.serve("mine", {"length": len})
        running = client.submit(None, "daemon.forever")
        thread.stop()
        with pytest.raises(ConnectionLost):
            running.result(10)
        with pytest.raises(DaemonNotRunning):
            client.daemon("echo", 1)
        with DaemonThread([tmp_path], control=CONTROL):
            assert client.daemon("echo", 2, timeout=10) == 2
            assert client.call(None, "mine.length", "abcd", timeout=10) == 4
            client.close()


class lattica_connected:
    """A daemon and a client of it."""

    def __init__(self, home: Path) -> None:
        self.thread = DaemonThread([home], control=CONTROL)

    def __enter__(self) -> tuple[lattica.Client, DaemonThread]:
        self.thread.__enter__()
        self.client = lattica.connect(self.thread.daemons[0].home)
        return self.client, self.thread

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.thread.stop()


def test_closing_ends_calls_that_run(alice: lattica.Client, bob: str) -> None:
    running = alice.submit(bob, "expert.hold")
    alice.close()
    with pytest.raises(ConnectionLost):
        running.result(10)
    with pytest.raises(ConnectionLost):
        alice.daemon("echo", 1)
    alice.close()


def test_threads_and_descriptors_are_given_back(daemons: DaemonThread) -> None:
    home = daemons.daemons[0].home

    def once() -> None:
        with lattica.connect(home) as client:
            client.serve("s", {"length": len})
            assert client.call(None, "s.length", b"x" * (2 << 20), timeout=10) == 2 << 20

    once()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        once()
    for thread in threading.enumerate():
        if thread.name.startswith("lattica-"):
            thread.join(10)
            assert not thread.is_alive()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # the daemon may keep a segment or two
