"""What is remembered of other peers: bounded in every count, and forgotten in time."""

from __future__ import annotations

import time

import pytest

from lattica import peerstore
from lattica.peerstore import PERMANENT, PeerInfo, Peerstore
from lattica_protocols.limits import MAX_ADDRS_PER_PEER, MAX_PEERSTORE_PEERS, MAX_PROTOCOLS_PER_PEER
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId

ADDR = Multiaddr.parse("/ip4/192.0.2.1/tcp/4101")


def peer(number: int) -> PeerId:
    return PeerId.from_bytes_untrusted(bytes.fromhex("002408011220") + number.to_bytes(32, "big"))


def full_store() -> Peerstore:
    store = Peerstore(lambda: 0.0)
    for number in range(MAX_PEERSTORE_PEERS):
        store.add_addrs(peer(number), [ADDR], PERMANENT)
    return store


def test_the_least_recently_touched_peer_makes_room_unless_it_is_pinned() -> None:
    store = full_store()
    store.pin(peer(0))
    store.add_addrs(peer(1), [ADDR], PERMANENT)
    store.add_addrs(peer(MAX_PEERSTORE_PEERS), [ADDR], PERMANENT)
    assert len(store.peers()) == MAX_PEERSTORE_PEERS
    assert not store.addrs(peer(2))
    assert store.addrs(peer(0)) == store.addrs(peer(1)) == store.addrs(peer(MAX_PEERSTORE_PEERS)) == [ADDR]
    store.unpin(peer(0))
    store.add_addrs(peer(-1 % 2**256), [ADDR], PERMANENT)
    assert not store.addrs(peer(0))


def test_room_is_made_at_no_cost() -> None:
    """Peer ids are free, and a store that has been up for long is full: 2,000 new ones took 3 s."""
    store = full_store()
    started = time.thread_time()
    for number in range(2000):
        store.add_addrs(peer(MAX_PEERSTORE_PEERS + number), [ADDR], PERMANENT)
    assert time.thread_time() - started < 0.5


def test_nobody_is_dropped_who_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peerstore, "MAX_PEERSTORE_PEERS", 2)
    store = Peerstore(lambda: 0.0)
    for number in range(4):
        store.pin(peer(number))
        store.add_addrs(peer(number), [ADDR], PERMANENT)
    assert store.peers() == [peer(number) for number in range(4)]


def test_addresses_expire_and_the_longest_time_to_live_counts() -> None:
    now = [0.0]
    store = Peerstore(lambda: now[0])
    store.add_addrs(peer(1), [ADDR], 10.0)
    store.add_addrs(peer(1), [ADDR.with_peer(peer(1))], 5.0)
    now[0] = 7.0
    assert store.addrs(peer(1)) == [ADDR]
    now[0] = 11.0
    assert store.addrs(peer(1)) == []


def test_what_a_peer_says_of_itself_is_bounded() -> None:
    store = Peerstore(lambda: 0.0)
    addrs = [Multiaddr.parse(f"/ip4/192.0.2.1/tcp/{port}") for port in range(1, 3 * MAX_ADDRS_PER_PEER)]
    store.add_addrs(peer(1), addrs[1:], 5.0)
    store.add_addrs(peer(1), addrs[:1], 10.0)
    assert len(store.addrs(peer(1))) == MAX_ADDRS_PER_PEER
    assert addrs[0] in store.addrs(peer(1)), "the one that is known to last"
    store.set_info(peer(1), PeerInfo(protocols=frozenset(f"/{n}" for n in range(2 * MAX_PROTOCOLS_PER_PEER))))
    assert len(store.protocols(peer(1))) == MAX_PROTOCOLS_PER_PEER
