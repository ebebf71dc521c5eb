"""Work that takes long, with reports of how far it is.

An async generator may not keep a nursery open across its yields, so the work runs in the daemon's nursery and the
generator looks at it now and then. Whoever stops reading the generator stops the work.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import trio

from lattica.errors import CallCancelled

REPORT_INTERVAL = 0.1
"""Seconds between two reports: a bar that moves ten times a second looks smooth."""

Progress = dict[str, Any]
"""`state`, `bytes`, `total` and what else the work counts. Written by the work, from any thread."""


async def report_while(
    nursery: trio.Nursery, progress: Progress, work: Callable[[], Awaitable[Progress]]
) -> AsyncGenerator[Progress, None]:
    """Run `work` and yield copies of `progress`, then its result with `state == "done"`. Raises what it raises."""
    finished = trio.Event()
    scope = trio.CancelScope()
    results: list[Progress] = []
    failures: list[Exception] = []

    async def run() -> None:
        try:
            with scope:
                results.append(await work())
        except Exception as error:  # it belongs to whoever reads the generator, and is raised there
            failures.append(error)
        finally:
            finished.set()

    nursery.start_soon(run)
    try:
        while not finished.is_set():
            with trio.move_on_after(REPORT_INTERVAL):
                await finished.wait()
            if not finished.is_set():
                yield dict(progress)
        if failures:
            raise failures[0]
        if not results:
            raise CallCancelled("the daemon is closing")
        yield {"state": "done", **results[0]}
    finally:
        scope.cancel()
