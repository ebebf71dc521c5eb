"""A thousand Kademlia machines on a simulated internet: latency, loss, churn, a Sybil attack.

No trio, no sockets: an event heap and the machines of `lattica_protocols.kad`. Each test prints its seed; run one again
with `LATTICA_SIM_SEED=<seed>`.
"""

from __future__ import annotations

import heapq
import os
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from lattica_protocols.kad.keyspace import position
from lattica_protocols.kad.lookup import Lookup, ProvidersLookup, ValueLookup
from lattica_protocols.kad.messages import (
    KadMessage,
    MessageType,
    PeerAddrs,
    Record,
    decode_message_untrusted,
    encode_answer,
    peer_entry,
    peers_untrusted,
)
from lattica_protocols.kad.records import Validators, seal_value
from lattica_protocols.kad.routing import RoutingTable
from lattica_protocols.kad.server import KadServer
from lattica_protocols.keys import PrivateKey
from lattica_protocols.limits import KAD_MAX_TABLE_PEERS_PER_SUBNET
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId

UNIX_START = 1_800_000_000.0
NODES = 1000
LATENCY = (0.01, 0.15)
"""Seconds one way, drawn for each message."""
LOSS = 0.02
"""Of all requests, as seen above TCP: a connection that breaks or cannot be made."""
REQUEST_TIMEOUT = 10.0


@pytest.fixture
def rng() -> random.Random:
    seed = int(os.environ.get("LATTICA_SIM_SEED") or random.SystemRandom().getrandbits(32))
    print(f"LATTICA_SIM_SEED={seed}")  # noqa: T201
    return random.Random(seed)


@dataclass
class Outcome:
    """What a lookup ended with."""

    lookup: Lookup
    seconds: float


class Node:
    """One peer's machines."""

    def __init__(self, net: Network, peer: PeerId, addr: Multiaddr) -> None:
        self.net = net
        self.peer = peer
        self.addr = addr
        self.alive = True
        self.table = RoutingTable(peer, net.now)
        self.server = KadServer(peer, self.table, self.addresses, validators=Validators())

    def addresses(self, peer: PeerId) -> tuple[Multiaddr, ...]:
        return (self.net.nodes[peer].addr,) if peer in self.table else ()

    def met(self, other: Node) -> None:
        """A connection with `other` is up and identified."""
        self.table.add(other.peer, [other.addr], self.net.now)
        while (wanted := self.table.next_event()) is not None:
            target = self.net.nodes[wanted.peer]
            self.net.request(self, target, None, lambda answer: None)

    def start(self, lookup: Lookup, message: KadMessage, done: Callable[[Outcome], None]) -> None:
        """Drive `lookup` with `message` until it is finished."""
        started = self.net.now
        ended = False

        def pump() -> None:
            nonlocal ended
            if ended:
                return
            while (peer := lookup.next(self.net.now)) is not None:
                self.net.request(self, self.net.nodes[peer], message, answered(peer))
            if lookup.finished:
                ended = True
                done(Outcome(lookup, self.net.now - started))
                return
            timeout = lookup.next_timeout()
            if timeout is not None:
                self.net.at(max(timeout, self.net.now), pump)

        def answered(peer: PeerId) -> Callable[[KadMessage | None], None]:
            def callback(answer: KadMessage | None) -> None:
                if ended:
                    return
                if answer is None:
                    lookup.on_failure(peer, self.net.now)
                else:
                    if isinstance(lookup, ProvidersLookup):
                        lookup.on_providers(peers_untrusted(answer.provider_peers, 64))
                    if isinstance(lookup, ValueLookup):
                        value = answer.record.value if answer.record else None
                        lookup.on_value(peer, value, self.net.unix_now)
                    closer = [p.peer for p in peers_untrusted(answer.closer_peers, 20)]
                    lookup.on_success(peer, closer, self.net.now)
                pump()

            return callback

        pump()

    def find(self, key: bytes) -> tuple[Lookup, KadMessage]:
        lookup = Lookup(key, self.table.closest(key), own=self.peer)
        return lookup, KadMessage(type=MessageType.FIND_NODE, key=key)


