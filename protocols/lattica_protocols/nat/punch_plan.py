"""Which technique opens a pair of NATs, and what each side has to do.

With EIM/EIF/ADF as in RFC 4787, a datagram of A gets to B when

    pass(A -> B) = B.EIF or (B.EIM and (B.ADF or A.EIM))

and one direction is enough, since the answer goes to where the probe came from (`SIMPLE`, peer-reflexive). Else a
port has to be guessed:

    PREDICT    those that are not endpoint-independent count their ports up: the next ones are known
    BIRTHDAY   one side is endpoint-independent: the other opens 256 sockets towards it, and it tries ports at random.
               After n probes they have met with 1 - (1 - 256/R)^n, R ports in the range: at 100 a second half of the
               pairs in 3 s, 99 % in 13 s, for R = 64,512; a carrier's block of 2,048 ports takes half a second
    NONE       both choose at random: not worth it (170,000 probes); a port mapping or the relay

A verdict on a NAT guides, it never excludes: where one is not known, or NONE is left, `SIMPLE` is tried all the same.
What costs little, that is: where both verdicts are certain nobody spends 28 s on a birthday without a chance.

Probes only go to addresses in `proven`: those from which the partner is connected, or which it has shown to hold. A
peer can name a victim's address, but not make us send there.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

from lattica_protocols.limits import NAT_MAX_TARGETS
from lattica_protocols.nat.behaviour import Allocation, Filtering, Mapping, NatBehaviour, Ports
from lattica_protocols.stun import SocketAddr

PREDICTED_PORTS = 8
"""Guesses for a sequential NAT: others behind it take ports between our samples and the punch."""
BIRTHDAY_SOCKETS = 256
"""Sockets of the hard side. Half of what a home router's or carrier's table grants a customer at least."""
OPENER_TTL = 2
"""Leaves one NAT and dies behind it. Behind a carrier's NAT 3 is needed, which `opener_ttl` can say."""

_EIM = (Mapping.NONE, Mapping.ENDPOINT_INDEPENDENT)


class Technique(Enum):
    """How a punch looks for the ports; see the top of the file."""

    SIMPLE = "simple"
    PREDICT = "predict"
    BIRTHDAY = "birthday"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Side:
    """What is known of one side when the punch starts."""

    behaviour: NatBehaviour
    candidates: tuple[SocketAddr, ...]
    """Public addresses as others see them; for a NAT whose ports depend on the other side the newest sample."""

    @classmethod
    def of(cls, behaviour: NatBehaviour) -> Side:
        """The side with such NATs, with the candidate that the verdict names."""
        if behaviour.mapped is not None:
            return cls(behaviour, (behaviour.mapped,))
        if behaviour.public_ip is not None and behaviour.allocation.last is not None:
            return cls(behaviour, ((behaviour.public_ip, behaviour.allocation.last),))
        return cls(behaviour, ())

    @property
    def is_easy(self) -> bool:
        """Its public port is known in advance. An unknown NAT is taken for an easy one: most are."""
        return self.behaviour.mapping in (*_EIM, Mapping.UNKNOWN)


@dataclass(frozen=True, slots=True)
class PunchPlan:
    """What one side does. Times are seconds from its start."""

    technique: Technique
    proven: frozenset[str] = frozenset()
    """IP addresses that are the partner's for certain."""
    targets: tuple[SocketAddr, ...] = ()
    """Probed again and again from socket `send_from`."""
    send_from: int = 0
    """0: the daemon's own. Another one is new: it has no mapping yet, so the partner's prediction holds for it."""
    open_sockets: int = 0
    """Further sockets to open towards the first of `open_towards`, one after the other."""
    open_towards: SocketAddr | None = None
    search_ip: str | None = None
    """Its ports from `search_low` to `search_high` are probed in random order, each once."""
    search_low: int = 0
    search_high: int = 0
    opener_ttl: int | None = None
    """First packets die after so many hops: they open our own NAT and cannot poison the other's."""
    opener_wait: float = 0.0
    """Until the targets are probed with the usual TTL: about a round trip."""
    opener_measured: bool = False
    """`opener_ttl` is known to pass all NATs of our own."""


def passes(source: NatBehaviour, target: NatBehaviour) -> bool:
    """pass(source -> target): see the top of the file. What is unknown is hoped for."""
    if target.filtering is Filtering.ENDPOINT_INDEPENDENT or Mapping.UNKNOWN in (source.mapping, target.mapping):
        return True
    if target.mapping not in _EIM:
        return False
    return target.filtering is not Filtering.ADDRESS_AND_PORT_DEPENDENT or source.mapping in _EIM


def choose_technique(a: NatBehaviour, b: NatBehaviour) -> Technique:
    """The same whichever way round they are given."""
    if a.udp_blocked or b.udp_blocked:
        return Technique.NONE
    if passes(a, b) or passes(b, a):
        return Technique.SIMPLE
    hard = [side for side in (a, b) if side.mapping not in _EIM]
    if all(side.allocation.ports is Ports.SEQUENTIAL for side in hard):
        return Technique.PREDICT
    return Technique.BIRTHDAY if len(hard) == 1 else Technique.NONE


