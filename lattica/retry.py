"""Waits for the next attempt of something that failed, as `RetryPace` says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from lattica_protocols.paths.retry import Pauses, RetryPace

if TYPE_CHECKING:
    import random


class Retry:
    """Of one thing, from its first attempt on."""

    def __init__(self, pauses: Pauses, rng: random.Random) -> None:
        self._pace = RetryPace(pauses, rng)
        self._changed = trio.Event()

    def news(self) -> None:
        """The network changed: try sooner."""
        self._pace.news(trio.current_time())
        self._changed.set()

    async def rest(self) -> None:
        """The attempt failed: until the next one."""
        self._pace.failed(trio.current_time())
        while trio.current_time() < self._pace.next_attempt:
            self._changed = trio.Event()
            with trio.move_on_at(self._pace.next_attempt):
                await self._changed.wait()
        self._pace.begun()
