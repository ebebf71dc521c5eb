"""The routing table: k-buckets of the `kademlia` package with our key space and our liveness policy.

The package gives the buckets (ordered by last contact, splitting in two, each with a replacement list). What differs:

* 256 bits and SHA-256 positions; ranges are inclusive on both ends, as the package's `split` makes them.
* Only the bucket that contains our own position splits.
* A full bucket asks for a ping of its least recently seen peer (`next_event` -> `PingWanted`) instead of starting an
  asyncio task. If that peer fails it makes room for the newest replacement; if it answers it moves to the young end.
  Old peers that live are kept: they are the likeliest to stay, and a flood of new ones cannot flush the table.
* At most two peers of one IPv4 /24 or IPv6 /48 per bucket, replacements included, private addresses aside.
* `closest` looks at every peer; the package stops at the first k of its walk, which need not be the k closest.
* The clock is an argument.

Only peers that serve the protocol and whose connection was authenticated belong in here; the caller sees to it.
(`kademlia.routing` imports asyncio. Only its data structures are used; nothing of ours touches an event loop.)
"""

from __future__ import annotations

import bisect
import heapq
import ipaddress
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import TypeAlias

from kademlia.routing import KBucket
from kademlia.routing import RoutingTable as PackageTable

from lattica_protocols.kad.keyspace import BITS, PeerPlace, Place, position, shared_bits
from lattica_protocols.limits import KAD_MAX_TABLE_PEERS_PER_SUBNET
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId

K = 20
"""Size of a bucket and number of peers that hold a record (Kademlia paper; libp2p)."""

REFRESH_INTERVAL = 600.0
"""Seconds after which a bucket nobody asked about is looked up (go-libp2p-kad-dht)."""

FRESH = 300.0
"""Seconds for which a peer that was heard is not pinged. Each newcomer to a full bucket would cost a ping, and the ping
makes us a newcomer to that peer: without a pause a network in which nothing happens pings itself for ever."""

FAILURES_ALLOWED = 2
"""Failed requests in a row before a peer leaves the table. One may be a lost packet or a moment of overload."""

REFRESH_DEPTH = 10
"""Buckets deeper than that many bits hold peers so close to us that the lookup of ourselves finds them."""

Subnet: TypeAlias = str


@dataclass(frozen=True, slots=True)
class PingWanted:
    """A bucket is full: find out whether its least recently seen peer lives, by `succeeded` or `failed`."""

    peer: PeerId


class Contact(PeerPlace):
    """A peer in the table."""

    subnets: frozenset[Subnet]
    last_seen: float
    failures: int

    def __init__(self, peer: PeerId, subnets: frozenset[Subnet], now: float) -> None:
        super().__init__(peer)
        self.subnets = subnets
        self.last_seen = now
        self.failures = 0


class Bucket(KBucket):  # type: ignore[misc]  # the package has no type information
    """A range of positions with up to k peers, oldest contact first, and up to k replacements, newest last."""

    nodes: OrderedDict[bytes, Contact]
    replacement_nodes: OrderedDict[bytes, Contact]
    last_updated: float

    def __init__(self, low: int, high: int, size: int, now: float) -> None:
        self._now = now
        super().__init__(low, high, size, replacementNodeFactor=1)

    def touch_last_updated(self) -> None:
        """Called by the package's constructor, which would read the clock."""
        self.last_updated = self._now

    def add_node(self, node: Contact) -> bool:
        """Whether `node` is in the bucket now. When not, it is a replacement unless its subnet has its share."""
        if self._subnet_is_full(node):
            self.nodes.pop(node.id, None)  # it was let in from another subnet
            self.replacement_nodes.pop(node.id, None)
            return False
        if len(self) < self.ksize:
            self.replacement_nodes.pop(node.id, None)
        return bool(super().add_node(node))

    def _subnet_is_full(self, node: Contact) -> bool:
        others = [c for c in (*self.nodes.values(), *self.replacement_nodes.values()) if c.id != node.id]
        return any(
            sum(subnet in other.subnets for other in others) >= KAD_MAX_TABLE_PEERS_PER_SUBNET
            for subnet in node.subnets
        )

    def split(self) -> tuple[Bucket, Bucket]:
        """Two halves of the range, each peer in its half in the same order. The package's makes plain `KBucket`s."""
        low, high = self.range
        middle = (low + high) // 2
        halves = (
            Bucket(low, middle, self.ksize, self.last_updated),
            Bucket(middle + 1, high, self.ksize, self.last_updated),
        )
        for node in (*self.nodes.values(), *self.replacement_nodes.values()):
            halves[node.long_id > middle].add_node(node)
        return halves

    def bits(self) -> int:
        """Length of the prefix that all positions of this bucket share."""
        return shared_bits(*self.range)

    def contains(self, place: int) -> bool:
        return bool(self.range[0] <= place <= self.range[1])


