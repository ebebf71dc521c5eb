"""Tasks that are used again: a handler runs in one that waits already, instead of in a new one for every call.

Starting a trio task costs about as much as the rest of a small call. A task that is done with a job parks and is
woken with the next. Each task has one cancel scope for many jobs; cancelling a job uses that scope up and the task
makes a new one, so calls that are not cancelled pay nothing for being cancellable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import outcome
import trio

MAX_IDLE: Final = 256
"""Parked tasks kept for later, about 3 KB each."""


class Job:
    """One piece of work: subclass it and write `run`."""

    __slots__ = ("scope",)

    def __init__(self) -> None:
        self.scope: trio.CancelScope | None = None
        """Set while the job runs."""

    async def run(self) -> None:
        """The work. Must not raise anything but `trio.Cancelled`."""
        raise NotImplementedError

    def cancel(self) -> None:
        """Cancel the job while it runs, otherwise do nothing."""
        if self.scope is not None:
            self.scope.cancel()


class TaskPool:
    """Runs jobs in the tasks of one nursery."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._idle: list[trio.lowlevel.Task] = []

    def start(self, job: Job) -> None:
        """Run the job soon."""
        if self._idle:
            trio.lowlevel.reschedule(self._idle.pop(), outcome.Value(job))
        else:
            self._nursery.start_soon(self._work, job)

    async def _work(self, job: Job | None) -> None:
        while True:
            with trio.CancelScope() as scope:
                while True:
                    if job is None:
                        if len(self._idle) >= MAX_IDLE:
                            return
                        job = await self._park()
                    job.scope = scope
                    try:
                        await job.run()
                    finally:
                        job.scope = None
                        job = None

    async def _park(self) -> Job:
        task = trio.lowlevel.current_task()
        self._idle.append(task)

        def abort(_: Callable[[], Any]) -> trio.lowlevel.Abort:
            self._idle.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        job: Job = await trio.lowlevel.wait_task_rescheduled(abort)
        return job
