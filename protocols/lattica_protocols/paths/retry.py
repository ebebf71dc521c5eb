"""When to try again what failed: a punch, or a session's move to a direct path.

Pauses double from the first to the longest, each a quarter more or less, so that partners of one network that failed
together do not come back together. News of the network brings the next attempt forward, and begins with short pauses
again: a new interface or a new public address changes what can work. But never sooner than `rested` after the attempt
before, whatever the news: a partner can make news, too.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

JITTER: Final = (0.75, 1.25)
NEWS_SECONDS: Final = 1.0
"""From the first news to an attempt: addresses change one by one, by interface, family and transport."""


@dataclass(frozen=True, slots=True)
class Pauses:
    """Seconds."""

    first: float
    longest: float
    rested: float


PUNCH_PAUSES: Final = Pauses(60.0, 900.0, 25.0)
"""Between rounds of punching. 60: what a failed one left in the boxes on the way is forgotten after 30. 900: a box that
was replaced, or a port that somebody opened, is made use of within a quarter of an hour, at 24 probes a time. 25: a
partner answers two rounds a minute (`PUNCH_ANSWERS_PER_MINUTE`)."""
MOVE_PAUSES: Final = Pauses(1.0, 60.0, 0.5)
"""Between attempts to take a session to a direct path that is up. 1: the connection may just have been lost, and the
heartbeat takes 6.5 s to notice. 60: each costs a stream and a message."""


class RetryPace:
    """Of one thing that is tried until it works. `next_attempt`: when, once the one before has `failed`."""

    __slots__ = ("_failed_at", "_news", "_pause", "_pauses", "_rng", "next_attempt")

    def __init__(self, pauses: Pauses, rng: random.Random) -> None:
        self._pauses = pauses
        self._rng = rng
        self._pause = pauses.first
        self._failed_at: float | None = None
        self._news = False
        self.next_attempt = 0.0

    def failed(self, now: float) -> None:
        """The attempt that was due is over."""
        self._failed_at = now
        self.next_attempt = now + self._pause * self._rng.uniform(*JITTER)
        self._pause = min(2 * self._pause, self._pauses.longest)
        if self._news:
            self.news(now)

    def begun(self) -> None:
        """An attempt runs: it may be with what was so before news that come now."""
        self._failed_at = None
        self._news = False

    def news(self, now: float) -> None:
        """The network is not what it was."""
        self._pause = self._pauses.first
        self._news = self._failed_at is None
        if self._failed_at is not None:
            soon = max(now + NEWS_SECONDS, self._failed_at + self._pauses.rested)
            self.next_attempt = min(self.next_attempt, soon + NEWS_SECONDS * self._rng.random())
