"""Chains of two authors, or two of one, that have one client id: all replicas agree, and nobody is excluded.

A writer who looks for such a pair finds it in 2^27 tries; here the ids have few bits, so that it takes a few.
"""

from __future__ import annotations

import random
from itertools import permutations

import pytest
from replica_byzantine import colliding_instances, find_instance, judge, play
from replica_members import NOW, data, deliver, forged, genesis, key_of, member, put, update_of

from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.replica import client_ids
from lattica_protocols.replica.client_ids import client_id, forked_client
from lattica_protocols.replica.errors import NotYet
from lattica_protocols.replica.genesis import Genesis
from lattica_protocols.replica.operation import Kind, Operation
from lattica_protocols.replica.plain import container, same_value
from lattica_protocols.replica.replica import Replica
from lattica_protocols.replica.short_form import RowWriter
from lattica_protocols.varint import encode_uvarint


@pytest.fixture(autouse=True)
def few_client_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_ids, "CLIENT_BITS", 10)


def colliding(number: int, space: Genesis, other: Replica) -> Replica:
    """The member with an instance whose client id is that of `other`'s chain."""
    assert other.key is not None
    wanted = client_id(other.key.public_key.data, other.instance)
    return member(number, space, find_instance(key_of(number).public_key.data, wanted, other.instance + 1))


def restarted(replica: Replica, *, contained: bool = True) -> Replica:
    """What a replica with this database would be after a restart."""
    row = RowWriter()
    stored = [(row.write(entry.op), entry.end - entry.start) for entry in replica.graph.counted()]
    forks = [[op.encoded for op in fork.operations] for fork in replica.graph.forks.values()]
    again = Replica(replica.genesis)
    if replica.checkpoint is not None:
        again.receive_checkpoint(replica.checkpoint.encode())
    again.load(stored, forks, (len(stored), replica.doc.get_update()) if contained else (0, b""))
    return again


def agree(space: Genesis, ops: list[Operation], orders: list[list[Operation]] | None = None) -> Replica:
    """Replicas that get the operations in other orders, and start again, have one root and one document."""
    first = Replica(space)
    deliver(first, *ops)
    for order in orders or [list(each) for each in permutations(ops)]:
        other = Replica(space)
        deliver(other, *order)
        for each in (other, restarted(other), restarted(other, contained=False)):
            assert each.root() == first.root()
            assert same_value(each.value(), first.value())
    assert first.verify().ok
    return first


@pytest.mark.parametrize("number", [1, 2], ids=["two of one author", "of two authors"])
def test_the_same_whatever_came_first(number: int) -> None:
    space = genesis()
    one = member(1, space)
    two = colliding(number, space, one)
    ops = [put(one, "a", 1), put(one, "b", [1]), put(two, "a", 2), put(two, "c", [2])]
    replica = agree(space, ops)
    assert replica.operations() == 4
    assert data(replica) == {"a": data(replica)["a"], "b": [1], "c": [2]}
    assert not replica.graph.exclusions()


def test_others_build_on_one_or_on_both() -> None:
    space = genesis(3)
    one = member(1, space)
    two = colliding(2, space, one)
    first, second = put(one, "x", [1]), put(two, "y", [2])
    third, reader = member(3, space), member(0, space)
    deliver(third, first)
    with third.transaction(NOW) as on_one:
        data_of(third)["x"].append(3)
    deliver(reader, first, second)
    with reader.transaction(NOW) as on_both:
        data_of(reader)["x"].append(4)
        data_of(reader)["y"].append(5)
    replica = agree(space, [first, second, *on_one, *on_both])
    assert sorted(data(replica)["x"]) == [1, 3, 4]
    assert data(replica)["y"] == [2, 5]


def data_of(replica: Replica) -> object:
    return container(replica.doc, "m:data")


def test_the_honest_writer_goes_on_in_another_instance() -> None:
    space = genesis()
    honest = member(1, space)
    cheat = colliding(2, space, honest)
    before, aimed = put(honest, "a", [1]), put(cheat, "b", 2)
    deliver(honest, aimed)
    old = honest.instance
    with honest.transaction(NOW) as made:
        data_of(honest)["a"].append(7)
    assert honest.instance != old
    replica = agree(space, [before, aimed, *made])
    assert data(replica) == {"a": [1, 7], "b": 2}


def test_without_another_instance_it_says_so() -> None:
    space = genesis()
    honest = member(1, space)
    alone = Replica(space, key=honest.key, instance=honest.instance)
    deliver(alone, put(colliding(2, space, honest), "b", 2))
    with pytest.raises(LocalProtocolError, match="no other instance"):
        put(alone, "a", 1)


def test_a_cheat_that_goes_on_in_its_chain() -> None:
    space = genesis()
    one = member(1, space)
    two = colliding(2, space, one)
    ops = [put(one, "a", 1), put(two, "b", 2)]
    twin = forged(two, update_of(two, "b", 4))
    more = put(two, "b", 3)  # in the chain that collides, linked to its own operation only
    agree(space, [*ops, more])
    replica = agree(space, [*ops, more, twin])
    assert [author for author, _, _ in replica.graph.exclusions()] == [two.key.public_key.data]  # type: ignore[union-attr]


