"""Many sources on an event heap: quick, slow, lying, vanishing, growing. Every run is replayed by its seed."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from lattica_protocols.blobs.chunk_set import ChunkSet
from lattica_protocols.blobs.fetch import CancelChunks, Completed, Fetch, SourceDropped
from lattica_protocols.limits import CHUNK_BYTES


@dataclass
class Peer:
    """Sends what it is asked for, one chunk after another."""

    have: ChunkSet
    rate: float = 50e6
    latency: float = 0.02
    lies: float = 0.0
    """Probability that a chunk is wrong."""
    dies_at: float = float("inf")
    """Its stream ends."""
    freezes_at: float = float("inf")
    """It keeps the stream and sends nothing more."""
    queue: list[int] = field(default_factory=list)
    busy: bool = False
    sent: int = 0


class Swarm:
    """Drives one `Fetch` over simulated peers."""

    def __init__(self, seed: int, count: int, peers: dict[str, Peer]) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.count = count
        self.peers = peers
        self.fetch: Fetch[str] = Fetch(count, rng=self.rng)
        self.log: list[tuple[float, str, str, int]] = []
        self.dropped: dict[str, bool] = {}
        self.wasted = 0
        self._order = itertools.count()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        for name, peer in peers.items():
            self.at(peer.latency, lambda name=name, peer=peer: self.fetch.add_source(name, peer.have, self.now))
            if peer.dies_at < float("inf"):
                self.at(peer.dies_at, lambda name=name: self.fetch.remove_source(name, self.now))

    def at(self, time: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (time, next(self._order), call))

    def grow(self, name: str, index: int, time: float) -> None:
        def do() -> None:
            self.peers[name].have.add(index)
            self.fetch.receive_more(name, [(index, 1)], self.now)

        self.at(time, do)

    def run(self, limit: float = 600.0) -> None:
        while self._heap and self.now < limit:
            timeout = self.fetch.next_timeout()
            if timeout is not None and timeout <= self._heap[0][0]:
                self.now = max(self.now, timeout)
                self.fetch.handle_timer(self.now)
            else:
                self.now, _, call = heapq.heappop(self._heap)
                call()
            self._pump()
            if self.fetch.complete:
                return
            timeout = self.fetch.next_timeout()
            if not self._heap and timeout is not None:
                self.at(max(self.now, timeout), lambda: self.fetch.handle_timer(self.now))

    def _pump(self) -> None:
        for command in self.fetch.poll_commands():
            peer = self.peers[command.source]
            indices = [i for first, count in command.ranges for i in range(first, first + count)]
            if isinstance(command, CancelChunks):
                self.log.append((self.now, command.source, "cancel", indices[0]))
                self.at(self.now + peer.latency, lambda peer=peer, gone=indices: self._cancel(peer, gone))
                continue
            for index in indices:
                assert index in peer.have, "asked for a chunk that the source does not have"
                self.log.append((self.now, command.source, "get", index))
            name = command.source
            self.at(self.now + peer.latency, lambda name=name, more=indices: self._ask(name, more))
        while (event := self.fetch.next_event()) is not None:
            if isinstance(event, SourceDropped):
                self.dropped[event.source] = event.liar
                self.peers[event.source].queue.clear()
            elif isinstance(event, Completed):
                self.log.append((self.now, "", "done", 0))

    def _cancel(self, peer: Peer, gone: list[int]) -> None:
        peer.queue = [index for index in peer.queue if index not in gone]

    def _ask(self, name: str, more: list[int]) -> None:
        peer = self.peers[name]
        peer.queue += more
        if not peer.busy:
            self._send_next(name)

    def _send_next(self, name: str) -> None:
        peer = self.peers[name]
        peer.busy = bool(peer.queue) and self.now < min(peer.dies_at, peer.freezes_at)
        if not peer.busy:
            return
        index = peer.queue.pop(0)
        done = self.now + CHUNK_BYTES / peer.rate
        self.at(done, lambda: self._send_next(name))
        if done < min(peer.dies_at, peer.freezes_at):
            peer.sent += 1
            self.at(done + peer.latency, lambda: self._arrive(name, index))

    def _arrive(self, name: str, index: int) -> None:
        if name in self.dropped or self.now >= self.peers[name].dies_at:
            return
        if not self.fetch.receive_chunk(name, index, CHUNK_BYTES, self.now):
            self.wasted += 1
        elif self.rng.random() < self.peers[name].lies:
            self.fetch.chunk_corrupt(name, index, self.now)
        else:
            self.fetch.chunk_verified(index, self.now)


def seeds(count: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("seed", range(count))


@seeds(5)
def test_bandwidth_of_all_sources_adds_up(seed: int) -> None:
    count = 400
    rates = (80e6, 40e6, 20e6, 5e6, 1e6)
    peers = {f"p{i}": Peer(ChunkSet(count, full=True), rate=rate) for i, rate in enumerate(rates)}
    swarm = Swarm(seed, count, peers)
    swarm.run()
    assert swarm.fetch.complete
    ideal = count * CHUNK_BYTES / sum(peer.rate for peer in peers.values())
    assert swarm.now < 1.25 * ideal + 0.5
    assert swarm.wasted <= 10


@seeds(5)
def test_one_source_at_its_rate_whatever_the_latency(seed: int) -> None:
    swarm = Swarm(seed, 600, {"far": Peer(ChunkSet(600, full=True), rate=100e6, latency=0.15)})
    swarm.run()
    assert swarm.fetch.complete
    assert swarm.now < 1.4 * 600 * CHUNK_BYTES / 100e6 + 1.5
    assert swarm.wasted == 0


@seeds(20)
def test_a_hostile_crowd(seed: int) -> None:
    rng = random.Random(seed)
    count = 300
    peers = {"honest": Peer(ChunkSet(count, full=True), rate=10e6)}
    for i in range(12):
        have = ChunkSet(count, full=rng.random() < 0.5)
        for index in range(count):
            if rng.random() < 0.4:
                have.add(index)
        peers[f"p{i}"] = Peer(
            have,
            rate=rng.uniform(1e6, 80e6),
            latency=rng.uniform(0.001, 0.2),
            lies=rng.choice([0, 0, 0.05, 1]),
            dies_at=rng.choice([float("inf"), rng.uniform(0, 5)]),
            freezes_at=rng.choice([float("inf"), rng.uniform(0, 5)]),
        )
    swarm = Swarm(seed, count, peers)
    swarm.run()
    assert swarm.fetch.complete
    assert "honest" not in swarm.dropped
    assert all(peers[name].lies > 0 for name, liar in swarm.dropped.items() if liar)


@seeds(5)
def test_freezing_sources_cost_a_few_seconds(seed: int) -> None:
    count = 200
    peers = {"ok": Peer(ChunkSet(count, full=True), rate=50e6)}
    peers |= {f"f{i}": Peer(ChunkSet(count, full=True), rate=50e6, freezes_at=0.3) for i in range(4)}
    swarm = Swarm(seed, count, peers)
    swarm.run()
    assert swarm.fetch.complete
    assert swarm.now < count * CHUNK_BYTES / 50e6 + 6


@seeds(5)
def test_partial_holders_that_grow_are_enough_together(seed: int) -> None:
    count = 120
    rng = random.Random(seed)
    peers = {f"p{i}": Peer(ChunkSet(count), rate=20e6) for i in range(4)}
    swarm = Swarm(seed, count, peers)
    for index in range(count):
        swarm.grow(f"p{rng.randrange(4)}", index, rng.uniform(0.1, 8.0))
    swarm.run()
    assert swarm.fetch.complete
    assert swarm.now < 10


def test_the_same_seed_gives_the_same_run() -> None:
    def run(seed: int) -> list[tuple[float, str, str, int]]:
        peers = {f"p{i}": Peer(ChunkSet(50, full=True), rate=1e7 * (i + 1), lies=0.02) for i in range(3)}
        swarm = Swarm(seed, 50, peers)
        swarm.run()
        return swarm.log

    assert run(1) == run(1)
    assert run(1) != run(2)
