"""The heartbeat machine, on a clock of its own."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lattica_protocols.paths.heartbeat import USUAL, Heartbeat, Pace, Verdict
from lattica_protocols.paths.keep_alive import DIALLER_SECONDS, MAPPING_SECONDS

ROUND_TRIP = 0.05


class Path:
    """A path that is checked when the machine wants it, up to a time."""

    def __init__(self, *, keep_alive: float = USUAL.keep_alive) -> None:
        self.now = 0.0
        self.heard_at = 0.0
        self.wanted = False
        self.alive = True
        self.slow = 0.0
        self.probes: list[float] = []
        self.dead_at: float | None = None
        self.machine = Heartbeat(0.0, Pace(keep_alive=keep_alive))
        self.answers: list[float] = []
        self.due = 0.0
        """Until when a driver sleeps that nobody wakes."""

    def check(self) -> None:
        verdict = self.machine.check(self.now, heard_at=self.heard_at, wanted=self.wanted)
        self.due = self.machine.next_timeout
        if verdict is Verdict.PROBE:
            self.probes.append(self.now)
            if self.alive:
                self.answers.append(self.now + ROUND_TRIP + self.slow)
        elif verdict is Verdict.DEAD:
            self.dead_at = self.now

    def run(self, until: float, *, heard: Callable[[float], float] | None = None) -> None:
        while self.dead_at is None and min(self.due, *self.answers, until) < until:
            self.now = max(self.now, min(self.due, *self.answers, until))
            if self.answers and self.now >= self.answers[0]:
                self.heard_at = self.answers.pop(0)
            else:
                if heard is not None:
                    self.heard_at = heard(self.now)
                self.check()
        self.now = until if self.dead_at is None else self.dead_at

    def want(self) -> None:
        self.wanted = True
        self.check()


@given(st.floats(0, 100), st.floats(0, 30))
@example(75.125, 0.0)  # wanted while a probe that keeps the path up is under way
def test_a_path_that_is_used_is_given_up_in_time(before: float, cut_after: float) -> None:
    path = Path()
    path.run(before)
    path.want()
    path.run(path.now + cut_after)
    path.alive = False
    heard, cut = path.heard_at, path.now
    path.run(cut + 60)
    assert path.dead_at is not None
    assert path.dead_at <= max(heard, before, cut) + USUAL.dead + ROUND_TRIP + 1e-6
    assert path.dead_at >= max(heard, before) + USUAL.dead - 1e-6


@given(st.lists(st.floats(0.01, 4), min_size=1, max_size=12), st.booleans())
@example([0.5, 2.5, 3.0], False)
def test_news_about_mappings_do_not_keep_a_dead_path_up(pauses: list[float], hurried: bool) -> None:
    """Each could have been taken for a check that came late, and the silence for our own."""
    path = Path()
    path.want()
    path.run(10)
    path.alive = False
    for pause in pauses:
        path.machine.keep_up(25.0, path.now)
        if hurried:  # a driver may look at once, or when it had to anyway
            path.check()
        path.run(path.now + pause)
    path.run(100)
    assert path.dead_at == pytest.approx(path.heard_at + USUAL.dead, abs=1e-6)


def test_traffic_needs_no_probes_and_its_end_is_noticed() -> None:
    path = Path()
    path.want()
    path.run(100, heard=lambda now: now - 0.1)
    assert path.probes == []
    path.alive, last = False, path.heard_at
    path.run(200)
    assert path.dead_at == pytest.approx(last + USUAL.dead)


@pytest.mark.parametrize("busy", [2.0, 3.3])
def test_a_busy_peer_lives(busy: float) -> None:
    path = Path()
    path.slow = busy
    path.want()
    path.run(500)
    assert path.dead_at is None


def test_any_byte_counts() -> None:
    """A link so slow that each acknowledgement takes 3 s to come, and no probe gets through."""
    path = Path()
    path.alive = False
    path.want()
    path.run(500, heard=lambda now: math.floor(now / 3) * 3)
    assert path.dead_at is None


def test_an_idle_path_costs_one_probe_in_25_seconds() -> None:
    path = Path()
    path.run(1000)
    assert len(path.probes) == pytest.approx(1000 / (USUAL.keep_alive + ROUND_TRIP), abs=1)
    path.alive = False
    path.run(2000)
    assert path.dead_at is not None
    assert path.dead_at - path.probes[-1] == pytest.approx(USUAL.dead)


def test_without_a_mapping_to_keep_nothing_is_sent() -> None:
    path = Path(keep_alive=math.inf)
    path.run(10_000)
    assert path.probes == []
    path.want()
    path.run(10_004)
    assert path.probes == [10_003]


def test_our_own_sleep_is_not_the_peers_silence() -> None:
    path = Path()
    path.want()
    path.run(3.1)
    path.wanted = True
    path.now = 600.0  # the lid was closed
    path.check()
    assert path.dead_at is None
    path.alive = True
    path.run(700)
    assert path.dead_at is None


def test_a_path_nobody_needs_any_more_is_left_alone() -> None:
    path = Path()
    path.alive = False
    path.want()
    path.run(2.9)
    path.wanted = False
    path.run(20)
    assert path.dead_at is None
    assert path.probes == []


def test_more_silence_is_granted_and_taken_back() -> None:
    path = Path()
    path.run(10)
    path.machine.keep_up(300.0, path.now)
    path.check()
    path.run(290)
    assert path.probes == []
    path.machine.keep_up(22.0, path.now)  # there is a NAT after all: it is late already
    path.check()
    assert path.probes == [290.0]
    path.run(400)
    assert len(path.probes) == 1 + 4  # each 22 s after the answer to the one before
    assert path.dead_at is None


def test_a_path_that_rests_is_watched_as_soon_as_it_is_used() -> None:
    path = Path(keep_alive=300.0)
    path.run(100)
    path.alive = False
    path.want()
    path.run(200)
    assert path.dead_at is not None
    assert path.dead_at <= 100 + USUAL.dead


def test_only_the_one_who_dialled_asks() -> None:
    """Both sides of one path need it kept up."""
    dialler, other = Path(keep_alive=DIALLER_SECONDS), Path(keep_alive=MAPPING_SECONDS)
    for end in range(5, 1000, 5):
        dialler.run(float(end))
        other.heard_at = max(dialler.heard_at, *dialler.probes, 0.0)
        other.run(float(end))
    assert len(dialler.probes) > 40
    assert other.probes == []
