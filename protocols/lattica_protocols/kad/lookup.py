"""Iterative lookups, as iterators over peers without any I/O.

Theory of operation. A lookup keeps the peers it has heard of, sorted by distance to its key. Whoever drives it asks
`next(now)` for a peer to send the request to until that gives `None`, reports each outcome with `on_success` (with the
closer peers of the answer) or `on_failure`, and asks again; `handle_timer` at `next_timeout`. At most `alpha` requests
are waited for at a time. It is finished when the k closest peers that did not fail have all answered.

    HEARD --- next() ---> ASKED --- slow_after s ---> SLOW --- 2 * slow_after s ---> LATE
                            |                           |                             |
                            +---------------------------+-----------------------------+--- on_success() ---> ANSWERED
                                                                                      `--- on_failure() ---> FAILED

A SLOW peer gives its place among the alpha to another one, and is waited for in the end only while fewer than k have
answered; a LATE one only while nobody has. Its answer always counts. So dead peers cost a lookup in a large network
`slow_after` seconds, and a peer behind a slow path in a small one is still heard.

With `paths` > 1 a lookup goes along that many disjoint paths (S/Kademlia): a peer belongs to the path that heard of it
first, and each path converges on its own, so one lying peer can divert one path and not the whole lookup.
"""

from __future__ import annotations

import bisect
import enum
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from kademlia.node import NodeHeap

from lattica_protocols.errors import LocalProtocolError
from lattica_protocols.kad.keyspace import PeerPlace, Place
from lattica_protocols.kad.messages import PeerAddrs
from lattica_protocols.kad.records import Validators
from lattica_protocols.kad.routing import K
from lattica_protocols.limits import (
    KAD_MAX_CLOSER_PEERS,
    KAD_MAX_LOOKUP_CANDIDATES,
    KAD_MAX_LOOKUP_REQUESTS,
)
from lattica_protocols.peer_id import PeerId

ALPHA = 10
"""Requests in flight (libp2p's specification, go-libp2p)."""

SLOW_AFTER = 2.5
"""Seconds: a dial over TCP with one lost SYN and its handshake is done by then."""

QUORUM = 8
"""Peers that have to give the same best value before a value lookup stops early. One that lags behind is outvoted by
sequence numbers; when half of the twenty replicas do, the first four to answer are all stale in 4 of 100 lookups, the
first eight in 4 of 10,000. go-libp2p waits for sixteen when it resolves IPNS names."""

SOURCES_OF_PROVIDERS = 4
"""How many sources of answers it takes, at least, to end a search for providers early."""


class _State(enum.Enum):
    HEARD = enum.auto()
    ASKED = enum.auto()
    SLOW = enum.auto()
    LATE = enum.auto()
    ANSWERED = enum.auto()
    FAILED = enum.auto()


_NOT_WAITED_FOR = frozenset({_State.SLOW, _State.LATE, _State.FAILED})


class Candidate(PeerPlace):
    """A peer that a lookup heard of."""

    state: _State
    asked_at: float
    path: int

    def __init__(self, peer: PeerId, path: int) -> None:
        super().__init__(peer)
        self.state = _State.HEARD
        self.asked_at = 0.0
        self.path = path


class CandidateHeap(NodeHeap):  # type: ignore[misc]  # the package has no type information
    """The package's heap of nodes by distance, kept sorted: that is a heap too, and iterates without sorting again.

    Membership is a dictionary (the package scans), and the farthest are dropped beyond `KAD_MAX_LOOKUP_CANDIDATES`.
    """

    node: Place
    heap: list[tuple[int, Candidate]]

    def __init__(self, target: Place, maxsize: int) -> None:
        super().__init__(target, maxsize)
        self._by_peer: dict[PeerId, Candidate] = {}

    def push(self, nodes: Candidate | list[Candidate]) -> None:
        for node in nodes if isinstance(nodes, list) else [nodes]:
            if node.peer in self._by_peer:
                continue
            entry = self.node.distance_to(node), node
            if len(self.heap) >= KAD_MAX_LOOKUP_CANDIDATES:
                if entry > self.heap[-1] or self.heap[-1][1].state is not _State.HEARD:
                    continue
                del self._by_peer[self.heap.pop()[1].peer]
            bisect.insort(self.heap, entry)
            self._by_peer[node.peer] = node

    def get(self, peer: PeerId) -> Candidate | None:
        return self._by_peer.get(peer)

    def __iter__(self) -> Iterator[Candidate]:
        """All, closest first."""
        return (node for _, node in self.heap)

    def __contains__(self, node: object) -> bool:
        return isinstance(node, Candidate) and node.peer in self._by_peer

    def __len__(self) -> int:
        return len(self.heap)


