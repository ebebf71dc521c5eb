"""Notices a dead path quickly where somebody waits for the peer, and costs next to nothing where nobody does.

The driver tells when the peer was last *heard* (any byte that proves the path: data, an acknowledgement) and whether
something of it is *wanted*: data that was sent is unanswered, or the application waits for an answer.

    wanted, silent for 3 s      PROBE, whose answer is heard
    wanted, silent for 6.5 s    DEAD, if a probe has been out for 3.5 s
    not wanted, silent for long PROBE: NATs and the peer's idle timeout forget silent connections; how long is a
                                matter of what is in between (`keep_alive.py`)

A peer that is busy for 2 s answers late and lives. So does one at the other end of a slow link that we fill, whose
acknowledgements are heard all the time. When our own process did not run for a while (it was stopped, the machine
slept) what the peer sent waits unread, so the silence is ours: it is counted from now on.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Final

_STALLED_SECONDS: Final = 1.0
"""A timer that is so late tells that our process did not run."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of silence."""

    probe: float = 3.0
    """Until a sign of life is asked for."""
    dead: float = 6.5
    """Until the path is given up: two heartbeats and something for the way."""
    keep_alive: float = 25.0
    """Until a path that nobody waits for is kept up; `inf`: never."""

    @property
    def answer(self) -> float:
        """What a peer has at least to answer a probe."""
        return self.dead - self.probe


USUAL: Final = Pace()


class Verdict(enum.Enum):
    """What `check` wants done."""

    NOTHING = "nothing to do"
    PROBE = "ask the peer for a sign of life"
    DEAD = "the path is dead"


class Heartbeat:
    """Of one path. Call `check` at the time it gave as `next_timeout`, and when something becomes wanted."""

    __slots__ = ("_pace", "_probed_at", "_since", "next_timeout")

    def __init__(self, now: float, pace: Pace = USUAL) -> None:
        self._pace = pace
        self._since: float | None = None
        """When something became wanted."""
        self._probed_at: float | None = None
        """When the probe that is not answered went out."""
        self.next_timeout = now
        """When `check` wants to be called, at the latest."""

    def keep_up(self, every: float, now: float) -> None:
        """From now on let no more than `every` seconds pass in silence while nothing is wanted. `check` is due then."""
        self._pace = replace(self._pace, keep_alive=every)
        if self._since is None and self._probed_at is None:  # else a check that comes when it was due would seem late
            self.next_timeout = min(self.next_timeout, now)

    def check(self, now: float, *, heard_at: float, wanted: bool) -> Verdict:
        """What to do now."""
        if now > self.next_timeout + _STALLED_SECONDS:
            self._since = self._probed_at = None
        if self._probed_at is not None and heard_at >= self._probed_at:
            self._probed_at = None
        if not wanted:
            self._since = None
        elif self._since is None:
            self._since = now
        if self._since is not None:
            return self._watch(now, max(heard_at, self._since))
        if self._probed_at is not None:
            return self._watch(now, self._probed_at)
        self.next_timeout = max(heard_at, now - self._pace.keep_alive / 2) + self._pace.keep_alive
        return self._probe(now) if now >= heard_at + self._pace.keep_alive else Verdict.NOTHING

    def _watch(self, now: float, silent_since: float) -> Verdict:
        if self._probed_at is None:
            self.next_timeout = silent_since + self._pace.probe
            return self._probe(now) if now >= self.next_timeout else Verdict.NOTHING
        dead_at = max(silent_since + self._pace.dead, self._probed_at + self._pace.answer)
        self.next_timeout = dead_at
        if now >= dead_at:
            return Verdict.DEAD
        # The answer may come without a call of `check`: then the next probe is due before the path would be dead.
        again_at = max(silent_since, self._probed_at) + self._pace.probe
        if now < again_at:
            self.next_timeout = min(again_at, dead_at)
        return Verdict.NOTHING

    def _probe(self, now: float) -> Verdict:
        self._probed_at = now
        self.next_timeout = now + self._pace.probe  # an answered one is followed by the next one in time
        return Verdict.PROBE
