"""Lookup machines alone: who is asked, when it ends, what it finds."""

from __future__ import annotations

import pytest

from lattica_protocols.errors import LocalProtocolError
from lattica_protocols.kad.keyspace import position
from lattica_protocols.kad.lookup import Lookup, ProvidersLookup, ValueLookup
from lattica_protocols.kad.messages import PeerAddrs
from lattica_protocols.kad.records import Validators, seal_value
from lattica_protocols.keys import PrivateKey
from lattica_protocols.limits import KAD_MAX_LOOKUP_CANDIDATES
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId

KEY = b"some key"


def peer(n: int) -> PeerId:
    return PeerId.from_bytes_untrusted(bytes.fromhex("002408011220") + n.to_bytes(32, "big"))


PEERS = sorted((peer(n) for n in range(1, 1001)), key=lambda p: position(p.to_bytes()) ^ position(KEY))
"""Closest to KEY first."""


def take(lookup: Lookup, now: float = 0.0) -> list[PeerId]:
    out = []
    while (asked := lookup.next(now)) is not None:
        out.append(asked)
    return out


def test_alpha_closest_first() -> None:
    lookup = Lookup(KEY, reversed(PEERS[:50]))
    assert take(lookup) == PEERS[:10]
    assert not lookup.finished
    lookup.on_success(PEERS[4], [], 0.1)
    assert take(lookup, 0.1) == [PEERS[10]]


def test_ends_when_the_k_closest_answered() -> None:
    lookup = Lookup(KEY, PEERS[:50])
    asked = []
    while not lookup.finished:
        for one in take(lookup):
            asked.append(one)
            lookup.on_success(one, [], 0.0)
    assert asked == PEERS[:20]
    assert lookup.result() == PEERS[:20]
    assert lookup.answered() == lookup.requests == 20
    assert take(lookup) == []


def test_closer_peers_are_asked_first() -> None:
    lookup = Lookup(KEY, PEERS[100:105], own=PEERS[1])
    for one in take(lookup):
        lookup.on_success(one, PEERS[:5], 0.0)
    assert take(lookup) == [PEERS[0], *PEERS[2:5]]


def test_failed_peers_are_replaced() -> None:
    lookup = Lookup(KEY, PEERS[:40])
    while not lookup.finished:
        for one in take(lookup):
            if PEERS.index(one) < 10:
                lookup.on_failure(one, 0.0)
            else:
                lookup.on_success(one, [], 0.0)
    assert lookup.result() == PEERS[10:30]


def test_nobody_to_ask() -> None:
    assert Lookup(KEY, []).finished
    assert Lookup(KEY, [PEERS[0]], own=PEERS[0]).finished


def test_slow_peers_give_their_place_away() -> None:
    lookup = Lookup(KEY, PEERS[:40], slow_after=2.0)
    assert take(lookup, 0.0) == PEERS[:10]
    assert lookup.next_timeout() == 2.0
    assert take(lookup, 1.9) == []
    assert take(lookup, 2.0) == PEERS[10:20]
    for one in PEERS[10:20]:
        lookup.on_success(one, [], 2.1)
    for one in take(lookup, 2.1):
        lookup.on_success(one, [], 2.2)
    assert lookup.finished, "20 answered: the slow ones are not waited for"
    lookup.on_success(PEERS[3], [], 5.0)
    assert lookup.result()[0] == PEERS[3], "a late answer counts"


def test_slow_peers_of_a_small_network_are_waited_for() -> None:
    lookup = Lookup(KEY, PEERS[:3], slow_after=2.0)
    take(lookup)
    lookup.on_success(PEERS[0], [], 0.1)
    lookup.handle_timer(2.0)
    assert not lookup.finished
    assert lookup.next_timeout() == 6.0
    lookup.handle_timer(6.0)
    assert lookup.finished
    assert lookup.result() == [PEERS[0]]


def test_the_only_peer_is_waited_for_to_the_end() -> None:
    lookup = Lookup(KEY, PEERS[:1], slow_after=2.0)
    take(lookup)
    lookup.handle_timer(9.0)
    assert not lookup.finished
    assert lookup.next_timeout() is None
    lookup.on_failure(PEERS[0], 10.0)
    assert lookup.finished
    assert lookup.result() == []


def test_outcomes_of_peers_that_were_not_asked() -> None:
    lookup = Lookup(KEY, PEERS[:40])
    with pytest.raises(LocalProtocolError, match="not being asked"):
        lookup.on_success(PEERS[0], [], 0.0)
    take(lookup)
    lookup.on_failure(PEERS[0], 0.0)
    with pytest.raises(LocalProtocolError, match="not being asked"):
        lookup.on_success(PEERS[0], [], 0.0)


