"""How a peer that others cannot reach keeps reservations at relays: which to ask, when to renew, whom to take instead.

    keeper.offer(peer, rank)        a possible relay; the lowest rank is asked first
    keeper.withdraw(peer)           it is none any more
    keeper.set_wanted(n, now)       so many reservations at a time; 0: none is needed
    keeper.granted / refused / lost / search_over
    keeper.silent / heard           it does not answer, or does again
    next_event(): Reserve(peer), Release(peer), Search()

       offer            Reserve              granted
    -----------> idle ----------> asking -------------> held --+ Reserve at 3/4 of its life, then granted again
                  ^                  |  refused, lost     |    |
                  +------------------+--------------------+<---+
                    not asked again before a pause that doubles from 5 s to 10 min; 1 s after one that was held
                    for a minute was lost, since what broke may be the network here

A relay that does not answer is kept for as long as the connection with it, and another one is asked besides.

A reservation wanted and not got starts a search for more relays: at once when one was lost, then after pauses that
double from 5 s to a minute, or to 10 minutes while another one is held.
"""

from __future__ import annotations

import enum
import random
from collections import deque
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias

from lattica_protocols.limits import RELAY_MAX_CANDIDATES
from lattica_protocols.peer_id import PeerId

WANTED_RESERVATIONS: Final = 2
"""One may vanish. More cost idle traffic, and every address we advertise is dialled by somebody."""
RENEW_AT: Final = 0.75
"""Part of a reservation's life after which it is renewed: time for several attempts is left."""
_FIRST_PAUSE: Final = 5.0
_LONGEST_PAUSE: Final = 600.0
_LOST_PAUSE: Final = 1.0
"""Before a relay that served us well is asked again: a restart takes about so long, a new address here less."""
_SERVED_WELL: Final = 60.0
"""Seconds of holding; whoever grants and drops is treated as one who refuses."""
_SLOW_SECONDS: Final = 3.0
"""After which a relay that has not answered is no reason any more to ask nobody else. A dial that nobody answers takes
15 s."""
_FIRST_SEARCH_PAUSE: Final = 5.0
"""Between two searches at least: each asks a handful of peers."""
_LONGEST_SEARCH_PAUSE: Final = 60.0
"""While there is no reservation at all, and nobody reaches us."""
_LONGEST_SPARE_SEARCH_PAUSE: Final = 600.0
"""While there is one, and a second would be for the case that it vanishes."""
_SHORTEST_LIFE: Final = 60.0
"""Seconds. A relay that grants less, or a time in the past (its clock is wrong), is taken to mean this."""
_LONGEST_LIFE: Final = 24 * 3600.0


class Reserve(NamedTuple):
    """Ask this relay, for the first time or again; answer with `granted` or `refused`."""

    peer: PeerId


class Release(NamedTuple):
    """The reservation is not needed any more."""

    peer: PeerId


class Search(NamedTuple):
    """Look for more relays, `offer` them, and say `search_over`."""


KeeperEvent: TypeAlias = Reserve | Release | Search


class _State(enum.Enum):
    IDLE = "may be asked"
    ASKING = "was asked"
    HELD = "there is a reservation"
    RENEWING = "there is a reservation, and it was asked again"


@dataclass(slots=True)
class _Candidate:
    rank: float
    state: _State = _State.IDLE
    not_before: float = 0.0
    failures: int = 0
    asked_at: float = 0.0
    counts: bool = True
    """Whether it is, or may soon be, one of those wanted: not when it is slow to answer, or silent."""
    held_since: float = 0.0
    renew_at: float = 0.0
    expires: float = 0.0


