"""Carries a `PunchPlan` out: sends probes, answers the partner's, and settles on one path.

    socket 0                    the daemon's own; probes `targets` every 50 ms, or searches at 100 a second
    socket 1                    instead of it on the side whose ports are predicted: a new one, without a mapping
    sockets 1 to 256            of the hard side of a birthday, one packet each, at 100 a second

A probe is answered to where it came from, and that address is probed in turn (peer-reflexive), so one open direction
is enough. The side that is `controlling` settles on the first path on which it was answered and says so (USE-CANDIDATE)
until that is answered; the other side settles when it hears so. Both go on answering for `LINGER` seconds, because the
other one may not have been answered yet: without that a lossy pair in ten is lost.

Events: `PathFound` once, then `PunchEnded` when the linger is over; or `PunchEnded` alone, which means it failed.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import (
    NAT_MAX_ANSWERS,
    NAT_MAX_PROBES,
    NAT_MAX_STRANGERS,
    NAT_MAX_TARGETS,
    NAT_PROBES_PER_SECOND,
)
from lattica_protocols.nat.probe import decode_probe_untrusted, encode_probe, encode_probe_answer
from lattica_protocols.nat.punch_plan import PunchPlan, Technique
from lattica_protocols.stun import TRANSACTION_ID_BYTES, Attribute, MessageType, SocketAddr, StunMessage
from lattica_protocols.stun_client import Datagram

MAIN = 0
ROUND = 0.05
"""Seconds between two probes to the same address (RFC 8445's Ta): what is lost costs no more than that."""
SIMPLE_SECONDS = 2.0
"""97.6 % of the punches that succeed in the wild do so at once; the rest is tried again with new sockets."""
BIRTHDAY_SECONDS = 28.0
"""Mappings of idle sockets die after 30 s in the strictest NATs, and all sockets are closed by then. 1 in 40,000 pairs
has not met."""
REOPEN_AFTER = 8.0
"""Seconds until the hard side opens its sockets once more: with one hop more, for a second router of its own, unless
the TTL is known to suffice. Then with the same: what was lost is made up for, and no mapping grows old."""
REOPEN_FULLY_AFTER = 18.0
"""Seconds until it opens them with the usual TTL, which passes any NATs of its own.

What arrives at the partner's box poisons it if that is one that tracks what it drops: the partner's probe that would
have met leaves from another port then, and so does every later flow of its socket. So one hop more is not risked where
it is not needed (two customers of one access router are three hops apart), and the usual TTL not before 99.9 % of the
pairs have met for which less suffices. Of the others 97 % meet in the ten seconds that are left.

What is left is a hard side whose routers do not answer traces, with a partner at the same access router behind a box of
that kind: of these pairs the 4 % that have not met after 8 s get one hop too many. Not to go further towards addresses
near our own would save them, and would cost ten seconds to each pair within one carrier whose hard side is behind two
NATs and silent routers: all of these meet by the additional hop, and a carrier's customers have addresses near each
other. There are more of them.
"""
_OPENINGS = 3
"""How often each socket is opened."""
LINGER = 0.8
_GAP = 1.0 / NAT_PROBES_PER_SECOND
_MAX_LAG = 0.1
"""Seconds that paced packets may be behind and still be made up for: a process that was held up sends no burst."""


@dataclass(frozen=True, slots=True)
class PathFound:
    """Datagrams between our socket of that number and `remote` get through, in both directions."""

    socket: int
    remote: SocketAddr
    seconds: float
    """Since the start."""


@dataclass(frozen=True, slots=True)
class PunchEnded:
    """The last event."""

    found: bool
    probes: int
    """Packets that were sent, answers not counted."""


class Puncher:
    """One attempt of one side. `key`: shared with the partner, for this attempt alone."""

    def __init__(self, plan: PunchPlan, key: bytes, *, controlling: bool, rng: random.Random, now: float) -> None:
        self.plan = plan
        self.probes = 0
        self._key = key
        self._controlling = controlling
        self._rng = rng
        self._start = now
        birthday = plan.technique is Technique.BIRTHDAY
        self._end = now + (BIRTHDAY_SECONDS if birthday else SIMPLE_SECONDS + plan.opener_wait)
        self._targets: dict[tuple[int, SocketAddr], None] = dict.fromkeys(
            (plan.send_from, addr) for addr in plan.targets
        )
        self._next_round = now + plan.opener_wait
        self._openers = deque(range(1, plan.open_sockets + 1))
        self._openings = 1
        self._search: deque[int] = deque()
        if plan.search_ip is not None:
            self._search.extend(_search_order(plan.search_low, plan.search_high, rng))
        self._next_paced = now
        self._waiting: dict[bytes, tuple[int, SocketAddr, bool]] = {}
        self._answers = self._strangers = 0
        self._path: tuple[int, SocketAddr] | None = None
        self._ended = False
        self._out: deque[Datagram] = deque()
        self._events: deque[PathFound | PunchEnded] = deque()
        if plan.opener_ttl and plan.opener_wait:
            for socket, addr in self._targets:
                self._probe(socket, addr, ttl=plan.opener_ttl)
        self.handle_timer(now)

    # -- the machine contract ---------------------------------------------------------------------------------------
    def receive_datagram(self, socket: int, data: bytes, source: SocketAddr, now: float) -> bool:
        """Whether the datagram was one of this attempt's."""
        try:
            message = decode_probe_untrusted(data, self._key)
        except RemoteProtocolError:
            return False
        if self._ended:
            return True
        if message.type is MessageType.REQUEST:
            self._probed(socket, message, source, now)
        else:
            self._answered(socket, message, source, now)
        return True

    def handle_timer(self, now: float) -> None:
        if self._ended:
            return
        if now >= self._end:
            self._ended = True
            self._events.append(PunchEnded(self._path is not None, self.probes))
            return
        if now >= self._next_round:
            self._send_round()
            self._next_round = max(self._next_round + ROUND, now)
        self._next_paced = max(self._next_paced, now - _MAX_LAG)
        while self._path is None and self._next_paced <= now and self._send_paced(now):
            self._next_paced += _GAP

    def next_timeout(self) -> float | None:
        if self._ended:
            return None
        due = self._end
        if self._targets:
            due = min(due, self._next_round)
        if self._path is None and (self._openers or self._search or self._may_reopen):
            due = min(due, self._next_paced)
        return due

    def poll_transmit(self) -> list[Datagram]:
        out, self._out = list(self._out), deque()
        return out

    def next_event(self) -> PathFound | PunchEnded | None:
        return self._events.popleft() if self._events else None

    # -- probes of the partner --------------------------------------------------------------------------------------
    def _probed(self, socket: int, message: StunMessage, source: SocketAddr, now: float) -> None:
        if self._answers >= NAT_MAX_ANSWERS:
            return
        self._answers += 1
        answer = encode_probe_answer(self._key, message.transaction_id, source)
        self._out.append(Datagram(socket, source, answer))
        if not self._controlling and message.get(Attribute.USE_CANDIDATE) is not None:
            self._found(socket, source, now)
        elif self._path is None and (socket, source) not in self._targets:
            self._probe_back(socket, source)

    def _probe_back(self, socket: int, source: SocketAddr) -> None:
        """Probe an address that the partner probes from and that we did not know.

        Whoever has the key may forge the source: addresses that are not proven get one probe each time, and few.
        """
        if source[0] not in self.plan.proven:
            if self._strangers < NAT_MAX_STRANGERS:
                self._strangers += 1
                self._probe(socket, source)
        elif len(self._targets) < 2 * NAT_MAX_TARGETS:
            self._targets[socket, source] = None
            self._probe(socket, source)

    def _answered(self, socket: int, message: StunMessage, source: SocketAddr, now: float) -> None:
        asked = self._waiting.pop(message.transaction_id, None)
        if asked is None or asked[:2] != (socket, source) or not self._controlling:
            return  # not what we asked, or open, but the partner is the one who settles
        if self._path is None:
            self._found(socket, source, now)
            self._targets = {(socket, source): None}
            self._probe(socket, source)
            self._next_round = now + ROUND
        elif asked[2]:
            self._targets = {}  # the partner knows

    def _found(self, socket: int, remote: SocketAddr, now: float) -> None:
        if self._path is not None:
            return
        self._path = (socket, remote)
        self._openers.clear()
        self._search.clear()
        if not self._controlling:
            self._targets = {}
        self._end = now + LINGER
        self._events.append(PathFound(socket, remote, now - self._start))

    # -- probes of ours -----------------------------------------------------------------------------------------------
    def _send_round(self) -> None:
        for socket, addr in list(self._targets):
            self._probe(socket, addr)

    @property
    def _may_reopen(self) -> bool:
        return bool(self.plan.open_sockets) and self.plan.opener_ttl is not None and self._openings < _OPENINGS

    @property
    def _ttl_of_openers(self) -> int | None:
        ttl = self.plan.opener_ttl
        if ttl is None or self._openings == _OPENINGS:
            return None
        return ttl if self._openings == 1 or self.plan.opener_measured else ttl + 1

    def _send_paced(self, now: float) -> bool:
        """One packet of a birthday; whether there was one to send."""
        plan = self.plan
        if self._openers and plan.open_towards is not None:
            socket = self._openers.popleft()
            self._probe(socket, plan.open_towards, ttl=self._ttl_of_openers)
            if not self._openers and self._may_reopen:
                after = REOPEN_AFTER if self._openings == 1 else REOPEN_FULLY_AFTER
                self._next_paced = max(self._next_paced, self._start + after - _GAP)
            return True
        if self._may_reopen:
            self._openings += 1
            self._openers = deque(range(1, plan.open_sockets + 1))
            return self._send_paced(now)
        if self._search and plan.search_ip is not None:
            self._probe(MAIN, (plan.search_ip, self._search.popleft()))
            return True
        return False

    def _probe(self, socket: int, to: SocketAddr, *, ttl: int | None = None) -> None:
        if self.probes >= NAT_MAX_PROBES:
            return
        self.probes += 1
        transaction_id = self._rng.randbytes(TRANSACTION_ID_BYTES)
        chosen = self._controlling and self._path == (socket, to)
        self._waiting[transaction_id] = (socket, to, chosen)
        self._out.append(Datagram(socket, to, encode_probe(self._key, transaction_id, chosen=chosen), ttl))


def most_probes(plan: PunchPlan) -> int:
    """How many packets the plan sends if nobody answers, at most."""
    if plan.technique is Technique.BIRTHDAY:
        return _OPENINGS * plan.open_sockets or min(NAT_MAX_PROBES, round(BIRTHDAY_SECONDS * NAT_PROBES_PER_SECOND) + 2)
    return min(NAT_MAX_PROBES, len(plan.targets) * (round(SIMPLE_SECONDS / ROUND) + 2))


def _search_order(low: int, high: int, rng: random.Random) -> list[int]:
    """Ports of the range at random, then others: what was said of the range may be wrong."""
    likely = range(low, high + 1)
    order = rng.sample(likely, min(len(likely), NAT_MAX_PROBES))
    if len(likely) < NAT_MAX_PROBES:
        others = [port for port in range(1024, 65536) if port not in likely]
        order += rng.sample(others, min(len(others), NAT_MAX_PROBES - len(order)))
    return order
