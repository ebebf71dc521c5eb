"""Checkpoints that a quorum signs: made alike by every signer, taken with enough signatures, never two ways."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from replica_members import NOW, data, deliver, forged, key_of, put, update_of

from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.keys import PrivateKey
from lattica_protocols.limits import REPLICA_MAX_PROPOSALS
from lattica_protocols.replica.checkpoint import Checkpoint
from lattica_protocols.replica.genesis import Genesis
from lattica_protocols.replica.operation import Operation
from lattica_protocols.replica.proposal import BLAME, PAUSE, Proposals
from lattica_protocols.replica.replica import Replica
from lattica_protocols.replica.sync import ReplicaSync


def space_of(quorum: int, signers: int) -> Genesis:
    """Owned by key 0, who is no signer; keys 1 to 4 write, keys 1 to `signers` sign."""
    keys = [key_of(number).public_key.data for number in range(5)]
    return Genesis.create(keys[0], "quorum", bytes(16), keys[1:], quorum, keys[1 : 1 + signers])


class Members:
    """Replicas with their machines; everything sent is delivered at once, unless somebody is cut off."""

    def __init__(self, genesis: Genesis, count: int = 4) -> None:
        self.now = 0.0
        self.cut: set[int] = set()
        rng = random.Random(1)
        self.replicas = [Replica(genesis, key=key_of(number), instance=7, rng=rng) for number in range(count)]
        self.machines = [ReplicaSync[int](replica, rng, 0.0) for replica in self.replicas]
        for number, machine in enumerate(self.machines):
            for other in range(count):
                if other != number:
                    machine.add_neighbour(other, 0.0)

    def put(self, number: int, key: str, value: object) -> Operation:
        op = put(self.replicas[number], key, value)
        self.machines[number].push([op])
        return op

    def settle(self, seconds: float = 20.0) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += 0.5
            for machine in self.machines:
                machine.handle_timer(self.now, NOW + self.now)
            moved = True
            while moved:
                moved = False
                for number, machine in enumerate(self.machines):
                    for peer, message in machine.poll_transmit():
                        if not {number, peer} & self.cut:
                            moved = True
                            self.machines[peer].receive_message_untrusted(number, message, self.now, NOW + self.now)

    def propose(self, number: int) -> bytes:
        return self.machines[number].propose_checkpoint(self.now, NOW + self.now)


def test_a_quorum_signs_and_everybody_takes_it() -> None:
    members = Members(space_of(2, 3))
    for number in range(4):
        members.put(number, f"k{number}", number)
    members.settle()
    made = members.propose(1)
    assert members.replicas[1].checkpoint is None
    members.settle()
    for replica in members.replicas:
        assert replica.checkpoint is not None
        assert replica.checkpoint.id == made
        assert len(replica.checkpoint.signatures) >= 2
        assert (replica.operations(), len(replica.tree)) == (4, 0)
        assert data(replica) == {f"k{number}": number for number in range(4)}
    # It is one that a newcomer takes, and the next one follows it.
    joiner = Replica(members.replicas[0].genesis)
    assert joiner.receive_checkpoint(members.replicas[3].checkpoint.encode())  # type: ignore[union-attr]
    members.put(2, "more", 1)
    members.settle()
    members.propose(2)
    members.settle()
    assert {replica.rank()[:2] for replica in members.replicas} == {(2, 5)}


def test_without_a_quorum_nothing_is_replaced_and_work_goes_on() -> None:
    members = Members(space_of(3, 3))
    members.put(1, "x", 1)
    members.settle()
    members.cut = {3}
    members.propose(1)
    members.put(2, "y", 2)
    members.settle()
    assert all(replica.checkpoint is None for replica in members.replicas)
    members.cut = set()
    members.settle()
    # Signed for the heads that were proposed; what came since stays an operation on top.
    assert {replica.rank()[:2] for replica in members.replicas} == {(1, 1)}
    assert [len(replica.tree) for replica in members.replicas] == [1] * 4
    assert len({replica.root() for replica in members.replicas}) == 1


def test_two_proposals_at_once_come_to_one() -> None:
    members = Members(space_of(2, 3))
    members.put(1, "x", 1)
    members.settle()
    members.cut = {1}
    members.put(1, "only", 1)
    members.put(2, "other", 2)
    members.propose(1)
    members.propose(2)
    members.cut = set()
    members.settle(30)
    members.propose(3)  # whoever comes last contains both
    members.settle(30)
    assert len({replica.rank() for replica in members.replicas}) == 1
    assert members.replicas[0].rank()[0] >= 1
    assert all(data(replica) == {"x": 1, "only": 1, "other": 2} for replica in members.replicas)
    assert all(not replica.lost for replica in members.replicas)


def test_a_signer_signs_no_second_one_that_leaves_something_out() -> None:
    genesis = space_of(2, 3)
    one = Replica(genesis, key=key_of(1), instance=7)
    two = Replica(genesis, key=key_of(2), instance=7)
    first, second = put(one, "a", 1), put(two, "b", 2)
    three = Replica(genesis, key=key_of(3), instance=7)
    deliver(three, first, second)
    signer = Proposals(three)
    for proposer, now in ((one, 0.0), (two, PAUSE)):
        proposal = Proposals(proposer).propose(NOW)
        assert signer.receive_untrusted(proposal.header, sorted(proposal.signatures.items())) is not None
        signed, _ = signer.settle(now)
        assert len(signed) == (1 if proposer is one else 0)
    # After a restart it remembers, and what contains both is signed.
    again = Proposals(three)
    again.signed = three.take_unsaved().signed
    assert again.signed == signer.signed
    assert len(again.propose(NOW).signatures) == 1
    apart = Replica(genesis, key=key_of(3), instance=8)
    deliver(apart, second)
    later = Proposals(apart)
    later.signed = again.signed
    with pytest.raises(LocalProtocolError, match="another checkpoint"):
        later.propose(NOW)


def test_what_a_signer_does_not_find_itself_it_does_not_sign() -> None:
    genesis = space_of(2, 3)
    one, two = (Replica(genesis, key=key_of(number), instance=7) for number in (1, 2))
    op = put(one, "a", 1)
    deliver(two, op)
    honest = one.unsigned_checkpoint(int(NOW))
    floor = honest.floor
    lie = Checkpoint.make(
        space=genesis.id, number=1, previous=bytes(32), time=int(NOW), root=one.root(), operations=1, floor=floor,
        state=Replica(genesis).doc.get_update(),
    ).signed(key_of(1))  # fmt: skip
    signer = Proposals(two)
    assert signer.receive_untrusted(lie.header, lie.signatures) is not None
    assert signer.settle(0.0) == ([], None)
    assert signer.receive_untrusted(honest.header, honest.signed(key_of(1)).signatures) is not None
    signed, complete = signer.settle(BLAME[0])
    assert len(signed) == 1
    assert complete is not None
    assert complete.header == honest.header


def test_a_signer_that_lies_keeps_nobody_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each proposal made the whole document anew, again every few seconds."""
    genesis = space_of(2, 3)
    one, two = (Replica(genesis, key=key_of(number), instance=7) for number in (1, 2))
    deliver(two, put(one, "a", 1))
    made: list[bytes] = []
    at_heads = two.at_heads
    monkeypatch.setattr(two, "at_heads", lambda heads: (made.append(b""), at_heads(heads))[1])
    signer = Proposals(two)
    for number in range(100):
        lie = replace(one.unsigned_checkpoint(int(NOW)).floor, former=frozenset([number.to_bytes(32, "big")]))
        header = Checkpoint.make(
            space=genesis.id, number=1, previous=bytes(32), time=int(NOW), root=one.root(), operations=1, floor=lie,
            state=one.doc.get_update(),
        ).signed(key_of(1))  # fmt: skip
        signer.receive_untrusted(header.header, header.signatures)
        signer.settle(number * PAUSE, again=True)
    assert len(made) < 8
    honest = two.unsigned_checkpoint(int(NOW)).signed(key_of(3))  # of another, nothing is held against it
    signer.receive_untrusted(honest.header, honest.signatures)
    assert len(signer.settle(100 * PAUSE)[0]) == 1


