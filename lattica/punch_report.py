"""What was tried to get from a relayed connection to a direct one, peer by peer: `nat` and `doctor` tell it.

A report is about one relayed connection. A new one begins the count and the time anew, and keeps what the peer said of
itself, which its next words replace: a connection that ends before the peer said anything leaves no gap.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from lattica.interfaces import Connection
    from lattica.nat.guesser import Guess
    from lattica_protocols.nat.behaviour import NatBehaviour
    from lattica_protocols.peer_id import PeerId

MAX_REPORTS: Final = 256
MAX_ERRORS: Final = 8
"""The newest of one report."""


@dataclass
class PunchReport:
    """What was tried with one peer, and how it ended."""

    peer: PeerId
    started: float
    attempts: int = 0
    tried: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)
    """Addresses that the peer named in the newest attempt, and at which nobody sees it."""
    guesses: list[Guess] = field(default_factory=list)
    """Attempts for which ports were guessed, the newest last."""
    partner: NatBehaviour | None = None
    """What the peer said that its NATs do."""
    technique: str = ""
    """What the direct connection came of: "dial", or that of a punch."""
    result: str = ""
    """The path of the direct connection, empty while there is none."""
    seconds: float | None = None
    """From the relayed connection to the direct one; `None`, too, when the relayed one was gone before."""
    relayed_closed: trio.Event = field(default_factory=trio.Event)
    """Of the relayed connection."""

    def add_error(self, error: str) -> None:
        self.errors = [*self.errors, error][-MAX_ERRORS:]

    def tell_direct(self, connection: Connection, now: float) -> None:
        """There is a direct connection."""
        self.result = connection.path
        guessed = [guess for guess in self.guesses if guess.found_remote == connection.remote_addr]
        if guessed:
            self.technique = guessed[-1].technique.value
        else:
            self.technique = "simple" if self.attempts and not self.relayed_closed.is_set() else "dial"
        self.seconds = None if self.relayed_closed.is_set() else now - self.started


class PunchReports(OrderedDict["PeerId", PunchReport]):
    """By peer, the one that was written to last at the end."""

    def of(self, relayed: Connection, now: float, *, is_direct: bool) -> PunchReport:
        """The report about `relayed`, which begins now unless there is one. `is_direct`: there is a direct connection
        beside it; when that is lost the search for another is a new one."""
        peer = relayed.peer_id
        former = self.get(peer)
        if former is None or former.relayed_closed.is_set() or (former.result and not is_direct):
            self[peer] = PunchReport(peer, now, relayed_closed=relayed.closed)
            if former is not None:
                self[peer].unproven, self[peer].partner = former.unproven, former.partner
        self.move_to_end(peer)
        while len(self) > MAX_REPORTS:
            self.popitem(last=False)
        return self[peer]


__all__ = ["PunchReport", "PunchReports"]
