"""Finding out what the NATs in front of us do, in the spirit of RFC 5780, from several observers.

An observer is a peer or server that answers STUN. The questions, each with the sockets it needs:

    mapping      socket 0 (the daemon's own) asks every observer, at two ports where it has two
    filtering    a socket of its own for each of three observers asks for the answer from another port, another address
    hairpin      one more socket and socket 0 send to each other's public address
    lifetime     for each of `lifetimes` a socket makes a mapping and falls silent; that many seconds later another
                 socket asks the observer to answer there (RESPONSE-PORT)

`BehaviourKnown` comes when the mapping is known (a round trip), again with all but the lifetimes (2 s, since silence
has to be waited for), and `final` at the end. What observers say is judged in `classify`. We send to the observers'
own addresses alone: an OTHER-ADDRESS on another IP is followed only where the user configured the observer, and the
hairpin test only goes to the address that the observers agree on.

The verdict guides which technique is tried first; it never excludes one (RFC 5780 section 1).
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lattica_protocols.limits import NAT_MAX_LIFETIMES, NAT_MAX_OBSERVERS
from lattica_protocols.nat.behaviour import Mapping, NatBehaviour
from lattica_protocols.nat.classify import (
    MIN_OBSERVERS,
    Claim,
    FilterTest,
    classify_allocation,
    classify_filtering,
    classify_mapping,
)
from lattica_protocols.stun import MessageType, SocketAddr
from lattica_protocols.stun_client import Answered, Datagram, Failed, StunClient

MAIN = 0
"""The socket whose mapping is looked at."""
_FILTER, _HAIRPIN, _LIFETIME = 1, 20, 30
"""Numbers of further sockets; the runtime opens them when they are first sent from."""
_FILTER_OBSERVERS = 3
_PACE = 0.01
"""Seconds between two requests to different observers, so that a home router sees no burst."""
_FILTER_ATTEMPTS = 3

_DEPENDENT = (Mapping.ADDRESS_DEPENDENT, Mapping.ADDRESS_AND_PORT_DEPENDENT)

Answer = Answered | Failed


@dataclass(frozen=True, slots=True)
class Observer:
    """Somebody who answers STUN. `other`: a second port of the same address, where it is known before."""

    addr: SocketAddr
    other: SocketAddr | None = None
    trusted: bool = False
    """Configured by the user: it is followed to its other IP address, and needs no third one's consent."""


@dataclass(frozen=True, slots=True)
class BehaviourKnown:
    """A verdict; later ones know more."""

    behaviour: NatBehaviour
    certain: bool
    """One lying observer could not have turned the verdict on the mapping round."""
    final: bool