class Lookup:
    """FIND_NODE: the k peers closest to `key`. The other lookups add what their answers carry."""

    def __init__(
        self,
        key: bytes,
        seeds: Iterable[PeerId],
        *,
        own: PeerId | None = None,
        k: int = K,
        alpha: int = ALPHA,
        slow_after: float = SLOW_AFTER,
        paths: int = 1,
        max_requests: int = KAD_MAX_LOOKUP_REQUESTS,
    ) -> None:
        """`seeds` are the closest peers we know; `own` is never asked."""
        self.key = key
        self.requests = 0
        """Peers asked so far."""
        self._own = own
        self._k = k
        self._alpha = alpha
        self._slow_after = slow_after
        self._paths = paths
        self._max_requests = max_requests
        self._asked: dict[PeerId, Candidate] = {}
        self._slow: dict[PeerId, Candidate] = {}
        self._answers = 0
        self._stopped = False
        self._heap = CandidateHeap(Place(key), k)
        for index, peer in enumerate(seeds):
            if peer != own:
                self._heap.push(Candidate(peer, index % paths))

    # -- driving it ---------------------------------------------------------------------------------------
    def next(self, now: float) -> PeerId | None:
        """A peer to ask now. `None`: nobody until an answer, a failure or the timer; or it is finished."""
        self.handle_timer(now)
        if self._stopped or self.requests >= self._max_requests:
            return None
        share = max(1, self._alpha // self._paths)
        for path in range(self._paths):
            if sum(asked.path == path for asked in self._asked.values()) >= share:
                continue
            for candidate in self._front(path):
                if candidate.state is _State.HEARD:
                    candidate.state = _State.ASKED
                    candidate.asked_at = now
                    self._asked[candidate.peer] = candidate
                    self.requests += 1
                    return candidate.peer
        return None

    def on_success(self, peer: PeerId, closer: Sequence[PeerId], now: float) -> None:
        """`peer` answered and named `closer`. `LocalProtocolError`: it was never asked."""
        candidate = self._finish(peer, _State.ANSWERED)
        for named in closer[:KAD_MAX_CLOSER_PEERS]:
            if named != self._own and self._heap.get(named) is None:
                self._heap.push(Candidate(named, candidate.path))
        self.handle_timer(now)

    def on_failure(self, peer: PeerId, now: float) -> None:
        """`peer` could not be reached, did not answer, or answered nonsense."""
        self._finish(peer, _State.FAILED)
        self.handle_timer(now)

    def handle_timer(self, now: float) -> None:
        """Peers asked `slow_after` seconds ago become SLOW, and LATE after twice as long again."""
        for peer in [p for p, c in self._asked.items() if c.asked_at + self._slow_after <= now]:
            self._slow[peer] = self._asked.pop(peer)
            self._slow[peer].state = _State.SLOW
        for candidate in self._slow.values():
            if candidate.asked_at + 3 * self._slow_after <= now:
                candidate.state = _State.LATE

    def next_timeout(self) -> float | None:
        """When `handle_timer` wants to be called."""
        times = [c.asked_at + self._slow_after for c in self._asked.values()]
        times += [c.asked_at + 3 * self._slow_after for c in self._slow.values() if c.state is _State.SLOW]
        return min(times, default=None)

    def stop(self) -> None:
        """Enough was found."""
        self._stopped = True

    # -- what came out ------------------------------------------------------------------------------------
    @property
    def finished(self) -> bool:
        """Nothing more is to be asked or waited for."""
        if self._stopped:
            return True
        if self.requests >= self._max_requests:
            if self._asked:
                return False
        elif not all(c.state is _State.ANSWERED for path in range(self._paths) for c in self._front(path)):
            return False
        if self._answers == 0:
            return not self._slow
        return self._answers >= self._k or all(c.state is _State.LATE for c in self._slow.values())

    def result(self) -> list[PeerId]:
        """The closest k peers that answered, closest first."""
        answered = (candidate for candidate in self._heap if candidate.state is _State.ANSWERED)
        return [candidate.peer for candidate, _ in zip(answered, range(self._k), strict=False)]

    def answered(self) -> int:
        """How many peers answered."""
        return self._answers

    def _front(self, path: int) -> list[Candidate]:
        """The k closest peers of a path that did not fail and are not slow."""
        share = max(1, self._k // self._paths)
        front: list[Candidate] = []
        for _, candidate in self._heap.heap:
            if candidate.path == path and candidate.state not in _NOT_WAITED_FOR:
                front.append(candidate)
                if len(front) == share:
                    break
        return front

    def _finish(self, peer: PeerId, state: _State) -> Candidate:
        candidate = self._heap.get(peer)
        if candidate is None or (self._asked.pop(peer, None) or self._slow.pop(peer, None)) is None:
            raise LocalProtocolError(f"{peer.short()} is not being asked")
        self._answers += state is _State.ANSWERED
        candidate.state = state
        return candidate


class ProvidersLookup(Lookup):
    """GET_PROVIDERS: stops when `wanted` providers were found (0: all that the k closest peers know).

    Anybody may answer with providers that he made up, so one *source* of answers gives a quarter of those wanted at
    most. What it names above that is kept, for when the lookup ends with fewer: see `spare`.
    """

    def __init__(self, key: bytes, seeds: Iterable[PeerId], *, wanted: int = 0, own: PeerId | None = None) -> None:
        super().__init__(key, seeds, own=own)
        self._wanted = wanted
        self._share = max(1, wanted // SOURCES_OF_PROVIDERS)
        self._found: dict[PeerId, PeerAddrs] = {}
        self._given: Counter[str] = Counter()
        self._over: dict[str, list[PeerAddrs]] = {}

    def on_providers(self, providers: Iterable[PeerAddrs], source: str = "") -> list[PeerAddrs]:
        """Providers of one answer; gives those to use now that are new or whose addresses were not known before.
        `source` is whoever stands behind the answer."""
        fresh = []
        for provider in providers:
            known = self._found.get(provider.peer)
            if known is not None and (known.addrs or not provider.addrs):
                continue
            if known is None:
                if self._wanted and self._given[source] >= self._share:
                    over = self._over.setdefault(source, [])
                    if len(over) < self._wanted:
                        over.append(provider)
                    continue
                self._given[source] += 1
            self._found[provider.peer] = provider
            fresh.append(provider)
        if self._wanted and len(self._found) >= self._wanted:
            self.stop()
        return fresh

    def spare(self) -> list[PeerAddrs]:
        """What the sources named above their shares, in turns, as far as providers are still wanted."""
        spare: dict[PeerId, PeerAddrs] = {}
        for turn in zip_longest(*self._over.values()):
            for provider in turn:
                if provider is not None and provider.peer not in self._found:
                    spare.setdefault(provider.peer, provider)
        return list(spare.values())[: max(0, self._wanted - len(self._found))]

    def providers(self) -> list[PeerAddrs]:
        """All found so far."""
        return list(self._found.values())


@dataclass(frozen=True, slots=True)
class _Replica:
    peer: PeerId
    value: bytes | None


class ValueLookup(Lookup):
    """GET_VALUE: the best valid value, and who has an older one or none.

    Stops when `quorum` peers gave the best value, else when the k closest peers were asked.
    """

    def __init__(
        self,
        key: bytes,
        seeds: Iterable[PeerId],
        validators: Validators,
        *,
        quorum: int = QUORUM,
        own: PeerId | None = None,
        known: bytes | None = None,
    ) -> None:
        """`known` is a valid value that we have ourselves."""
        super().__init__(key, seeds, own=own)
        self._validators = validators
        self._quorum = quorum
        self._replicas: list[_Replica] = []
        self.best: bytes | None = known
        self._agreeing = 0 if known is None else 1
        self.invalid = 0
        """Answers with a value that its validator refused."""

    def on_value(self, peer: PeerId, value: bytes | None, unix_now: float) -> None:
        """What `peer` has under the key (`None`: nothing). Call it before `on_success`."""
        if value is not None:
            reason = self._validators.refusal(self.key, value, unix_now)
            if reason is not None:
                self.invalid += 1
                value = None
        self._replicas.append(_Replica(peer, value))
        if value is None:
            return
        if self.best is not None and value != self.best:
            better = self._validators.better(self.key, value, self.best)
            if not better:
                return
            self._agreeing = 0
        self.best = value
        self._agreeing += 1
        if self._agreeing >= self._quorum:
            self.stop()

    def stale(self) -> list[PeerId]:
        """Peers among the k closest that answered and do not have the best value: put it to them."""
        if self.best is None:
            return []
        have = {replica.peer for replica in self._replicas if replica.value == self.best}
        return [peer for peer in self.result() if peer not in have]