class RoutingTable(PackageTable):  # type: ignore[misc]  # the package has no type information
    """The peers we know, sorted by distance from ourselves; about k of each distance."""

    node: PeerPlace
    buckets: list[Bucket]
    ksize: int

    def __init__(self, own: PeerId, now: float, *, k: int = K) -> None:
        self._now = now
        self._contacts: dict[PeerId, Contact] = {}
        self._pinging: set[PeerId] = set()
        self._events: deque[PingWanted] = deque()
        super().__init__(None, k, PeerPlace(own))

    # -- what happened ------------------------------------------------------------------------------------
    def add(self, peer: PeerId, addrs: Iterable[Multiaddr], now: float) -> bool:
        """A peer that serves our protocol was heard; true when it is in the table now.

        `addrs` are the addresses of the connections it was heard on, not those it claims: they say what subnet it
        is in. A full bucket leads to a `PingWanted`.
        """
        if peer == self.node.peer:
            return False
        contact = Contact(peer, subnets_of(addrs), now)
        self.add_contact(contact)
        return peer in self._contacts

    def succeeded(self, peer: PeerId, now: float) -> None:
        """`peer` answered something."""
        self._pinging.discard(peer)
        contact = self._contacts.get(peer)
        if contact is None:
            return
        contact.failures = 0
        contact.last_seen = now
        self._bucket_of(contact).nodes.move_to_end(contact.id)

    def failed(self, peer: PeerId) -> None:
        """`peer` could not be reached or did not answer."""
        contact = self._contacts.get(peer)
        if contact is not None:
            contact.failures += 1
            if peer in self._pinging or contact.failures >= FAILURES_ALLOWED:
                self.remove(peer)
        self._pinging.discard(peer)

    def remove(self, peer: PeerId) -> None:
        """`peer` does not serve our protocol any more, or is gone."""
        contact = self._contacts.get(peer) or Contact(peer, frozenset(), 0.0)
        self.remove_contact(contact)

    def looked_up(self, key: bytes, now: float) -> None:
        """A lookup towards `key` was made: its bucket needs no refresh for a while."""
        self._bucket_of(Place(key)).last_updated = now

    def next_event(self) -> PingWanted | None:
        return self._events.popleft() if self._events else None

    # -- what is known ------------------------------------------------------------------------------------
    def closest(self, key: bytes, count: int | None = None, *, exclude: PeerId | None = None) -> list[PeerId]:
        """The `count` (default k) peers closest to `key`, closest first."""
        target = position(key)
        contacts: Iterable[Contact] = self._contacts.values()
        if exclude is not None:
            contacts = [c for c in contacts if c.peer != exclude]
        nearest = heapq.nsmallest(count or self.ksize, contacts, key=lambda c: c.long_id ^ target)
        return [contact.peer for contact in nearest]

    def peers(self) -> list[PeerId]:
        """All peers in the table."""
        return list(self._contacts)

    def __contains__(self, peer: object) -> bool:
        return peer in self._contacts

    def __len__(self) -> int:
        return len(self._contacts)

    def last_seen(self, peer: PeerId) -> float | None:
        """When `peer` was last heard, `None` when it is not in the table."""
        contact = self._contacts.get(peer)
        return None if contact is None else contact.last_seen

    def bucket_sizes(self) -> list[tuple[int, int]]:
        """(bits shared with us, number of peers) of each bucket, far to near."""
        own = self.node.long_id
        return sorted(
            (bucket.bits() if bucket.contains(own) else shared_bits(own, bucket.range[0]), len(bucket))
            for bucket in self.buckets
        )

    def refresh_keys(self, now: float, rng: Random, *, older_than: float = REFRESH_INTERVAL) -> list[bytes]:
        """A key in each bucket that was not looked up for `older_than` seconds; look them up, and ourselves.

        A key has the form of a peer id (SHA-256 multihash). It has to be found by trying, as positions are hashes:
        2,048 tries on average for the deepest bucket, at most 8,192 (about 8 ms) for all.
        """
        wanted = [
            bucket
            for bucket in self.buckets
            if bucket.last_updated + older_than <= now and bucket.bits() <= REFRESH_DEPTH
        ]
        keys: list[bytes] = []
        for _ in range(1 << (REFRESH_DEPTH + 3)):
            if not wanted:
                break
            key = b"\x12\x20" + rng.randbytes(32)
            place = position.__wrapped__(key)
            for bucket in wanted:
                if bucket.contains(place):
                    wanted.remove(bucket)
                    keys.append(key)
                    break
        return keys

    # -- what the package calls or does otherwise ---------------------------------------------------------
    def flush(self) -> None:
        """Empty the table. The package's covers 160 bits, and one position too many."""
        self._contacts.clear()
        self.buckets = [Bucket(0, (1 << BITS) - 1, self.ksize, self._now)]

    def get_bucket_for(self, node: Place) -> int:
        """Index of the bucket of `node`. The package's takes the upper end of a range for exclusive."""
        return bisect.bisect_left(self.buckets, node.long_id, key=lambda bucket: bucket.range[1])

    def add_contact(self, node: Contact) -> None:
        """As the package's, without its asyncio task; see the module's policy."""
        while True:
            index = self.get_bucket_for(node)
            bucket = self.buckets[index]
            if bucket.add_node(node):
                self._contacts[node.peer] = node
                return
            if node.id not in bucket.replacement_nodes:
                self._contacts.pop(node.peer, None)
                return
            if not bucket.contains(self.node.long_id) or bucket.bits() >= BITS - 1:
                break
            self.split_bucket(index)
            self._index(index, index + 1)
        oldest: Contact = bucket.head()
        if node.last_seen - oldest.last_seen >= FRESH and oldest.peer not in self._pinging:
            self._pinging.add(oldest.peer)
            self._events.append(PingWanted(oldest.peer))

    def remove_contact(self, node: Contact) -> None:
        """As the package's: the newest replacement takes the place."""
        self._contacts.pop(node.peer, None)
        self._pinging.discard(node.peer)
        index = self.get_bucket_for(node)
        self.buckets[index].remove_node(node)
        self._index(index)

    def find_neighbors(self, node: Place, k: int | None = None, exclude: Place | None = None) -> list[Contact]:
        """The true k closest contacts; `closest` is the same with peer ids."""
        found = [self._contacts[peer] for peer in self.closest(node.id, (k or self.ksize) + 2)]
        return [c for c in found if c.id != node.id and (exclude is None or c.id != exclude.id)][: k or self.ksize]

    def lonely_buckets(self) -> list[Bucket]:
        raise NotImplementedError("the package's reads the clock: use refresh_keys")

    def _index(self, *indices: int) -> None:
        """Peers that moved up from a replacement list become contacts."""
        for index in indices:
            for contact in self.buckets[index].nodes.values():
                self._contacts[contact.peer] = contact

    def _bucket_of(self, node: Place) -> Bucket:
        return self.buckets[self.get_bucket_for(node)]


def subnets_of(addrs: Iterable[Multiaddr]) -> frozenset[Subnet]:
    """The IPv4 /24s and IPv6 /48s of the public addresses among `addrs`. A relayed path counts for its relay."""
    found = set()
    for addr in addrs:
        ip = addr.ip()
        if ip is not None and addr.is_global:
            found.add(str(ipaddress.ip_network((int(ip), 24 if ip.version == 4 else 48), strict=False)))
    return frozenset(found)
