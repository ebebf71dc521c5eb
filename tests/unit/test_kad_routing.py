"""The routing table alone."""

from __future__ import annotations

import itertools
import random

from lattica_protocols.kad.keyspace import BITS, position, shared_bits
from lattica_protocols.kad.routing import FRESH, PingWanted, RoutingTable, subnets_of
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId


def peer(n: int) -> PeerId:
    return PeerId.from_bytes_untrusted(bytes.fromhex("002408011220") + n.to_bytes(32, "big"))


def filled(count: int, now: float = 0.0) -> RoutingTable:
    table = RoutingTable(peer(0), now)
    for n in range(1, count + 1):
        table.add(peer(n), [], now)
    return table


def far_peers(own: PeerId, count: int, start: int = 1000) -> list[PeerId]:
    """Peers in the half of the key space that `own` is not in."""
    out, n = [], start
    while len(out) < count:
        if shared_bits(position(own.to_bytes()), position(peer(n).to_bytes())) == 0:
            out.append(peer(n))
        n += 1
    return out


def test_buckets_split_only_around_ourselves() -> None:
    table = filled(2000)
    sizes = table.bucket_sizes()
    assert [bits for bits, _ in sizes] == sorted(bits for bits, _ in sizes)
    assert sizes[0] == (0, 20)
    assert len(sizes) < 12
    assert sum(size for _, size in sizes) == len(table) == len(table.peers())
    ranges = [bucket.range for bucket in table.buckets]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == 2**BITS - 1
    assert all(low[1] + 1 == high[0] for low, high in itertools.pairwise(ranges))
    for bucket in table.buckets:
        assert all(bucket.contains(contact.long_id) for contact in bucket.nodes.values())


def test_we_are_not_in_our_table() -> None:
    table = RoutingTable(peer(0), 0.0)
    assert not table.add(peer(0), [], 0.0)
    assert len(table) == 0


def test_closest_are_the_true_closest() -> None:
    table = filled(500)
    rng = random.Random(1)
    for _ in range(50):
        key = rng.randbytes(32)
        target = position(key)
        truth = sorted(table.peers(), key=lambda p: position(p.to_bytes()) ^ target)
        assert table.closest(key) == truth[:20]
        assert table.closest(key, 3, exclude=truth[0]) == truth[1:4]


def test_full_bucket_asks_for_its_oldest() -> None:
    table = RoutingTable(peer(0), 0.0)
    far = far_peers(peer(0), 23)
    for n, contact in enumerate(far[:20]):
        assert table.add(contact, [], float(n))
    table.add(peer(1), [], 20.0)  # makes the bucket split if it is in the near half
    assert not table.add(far[20], [], 21.0)
    assert table.next_event() is None, "it was heard a moment ago"
    assert not table.add(far[21], [], FRESH + 30)
    assert not table.add(far[22], [], FRESH + 30)
    assert table.next_event() == PingWanted(far[0])
    assert table.next_event() is None, "one ping per bucket at a time"
    table.succeeded(far[0], FRESH + 31)
    assert far[0] in table
    assert far[22] not in table
    assert not table.add(far[22], [], FRESH + 32)
    assert table.next_event() == PingWanted(far[1])
    table.failed(far[1])
    assert far[1] not in table
    assert far[22] in table, "the newest replacement takes the place"


def test_two_failures_cost_the_place() -> None:
    table = filled(5)
    table.failed(peer(3))
    assert peer(3) in table
    table.succeeded(peer(3), 1.0)
    table.failed(peer(3))
    assert peer(3) in table
    table.failed(peer(3))
    assert peer(3) not in table
    table.failed(peer(3))
    table.remove(peer(77))
    assert len(table) == 4
    assert table.last_seen(peer(3)) is None


def test_subnets() -> None:
    def addrs(*texts: str) -> list[Multiaddr]:
        return [Multiaddr.parse(text) for text in texts]

    assert subnets_of(addrs("/ip4/8.8.8.8/tcp/1", "/ip4/8.8.8.9/udp/1/quic-v1")) == {"8.8.8.0/24"}
    assert subnets_of(addrs("/ip6/2600:1:2:3::1/tcp/1")) == {"2600:1:2::/48"}
    assert subnets_of(addrs("/ip4/10.0.0.1/tcp/1", "/ip4/127.0.0.1/tcp/1", "/dns4/x.org/tcp/1", "/memory/1")) == set()
    assert subnets_of(addrs("/ip6/::ffff:8.8.8.8/tcp/1")) == {"8.8.8.0/24"}


def test_one_subnet_gets_two_places_in_a_bucket() -> None:
    table = RoutingTable(peer(0), 0.0)
    far = far_peers(peer(0), 10)
    same = [Multiaddr.parse("/ip4/8.8.8.8/tcp/1")]
    assert [table.add(contact, same, 0.0) for contact in far[:4]] == [True, True, False, False]
    assert table.add(far[4], [Multiaddr.parse("/ip4/8.8.9.8/tcp/1")], 0.0)
    local = [Multiaddr.parse("/ip4/192.168.1.7/tcp/1")]
    assert all(table.add(contact, local, 0.0) for contact in far[5:])
    # Nobody gets round it by coming from elsewhere first.
    assert not table.add(far[4], same, 1.0)
    assert far[4] not in table
    table.remove(far[0])
    assert table.add(far[2], same, 2.0)


def test_refresh_keys_fall_into_their_buckets() -> None:
    table = filled(1000)
    keys = table.refresh_keys(700.0, random.Random(3))
    assert len(keys) == len(table.buckets)
    buckets = {table.get_bucket_for(place) for place in map(_place, keys)}
    assert buckets == set(range(len(table.buckets)))
    for key in keys:
        table.looked_up(key, 700.0)
    assert table.refresh_keys(900.0, random.Random(3)) == []
    assert len(table.refresh_keys(900.0, random.Random(3), older_than=100.0)) == len(keys)


def _place(key: bytes):  # type: ignore[no-untyped-def]
    from lattica_protocols.kad.keyspace import Place

    return Place(key)


def test_flush() -> None:
    table = filled(100)
    table.flush()
    assert len(table) == 0
    assert table.closest(b"x") == []
