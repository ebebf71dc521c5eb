"""Writes of many tasks in one: under load a task of its own writes what a whole round of the scheduler produced."""

from __future__ import annotations

import outcome
import trio

from lattica.rpc.channel import Channel, Turn

BUSY_CALLS = 3
"""Calls at once from which on it pays to wait for the others: below, the wait would be latency for nothing."""


class BatchingTurn(Turn):
    """A turn whose `run` has to run for writes to be gathered; without it every write goes out at once.

    All tasks that trio runs in one round queue their frames; the writer, woken by the first of them, runs in the
    next round. One join and one write to the stream then serve some dozens of calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self._parked: trio.lowlevel.Task | None = None
        self._woken = False

    async def run(self) -> None:
        """Write what is gathered, for ever."""
        try:
            while True:
                self._parked = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(self._abort)
                self._woken = False
                self.write_waiting()
        finally:
            self._woken = False
            self.write_waiting()

    def _abort(self, _: object) -> trio.lowlevel.Abort:
        self._parked = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _defer(self, channel: Channel) -> bool:
        if self._woken:
            return True
        machine = channel.machine
        if self._parked is None or machine.outbound_calls + machine.inbound_calls < BUSY_CALLS:
            return False
        task, self._parked = self._parked, None
        self._woken = True
        trio.lowlevel.reschedule(task, outcome.Value(None))
        return True
