"""How tests wait: for a condition where there is no event to wait for, and for time on the mock clock.

Nothing else in `tests/` sleeps to let something happen. What does sleep there is a pace (an attacker's, a load's) or
the length of a measurement.
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


async def elapse(seconds: float) -> None:
    """Let time go by on the mock clock: everything that was to happen within it has happened then."""
    assert isinstance(trio.lowlevel.current_clock(), trio.testing.MockClock), "a test must not wait by the wall clock"
    await trio.sleep(seconds)
