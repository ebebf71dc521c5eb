"""What many small messages may cost: of a writer that cheats."""

from __future__ import annotations

import time

import pytest
from replica_members import NOW, deliver, forged, genesis, key_of, member, put

from lattica_protocols.limits import REPLICA_MAX_LIMBO_LINKS
from lattica_protocols.replica.client_ids import client_id
from lattica_protocols.replica.errors import Refused
from lattica_protocols.replica.operation import Operation
from lattica_protocols.replica.replica import Replica
from lattica_protocols.varint import encode_uvarint as uvarint

SPACE = genesis(3)
CLIENT = client_id(key_of(1).public_key.data, 7)


def long_chain(number: int, length: int) -> Replica:
    """A member that wrote so many operations without items."""
    author = member(number, SPACE)
    for _ in range(length):
        author.graph.admit(forged(author, b""), None, span=(0, 0))
    return author


def taken(replica: Replica, ops: list[Operation]) -> float:
    """Seconds of CPU to take them in."""
    assert all(op.verified for op in ops)  # ours: their signatures cost nothing
    before = time.thread_time()
    for op in ops:
        replica.receive_operation(op, NOW)
    return time.thread_time() - before


def test_an_operation_linked_to_the_middle_of_a_long_chain_costs_no_walk_over_it() -> None:
    """0.5 µs for each operation before: 50 ms at 100,000."""
    replica = long_chain(2, 40_000)
    middle = replica.graph.counted()[30_000].op.id
    cheat = member(1, SPACE)
    twins = [forged(cheat, b"", seq=0, parents=[middle], time=int(NOW) - n) for n in range(60)]
    deliver(replica, *twins[:10])
    assert taken(replica, twins[10:]) < 0.05


def test_names_of_a_client_with_many_twins_are_looked_up_once() -> None:
    """An operation that names 2,000 items of an author with 3,500 twins took 14 s."""
    replica, cheat = member(0, SPACE), member(1, SPACE)
    item = b"\1\1" + uvarint(CLIENT) + b"\0\x28\1\6m:data\1k\1\x7d\1\0"
    twins = [forged(cheat, item, seq=0, parents=[], time=int(NOW) - n) for n in range(450)]
    deliver(replica, *twins)
    assert len(replica.graph.client_ids.branches(CLIENT)) == 450
    names = [b"\x88" + uvarint(CLIENT) + b"\0\1\x7d\1"] * 4000
    body = b"\1" + b"".join(map(uvarint, (len(names), CLIENT, 1))) + b"".join(names) + b"\0"
    naming = forged(cheat, body, seq=1, parents=[twins[-1].id])
    before = time.thread_time()
    with pytest.raises(Refused, match="more than 8 places"):
        replica.receive_operation(naming, NOW)
    assert time.thread_time() - before < 0.4


def test_twins_that_are_linked_to_each_other_fill_no_memory() -> None:
    """Each has all before it in its past: 4,096 of them filled 400 MB."""
    replica, cheat = member(0, SPACE), member(1, SPACE)
    made: list[Operation] = []
    for number in range(1200):
        parents = sorted(op.id for op in made[-100:] if op.id in replica.graph.entries)
        made.append(forged(cheat, b"", seq=0, parents=parents, time=int(NOW) - number))
        deliver(replica, made[-1])
    pasts = sum(len(b.past) for branches in replica.graph.chains.values() for b in branches)
    assert pasts <= REPLICA_MAX_LIMBO_LINKS
    put(replica, "x", 1)
    assert replica.verify().ok