def test_made_up_peers_cannot_keep_it_going() -> None:
    """Every answer names 20 ever closer peers."""
    lookup = Lookup(KEY, PEERS[-10:], max_requests=50)
    names = iter(range(10_000, 100_000))
    asked = 0
    while not lookup.finished:
        for one in take(lookup):
            asked += 1
            lookup.on_success(one, [peer(next(names)) for _ in range(200)], 0.0)
    assert asked == lookup.requests <= 50
    assert len(lookup.result()) == 20


def test_candidates_are_bounded() -> None:
    lookup = Lookup(KEY, PEERS, max_requests=1000)
    assert len(lookup._heap) == KAD_MAX_LOOKUP_CANDIDATES
    assert take(lookup) == PEERS[:10]


def test_disjoint_paths() -> None:
    """A liar on one path names 20 peers of its own; the other path still converges on the honest ones."""
    lookup = Lookup(KEY, [PEERS[500], PEERS[600]], paths=2)
    liar, honest = take(lookup)
    made_up = PEERS[:20]
    lookup.on_success(liar, made_up, 0.0)
    lookup.on_success(honest, PEERS[20:40], 0.0)
    first = take(lookup)
    assert [one in made_up for one in first] == [True] * 5 + [False] * 5
    for one in first:
        if one in made_up:
            lookup.on_failure(one, 0.0)
        else:
            lookup.on_success(one, PEERS[20:40], 0.0)
    while not lookup.finished:
        for one in take(lookup):
            lookup.on_failure(one, 0.0) if one in made_up else lookup.on_success(one, [], 0.0)
    assert lookup.result()[:10] == PEERS[20:30]


def test_one_source_does_not_name_all_providers() -> None:
    """Whoever makes up providers, and answers first, must not end the search; what all name above their share counts
    only when there is nothing better."""
    lookup = ProvidersLookup(KEY, PEERS[:30], wanted=8)
    take(lookup)
    made_up = [PeerAddrs(peer(6000 + n)) for n in range(60)]
    assert lookup.on_providers(made_up, "liar") == made_up[:2]
    assert lookup.on_providers(made_up[2:], "liar") == []
    lookup.on_success(PEERS[0], [], 0.0)
    assert not lookup.finished
    real = [PeerAddrs(peer(5000 + n)) for n in range(3)]
    assert lookup.on_providers(real[:1], "a") == real[:1]
    assert lookup.on_providers(real, "b") == real[1:]
    assert lookup.on_providers([PeerAddrs(peer(5000 + n)) for n in range(9)], "c") == [
        PeerAddrs(peer(5003)),
        PeerAddrs(peer(5004)),
    ]
    assert [p.peer for p in lookup.spare()] == [peer(6002)]
    assert len(lookup.providers()) == 7

    everything = ProvidersLookup(KEY, PEERS[:30])
    assert everything.on_providers(made_up, "liar") == made_up
    assert everything.spare() == []


def test_providers_stop_at_enough() -> None:
    lookup = ProvidersLookup(KEY, PEERS[:30], wanted=2)
    addr = Multiaddr.parse("/ip4/8.8.8.8/tcp/1")
    take(lookup)
    assert lookup.on_providers([PeerAddrs(peer(5001))]) == [PeerAddrs(peer(5001))]
    assert lookup.on_providers([PeerAddrs(peer(5001))]) == []
    assert lookup.on_providers([PeerAddrs(peer(5001), (addr,))]) == [PeerAddrs(peer(5001), (addr,))]
    lookup.on_success(PEERS[0], [], 0.0)
    assert not lookup.finished
    lookup.on_providers([PeerAddrs(peer(5002))], "another")
    assert lookup.finished
    assert lookup.next(0.0) is None
    assert [p.peer for p in lookup.providers()] == [peer(5001), peer(5002)]


def test_value_lookup_takes_the_newest_and_names_the_stale() -> None:
    private_key = PrivateKey.generate(b"k" * 32)
    key, old = seal_value(private_key, "n", b"old", sequence=1, expires=1000)
    _, new = seal_value(private_key, "n", b"new", sequence=2, expires=1000)
    order = sorted((peer(n) for n in range(1, 31)), key=lambda p: position(p.to_bytes()) ^ position(key))
    lookup = ValueLookup(key, order, Validators(), quorum=3)
    answers = {order[0]: old, order[1]: new, order[2]: b"junk", order[3]: None, order[4]: new, order[5]: new}
    for one in take(lookup):
        if one in answers:
            lookup.on_value(one, answers[one], 500.0)
            lookup.on_success(one, [], 0.0)
    assert lookup.finished, "three gave the newest"
    assert lookup.best == new
    assert lookup.invalid == 1
    assert lookup.stale() == [order[0], order[2], order[3]]


def test_value_lookup_without_a_value() -> None:
    lookup = ValueLookup(b"/lattica/x/y", PEERS[:5], Validators())
    while not lookup.finished:
        for one in take(lookup):
            lookup.on_value(one, None, 0.0)
            lookup.on_success(one, [], 0.0)
    assert lookup.best is None
    assert lookup.stale() == []