@dataclass(slots=True)
class ReservationKeeper:
    """One node's reservations. `rng` spreads renewals and retries."""

    rng: random.Random
    wanted: int = 0
    _candidates: dict[PeerId, _Candidate] = field(default_factory=dict)
    _events: deque[KeeperEvent] = field(default_factory=deque)
    _searching: bool = False
    _searches: int = 0
    """In vain, one after the other."""
    _searched_at: float = -_FIRST_SEARCH_PAUSE
    _search_not_before: float = 0.0

    # -- what is known ------------------------------------------------------------------------------------
    def held(self) -> list[PeerId]:
        """Relays at which we have a reservation."""
        return [p for p, c in self._candidates.items() if c.state in (_State.HELD, _State.RENEWING)]

    def _serving(self) -> list[PeerId]:
        return [peer for peer in self.held() if self._candidates[peer].counts]

    def next_event(self) -> KeeperEvent | None:
        return self._events.popleft() if self._events else None

    def next_timeout(self) -> float | None:
        """`None` when only an event from outside can change anything."""
        if not self.wanted:
            return None
        times = [c.renew_at for c in self._candidates.values() if c.state is _State.HELD]
        times += [c.expires for c in self._candidates.values() if c.state in (_State.HELD, _State.RENEWING)]
        asked = [c for c in self._candidates.values() if c.state is _State.ASKING and c.counts]
        times += [c.asked_at + _SLOW_SECONDS for c in asked]
        if self._missing() > 0:
            times += [c.not_before for c in self._candidates.values() if c.state is _State.IDLE]
            if not self._searching:
                times.append(self._search_not_before)
        return min(times, default=None)

    # -- what happens -------------------------------------------------------------------------------------
    def set_wanted(self, wanted: int, now: float) -> None:
        """How many reservations to keep. Too many are released, the last in rank first."""
        self.wanted = wanted
        self._release_surplus()
        self.handle_timer(now)

    def _release_surplus(self) -> None:
        serving = sorted(self._serving(), key=lambda peer: self._candidates[peer].rank)
        for peer in serving[self.wanted :]:
            self._candidates[peer].state = _State.IDLE
            self._events.append(Release(peer))

    def offer(self, peer: PeerId, rank: float, now: float) -> None:
        """`peer` relays, as far as we know. Of too many the last in rank that is not in use is forgotten."""
        known = self._candidates.get(peer)
        if known is not None:
            known.rank = rank
        else:
            self._candidates[peer] = _Candidate(rank)
            if len(self._candidates) > RELAY_MAX_CANDIDATES:
                idle = [p for p, c in self._candidates.items() if c.state is _State.IDLE]
                del self._candidates[max(idle, key=lambda p: self._candidates[p].rank)]
        self.handle_timer(now)

    def withdraw(self, peer: PeerId, now: float) -> None:
        """`peer` does not relay any more, or cannot be found any more."""
        if self._candidates.pop(peer, None) is not None:
            self.handle_timer(now)

    def granted(self, peer: PeerId, seconds: float, now: float) -> None:
        """`peer` gave us a reservation of `seconds`."""
        candidate = self._candidates.get(peer)
        if candidate is None or candidate.state is _State.IDLE:
            return
        if candidate.state is _State.ASKING:
            candidate.held_since = now
        candidate.counts = True
        life = min(max(seconds, _SHORTEST_LIFE), _LONGEST_LIFE)
        candidate.state, candidate.failures = _State.HELD, 0
        candidate.expires = now + life
        candidate.renew_at = now + life * RENEW_AT * self.rng.uniform(0.9, 1.0)
        self._release_surplus()
        self.handle_timer(now)

    def refused(self, peer: PeerId, now: float) -> None:
        """`peer` said no, or did not answer. Also a renewal: then another relay is taken at once."""
        candidate = self._candidates.get(peer)
        if candidate is not None and candidate.state is _State.RENEWING:
            self._search_soon()
        self._failed(peer, now)

    def lost(self, peer: PeerId, now: float) -> None:
        """The connection is gone, and the reservation with it. Being asked for it does not count as lost."""
        candidate = self._candidates.get(peer)
        if candidate is not None and candidate.state in (_State.HELD, _State.RENEWING):
            self._search_soon()
            self._failed(peer, now)

    def silent(self, peer: PeerId, now: float) -> None:
        """A relay at which we have a place does not answer: it may be gone, which takes time to be certain of."""
        candidate = self._candidates.get(peer)
        if candidate is not None and candidate.counts and candidate.state in (_State.HELD, _State.RENEWING):
            candidate.counts = False
            self._search_soon()
            self.handle_timer(now)

    def heard(self, peer: PeerId) -> None:
        """It answers after all; what was taken instead is too many now."""
        candidate = self._candidates.get(peer)
        if candidate is not None and not candidate.counts and candidate.state in (_State.HELD, _State.RENEWING):
            candidate.counts = True
            self._release_surplus()

    def search_over(self, now: float) -> None:
        longest = _LONGEST_SPARE_SEARCH_PAUSE if self._serving() else _LONGEST_SEARCH_PAUSE
        pause = min(longest, _FIRST_SEARCH_PAUSE * 2.0**self._searches)
        self._searching = False
        self._searches = min(self._searches + 1, 10)
        self._searched_at = now
        self._search_not_before = now + pause * self.rng.uniform(0.75, 1.25)
        self.handle_timer(now)

    def _search_soon(self) -> None:
        """A place is lost: what was found before, or not, was found with that one in hand."""
        self._searches = 0
        self._search_not_before = min(self._search_not_before, self._searched_at + _FIRST_SEARCH_PAUSE)

    def handle_timer(self, now: float) -> None:
        """Ask, renew and search as far as it is due."""
        for peer, candidate in list(self._candidates.items()):
            if candidate.state in (_State.HELD, _State.RENEWING) and candidate.expires <= now:
                self._candidates[peer].state = _State.IDLE
                self._search_soon()
            elif candidate.state is _State.HELD and candidate.renew_at <= now:
                candidate.state = _State.RENEWING
                self._events.append(Reserve(peer))
            elif candidate.state is _State.ASKING and candidate.asked_at + _SLOW_SECONDS <= now:
                candidate.counts = False
        ready = [p for p, c in self._candidates.items() if c.state is _State.IDLE and c.not_before <= now]
        ready.sort(key=lambda p: self._candidates[p].rank)
        for peer in ready[: max(0, self._missing())]:
            candidate = self._candidates[peer]
            candidate.state, candidate.asked_at, candidate.counts = _State.ASKING, now, True
            self._events.append(Reserve(peer))
        if self._missing() > 0 and not self._searching and self._search_not_before <= now:
            self._searching = True
            self._events.append(Search())

    def _missing(self) -> int:
        return self.wanted - sum(c.state is not _State.IDLE and c.counts for c in self._candidates.values())

    def _failed(self, peer: PeerId, now: float) -> None:
        candidate = self._candidates.get(peer)
        if candidate is None:
            return
        held = candidate.state in (_State.HELD, _State.RENEWING)
        if held and now - candidate.held_since >= _SERVED_WELL:
            pause = _LOST_PAUSE
        else:
            pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(candidate.failures, 10))
            candidate.failures += 1
        candidate.not_before = now + pause * self.rng.uniform(0.75, 1.25)
        candidate.state = _State.IDLE
        self.handle_timer(now)
