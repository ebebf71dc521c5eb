"""Fresh samples of a NAT's ports, right before they are to be guessed.

Sockets that are new make mappings that are new, whatever they send to; those of the daemon's own socket with its
observers are as old as its last question. So of two questions one goes from the daemon's own socket, for the address
that a NAT with endpoint-independent mapping gives it, and the rest from new sockets in turn:

    socket 0          asks each observer
    sockets 1 to n    ask one observer each, one after the other, and are not used for anything else

One event, `Sampled`, when everybody has answered or `SECONDS` later.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from lattica_protocols.nat.behaviour import Allocation
from lattica_protocols.nat.classify import Claim, classify_allocation
from lattica_protocols.stun import SocketAddr
from lattica_protocols.stun_client import Answered, Datagram, StunClient

MAIN = 0
SAMPLES: Final = 8
"""New mappings: of 64,512 random ports eight span a block of 4,096 by chance once in a billion."""
OBSERVERS: Final = 3
SECONDS: Final = 0.6
"""As long as two sendings of a request take: an observer that answers later holds up the punch for nothing."""
_ATTEMPTS: Final = 2


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the samples say, when they are over."""

    seen: tuple[SocketAddr, ...]
    """Where observers see socket 0, the most often named address first."""
    allocation: Allocation
    """How ports of new mappings are chosen now."""
    newest: SocketAddr | None
    """The public address of the newest mapping."""


class PortSampler:
    """See the top of the file. `samples`: new mappings to make; 0 when the ports need not be guessed."""

    def __init__(self, observers: Sequence[SocketAddr], rng: random.Random, now: float, *, samples: int = SAMPLES):
        self._client = StunClient(rng)
        self._asked: dict[int, tuple[int, SocketAddr]] = {}
        self._claims: list[Claim] = []
        self._end = now + SECONDS
        self._event: Sampled | None = None
        self._ended = False
        asked = list(observers[:OBSERVERS])
        sockets = [(MAIN, addr) for addr in asked]
        sockets += [(1 + i, asked[i % len(asked)]) for i in range(samples if asked else 0)]
        for socket, addr in sockets:
            self._asked[self._client.request(socket, addr, now, attempts=_ATTEMPTS)] = socket, addr
        if not sockets:
            self._finish()

    def receive_datagram(self, socket: int, data: bytes, source: SocketAddr, now: float) -> bool:
        """Whether the datagram was for this machine."""
        ours = self._client.receive_datagram(socket, data, source, now)
        self._look()
        return ours

    def handle_timer(self, now: float) -> None:
        self._client.handle_timer(now)
        self._look()
        if now >= self._end:
            self._finish()

    def next_timeout(self) -> float | None:
        if self._ended:
            return None
        due = self._client.next_timeout()
        return self._end if due is None else min(due, self._end)

    def poll_transmit(self) -> list[Datagram]:
        return [] if self._ended else self._client.poll_transmit()

    def next_event(self) -> Sampled | None:
        event, self._event = self._event, None
        return event

    def _look(self) -> None:
        while (event := self._client.next_event()) is not None:
            socket, addr = self._asked.pop(event.number)
            if isinstance(event, Answered):
                order = (event.first_sent, event.number)
                self._claims.append(Claim(order, socket, None, addr, event.mapped))
        if not self._asked:
            self._finish()

    def _finish(self) -> None:
        if self._ended:
            return
        self._ended = True
        main = Counter(claim.mapped for claim in self._claims if claim.socket == MAIN)
        new = sorted((claim for claim in self._claims if claim.socket != MAIN), key=lambda claim: claim.order)
        self._event = Sampled(
            tuple(addr for addr, _ in main.most_common()),
            classify_allocation(new, dependent=True),
            new[-1].mapped if new else None,
        )
