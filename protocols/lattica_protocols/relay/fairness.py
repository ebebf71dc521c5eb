"""How a relay shares a bandwidth that it does not want to exceed: every circuit gets the same, what one leaves over
the others get (max-min fairness).

Each tick a budget of `rate * elapsed` is split. A circuit that did not use up its last share is filled up to one
share; the rest goes to those that were stopped, in equal parts. A circuit that overdrew, because a whole window was on
its way when it was stopped, pays that back from its next shares. Without a rate nobody is ever stopped.
"""

from __future__ import annotations

from typing import Final

TICK_SECONDS: Final = 0.05
"""Short against what people notice, long against the work of a round over all circuits (0.1 ms for 500)."""
_MAX_ELAPSED: Final = 4 * TICK_SECONDS
"""A process that was stopped for a while must not send it all at once afterwards."""


class Share:
    """One circuit's part. Compared by identity; belongs to one `FairShares`."""

    __slots__ = ("allowance", "stopped")

    def __init__(self, allowance: float) -> None:
        self.allowance = allowance
        """Bytes it may still carry; negative when it overdrew."""
        self.stopped = False


class FairShares:
    """`rate` in bytes a second for all circuits together, `None`: no limit."""

    def __init__(self, rate: float | None, now: float) -> None:
        self.rate = rate
        self._shares: set[Share] = set()
        self._stopped: set[Share] = set()
        self._filled_at = now

    def join(self) -> Share:
        """A new circuit."""
        share = Share(self._part())
        self._shares.add(share)
        return share

    def leave(self, share: Share) -> None:
        """It is over. Safe to call twice."""
        self._shares.discard(share)
        self._stopped.discard(share)

    def spend(self, share: Share, size: int) -> bool:
        """`size` bytes went through. False: take no more for it until `handle_timer` gives it back."""
        if self.rate is None:
            return True
        share.allowance -= size
        if share.allowance > 0:
            return True
        if share in self._shares:
            share.stopped = True
            self._stopped.add(share)
        return False

    def next_timeout(self) -> float | None:
        """When a tick is due; `None` while nobody is stopped."""
        return self._filled_at + TICK_SECONDS if self._stopped else None

    def handle_timer(self, now: float) -> list[Share]:
        """Fill up; the circuits that may go on."""
        if self.rate is None or now - self._filled_at < TICK_SECONDS:
            return []
        budget = self.rate * min(now - self._filled_at, _MAX_ELAPSED)
        self._filled_at = now
        part = budget / max(1, len(self._shares))
        for share in self._shares:
            if not share.stopped:
                given = min(part, max(0.0, part - share.allowance))
                share.allowance += given
                budget -= given
        if not self._stopped:
            return []
        each = budget / len(self._stopped)
        for share in self._stopped:
            share.allowance += each
        free = [share for share in self._stopped if share.allowance > 0]
        for share in free:
            share.stopped = False
            self._stopped.discard(share)
        return free

    def _part(self) -> float:
        """What one circuit gets in one tick."""
        return 0.0 if self.rate is None else self.rate * TICK_SECONDS / (len(self._shares) + 1)