class Discovery:
    """See the top of the file. `lifetimes`: seconds of silence to test, as (10, 30, 60, 120); none: not tested."""

    def __init__(
        self,
        observers: Sequence[Observer],
        rng: random.Random,
        now: float,
        *,
        local_of: Callable[[int], SocketAddr | None] = lambda socket: None,
        lifetimes: Sequence[float] = (),
    ) -> None:
        """`local_of`: the local address of a socket by its number, to see whether ports are kept; `None`: not known."""
        self._observers = _independent(observers)[:NAT_MAX_OBSERVERS]
        self._client = StunClient(rng)
        self._local_of = local_of
        self._lifetimes = tuple(sorted(lifetimes)[:NAT_MAX_LIFETIMES])
        self._now = now
        self._then: dict[int, Callable[[Answer], None]] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._claims: list[Claim] = []
        self._tests: list[FilterTest] = []
        self._hairpin: bool | None = None
        self._lived: dict[float, bool] = {}
        self._main_left = self._quick_left = self._all_left = 0
        self._told_mapping = self._told_final = False
        self._events: deque[BehaviourKnown] = deque()
        self._start()

    # -- the machine contract ---------------------------------------------------------------------------------------
    def receive_datagram(self, socket: int, data: bytes, source: SocketAddr, now: float) -> bool:
        """Whether the datagram was for this machine."""
        self._now = now
        ours = self._client.is_waiting_for(data)
        if self._client.receive_datagram(socket, data, source, now):
            self._run_answers()
        elif ours and data[:2] == MessageType.REQUEST.to_bytes(2, "big"):
            self._hairpin = True  # our own request: a socket of ours sent it to the public address of another
        return ours

    def handle_timer(self, now: float) -> None:
        self._now = now
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2]()
        self._client.handle_timer(now)
        self._run_answers()

    def next_timeout(self) -> float | None:
        due = self._client.next_timeout()
        if self._timers and (due is None or self._timers[0][0] < due):
            due = self._timers[0][0]
        return due

    def poll_transmit(self) -> list[Datagram]:
        return self._client.poll_transmit()

    @property
    def answering(self) -> list[SocketAddr]:
        """Addresses of observers that answered socket 0."""
        return list(dict.fromkeys(claim.asked for claim in self._main_claims()))

    def next_event(self) -> BehaviourKnown | None:
        return self._events.popleft() if self._events else None

    # -- mapping ----------------------------------------------------------------------------------------------------
    def _start(self) -> None:
        self._all_left += 1
        for i, observer in enumerate(self._observers):
            self._ask_main(observer, observer.addr, _PACE * i)
        for i, observer in enumerate(self._observers[:_FILTER_OBSERVERS]):
            self._quick_left += 1
            delay = _PACE * (len(self._observers) + i)
            self._ask(_FILTER + i, observer.addr, self._filter_opened(observer, _FILTER + i), delay=delay)
        for i, seconds in enumerate(self._lifetimes):
            self._test_lifetime(i, seconds)
        self._all_left -= 1
        if not self._observers:
            self._tell()

    def _ask_main(self, observer: Observer, addr: SocketAddr, delay: float = 0.0) -> None:
        self._main_left += 1

        def answered(answer: Answer) -> None:
            if isinstance(answer, Answered):
                self._note(MAIN, addr, answer, observer)
                if addr == observer.addr:
                    self._ask_other_ports(observer, answer.other)
            self._main_left -= 1
            if not self._told_mapping:
                self._look_at_mapping()
            elif not self._main_left:
                self._tell()

        self._ask(MAIN, addr, answered, delay=delay)

    def _ask_other_ports(self, observer: Observer, said: SocketAddr | None) -> None:
        other = observer.other or said
        if other is None or not other[1]:
            return
        if other[1] != observer.addr[1]:
            self._ask_main(observer, (observer.addr[0], other[1]))
        if other[0] != observer.addr[0] and observer.trusted:
            self._ask_main(observer, other)

    def _look_at_mapping(self) -> None:
        """Whether enough is known: one that does not answer should not hold up the others."""
        claims = self._main_claims()
        verdict = classify_mapping(claims)
        enough = verdict.certain and len({claim.asked[0] for claim in claims}) > len(self._observers) // 2
        if self._main_left and not (enough and verdict.mapping in (Mapping.NONE, Mapping.ENDPOINT_INDEPENDENT)):
            return
        self._told_mapping = True
        if verdict.mapping is Mapping.ENDPOINT_INDEPENDENT and verdict.mapped is not None and verdict.certain:
            self._test_hairpin(verdict.mapped)
        self._tell()

    # -- filtering --------------------------------------------------------------------------------------------------
    def _filter_opened(self, observer: Observer, socket: int) -> Callable[[Answer], None]:
        """The socket has a mapping towards the observer: now ask for answers from elsewhere."""

        def opened(answer: Answer) -> None:
            if isinstance(answer, Answered):
                self._note(socket, observer.addr, answer, observer)
                if answer.other is not None and answer.other[0] != observer.addr[0]:
                    self._ask_elsewhere(observer, socket, other_ip=True)
                if answer.other is not None and answer.other[1] != observer.addr[1]:
                    self._ask_elsewhere(observer, socket, other_ip=False)
            self._quick_done()

        return opened

    def _ask_elsewhere(self, observer: Observer, socket: int, *, other_ip: bool) -> None:
        self._quick_left += 1

        def answered(answer: Answer) -> None:
            if isinstance(answer, Answered):
                self._tests.append(FilterTest(observer.addr[0], other_ip, True))
            elif answer.code is None:  # a refusal says nothing about the NAT
                self._tests.append(FilterTest(observer.addr[0], other_ip, False))
            self._quick_done()

        self._ask(socket, observer.addr, answered, change_ip=other_ip, change_port=True, attempts=_FILTER_ATTEMPTS)

    # -- hairpin ----------------------------------------------------------------------------------------------------
    def _test_hairpin(self, mapped: SocketAddr) -> None:
        self._quick_left += 1
        asked = next(iter(self._main_claims())).asked

        def opened(answer: Answer) -> None:
            if isinstance(answer, Answered) and answer.mapped[0] == mapped[0]:
                self._hairpin = False
                for socket, to in ((_HAIRPIN, mapped), (MAIN, answer.mapped)):
                    self._quick_left += 1
                    self._ask(socket, to, lambda answer: self._quick_done(), attempts=_FILTER_ATTEMPTS)
            self._quick_done()

        self._ask(_HAIRPIN, asked, opened)

    # -- lifetime ---------------------------------------------------------------------------------------------------
    def _test_lifetime(self, i: int, seconds: float) -> None:
        if not self._observers:
            return
        self._all_left += 1
        observer = self._observers[i % len(self._observers)]
        silent, asking = _LIFETIME + 2 * i, _LIFETIME + 2 * i + 1

        def opened(answer: Answer) -> None:
            if isinstance(answer, Failed):
                self._done()
                return
            port = answer.mapped[1]
            self._at(
                self._now + seconds,
                lambda: self._ask(asking, observer.addr, ended, response_port=port, answer_on=silent),
            )

        def ended(answer: Answer) -> None:
            if isinstance(answer, Answered) or answer.code is None:
                self._lived[seconds] = isinstance(answer, Answered)
            self._done()

        self._ask(silent, observer.addr, opened, delay=_PACE * (2 * len(self._observers) + i))

    # -- inside -----------------------------------------------------------------------------------------------------
    def _ask(self, socket: int, to: SocketAddr, then: Callable[[Answer], None], **options: object) -> None:
        number = self._client.request(socket, to, self._now, **options)  # type: ignore[arg-type]
        self._then[number] = then

    def _at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (when, next(self._order), what))

    def _run_answers(self) -> None:
        while (event := self._client.next_event()) is not None:
            self._then.pop(event.number)(event)

    def _main_claims(self) -> list[Claim]:
        return [claim for claim in self._claims if claim.socket == MAIN]

    def _note(self, socket: int, asked: SocketAddr, answer: Answered, observer: Observer) -> None:
        order = (answer.first_sent, answer.number)
        claim = Claim(order, socket, self._local_of(socket), asked, answer.mapped, observer.trusted)
        self._claims.append(claim)

    def _quick_done(self) -> None:
        self._quick_left -= 1
        if not self._quick_left and not self._main_left:
            self._tell()

    def _done(self) -> None:
        self._all_left -= 1
        if not self._all_left:
            self._tell()

    def _tell(self) -> None:
        final = not (self._main_left or self._quick_left or self._all_left)
        if self._told_final:
            return
        self._told_final = final
        verdict = classify_mapping(self._main_claims())
        filtering, why = classify_filtering(self._tests)
        mapped = verdict.mapped if verdict.certain else None
        blocked = bool(self._observers) and not self._claims and not self._main_left
        behaviour = NatBehaviour(
            mapping=verdict.mapping,
            filtering=filtering,
            allocation=classify_allocation(self._claims, dependent=verdict.mapping in _DEPENDENT),
            mapped=mapped,
            seen=tuple(addr for addr, _ in Counter(claim.mapped for claim in self._main_claims()).most_common()),
            observed=tuple(dict.fromkeys((claim.asked, claim.mapped) for claim in self._main_claims())),
            public_ip=_public_ip(self._claims),
            udp_blocked=blocked,
            certain=verdict.certain or (blocked and len(self._observers) >= MIN_OBSERVERS),
            hairpin=self._hairpin,
            evidence=(verdict.evidence, why),
        )
        self._events.append(BehaviourKnown(self._with_lifetime(behaviour), verdict.certain, final))

    def _with_lifetime(self, behaviour: NatBehaviour) -> NatBehaviour:
        lived = [seconds for seconds, ok in self._lived.items() if ok]
        died = [seconds for seconds, ok in self._lived.items() if not ok and seconds > max(lived, default=0.0)]
        if not lived:  # then the observers' answers may not get anywhere at all, for another reason
            return behaviour
        return replace(behaviour, lives_for=max(lived), dies_within=min(died, default=None))


def _independent(observers: Sequence[Observer]) -> list[Observer]:
    """One for each IP address: two peers behind it may be one liar."""
    return list({observer.addr[0]: observer for observer in reversed(observers)}.values())[::-1]


def _public_ip(claims: Sequence[Claim]) -> str | None:
    """The address that more than half of the observers name, of at least two."""
    by_observer = {claim.asked[0]: claim.mapped[0] for claim in claims}
    for ip in set(by_observer.values()):
        votes = sum(named == ip for named in by_observer.values())
        if votes >= 2 and 2 * votes > len(by_observer):
            return ip
    return None
