"""How tests wait: for a condition where there is no event to wait for, for a condition to last, and on the mock clock.

Nothing else in `tests/` sleeps to let something happen. What does sleep there has a name: the pace of an attacker or a
load, or the length of a measurement (`tests/arch/test_sleeps.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import trio
import trio.testing

POLL_SECONDS = 0.02


def wait_until(
    condition: Callable[[], object],
    seconds: float = 30.0,
    log: Callable[[], str] = lambda: "",
    *,
    poll: float = POLL_SECONDS,
) -> float:
    """Seconds until `condition()` holds, which another process brings about. `log()` explains why it does not."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"not within {seconds} s\n{log()}"
        time.sleep(poll)
    return time.monotonic() - started


async def until(
    condition: Callable[[], object],
    seconds: float = 30.0,
    log: Callable[[], str] = lambda: "",
    *,
    poll: float = POLL_SECONDS,
) -> float:
    """The same while the test's own tasks, and what they wait for in the kernel, go on."""
    started = trio.current_time()
    while not condition():  # it has no event
        assert trio.current_time() - started < seconds, f"not within {seconds} s\n{log()}"
        await trio.sleep(poll)
    return trio.current_time() - started


def stays(
    condition: Callable[[], object],
    seconds: float,
    log: Callable[[], str] = lambda: "",
    *,
    poll: float = POLL_SECONDS,
) -> None:
    """`condition()` holds for `seconds`, in another process: that nothing happens is no event to wait for."""
    end = time.monotonic() + seconds
    while (now := time.monotonic()) < end:
        assert condition(), f"no more after {seconds - (end - now):.2f} s\n{log()}"
        time.sleep(poll)


async def remains(condition: Callable[[], object], seconds: float, *, poll: float = POLL_SECONDS) -> None:
    """The same while the test's own tasks go on."""
    end = trio.current_time() + seconds
    while (now := trio.current_time()) < end:
        assert condition(), f"no more after {seconds - (end - now):.2f} s"
        await trio.sleep(poll)


async def elapse(seconds: float) -> None:
    """Let time go by on the mock clock: everything that was to happen within it has happened then."""
    assert isinstance(trio.lowlevel.current_clock(), trio.testing.MockClock), "a test must not wait by the wall clock"
    await trio.sleep(seconds)
