"""When what failed is tried again, on a clock of the test's own."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from lattica_protocols.limits import PUNCH_ANSWERS_PER_MINUTE, PUNCH_ATTEMPTS
from lattica_protocols.paths.retry import JITTER, NEWS_SECONDS, PUNCH_PAUSES, Pauses, RetryPace

PAUSES = Pauses(10.0, 100.0, 5.0)


def attempt(pace: RetryPace, at: float, takes: float = 1.0) -> float:
    """One that fails; how long it is until the next."""
    pace.begun()
    pace.failed(at + takes)
    return pace.next_attempt - at - takes


@given(st.integers(0, 2**32))
def test_pauses_double_up_to_the_longest(seed: int) -> None:
    pace, now = RetryPace(PAUSES, random.Random(seed)), 0.0
    for wanted in (10, 20, 40, 80, 100, 100):
        pause = attempt(pace, now)
        assert wanted * JITTER[0] <= pause <= wanted * JITTER[1]
        now = pace.next_attempt


@given(st.integers(0, 2**32), st.floats(0, 60))
def test_news_bring_the_next_attempt_forward(seed: int, after: float) -> None:
    pace = RetryPace(PAUSES, random.Random(seed))
    now = 0.0
    for _ in range(4):
        attempt(pace, now)
        now = pace.next_attempt
    attempt(pace, now, 0.0)
    pace.news(now + after)
    soonest = max(now + after + NEWS_SECONDS, now + PAUSES.rested)
    assert soonest <= pace.next_attempt <= soonest + NEWS_SECONDS
    assert attempt(pace, pace.next_attempt) <= PAUSES.first * JITTER[1]


def test_news_during_an_attempt_count_for_the_next() -> None:
    pace = RetryPace(PAUSES, random.Random(1))
    pace.begun()
    pace.news(0.5)
    pace.failed(1.0)
    assert pace.next_attempt <= 1.0 + PAUSES.rested + NEWS_SECONDS
    assert attempt(pace, pace.next_attempt) >= PAUSES.first * JITTER[0]  # once


@given(st.integers(0, 2**32), st.lists(st.floats(0, 30), min_size=100, max_size=100))
def test_news_without_end_do_not_make_attempts_without_end(seed: int, gaps: list[float]) -> None:
    """A partner can tell a new address in each second."""
    pace, now, attempts = RetryPace(PUNCH_PAUSES, random.Random(seed)), 0.0, []
    pace.begun()
    pace.failed(now)
    for gap in gaps:
        now += gap
        if now >= pace.next_attempt:
            attempts.append(now)
            pace.begun()
            pace.failed(now)
        pace.news(now)
    for first, third in zip(attempts, attempts[2:], strict=False):
        assert third - first >= 2 * PUNCH_PAUSES.rested
    assert PUNCH_ANSWERS_PER_MINUTE * PUNCH_PAUSES.rested / 60 >= PUNCH_ATTEMPTS
