"""Which of the addresses that peers see us at are believed.

Every peer tells by identify where it sees us. A NAT in front of us makes that the only way to know our public address;
but a peer can lie, and who believes a single one sends everybody to an address that the liar chose. So:

* An observation counts only for a socket that we listen on (the peer sees another port of a socket that dials).
* It is weighed: a peer that we dialled counts 2, one that dialled us 1, because a liar can choose to dial us, but
  hardly to be dialled. An address is confirmed from `CONFIRMED_AT` on: two peers that we dialled, four that dialled us.
* Peers of one address range (`voice_of`) have one voice for each of our sockets: the newest observation counts, so one
  operator is never enough.
* An observer that is on the internet cannot have seen an address of a local network; loopback is never believed.
* An observation lives with the connection it came over, and `LINGER` seconds longer.

    observed.observe(Observation(...), now)
    observed.connection_gone(key, now)
    observed.confirmed(now)          -> addresses, the best confirmed first
    observed.reset()                 our own addresses changed: what was seen before means nothing
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final

from lattica_protocols.limits import OBSERVED_MAX_ADDRS_PER_SOCKET, OBSERVED_MAX_OBSERVATIONS
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.nat.scope import IpAddress, IpNetwork, is_local, voice_of

CONFIRMED_AT: Final = 4
OUTBOUND_WEIGHT: Final = 2
INBOUND_WEIGHT: Final = 1
LINGER: Final = 1000.0
"""Seconds: a NAT's mapping of a socket that is in use stays; peers that come and go must not make us forget it. Longer
than the time after which STUN is asked again (`lattica.nat.watch`, 900 s), whose answers come over no connection."""

_KINDS: Final = (("ip4", "tcp"), ("ip6", "tcp"), ("ip4", "udp", "quic-v1"), ("ip6", "udp", "quic-v1"))


@dataclass(frozen=True, slots=True)
class Observation:
    """What one peer said over one connection."""

    connection: Hashable
    """Names the connection; a later observation over it replaces this one."""
    observer: IpAddress
    """Where the peer is."""
    outbound: bool
    """Whether we dialled it."""
    listen: Multiaddr
    """The socket of ours that the connection uses, as it is bound (wildcard or not)."""
    seen: Multiaddr
    """What it sees."""


@dataclass(frozen=True, slots=True)
class Confirmed:
    """An address that enough peers see."""

    addr: Multiaddr
    listen: Multiaddr
    weight: int
    voices: int


class ObservedAddrs:
    """See the top of the file."""

    def __init__(self) -> None:
        self._held: dict[Hashable, tuple[Observation, float]] = {}  # until when; infinite while the connection is up

    def observe(self, observation: Observation, now: float) -> bool:
        """A peer told where it sees us; whether that can count at all."""
        self._expire(now)
        if not _plausible(observation):
            return False
        self._held.pop(observation.connection, None)  # to the end: the newest of a range has its voice
        self._held[observation.connection] = observation, float("inf")
        if len(self._held) > OBSERVED_MAX_OBSERVATIONS:
            self._make_room()
        return True

    def connection_gone(self, connection: Hashable, now: float, *, kept_as: Hashable | None = None) -> None:
        """It ended; what came over it counts for `LINGER` seconds more, under the name `kept_as` when its own name can
        be given to another connection."""
        held = self._held.pop(connection, None)
        if held is not None:
            self._held[connection if kept_as is None else kept_as] = held[0], now + LINGER

    def reset(self) -> None:
        """Forget everything."""
        self._held.clear()

    def next_timeout(self) -> float | None:
        """When the next observation expires."""
        due = min((until for _, until in self._held.values()), default=float("inf"))
        return None if due == float("inf") else due

    def confirmed(self, now: float) -> list[Confirmed]:
        """Addresses that count, the best confirmed first; at most `OBSERVED_MAX_ADDRS_PER_SOCKET` for a socket."""
        self._expire(now)
        out: list[Confirmed] = []
        for listen in dict.fromkeys(observation.listen for observation, _ in self._held.values()):
            found = [c for c in self.candidates(listen) if c.weight >= CONFIRMED_AT]
            out += found[:OBSERVED_MAX_ADDRS_PER_SOCKET]
        return sorted(out, key=lambda c: -c.weight)

    def candidates(self, listen: Multiaddr) -> list[Confirmed]:
        """All addresses seen of one socket with what they weigh, the heaviest first."""
        voices: dict[IpNetwork, Observation] = {}
        for observation, _ in self._held.values():
            if observation.listen == listen:
                voice = voice_of(observation.observer)
                known = voices.get(voice)
                if known is None or observation.outbound >= known.outbound:
                    voices[voice] = observation
        weights: dict[Multiaddr, list[int]] = {}
        for observation in voices.values():
            weights.setdefault(observation.seen, []).append(OUTBOUND_WEIGHT if observation.outbound else INBOUND_WEIGHT)
        found = [Confirmed(addr, listen, sum(each), len(each)) for addr, each in weights.items()]
        return sorted(found, key=lambda c: -c.weight)

    def _make_room(self) -> None:
        """One less: of an ended connection, else the oldest of the range that has the most, whose many words count as
        one anyway. So a flood from one range drives out nobody else."""
        ended = [key for key, (_, until) in self._held.items() if until != float("inf")]
        if not ended:
            crowd = Counter(voice_of(observation.observer) for observation, _ in self._held.values())
            largest = crowd.most_common(1)[0][0]
            ended = [key for key, (held, _) in self._held.items() if voice_of(held.observer) == largest]
        del self._held[min(ended, key=lambda key: self._held[key][1])]

    def _expire(self, now: float) -> None:
        for key in [key for key, (_, until) in self._held.items() if until <= now]:
            del self._held[key]


def _plausible(observation: Observation) -> bool:
    """Whether the address can be one of ours, of the same kind as the socket."""
    seen, ip = observation.seen, observation.seen.ip()
    if ip is None or seen.names() not in _KINDS or seen.names() != observation.listen.names():
        return False
    if ip.is_loopback or ip.is_unspecified or ip.is_link_local or ip.is_multicast or seen.value(seen.names()[1]) == "0":
        return False
    return not is_local(ip) or is_local(observation.observer)
