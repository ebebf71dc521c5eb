"""Replicas under everything that goes wrong: every run ends with one root and one document.

A few dozen runs here; `python tests/sim/replica_runs.py --runs 1000` makes a thousand with 50 replicas each.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from replica_cheats import cheat, crowd, withhold
from replica_network import UNIX, Network, edit_at_random
from replica_runs import run

from lattica_protocols.keys import PrivateKey
from lattica_protocols.limits import REPLICA_MAX_PENDING_PER_PEER
from lattica_protocols.replica.genesis import Genesis
from lattica_protocols.replica.messages import Kind, decode_message_untrusted, encode_message
from lattica_protocols.replica.replica import Replica
from lattica_protocols.replica.sync import ReplicaSync


@pytest.mark.parametrize("seed", range(24))
def test_small_spaces(seed: int) -> None:
    run(seed, size=9, edits=40)


@pytest.mark.parametrize("seed", [3, 119])
def test_fifty_replicas(seed: int) -> None:
    run(seed, size=50, edits=100)


def test_members_are_not_parted_by_one_with_too_many_instances() -> None:
    """Each neighbour of the cheat gets others of its instances; the network loses a part."""
    network = Network(3, 12, 1)
    cheater = network.members[1]
    for number in range(4):
        network.at(1.0 + number, lambda: cheat(network, cheater, crowd))
    for member in network.honest():
        for second in range(1, 8):
            network.at(second + 0.5, lambda member=member: network.edit(member))  # type: ignore[misc]
    assert network.run(120.0, network.agreed, every=20.0)
    replicas = [member.replica for member in network.honest()]
    author = cheater.key.public_key.data
    assert all((author, 0, 0) in replica.graph.exclusions() for replica in replicas)
    assert all(replica.value() == replicas[0].value() for replica in replicas)


def test_the_same_seed_gives_the_same_run() -> None:
    assert run(5, size=7, edits=30) == run(5, size=7, edits=30)


def test_another_process_replays_a_seed() -> None:
    """The order of sets of bytes differs from process to process: nothing may hang on it."""
    command = [sys.executable, str(Path(__file__).with_name("replica_runs.py")), "--seed", "5", "--size", "20"]
    results = []
    for hashes in ("1", "2"):
        out = subprocess.run(
            command,
            env={**os.environ, "PYTHONHASHSEED": hashes},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        results.append(out.stdout.split("}")[0])
    assert "'operations'" in results[0]
    assert results[0] == results[1]


class Pair:
    """Two replicas and the bytes between them."""

    def __init__(self, common: int) -> None:
        key = PrivateKey.generate(bytes(32))
        other = PrivateKey.generate(bytes([1]) * 32)
        genesis = Genesis.create(key.public_key.data, "pair", bytes(16), [other.public_key.data])
        rng = random.Random(1)
        self.replicas = [Replica(genesis, key=each, instance=3) for each in (key, other)]
        self.edit(0, common, rng)
        for entry in self.replicas[0].graph.counted():
            self.replicas[1].receive_operation(entry.op, UNIX)
        self.machines = [ReplicaSync[int](replica, rng, 0.0) for replica in self.replicas]
        self.sent = 0
        self.operations = 0

    def edit(self, side: int, count: int, rng: random.Random) -> None:
        for _ in range(count):
            with self.replicas[side].transaction(UNIX):
                edit_at_random(self.replicas[side], rng)

    def settle(self) -> None:
        self.machines[0].add_neighbour(1, 0.0)
        self.machines[1].add_neighbour(0, 0.0)
        quiet, now = 0, 0.0
        while quiet < 4:
            moved = False
            for side in (0, 1):
                self.machines[side].handle_timer(now, UNIX)
                for peer, data in self.machines[side].poll_transmit():
                    moved = True
                    self.sent += len(data)
                    message = decode_message_untrusted(data)
                    if message.kind == Kind.OPERATIONS:
                        self.operations += len(message.fields[1])
                    self.machines[peer].receive(side, message, now, UNIX)
            quiet = 0 if moved and self.replicas[0].root() != self.replicas[1].root() else quiet + 1
            now += 0.5
        assert self.replicas[0].root() == self.replicas[1].root()


def test_what_is_exchanged_grows_with_the_difference_not_with_the_history() -> None:
    sent = []
    for common in (50, 3000):
        pair = Pair(common)
        rng = random.Random(2)
        pair.edit(0, 20, rng)
        pair.edit(1, 10, rng)
        pair.settle()
        assert pair.operations == 30
        sent.append(pair.sent)
    assert sent[1] < sent[0] * 1.2


def test_equal_replicas_exchange_their_digests_only() -> None:
    pair = Pair(500)
    pair.settle()
    assert pair.operations == 0
    assert pair.sent < 1000


def test_a_sync_that_is_cut_off_goes_on_where_it_stopped() -> None:
    pair = Pair(0)
    pair.edit(0, 6000, random.Random(3))
    one, two = pair.machines
    one.add_neighbour(1, 0.0)
    two.add_neighbour(0, 0.0)
    got = 0
    while not got:  # the first batch only, then the connection is gone
        for side in (0, 1):
            for peer, data in pair.machines[side].poll_transmit():
                if got == 0:
                    pair.machines[peer].receive_message_untrusted(side, data, 0.0, UNIX)
                    got = pair.replicas[1].operations()
    assert 0 < got < 6000
    one.remove_neighbour(1)
    two.remove_neighbour(0)
    pair.operations = 0
    pair.settle()
    assert pair.operations <= 6000 - got + 4 * 1024


def test_withheld_parents_fill_no_memory() -> None:
    network = Network(1, 4, 1, loss=0.0)
    victim = network.members[0].machine
    cheater = network.members[1]
    for _ in range(REPLICA_MAX_PENDING_PER_PEER + 50):
        for _, ops in withhold(network, cheater, network.rng)[:1]:
            data = encode_message(Kind.OPERATIONS, network.genesis.id, 0, [op.encoded for op in ops])
            victim.receive_message_untrusted(1, data, 0.0, UNIX)
    assert len(victim._pending) <= REPLICA_MAX_PENDING_PER_PEER
    assert len(victim._waiting) <= REPLICA_MAX_PENDING_PER_PEER
