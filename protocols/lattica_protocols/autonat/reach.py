"""Which of our addresses strangers reach, as far as several servers have tried.

Each address is asked about at one server after the other, each in an address range of its own (`voice_of`), until the
answers of one kind are `MARGIN` ahead; then the address is `public` or `private`, and asked about again after a while.
An answer that contradicts what was known is not believed by itself: it makes us ask the others anew. A single server is
never enough, so one that lies, or that sits behind the same NAT, moves nothing.

    reach.set_addrs(addrs, now)            what to ask about; addresses that are new are asked about at once
    reach.set_servers({peer: ip}, now)     whom can be asked
    reach.next_question(now)               -> Question | None, which is then under way
    reach.answered(question, outcome, now)
    reach.next_timeout()                   when `next_question` may have more
    reach.known(addr), reach.overall()     "public", "private" or "unknown"
    reach.reset()                          our network changed: nothing that was found out holds
"""

from __future__ import annotations

import enum
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from lattica_protocols.limits import AUTONAT_MAX_ASKED_ADDRS
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.nat.scope import IpAddress, IpNetwork, voice_of
from lattica_protocols.peer_id import PeerId

Verdict: TypeAlias = Literal["public", "private", "unknown"]

MARGIN: Final = 2
PUBLIC_AGAIN: Final = 1800.0
PRIVATE_AGAIN: Final = 300.0
"""Seconds until an address is asked about again: it works; it does not (somebody may just be opening a port)."""
UNSURE_AGAIN: Final = (120.0, 1800.0)
"""The same while too few can be asked: doubling from the first to the second, since the same few will say the same.
Somebody who is new is asked at once."""
REST: Final = 120.0
"""Seconds for which a server that had no answer about an address is not asked about it."""
LOST_REST: Final = 10.0
"""The same when its connection broke."""
FRESH: Final = 60.0
"""Seconds within which answers were given under the same circumstances."""
PACE: Final = 1.0
"""Seconds between two questions about one address."""


class Outcome(enum.Enum):
    """Of one question."""

    REACHED = "reached"
    UNREACHED = "unreached"
    NOTHING = "nothing"
    """Refused, or an answer that proves nothing."""
    LOST = "lost"
    """The connection with the server broke, or it did not answer."""


@dataclass(frozen=True, slots=True)
class Question:
    """`server` is to be asked about `addr`; its answer counts for its address range, `voice`."""

    addr: Multiaddr
    server: PeerId
    voice: IpNetwork


@dataclass(slots=True)
class _Asked:
    """What is known about one address."""

    due: float
    verdict: Verdict = "unknown"
    unsure: int = 0
    """How often all were asked who could be, and that was not enough."""
    votes: dict[IpNetwork, tuple[bool, float]] = field(default_factory=dict)
    resting: dict[IpNetwork, float] = field(default_factory=dict)
    running: set[IpNetwork] = field(default_factory=set)

    def score(self) -> int:
        return sum(1 if reached else -1 for reached, _ in self.votes.values())

    @property
    def is_busy(self) -> bool:
        """Whether the questions under way may settle it: a vain dial takes 10 s, so they are asked side by side."""
        return len(self.running) >= (1 if self.verdict != "unknown" else max(1, MARGIN - abs(self.score())))


class ReachTracker:
    """See the top of the file."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._asked: dict[Multiaddr, _Asked] = {}
        self._servers: dict[PeerId, IpNetwork] = {}

    # -- what is so ---------------------------------------------------------------------------------------
    def known(self, addr: Multiaddr) -> Verdict:
        asked = self._asked.get(addr)
        return "unknown" if asked is None else asked.verdict

    def verdicts(self) -> dict[Multiaddr, Verdict]:
        """Of every address that is asked about."""
        return {addr: asked.verdict for addr, asked in self._asked.items()}

    def overall(self) -> Verdict:
        """Public when one address is; private when all are."""
        verdicts = {asked.verdict for asked in self._asked.values()}
        if "public" in verdicts:
            return "public"
        return "private" if verdicts == {"private"} else "unknown"

    # -- what is asked ------------------------------------------------------------------------------------
    def set_addrs(self, addrs: Sequence[Multiaddr], now: float) -> None:
        """The most promising first; those beyond `AUTONAT_MAX_ASKED_ADDRS` are not asked about."""
        wanted = list(dict.fromkeys(addrs))[:AUTONAT_MAX_ASKED_ADDRS]
        self._asked = {addr: self._asked.get(addr) or _Asked(due=now) for addr in wanted}

    def set_servers(self, servers: Mapping[PeerId, IpAddress], now: float) -> None:
        """Who can be asked, and where they are."""
        before = set(self._servers.values())
        self._servers = {peer: voice_of(ip) for peer, ip in servers.items()}
        if set(self._servers.values()) - before:
            for asked in self._asked.values():
                if asked.verdict == "unknown":
                    asked.due, asked.unsure = min(asked.due, now), 0

    def next_question(self, now: float) -> Question | None:
        """Something to ask now."""
        for addr, asked in self._asked.items():
            if asked.is_busy or asked.due > now:
                continue
            servers = self._free_servers(asked, now)
            if servers:
                server = self._rng.choice(servers)
                asked.running.add(self._servers[server])
                return Question(addr, server, self._servers[server])
            if not asked.running:
                asked.due = min([now + _again(asked), *asked.resting.values()])
                asked.unsure += not asked.resting
        return None

    def next_timeout(self) -> float | None:
        """When there may be something to ask, other than because of an answer."""
        return min((asked.due for asked in self._asked.values() if not asked.running), default=None)

    def answered(self, question: Question, outcome: Outcome, now: float) -> bool:
        """What came of a question; whether that changed a verdict."""
        asked = self._asked.get(question.addr)
        if asked is None:
            return False
        asked.running.discard(question.voice)
        asked.due = now + PACE
        if outcome in (Outcome.NOTHING, Outcome.LOST):
            asked.resting[question.voice] = now + (REST if outcome is Outcome.NOTHING else LOST_REST)
            return False
        reached = outcome is Outcome.REACHED
        if asked.verdict != "unknown" and reached != (asked.verdict == "public"):
            asked.votes = {voice: vote for voice, vote in asked.votes.items() if now - vote[1] < FRESH}
        asked.votes[question.voice] = reached, now
        score = asked.score()
        if abs(score) < MARGIN:
            return False
        before, asked.verdict, asked.unsure = asked.verdict, "public" if score > 0 else "private", 0
        asked.due = now + _again(asked) * self._rng.uniform(0.8, 1.2)
        return asked.verdict != before

    def reset(self, now: float) -> None:
        """Everything is asked again."""
        self._asked = {addr: _Asked(due=now) for addr in self._asked}

    def _free_servers(self, asked: _Asked, now: float) -> list[PeerId]:
        asked.resting = {voice: until for voice, until in asked.resting.items() if until > now}
        voices = set(self._servers.values())
        asked.votes = {voice: vote for voice, vote in asked.votes.items() if voice in voices or now - vote[1] < FRESH}
        fresh = asked.running | {voice for voice, (_, at) in asked.votes.items() if now - at < FRESH}
        return sorted(
            peer for peer, voice in self._servers.items() if voice not in asked.resting and voice not in fresh
        )


def _again(asked: _Asked) -> float:
    if asked.verdict == "unknown":
        return min(UNSURE_AGAIN[1], UNSURE_AGAIN[0] * 2.0 ** min(asked.unsure, 10))
    return PUBLIC_AGAIN if asked.verdict == "public" else PRIVATE_AGAIN
