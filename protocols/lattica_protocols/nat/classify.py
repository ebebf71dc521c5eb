"""From what observers say to what the NAT does: pure functions, robust against an observer that lies.

An observer is whoever answers at one IP address; all its ports count once. With n of them, up to f = (n - 1) // 3 may
lie and the verdict on the mapping stays right:

* endpoint-independent when at least n - f name the same address: of a NAT whose ports depend on the other side two
  honest observers never see the same, so liars that copy one honest answer make at most 1 + f;
* dependent when no address is named by more than 1 + f;
* unknown in between.

With three observers that holds for one liar as well, except that he can turn the verdict into "unknown". With fewer
the likelier one is returned, not `certain`; observers that the user has configured are trusted one by one.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lattica_protocols.limits import NAT_MAX_STEP
from lattica_protocols.nat.behaviour import Allocation, Filtering, Mapping, Ports
from lattica_protocols.stun import SocketAddr

MIN_OBSERVERS = 3
"""For a verdict that one liar cannot turn round."""
_MAX_BLOCK = 4096
"""Span of the samples of a port block. Four random ports of 64,512 are that near together once in 1,000."""
_MIN_SAMPLES = 4


@dataclass(frozen=True, slots=True)
class Claim:
    """One answer: asked at `asked` from `socket`, which is bound to `local`, an observer said that it saw `mapped`."""

    order: tuple[float, int]
    """When it was first sent: mappings are made in this order."""
    socket: int
    local: SocketAddr | None
    asked: SocketAddr
    mapped: SocketAddr
    trusted: bool = False


@dataclass(frozen=True, slots=True)
class MappingVerdict:
    """How a NAT chooses the public address of a socket (RFC 4787, section 4.1)."""

    mapping: Mapping
    mapped: SocketAddr | None
    """The address that everybody sees, when there is one."""
    certain: bool
    evidence: str


@dataclass(frozen=True, slots=True)
class FilterTest:
    """Whether an answer from an address that we had not sent to got in."""

    observer: str
    other_ip: bool
    """From another IP address, else from another port of the same."""
    passed: bool


def classify_mapping(claims: Sequence[Claim]) -> MappingVerdict:
    """What the claims about one socket mean."""
    first: dict[str, Claim] = {}
    for claim in sorted(claims, key=lambda claim: claim.order):
        first.setdefault(claim.asked[0], claim)
    n = len(first)
    if not n:
        return MappingVerdict(Mapping.UNKNOWN, None, False, "no observer answered")
    named = Counter(claim.mapped for claim in first.values())
    mapped, most = named.most_common(1)[0]
    liars = (n - 1) // 3
    trusted = all(claim.trusted for claim in first.values())
    certain = n >= MIN_OBSERVERS or (trusted and n >= 2)
    seen = ", ".join(f"{claim.asked[0]} sees {_text(claim.mapped)}" for claim in first.values())
    if n > 1 and most >= n - liars:
        local = first[next(iter(first))].local
        if mapped == local:
            return MappingVerdict(Mapping.NONE, mapped, certain, f"{seen}: our own address")
        return MappingVerdict(Mapping.ENDPOINT_INDEPENDENT, mapped, certain, f"{seen}: {most} of {n} the same")
    if n > 1 and most <= 1 + liars:
        kind, why = _dependent_on(claims)
        return MappingVerdict(kind, None, certain, f"{seen}: {why}")
    reason = "the observers contradict each other" if n > 1 else "one observer is not enough"
    return MappingVerdict(Mapping.UNKNOWN, None, False, f"{seen}: {reason}")


def _dependent_on(claims: Iterable[Claim]) -> tuple[Mapping, str]:
    """Whether the port of the other side counts: by vote of the observers that were asked at two of theirs."""
    by_observer: dict[str, set[SocketAddr]] = defaultdict(set)
    asked: Counter[str] = Counter()
    for claim in claims:
        by_observer[claim.asked[0]].add(claim.mapped)
        asked[claim.asked[0]] += 1
    votes = Counter(len(by_observer[host]) > 1 for host, times in asked.items() if times > 1)
    if not votes:
        return Mapping.ADDRESS_AND_PORT_DEPENDENT, "all different; whether the port counts could not be asked"
    if votes[False] > votes[True]:
        return Mapping.ADDRESS_DEPENDENT, f"different, but the same at {votes[False]} observers' two ports"
    return Mapping.ADDRESS_AND_PORT_DEPENDENT, f"all different, also at {votes[True]} observers' two ports"


def classify_filtering(tests: Sequence[FilterTest]) -> tuple[Filtering, str]:
    """What got in counts for good: nobody can forge it. What did not, could be an observer that does not send."""
    if any(test.passed and test.other_ip for test in tests):
        return Filtering.ENDPOINT_INDEPENDENT, "a datagram of an address that we never sent to got in"
    ip_tests = sum(test.other_ip for test in tests)
    if any(test.passed for test in tests):
        more = "one from another address did not" if ip_tests else "another address could not be tried"
        return Filtering.ADDRESS_DEPENDENT, f"a datagram from another port of an address we sent to got in; {more}"
    silent = len({test.observer for test in tests if not test.other_ip})
    if silent:
        return Filtering.ADDRESS_AND_PORT_DEPENDENT, f"nothing from other ports of {silent} observers got in"
    return Filtering.UNKNOWN, "no observer could answer from another port"


def classify_allocation(claims: Sequence[Claim], *, dependent: bool) -> Allocation:
    """How public ports are chosen. `claims`: of all sockets; each new mapping is a sample.

    `dependent`: the mapping depends on the other side. If not, nobody has to guess ports, and the few samples there are
    (one for each socket) are not looked at for a block.
    """
    ordered = sorted(claims, key=lambda claim: claim.order)
    if not ordered:
        return Allocation()
    last = ordered[-1].mapped[1]
    kept = [claim.local is not None and claim.local[1] == claim.mapped[1] for claim in ordered]
    if 3 * sum(kept) >= 2 * len(kept):
        return Allocation(Ports.PRESERVED, last=last)
    observers = sorted({claim.asked[0] for claim in ordered})
    without: list[str | None] = [None]
    if len(observers) >= MIN_OBSERVERS:
        without += observers
    views = [_ports([claim for claim in ordered if claim.asked[0] != liar]) for liar in without]
    for ports in views:
        step = _sequential_step(ports)
        if step:
            return Allocation(Ports.SEQUENTIAL, step=step, last=ports[-1])
    if not dependent:
        return Allocation(Ports.RANDOM if len(views[0]) > 1 else Ports.UNKNOWN, last=last)
    for ports in views:
        low, high = min(ports), max(ports)
        if len(ports) >= _MIN_SAMPLES and high - low < _MAX_BLOCK:
            margin = (high - low) // (len(ports) - 1) + 1
            return Allocation(Ports.BLOCK, max(1, low - margin), min(65535, high + margin), last=last)
    low, high = min(views[0]), max(views[0])
    if high - low >= _MAX_BLOCK:
        margin = (high - low) // (len(views[0]) - 1) + 1
        return Allocation(Ports.RANDOM, max(1024, low - margin), min(65535, high + margin), last=last)
    return Allocation(last=last)


def _ports(claims: Iterable[Claim]) -> list[int]:
    """The ports in order, each mapping once."""
    return list(dict.fromkeys(claim.mapped[1] for claim in claims))


def _sequential_step(ports: Sequence[int]) -> int:
    """The usual difference, 0 when the ports do not follow each other."""
    deltas = [b - a for a, b in itertools.pairwise(ports)]
    if len(deltas) < 2 or not all(0 < abs(delta) <= NAT_MAX_STEP for delta in deltas):
        return 0
    if len({delta > 0 for delta in deltas}) > 1:
        return 0
    return Counter(sorted(deltas, key=abs)).most_common(1)[0][0]


def _text(addr: SocketAddr) -> str:
    return f"[{addr[0]}]:{addr[1]}" if ":" in addr[0] else f"{addr[0]}:{addr[1]}"
