"""Calls between workers through two daemons: what passes, what ends when somebody goes away, who may call what."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing

import lattica
from lattica.errors import (
    CallCancelled,
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    InvalidArgument,
    RemoteError,
    ResourceExhausted,
    ServiceNotFound,
)
from lattica.local import memfd, segment
from lattica.rpc import client_streaming, forward
from lattica.rpc.peer_channel import PeerChannel
from lattica.testing import MemoryNetwork
from lattica.testing.local import LocalDaemon, open_local_daemon
from lattica_protocols.keys import PrivateKey
from lattica_protocols.limits import RPC_STREAM_ITEMS
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId

Run = Callable[..., Any]
Main = Callable[[LocalDaemon, LocalDaemon, lattica.AsyncClient, lattica.AsyncClient], Awaitable[None]]


@pytest.fixture
def two(run: Run, tmp_path: Path) -> Callable[[Main], None]:
    """Runs a test with two daemons and a client of each."""

    def runner(main: Main) -> None:
        async def inside() -> None:
            network = MemoryNetwork()
            control = {"secret": lambda: "for this machine only"}
            async with (
                open_local_daemon(tmp_path / "a", network, 1, control=control) as a,
                open_local_daemon(tmp_path / "b", network, 2, control=control) as b,
                lattica.aconnect(a.home) as alice,
                lattica.aconnect(b.home) as bob,
            ):
                a.meet(b)
                await main(a, b, alice, bob)

        run(inside)

    return runner


async def echo(value: object) -> object:
    return value


async def forever() -> None:
    await trio.sleep_forever()


def test_both_ways_over_one_session(two: Callable[[Main], None]) -> None:
    async def main(a: LocalDaemon, b: LocalDaemon, alice: lattica.AsyncClient, bob: lattica.AsyncClient) -> None:
        await alice.serve("alice", {"echo": echo})
        await bob.serve("bob", {"echo": echo})
        assert await alice.call(b.peer_id, "bob.echo", 1, timeout=10) == 1
        assert await bob.call(a.peer_id, "alice.echo", 2, timeout=10) == 2
        assert len(a.rpc._sessions) == len(b.rpc._sessions) == 1

    two(main)


@pytest.mark.parametrize("ends", ["retire", "suspend"])
def test_calls_that_waited_for_a_session_which_ends_go_to_the_next_one(
    two: Callable[[Main], None], monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """The peer says goodbye, or the path is lost, after the session was ready and before the calls are passed on."""
    real = PeerChannel.ready
    ended: list[PeerChannel] = []

    async def ready(channel: PeerChannel) -> None:
        await real(channel)
        if not ended:
            ended.append(channel)
            if ends == "retire":
                channel.retire()
            else:
                channel.suspend("its path is lost", 5.0)

    async def main(a: LocalDaemon, b: LocalDaemon, alice: lattica.AsyncClient, bob: lattica.AsyncClient) -> None:
        await bob.serve("bob", {"echo": echo})
        monkeypatch.setattr(PeerChannel, "ready", ready)
        answers: list[object] = []

        async def ask(i: int) -> None:
            answers.append(await alice.call(b.peer_id, "bob.echo", i, timeout=10))

        async with trio.open_nursery() as nursery:
            for i in range(5):
                nursery.start_soon(ask, i)
        assert sorted(answers) == list(range(5))  # type: ignore[type-var]
        assert len(ended) == 1

    two(main)


def test_a_worker_that_vanishes_ends_its_calls_on_the_far_side(two: Callable[[Main], None]) -> None:
    async def main(a: LocalDaemon, b: LocalDaemon, alice: lattica.AsyncClient, bob: lattica.AsyncClient) -> None:
        async with trio.open_nursery() as nursery:

            async def lose() -> None:
                with pytest.raises(ConnectionLost):
                    await alice.call(b.peer_id, "short.forever")

            async def lose_stream() -> None:
                with pytest.raises(ConnectionLost):
                    async for _ in alice.stream(b.peer_id, "short.forever"):
                        pass

            async with lattica.aconnect(b.home) as worker:
                await worker.serve("short", {"forever": forever})
                nursery.start_soon(lose)
                nursery.start_soon(lose_stream)
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert b.rpc.calls_in_flight() == 2
                assert worker._link is not None
                worker._link.hang_up()
                await trio.testing.wait_all_tasks_blocked(0.01)
        with pytest.raises(ServiceNotFound):
            await alice.call(b.peer_id, "short.forever", timeout=10)
        assert b.forwarder.services() == {}

    two(main)


def test_a_worker_that_leaves_in_order_says_so(two: Callable[[Main], None]) -> None:
    async def main(a: LocalDaemon, b: LocalDaemon, alice: lattica.AsyncClient, bob: lattica.AsyncClient) -> None:
        async with trio.open_nursery() as nursery:

            async def lose() -> None:
                with pytest.raises(CallCancelled, match="cancelled by its worker"):
                    await alice.call(b.peer_id, "short.forever")

            async with lattica.aconnect(b.home) as worker:
                await worker.serve("short", {"forever": forever})
                nursery.start_soon(lose)
                await trio.testing.wait_all_tasks_blocked(0.01)

    two(main)


def test_a_caller_that_vanishes_cancels_the_handler(two: Callable[[Main], None]) -> None:
    async def main(a: LocalDaemon, b: LocalDaemon, alice: lattica.AsyncClient, bob: lattica.AsyncClient) -> None:
        started, cancelled = trio.Event(), trio.Event()

        async def long() -> None:
            started.set()
            try:
                await trio.sleep_forever()
            finally:
                cancelled.set()

        await bob.serve("bob", {"long": long})
        async with trio.open_nursery() as nursery:
            async with lattica.aconnect(a.home) as caller:
                nursery.start_soon(caller.call, b.peer_id, "bob.long")
                await started.wait()
                nursery.cancel_scope.cancel()
        with trio.fail_after(5):
            await cancelled.wait()

    two(main)


def test_a_lost_peer_ends_calls_on_both_sides(two: Callable[[Main], None]) -> None:
    async def main(a: LocalDaemon, b: LocalDaemon, alice: lattica.AsyncClient, bob: lattica.AsyncClient) -> None:
        started, cancelled = trio.Event(), trio.Event()

        async def long() -> None:
            started.set()
            try:
                await trio.sleep_forever()
            finally:
                cancelled.set()

        await bob.serve("bob", {"long": long, "echo": echo})
        async with trio.open_nursery() as nursery:

            async def lose() -> None:
                with pytest.raises(ConnectionLost):
                    await alice.call(b.peer_id, "bob.long")

            nursery.start_soon(lose)
            await started.wait()
            for connection in a.host.connections():
                connection.abort()
            await cancelled.wait()
        assert await alice.call(b.peer_id, "bob.echo", 1, timeout=10) == 1, "the next call connects again"

    two(main)


def test_the_deadline_that_arrives_is_what_is_left(two: Callable[[Main], None]) -> None:
    async def main(a: LocalDaemon, b: LocalDaemon, alice: lattica.AsyncClient, bob: lattica.AsyncClient) -> None:
        await bob.serve("bob", {"forever": forever, "echo": echo})
        assert await alice.call(b.peer_id, "bob.echo", 1) == 1
        async with trio.open_nursery() as nursery:

            async def lose() -> None:
                with pytest.raises(DeadlineExceeded):
                    await alice.call(b.peer_id, "bob.forever", timeout=0.5)

            nursery.start_soon(lose)
            await trio.testing.wait_all_tasks_blocked(0.01)
            (worker,) = b.server.clients
            left = worker.machine.next_timeout()
            assert left is not None
            assert 0 < left - trio.current_time() <= 0.5
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert worker.machine.outbound_calls == 0

    two(main)


def test_back_pressure_reaches_through(two: Callable[[Main], None]) -> None:
    async def main(a: LocalDaemon, b: LocalDaemon, alice: lattica.AsyncClient, bob: lattica.AsyncClient) -> None:
        made = 0

        async def numbers() -> AsyncIterator[int]:
            nonlocal made
            for made in range(1000):
                yield made

        await bob.serve("bob", {"numbers": numbers})
        async with alice.open_call(b.peer_id, "bob.numbers", sends=False, timeout=20) as call:
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert made == RPC_STREAM_ITEMS
            assert [item async for item in call] == list(range(1000))

    two(main)


def test_back_pressure_of_what_the_caller_sends(two: Callable[[Main], None]) -> None:
    async def main(a: LocalDaemon, b: LocalDaemon, alice: lattica.AsyncClient, bob: lattica.AsyncClient) -> None:
        release = trio.Event()

        @client_streaming
        async def total(items: AsyncIterator[int]) -> int:
            await release.wait()
            return sum([item async for item in items])

        await bob.serve("bob", {"total": total})
        sent = 0
        async with alice.open_call(b.peer_id, "bob.total", receives=False, timeout=20) as call:
            async with trio.open_nursery() as nursery:

                async def send() -> None:
                    nonlocal sent
                    for n in range(300):
                        await call.send(n)
                        sent += 1

                nursery.start_soon(send)
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert sent == RPC_STREAM_ITEMS
                release.set()
            assert await call.result() == sum(range(300))

    two(main)


def test_calls_go_to_the_worker_that_is_least_busy(two: Callable[[Main], None]) -> None:
    async def main(a: LocalDaemon, b: LocalDaemon, alice: lattica.AsyncClient, bob: lattica.AsyncClient) -> None:
        async with lattica.aconnect(b.home) as second:
            hold = trio.Event()

            async def wait() -> None:
                await hold.wait()

            await bob.serve("pool", {"name": lambda: "bob", "wait": wait})
            await second.serve("pool", {"name": lambda: "second", "wait": wait})
            names = [await alice.call(b.peer_id, "pool.name", timeout=10) for _ in range(4)]
            assert sorted(names) == ["bob", "bob", "second", "second"]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(alice.call, b.peer_id, "pool.wait")
                await trio.testing.wait_all_tasks_blocked(0.01)
                names = [await alice.call(b.peer_id, "pool.name", timeout=10) for _ in range(4)]
                assert len(set(names)) == 1, "the other one is waiting"
                hold.set()
        names = [await alice.call(b.peer_id, "pool.name", timeout=10) for _ in range(3)]
        assert names == ["bob"] * 3

    two(main)


def test_the_daemons_own_service_is_for_its_machine_only(two: Callable[[Main], None]) -> None:
    async def main(a: LocalDaemon, b: LocalDaemon, alice: lattica.AsyncClient, bob: lattica.AsyncClient) -> None:
        assert await alice.daemon("secret") == "for this machine only"
        for method in ("daemon.secret", "local.register"):
            with pytest.raises(ServiceNotFound):
                await alice.call(b.peer_id, method, timeout=10)
            with pytest.raises(ServiceNotFound):
                await a.rpc.call(b.host.peer_id, method, timeout=10)
        with pytest.raises(ServiceNotFound):
            await alice.call(a.peer_id, "daemon.secret", timeout=10)

    two(main)


def test_calls_to_oneself(two: Callable[[Main], None]) -> None:
    async def main(a: LocalDaemon, b: LocalDaemon, alice: lattica.AsyncClient, bob: lattica.AsyncClient) -> None:
        a.rpc.serve("node", {"echo": echo})
        await alice.serve("mine", {"echo": echo})
        for peer in (None, a.peer_id):
            assert await alice.call(peer, "mine.echo", 1, timeout=10) == 1
            assert await alice.call(peer, "node.echo", 2, timeout=10) == 2
        with pytest.raises(ServiceNotFound, match="no service nothing"):
            await bob.call(b.peer_id, "nothing.here", timeout=10)

    two(main)


def test_a_peer_that_cannot_be_reached(two: Callable[[Main], None]) -> None:
    async def main(a: LocalDaemon, b: LocalDaemon, alice: lattica.AsyncClient, bob: lattica.AsyncClient) -> None:
        with pytest.raises(ConnectError):  # only a was told where b is
            await bob.call(a.peer_id, "alice.echo", 1, timeout=10)
        assert await bob.daemon("secret") == "for this machine only"
        assert not b.forwarder._queues

    two(main)


def test_more_calls_at_once_than_the_peer_takes_before_its_greeting(two: Callable[[Main], None]) -> None:
    async def main(a: LocalDaemon, b: LocalDaemon, alice: lattica.AsyncClient, bob: lattica.AsyncClient) -> None:
        await bob.serve("bob", {"echo": echo})
        done = []

        async def one(n: int) -> None:
            done.append(await alice.call(b.peer_id, "bob.echo", n, timeout=20))

        async with trio.open_nursery() as nursery:
            for n in range(500):
                nursery.start_soon(one, n)
        assert sorted(done) == list(range(500))

    two(main)


def test_large_results_of_many_calls_do_not_end_the_session(two: Callable[[Main], None]) -> None:
    """Answers that stand in the control stream (under 64 KiB each) add up to more than a peer may leave unread."""

    async def main(a: LocalDaemon, b: LocalDaemon, alice: lattica.AsyncClient, bob: lattica.AsyncClient) -> None:
        data = bytes(60_000)
        await bob.serve("bob", {"echo": echo})

        async def one() -> None:
            assert await alice.call(b.peer_id, "bob.echo", data, timeout=25) == data

        async with trio.open_nursery() as nursery:
            for _ in range(600):
                nursery.start_soon(one)

    two(main)


def test_a_worker_that_does_not_read_is_refused_more(
    two: Callable[[Main], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main(a: LocalDaemon, b: LocalDaemon, alice: lattica.AsyncClient, bob: lattica.AsyncClient) -> None:
        monkeypatch.setattr(forward, "UNREAD_LIMIT", -1)
        await bob.serve("bob", {"echo": echo})
        with pytest.raises(ResourceExhausted, match="does not keep up"):
            await alice.call(b.peer_id, "bob.echo", 1, timeout=10)

    two(main)


def test_errors_of_a_handler_pass_through(two: Callable[[Main], None]) -> None:
    async def main(a: LocalDaemon, b: LocalDaemon, alice: lattica.AsyncClient, bob: lattica.AsyncClient) -> None:
        async def fail() -> None:
            raise ArithmeticError("no way")

        await bob.serve("bob", {"fail": fail})
        with pytest.raises(RemoteError, match="no way") as caught:
            await alice.call(b.peer_id, "bob.fail", timeout=10)
        assert caught.value.kind == "ArithmeticError"

    two(main)


@pytest.mark.skipif(not segment.AVAILABLE, reason="this system has no memfd")
def test_a_long_tail_is_copied_into_shared_memory_only_by_the_workers(
    two: Callable[[Main], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main(a: LocalDaemon, b: LocalDaemon, alice: lattica.AsyncClient, bob: lattica.AsyncClient) -> None:
        await bob.serve("bob", {"size": lambda x: x.nbytes, "echo": echo})
        copies = []
        write_all = memfd._write_all
        monkeypatch.setattr(memfd, "_write_all", lambda fd, buffers: (copies.append(fd), write_all(fd, buffers)))
        x = np.ones(4 << 20, np.uint8)
        assert await alice.call(b.peer_id, "bob.size", x, timeout=10) == x.nbytes
        assert len(copies) == 1
        np.testing.assert_array_equal(await alice.call(b.peer_id, "bob.echo", x, timeout=10), x)
        assert len(copies) == 3

    two(main)


def test_registering_nonsense(two: Callable[[Main], None]) -> None:
    async def main(a: LocalDaemon, b: LocalDaemon, alice: lattica.AsyncClient, bob: lattica.AsyncClient) -> None:
        for args in ((), ("x",) * 3, (1, []), ("x", [1]), ("a.b", []), ("_x", []), ("daemon", []), ("local", [])):
            with pytest.raises(InvalidArgument):
                await alice.call(None, "local.register", *args, timeout=10)
        assert a.forwarder.services() == {}

    two(main)


def test_arguments_of_a_caller_that_gave_up_are_not_kept_for_a_peer_that_does_not_come(
    two: Callable[[Main], None],
) -> None:
    async def main(a: LocalDaemon, b: LocalDaemon, alice: lattica.AsyncClient, bob: lattica.AsyncClient) -> None:
        async def search(peer: PeerId) -> list[Multiaddr]:
            await trio.sleep_forever()
            raise AssertionError

        a.host.find_addrs = search
        stranger = PeerId.from_public_key(PrivateKey.generate(bytes(32)).public_key)
        with pytest.raises(DeadlineExceeded):
            await alice.call(stranger, "far.away", np.zeros(1 << 20), timeout=0.1)
        await trio.testing.wait_all_tasks_blocked(0.01)
        (waiting,) = a.forwarder._queues[stranger].requests
        assert (waiting.head, waiting.tail) == (b"", b"")

    two(main)
