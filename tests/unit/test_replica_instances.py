"""An author with more instances than it may have: excluded everywhere alike, whichever of them came first."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from replica_members import NOW, data, deliver, forged, genesis, key_of, member, put

from lattica.replica.store import SpaceStore
from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.limits import (
    REPLICA_MAX_FIRST_BYTES,
    REPLICA_MAX_INSTANCES,
    REPLICA_MAX_MESSAGE_BYTES,
    REPLICA_MAX_UPDATE_BYTES,
)
from lattica_protocols.replica.equivocation import Crowd, Fork, equivocation_untrusted
from lattica_protocols.replica.messages import Kind, decode_message_untrusted, encode_message
from lattica_protocols.replica.operation import Operation
from lattica_protocols.replica.replica import Replica
from lattica_protocols.replica.sync import ReplicaSync

SPACE = genesis(3)
CHEAT = key_of(1).public_key.data


def chains(count: int, first: int = 0, body: bytes = b"", number: int = 1) -> list[Operation]:
    """First operations of so many instances of a member."""
    author = member(number, SPACE)
    return [forged(author, body, instance=first + n, parents=[], seq=0) for n in range(count)]


class Meeting:
    """Replicas that all are neighbours, until nothing more is sent."""

    def __init__(self, *replicas: Replica) -> None:
        self.replicas = replicas
        self.machines = [ReplicaSync[int](each, random.Random(n), 0.0) for n, each in enumerate(replicas)]
        self.longest = 0

    def settle(self) -> None:
        for side, machine in enumerate(self.machines):
            for other in range(len(self.machines)):
                if other != side:
                    machine.add_neighbour(other, 0.0)
        for step in range(40):
            for side, machine in enumerate(self.machines):
                machine.handle_timer(step * 0.5, NOW)
                for peer, message in machine.poll_transmit():
                    self.longest = max(self.longest, len(message))
                    self.machines[peer].receive_message_untrusted(side, message, step * 0.5, NOW)


def test_who_shows_other_instances_to_others_is_excluded_by_all() -> None:
    owner, one, other = (member(number, SPACE) for number in (0, 2, 3))
    made = chains(REPLICA_MAX_INSTANCES + 2)
    kept = put(owner, "x", 1)
    deliver(one, kept, *made[:REPLICA_MAX_INSTANCES])
    deliver(other, kept, *made[2:])
    assert not one.graph.exclusions()
    built = put(one, "y", 2)  # on all that it has of the cheat
    Meeting(owner, one, other).settle()
    assert owner.root() == one.root() == other.root()
    for replica in (owner, one, other):
        assert replica.graph.exclusions() == [(CHEAT, 0, 0)]
        assert data(replica) == {"x": 1, "y": 2}
        assert built.id in replica.graph.entries
        assert replica.operations() == 2 + REPLICA_MAX_INSTANCES  # what a valid member built on
        assert replica.verify().ok


def test_the_proof_is_enough_for_who_has_none_of_the_operations() -> None:
    owner, late = member(0, SPACE), member(2, SPACE)
    deliver(owner, *chains(REPLICA_MAX_INSTANCES + 1))
    assert owner.operations() == 0
    meeting = Meeting(owner, late)
    meeting.settle()
    assert late.graph.exclusions() == owner.graph.exclusions() == [(CHEAT, 0, 0)]
    assert not late.graph.entries
    assert late.root() == owner.root()


def test_as_many_as_allowed_are_taken() -> None:
    owner = member(0, SPACE)
    deliver(owner, *chains(REPLICA_MAX_INSTANCES))
    assert owner.operations() == REPLICA_MAX_INSTANCES
    assert owner.graph.exclusions() == []


def test_the_longest_proof_fits_a_message() -> None:
    owner, late = member(0, SPACE), member(2, SPACE)
    update = b"\0" * 11_000
    author = member(1, SPACE)
    made = [forged(author, update, instance=n, parents=[], seq=0) for n in range(REPLICA_MAX_INSTANCES + 1)]
    room = REPLICA_MAX_FIRST_BYTES - len(made[0].encoded)
    made = [forged(author, update + bytes(room), instance=n, parents=[], seq=0) for n in range(len(made))]
    assert {len(op.encoded) for op in made} == {REPLICA_MAX_FIRST_BYTES}
    owner.receive_fork(Crowd(made))
    meeting = Meeting(owner, late)
    meeting.settle()
    assert meeting.longest <= REPLICA_MAX_MESSAGE_BYTES
    assert late.root() == owner.root()


def test_a_proof_that_proves_nothing_is_refused() -> None:
    made = chains(REPLICA_MAX_INSTANCES + 1)
    author = member(1, SPACE)
    later = forged(author, b"", instance=99, parents=[made[0].id], seq=1)
    unsigned = made[0].encoded[:-1] + bytes([made[0].encoded[-1] ^ 1])
    long = forged(author, bytes(REPLICA_MAX_FIRST_BYTES), instance=99, parents=[], seq=0)
    for bad in (made[1], later, long, chains(1, 99, number=2)[0], Operation.decode_untrusted(unsigned, SPACE.id)):
        with pytest.raises(RemoteProtocolError):
            member(0, SPACE).receive_fork(Crowd([bad, *made[1:]]))
    with pytest.raises(RemoteProtocolError, match="a proof of 3 operations"):
        equivocation_untrusted([op.encoded for op in made[:3]], SPACE.id)


def test_the_first_operation_of_a_chain_is_short_and_a_long_edit_follows_one() -> None:
    owner, a = member(0, SPACE), member(1, SPACE)
    with pytest.raises(RemoteProtocolError, match="first operation of a chain has"):
        owner.receive_operation(forged(a, bytes(REPLICA_MAX_FIRST_BYTES)), NOW)
    long = put(a, "x", "y" * 50_000)
    assert long.seq == 0  # the empty one: `put` gives the first of two
    deliver(owner, *[entry.op for entry in a.graph.counted()])
    assert data(owner) == {"x": "y" * 50_000}
    assert len(a.graph.entries) == 2


def test_a_member_that_lost_its_memory_too_often_is_told_and_not_excluded() -> None:
    again = member(1, SPACE, instance=1000)
    deliver(again, *chains(REPLICA_MAX_INSTANCES))
    with pytest.raises(LocalProtocolError, match="64 instances here already"):
        put(again, "x", 1)
    known = member(1, SPACE, instance=5)  # one that it has: it goes on
    deliver(known, *chains(REPLICA_MAX_INSTANCES))
    put(known, "x", 1)
    assert known.graph.exclusions() == []


def test_the_exclusion_outlasts_a_restart_and_a_checkpoint(tmp_path: Path) -> None:
    owner = member(0, SPACE)
    deliver(owner, *chains(REPLICA_MAX_INSTANCES + 1))
    put(owner, "x", 1)
    with SpaceStore.open(tmp_path) as store:
        store.add(SPACE, 7)
        store.save(SPACE.id, owner.take_unsaved())
    with SpaceStore.open(tmp_path) as store:
        stored = store.load()[0]
        again = member(0, SPACE)
        again.load(stored.operations, stored.forks, stored.snapshot)
    assert again.root() == owner.root()
    assert again.graph.exclusions() == [(CHEAT, 0, 0)]
    again.adopt(again.make_checkpoint(NOW))
    deliver(again, *chains(1, 500))
    assert again.graph.exclusions() == [(CHEAT, 0, 0)]
    assert again.operations() == 1


def test_proofs_with_long_operations_are_sent_in_messages_that_are_taken() -> None:
    """Two forks with updates of the largest size: together more than a message may have."""
    owner, late = member(0, SPACE), member(0, SPACE, instance=8)
    for number in (1, 2, 3):
        author = member(number, SPACE)
        first = forged(author, b"")
        body = bytes(REPLICA_MAX_UPDATE_BYTES)
        twins = [forged(author, body, seq=1, parents=[first.id], time=int(NOW) + n) for n in range(2)]
        owner.receive_fork(Fork(*twins))
    meeting = Meeting(owner, late)
    meeting.settle()
    assert meeting.longest <= REPLICA_MAX_MESSAGE_BYTES
    assert late.graph.exclusions() == owner.graph.exclusions()
    assert len(late.graph.exclusions()) == 3


def test_a_proof_that_is_known_costs_no_signature_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = member(0, SPACE)
    made = chains(REPLICA_MAX_INSTANCES + 1)
    owner.receive_fork(Crowd(made))
    monkeypatch.setattr(Operation, "check_signature", lambda *_: pytest.fail("checked again"))
    owner.receive_fork(Crowd(made))
    owner.receive_fork(Fork(made[0], made[1]))


def test_a_crowd_is_sent_only_to_who_lacks_it() -> None:
    owner = member(0, SPACE)
    machine = ReplicaSync[int](owner, random.Random(1), 0.0)
    machine.add_neighbour(1, 0.0)
    machine.poll_transmit()
    for op in chains(REPLICA_MAX_INSTANCES + 1):
        machine.receive_message_untrusted(2, encode_message(Kind.OPERATIONS, SPACE.id, 0, [op.encoded]), 0.0, NOW)
    kinds = [decode_message_untrusted(message).kind for _, message in machine.poll_transmit()]
    assert Kind.HELLO in kinds
    assert Kind.FORKS not in kinds
