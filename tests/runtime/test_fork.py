"""Workers that fork, as data loaders do: what parent and child share then, and what ends with which of them."""

from __future__ import annotations

import gc
import os
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lattica
from lattica.local.memfd import LentSegments, SegmentPool
from lattica.local.segment import AVAILABLE
from lattica.testing.local import DaemonThread

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # of Python 3.12: we mean it


async def echo(value: object) -> object:
    return value


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[DaemonThread]:
    with DaemonThread([tmp_path / "a", tmp_path / "b"], control={"echo": echo}) as thread:
        yield thread


@pytest.fixture
def alice(daemons: DaemonThread) -> Iterator[lattica.Client]:
    with lattica.connect(daemons.daemons[0].home) as client:
        yield client


@contextmanager
def forked(in_child: Callable[[Callable[[], None]], bool]) -> Iterator[Callable[[], None]]:
    """A child that runs `in_child(wait)`, which has to be true, and the way to let its `wait` return."""
    go_on, started = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(go_on[1])
            os.write(started[1], b"x")
            code = 0 if in_child(lambda: os.read(go_on[0], 1) and None) else 2
        finally:
            os._exit(code)
    os.read(started[0], 1)

    def join() -> None:
        os.write(go_on[1], b"x")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    try:
        yield join
    finally:
        for fd in (*go_on, *started):
            os.close(fd)


def test_a_child_connects_anew_and_does_not_disturb_its_parent(alice: lattica.Client) -> None:
    assert alice.daemon("echo", 1, timeout=10) == 1

    def in_child(wait: Callable[[], None]) -> bool:
        return bool(alice.daemon("echo", "child", timeout=10) == "child")

    with forked(in_child) as join:
        join()
    assert alice.daemon("echo", 2, timeout=10) == 2


def test_a_child_does_not_keep_the_services_of_its_parent(daemons: DaemonThread, alice: lattica.Client) -> None:
    """While data loaders of a worker that has ended live on, calls must not go to the worker."""
    bob = daemons.daemons[1]
    with lattica.connect(bob.home) as worker:
        worker.serve("expert", {"add": lambda a, b: a + b})

        def in_child(wait: Callable[[], None]) -> bool:
            wait()
            return True

        with forked(in_child) as join:
            assert alice.call(bob.peer_id, "expert.add", 1, 2, timeout=10) == 3
            worker.close()
            with pytest.raises(lattica.ServiceNotFound):
                alice.call(bob.peer_id, "expert.add", 1, 2, timeout=10)
            join()


@pytest.mark.parametrize("keeper", ["parent", "child"])
def test_arrays_that_arrived_before_a_fork_stay_as_they_are(
    daemons: DaemonThread, alice: lattica.Client, keeper: str
) -> None:
    """Whichever of the two lets go of its array: the memory is not used for others while the other still looks."""
    bob = daemons.daemons[1]
    with lattica.connect(bob.home) as worker:
        worker.serve("expert", {"full": lambda value: np.full(2 << 20, value, np.uint8)})

        def full(value: int) -> Any:
            return alice.call(bob.peer_id, "expert.full", value, timeout=10)

        kept = [full(7)]

        def in_child(wait: Callable[[], None]) -> bool:
            if keeper == "parent":
                kept.clear()
                gc.collect()
                return True
            wait()
            return bool((kept[0] == 7).all())

        with forked(in_child) as join:
            if keeper == "parent":
                join()
            else:
                kept.clear()
                gc.collect()
            for value in range(20, 30):
                assert (full(value) == value).all()
            if keeper == "parent":
                assert (kept[0] == 7).all()
            else:
                join()


@pytest.mark.skipif(not AVAILABLE, reason="this system has no memfd")
def test_memory_that_parent_and_child_share_is_forgotten_by_its_sender() -> None:
    pool, lent = SegmentPool(), LentSegments()
    segment = pool.store([b"1" * 10], 10)
    lent.add(segment)
    channel = types.SimpleNamespace(closed=False)
    view = pool.received.map_untrusted(segment.fd, channel)

    def in_child(wait: Callable[[], None]) -> bool:
        wait()
        return bytes(view) == b"1" * 10

    with forked(in_child) as join:
        view.release()
        gc.collect()
        lent.collect()
        assert lent.bytes == 0
        assert segment.fd < 0
        assert pool.store([b"2" * 10], 10) is not segment
        join()
    pool.close()