class Network:
    """The event heap, and what connects the nodes."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.now = 0.0
        self.nodes: dict[PeerId, Node] = {}
        self.requests = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0

    @property
    def unix_now(self) -> float:
        return UNIX_START + self.now

    def at(self, when: float, what: Callable[[], None]) -> None:
        self._serial += 1
        heapq.heappush(self._heap, (when, self._serial, what))

    def run(self, seconds: float, *, until: Callable[[], bool] = lambda: False) -> None:
        """Let `seconds` pass, or what there is to do until the condition holds."""
        end = self.now + seconds
        while self._heap and self._heap[0][0] <= end and not until():
            self.now, _, what = heapq.heappop(self._heap)
            what()
        if not until():
            self.now = end

    def request(
        self, sender: Node, target: Node, message: KadMessage | None, done: Callable[[KadMessage | None], None]
    ) -> None:
        """A request and its answer, or `None` when the time is up. No message: only whether it is there."""
        self.requests += 1

        def arrive() -> None:
            if not target.alive or self.rng.random() < LOSS:
                self.at(self.now + REQUEST_TIMEOUT, lambda: fail())
                return
            target.met(sender)
            answer = None
            if message is not None:
                answer = target.server.answer_untrusted(message, sender.peer, sender.addr, self.unix_now)
                if answer is not None and self.requests % 50 == 0:  # through the wire now and then
                    answer = decode_message_untrusted(encode_answer(answer))
            self.at(self.now + self.rng.uniform(*LATENCY), lambda: succeed(answer))

        def succeed(answer: KadMessage | None) -> None:
            if sender.alive:
                sender.met(target)
                sender.table.succeeded(target.peer, self.now)
                done(answer or KadMessage())

        def fail() -> None:
            if sender.alive:
                sender.table.failed(target.peer)
                done(None)

        self.at(self.now + self.rng.uniform(*LATENCY), arrive)

    def add(self, addr: Multiaddr | None = None) -> Node:
        peer = PeerId.from_bytes_untrusted(bytes.fromhex("002408011220") + self.rng.randbytes(32))
        if addr is None:
            host = ".".join(str(self.rng.randrange(1, 255)) for _ in range(3))
            addr = Multiaddr.parse(f"/ip4/{self.rng.choice((5, 8, 23, 45, 77, 91))}.{host}/tcp/4101")
        node = self.nodes[peer] = Node(self, peer, addr)
        return node

    def join(self, node: Node, known: Node) -> None:
        """Connect with `known`, look up ourselves, then a key in one of the buckets."""
        node.met(known)
        known.met(node)

        def refresh(outcome: Outcome) -> None:
            for key in node.table.refresh_keys(self.now, self.rng, older_than=0.0)[:1]:
                node.start(*node.find(key), lambda outcome: None)

        node.start(*node.find(node.peer.to_bytes()), refresh)

    def grow(self, count: int, interval: float = 0.05) -> list[Node]:
        """`count` nodes that join one after the other by way of a random node."""
        new = []

        def one() -> None:
            present = self.living()
            node = self.add()
            new.append(node)
            if present:
                self.join(node, self.rng.choice(present))

        for index in range(count):
            self.at(self.now + index * interval, one)
        self.run(count * interval + 2 * REQUEST_TIMEOUT)
        return new

    def settle(self, count: int) -> None:
        """`count` nodes as they are after some time: each knows its neighbours and some others."""
        new = [self.add() for _ in range(count)]
        near = sorted(new, key=lambda node: position(node.peer.to_bytes()))
        for index, node in enumerate(near):
            around = near[max(0, index - 16) : index + 17]
            for other in (*around, *self.rng.sample(new, min(count, 50))):
                node.met(other)

    def living(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.alive]

    def true_closest(self, key: bytes, count: int, without: Node) -> list[PeerId]:
        target = position(key)
        peers = (node.peer for node in self.living() if node is not without)
        return heapq.nsmallest(count, peers, key=lambda peer: position(peer.to_bytes()) ^ target)

    def look_up(self, node: Node, lookup: Lookup, message: KadMessage) -> Outcome:
        outcomes: list[Outcome] = []
        node.start(lookup, message, outcomes.append)
        self.run(120, until=lambda: bool(outcomes))
        return outcomes[0]


def content_key(rng: random.Random) -> bytes:
    return b"\x12\x20" + rng.randbytes(32)


def announce(net: Network, provider: Node, key: bytes) -> None:
    """As `KadService.announce`: a lookup, then ADD_PROVIDER to the k closest."""
    closest = net.look_up(provider, *provider.find(key)).lookup.result()
    entry = peer_entry(PeerAddrs(provider.peer, (provider.addr,)))
    message = KadMessage(type=MessageType.ADD_PROVIDER, key=key, provider_peers=(entry,))
    for peer in closest:
        net.request(provider, net.nodes[peer], message, lambda answer: None)
    net.run(2 * REQUEST_TIMEOUT)


def check_lookups(net: Network, count: int) -> None:
    found = expected = first = 0
    seconds, requests = [], []
    for _ in range(count):
        node, key = net.rng.choice(net.living()), content_key(net.rng)
        outcome = net.look_up(node, *node.find(key))
        truth = net.true_closest(key, 20, node)
        result = outcome.lookup.result()
        found += len(set(truth) & set(result))
        expected += len(truth)
        first += result[0] == truth[0]
        seconds.append(outcome.seconds)
        requests.append(outcome.lookup.requests)
    print(  # noqa: T201
        f"{len(net.nodes)} nodes: {found / expected:.4f} of the true 20 closest, the first of them "
        f"{first / count:.2f}; median {sorted(seconds)[count // 2]:.2f} s, "
        f"{sorted(requests)[count // 2]} requests a lookup"
    )
    assert found / expected > 0.95  # 2 % of the requests are lost
    assert first >= 0.9 * count
    assert sorted(seconds)[count // 2] < 3
    assert all(len(bucket) <= 20 for node in net.living() for bucket in node.table.buckets)


def test_lookups_find_the_true_closest(rng: random.Random) -> None:
    net = Network(rng)
    net.settle(NODES)
    check_lookups(net, 60)


def test_a_network_grows_from_one_node(rng: random.Random) -> None:
    """Nobody knows anything but one peer that was there before."""
    net = Network(rng)
    net.grow(120)
    check_lookups(net, 60)


def test_records_survive_churn(rng: random.Random) -> None:
    """Providers and values are found after 30 % of the peers vanished without a word, and new ones came."""
    net = Network(rng)
    net.settle(NODES)
    expires = int(net.unix_now) + 3600
    stored: list[tuple[bytes, Node]] = []
    for _ in range(25):
        key, provider = content_key(rng), rng.choice(net.living())
        announce(net, provider, key)
        stored.append((key, provider))
    values = []
    for number in range(10):
        private_key = PrivateKey.generate(rng.randbytes(32))
        key, old = seal_value(private_key, "state", b"old", sequence=number + 1, expires=expires)
        _, new = seal_value(private_key, "state", b"new", sequence=number + 2, expires=expires)
        node = rng.choice(net.living())
        holders = net.look_up(node, *node.find(key)).lookup.result()
        for index, peer in enumerate(holders):
            record = new if index % 2 else old
            message = KadMessage(type=MessageType.PUT_VALUE, key=key, record=Record(key=key, value=record))
            net.request(node, net.nodes[peer], message, lambda answer: None)
        net.run(2 * REQUEST_TIMEOUT)
        values.append((key, new))

    protected = {provider.peer for _, provider in stored}
    victims = [node for node in net.living() if node.peer not in protected]
    for node in rng.sample(victims, NODES * 3 // 10):
        node.alive = False
    net.grow(NODES // 20)

    found, seconds = 0, []
    for key, provider in stored:
        node = rng.choice([n for n in net.living() if n is not provider])
        lookup = ProvidersLookup(key, node.table.closest(key), wanted=1, own=node.peer)
        outcome = net.look_up(node, lookup, KadMessage(type=MessageType.GET_PROVIDERS, key=key))
        found += provider.peer in {p.peer for p in lookup.providers()}
        seconds.append(outcome.seconds)
    newest = 0
    for key, new in values:
        node = rng.choice(net.living())
        value_lookup = ValueLookup(key, node.table.closest(key), Validators(), own=node.peer)
        net.look_up(node, value_lookup, KadMessage(type=MessageType.GET_VALUE, key=key))
        newest += value_lookup.best == new
        assert all(net.nodes[peer].alive for peer in value_lookup.stale())
    print(  # noqa: T201
        f"providers found {found}/{len(stored)}, newest value {newest}/{len(values)}, "
        f"median {sorted(seconds)[len(seconds) // 2]:.2f} s"
    )
    assert found >= len(stored) - 1
    assert newest >= len(values) - 1


def test_one_subnet_cannot_fill_a_bucket(rng: random.Random) -> None:
    """An attacker with a /24 and 250 identities, all eager to be known, gets two places in each bucket."""
    net = Network(rng)
    honest = net.grow(60)
    sybils = [net.add(Multiaddr.parse(f"/ip4/66.1.2.{n % 254 + 1}/tcp/{4000 + n}")) for n in range(250)]
    for sybil in sybils:
        for node in honest:
            node.met(sybil)
    net.run(2 * REQUEST_TIMEOUT)
    bad = {sybil.peer for sybil in sybils}
    for node in honest:
        for bucket in node.table.buckets:
            inside = sum(contact.peer in bad for contact in bucket.nodes.values())
            assert inside <= KAD_MAX_TABLE_PEERS_PER_SUBNET
    key = content_key(rng)
    for sybil in sybils:  # and they are of no use to anybody: they do not answer
        sybil.alive = False
    truth = heapq.nsmallest(20, (n.peer for n in honest[1:]), key=lambda p: position(p.to_bytes()) ^ position(key))
    result = net.look_up(honest[0], *honest[0].find(key)).lookup.result()
    assert len(set(truth) & set(result)) >= 18


def test_flood_does_not_displace_old_peers(rng: random.Random) -> None:
    """A full bucket keeps its living peers, whoever comes; dead ones make room."""
    net = Network(rng)
    node = net.add()
    old = [net.add() for _ in range(60)]
    for other in old:
        node.met(other)
    before = set(node.table.peers())
    net.now += 3600
    for _ in range(1000):
        node.met(net.add())
    net.run(2 * REQUEST_TIMEOUT)
    lost = before - set(node.table.peers())
    assert len(lost) <= 4, "only what a lost ping costs"
    for other in old:
        other.alive = False
    for _ in range(30):
        net.now += 120
        for _ in range(50):
            node.met(net.add())
        net.run(2 * REQUEST_TIMEOUT)
    far = [bucket for bucket in node.table.buckets if not bucket.contains(node.table.node.long_id)]
    assert len(far[0]) == 20
    assert not {contact.peer for contact in far[0].nodes.values()} <= {other.peer for other in old}


def test_the_same_seed_gives_the_same_run() -> None:
    def trace(seed: int) -> list[object]:
        net = Network(random.Random(seed))
        net.grow(25)
        node, key = net.living()[7], content_key(net.rng)
        outcome = net.look_up(node, *node.find(key))
        return [net.now, net.requests, outcome.seconds, outcome.lookup.result()]

    assert trace(11) == trace(11) != trace(12)