def is_hopeless(a: NatBehaviour, b: NatBehaviour) -> bool:
    """Whether it is certain on both sides that by theory no guess helps. Of blocked UDP one side's word is enough."""
    if any(side.certain and side.udp_blocked for side in (a, b)):
        return True
    known = all(side.certain and side.filtering is not Filtering.UNKNOWN for side in (a, b))
    return known and choose_technique(a, b) is Technique.NONE


def plan_punch(
    own: Side,
    peer: Side,
    *,
    proven: Collection[str],
    technique: Technique | None = None,
    opens: bool | None = None,
    opener_ttl: int | None = None,
    opener_wait: float = 0.0,
    opener_measured: bool = False,
) -> PunchPlan:
    """What our side does about `peer`, of which it said so itself. Both sides plan by themselves and come to match.

    `technique`: what was agreed on; default: what the verdicts suggest. `opens`: whether our side is the one that opens
    the sockets of a birthday; default: when it is the hard one. `opener_ttl` and `opener_wait`: in case the other box
    is one that early packets poison; `opener_measured`: the TTL is known to pass all NATs of our own. The sockets of a
    birthday are always opened with a low TTL.
    """
    technique = technique or choose_technique(own.behaviour, peer.behaviour)
    targets = _known_targets(peer, technique)
    targets = tuple(addr for addr in targets if addr[0] in proven)[:NAT_MAX_TARGETS]
    if technique is not Technique.BIRTHDAY:
        new_socket = technique is Technique.PREDICT and not own.is_easy
        return PunchPlan(
            technique,
            frozenset(proven),
            targets,
            send_from=1 if new_socket else 0,
            opener_ttl=opener_ttl,
            opener_wait=opener_wait,
        )
    if not own.is_easy if opens is None else opens:
        towards = targets[0] if targets else None
        sockets = BIRTHDAY_SOCKETS if towards is not None else 0
        return PunchPlan(
            technique,
            frozenset(proven),
            open_sockets=sockets,
            open_towards=towards,
            opener_ttl=opener_ttl or OPENER_TTL,
            opener_measured=opener_measured and opener_ttl is not None,
        )
    low, high = search_range(peer.behaviour.allocation)
    ip = targets[0][0] if targets else None
    return PunchPlan(technique, frozenset(proven), search_ip=ip, search_low=low, search_high=high)


def search_range(allocation: Allocation) -> tuple[int, int]:
    """The ports to try first, both ends included, from what the other side said of its NAT; always within 1 to 65535.

    The range that its samples span costs nothing when ports are chosen evenly from more (as many sockets are in each
    part of it), and saves half of the time with a NAT that takes 32768 to 60999 only.
    """
    if allocation.ports not in (Ports.BLOCK, Ports.RANDOM):
        return 1024, 65535
    low, high = max(1, allocation.low), min(65535, allocation.high)
    return (low, high) if low < high else (1024, 65535)


def techniques_to_try(a: NatBehaviour, b: NatBehaviour) -> tuple[Technique, ...]:
    """What to do when a punch without guesses does not work, the likeliest first; the same whichever way round.

    A prediction that failed may have been disturbed by another flow, so it is tried twice. The verdicts may be wrong:
    the birthday comes last in each case, as it works whenever one of the two is an easy one after all, unless they are
    certain (`is_hopeless`).
    """
    if is_hopeless(a, b):
        return (Technique.SIMPLE,)
    if choose_technique(a, b) is Technique.PREDICT:
        last = Technique.BIRTHDAY if a.mapping in _EIM or b.mapping in _EIM else Technique.PREDICT
        return Technique.PREDICT, Technique.PREDICT, last
    if choose_technique(a, b) is Technique.BIRTHDAY:
        return Technique.BIRTHDAY, Technique.SIMPLE
    return Technique.SIMPLE, Technique.BIRTHDAY


def should_open(own: NatBehaviour, peer: NatBehaviour, *, initiator: bool) -> bool:
    """Whether ours is the side that opens the sockets of a birthday: the harder one, of two equals the initiator."""
    mine, theirs = _hardness(own), _hardness(peer)
    return mine > theirs or (mine == theirs and initiator)


def _hardness(known: NatBehaviour) -> int:
    return 0 if known.mapping in _EIM else 1 if known.mapping is Mapping.UNKNOWN else 2


def _known_targets(peer: Side, technique: Technique) -> tuple[SocketAddr, ...]:
    predicted = peer.behaviour.allocation.next_ports(PREDICTED_PORTS)
    if technique is Technique.PREDICT and not peer.is_easy and predicted and peer.candidates:
        ip = peer.behaviour.public_ip or peer.candidates[0][0]
        return tuple((ip, port) for port in predicted)
    return peer.candidates