def test_strangers_and_the_owner_propose_nothing() -> None:
    genesis = space_of(2, 3)
    owner = Replica(genesis, key=key_of(0), instance=7)
    put(owner, "a", 1)
    with pytest.raises(LocalProtocolError, match="none of the signers"):
        Proposals(owner).propose(NOW)
    made = owner.make_checkpoint(NOW)
    signer = Proposals(Replica(genesis, key=key_of(1), instance=7))
    with pytest.raises(RemoteProtocolError, match="none of the signers"):
        signer.receive_untrusted(made.header, made.signatures)
    with pytest.raises(RemoteProtocolError, match="nobody signed"):
        Replica(genesis).receive_checkpoint(made.encode())
    # One signature of two is not enough either.
    with pytest.raises(RemoteProtocolError, match="nobody signed"):
        Replica(genesis).receive_checkpoint(made.signed(key_of(1)).encode())


def test_a_signer_fills_no_memory_with_proposals() -> None:
    genesis = space_of(2, 3)
    replica = Replica(genesis, key=key_of(1), instance=7)
    signer = Proposals(Replica(genesis, key=key_of(2), instance=7))
    for number in range(REPLICA_MAX_PROPOSALS + 5):
        made = replica.unsigned_checkpoint(int(NOW) + number).signed(key_of(1))
        signer.receive_untrusted(made.header, made.signatures)
    assert len(signer.held()) == REPLICA_MAX_PROPOSALS


def test_every_order_of_arrival_makes_the_same_checkpoint() -> None:
    """Byte for byte: with deletions, texts, an equivocator on whom somebody built."""
    genesis = space_of(2, 3)
    members = [Replica(genesis, key=key_of(number), instance=7, rng=random.Random(number)) for number in range(4)]
    rng = random.Random(3)
    from replica_network import edit_at_random

    made: list[Operation] = []
    for _ in range(60):
        member = rng.choice(members)
        with member.transaction(NOW) as ops:
            edit_at_random(member, rng)
        made += ops
        if rng.random() < 0.3:
            deliver(rng.choice(members), *made)
    deliver(members[0], *made)
    fork = forged(members[1], update_of(members[1], "x", 2))
    left = put(members[1], "x", 1)
    deliver(members[2], *made, fork)
    above = put(members[2], "y", 3)
    made += [fork, left, above]
    headers = set()
    for seed in range(12):
        order = list(made)
        random.Random(seed).shuffle(order)
        replica = Replica(genesis)
        deliver(replica, *order)
        at = replica.at_heads(replica.graph.heads)
        assert at is not None
        assert at.root() == replica.root()
        headers.add(at.unsigned_checkpoint(int(NOW)).header)
    assert len(headers) == 1


def test_a_quorum_is_more_than_half() -> None:
    keys = [PrivateKey.generate(bytes([number]) * 32).public_key.data for number in range(5)]
    for quorum, signers in ((1, 2), (2, 4), (3, 2), (0, 1)):
        with pytest.raises(ValueError, match="more than half"):
            Genesis.create(keys[0], "x", bytes(16), (), quorum, keys[:signers])