def test_a_chain_that_does_not_count_collides_with_none() -> None:
    """Replicas that never saw it have the same root, so they must have the same names, and take the same operations."""
    space = genesis(3)
    one = member(1, space)
    two = colliding(2, space, one)
    owner = member(0, space)
    removal = owner.change_members(Kind.REMOVE, two.key.public_key.data, NOW)  # type: ignore[union-attr]
    first, void = put(one, "a", [1]), put(two, "a", [2])
    with_it, without = Replica(space), Replica(space)
    deliver(with_it, first, removal, void)
    deliver(without, first, removal)
    assert with_it.root() == without.root()
    assert with_it.doc.get_update() == without.doc.get_update()
    third = member(3, space)
    deliver(third, first)
    renamed = update_of(third, "a", 1).replace(
        encode_uvarint(client_id(*first.chain)), encode_uvarint(forked_client(first.id))
    )
    named = forged(third, renamed)
    for replica in (with_it, without):
        with pytest.raises(NotYet):
            deliver(replica, named)
    with_it.graph.forget_limbo()
    follow = put(one, "b", 3)
    for replica in (with_it, without):
        deliver(replica, follow)
    assert with_it.doc.get_update() == without.doc.get_update()
    assert void.id not in with_it.graph.entries


def test_void_until_somebody_builds_on_it() -> None:
    space = genesis(3)
    one = member(1, space)
    two = colliding(2, space, one)
    owner = member(0, space)
    removal = owner.change_members(Kind.REMOVE, two.key.public_key.data, NOW)  # type: ignore[union-attr]
    first, void = put(one, "a", 1), put(two, "b", 2)
    third = member(3, space)
    deliver(third, void)
    built = put(third, "c", 3)
    replica = agree(space, [first, void, removal, built])
    assert data(replica) == {"a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_a_checkpoint(cut: int) -> None:
    space = genesis()
    one = member(1, space)
    two = colliding(2, space, one)
    ops = [put(one, "a", [1]), put(two, "b", [2]), put(one, "c", 3), put(two, "d", 4)]
    owner = member(0, space)
    deliver(owner, *ops[:cut])
    checkpoint = owner.make_checkpoint(NOW).encode()
    replicas = []
    for before, after in ((ops, []), ([], ops), (ops[::-2], ops[::2])):
        replica = Replica(space)
        offer(replica, before)
        assert replica.receive_checkpoint(checkpoint)
        offer(replica, after)
        replicas += [replica, restarted(replica)]
    assert len({replica.root() for replica in replicas}) == 1
    for replica in replicas:
        assert same_value(replica.value(), replicas[0].value())
    assert data(replicas[0]).keys() == ({"a", "c"} if cut == 1 else {"a", "b", "c", "d"})
    third = member(2, space, 99)
    third.receive_checkpoint(checkpoint)
    more = put(third, "e", 5)
    for replica in replicas:
        deliver(replica, more)
        assert data(replica)["e"] == 5


def offer(replica: Replica, ops: list[Operation]) -> None:
    for _ in ops:
        for op in ops:
            try:
                deliver(replica, op)
            except (RemoteProtocolError, AssertionError):
                pass  # judged by the roots


def test_lists_in_colliding_chains_are_different_ones() -> None:
    """Both are item 0 of one client: nothing stands between an item of one and an item of the other."""
    space = genesis(3)
    one = member(1, space)
    two = colliding(2, space, one)
    first, second = put(one, "x", [1]), put(two, "y", [2])
    third = member(3, space)
    deliver(third, first, second)
    left, right = (forked_client(op.id) for op in (first, second))
    own = third.doc.client_id
    body = (
        b"\1"
        + b"".join(map(encode_uvarint, (1, own, 0)))
        + b"\xc8"
        + b"".join(map(encode_uvarint, (left, 1, right, 1)))
    )
    with pytest.raises(RemoteProtocolError, match="different containers"):
        deliver(third, forged(third, body + b"\1\x7d\1\0"))


@pytest.mark.parametrize("seed", range(40))
def test_writers_who_contradict_in_colliding_chains(seed: int) -> None:
    rng = random.Random(f"collisions {seed}")
    space, made = play(rng, 24, 0.1 if seed % 3 == 0 else 0, colliding_instances(rng))
    assert judge(space, made, rng)


def test_an_author_whose_operation_is_lost_signs_no_other_in_its_place() -> None:
    """What it built on a chain that the checkpoint cannot have is lost, but others have it: to go on from before would
    exclude the author."""
    space = genesis(3)
    one, owner, honest = member(1, space), member(0, space), member(3, space)
    two = colliding(2, space, one)
    covered, aimed = put(one, "a", 1), put(two, "b", 2)
    deliver(owner, covered)
    deliver(honest, aimed)
    built = put(honest, "c", 3)
    honest.receive_checkpoint(owner.make_checkpoint(NOW).encode())
    assert honest.lost == [built]
    other = put(honest, "d", 4)
    assert other.instance != built.instance
    replica = Replica(space)
    deliver(replica, covered, aimed, built)
    assert replica.receive_checkpoint(owner.make_checkpoint(NOW).encode())
    deliver(replica, other)
    assert data(replica) == {"a": 1, "d": 4}
