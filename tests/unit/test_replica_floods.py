"""What many small messages may cost: of a writer that cheats, of a stranger that asks."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import pytest
from replica_members import NOW, deliver, forged, genesis, key_of, member, put

from lattica_protocols.limits import REPLICA_MAX_LIMBO_LINKS, REPLICA_MAX_PENDING, REPLICA_PRESENCE_BURST
from lattica_protocols.replica.client_ids import client_id
from lattica_protocols.replica.errors import Refused
from lattica_protocols.replica.messages import Kind, Message, decode_message_untrusted, encode_message
from lattica_protocols.replica.operation import Operation
from lattica_protocols.replica.presence import Presence
from lattica_protocols.replica.replica import Replica
from lattica_protocols.replica.sync import SETTLE, ReplicaSync
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


class Asked:
    """A replica with a machine, asked by strangers."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.machine = ReplicaSync[int](replica, random.Random(1), 0.0)

    def hear(self, kind: Kind, *fields: object, peer: int = 9, now: float = 0.0) -> list[Message]:
        self.machine.receive_message_untrusted(peer, encode_message(kind, SPACE.id, *fields), now, NOW)
        return [decode_message_untrusted(data) for _, data in self.machine.poll_transmit()]


def test_missing_parents_of_a_stranger_fill_no_memory() -> None:
    asked, stranger = Asked(member(0, SPACE)), key_of(50)
    rng = random.Random(1)
    for number in range(40):
        parents = sorted(rng.randbytes(32) for _ in range(256))
        op = Operation.seal(stranger, SPACE.id, instance=number, seq=0, parents=parents, time=int(NOW), body=b"")
        asked.hear(Kind.OPERATIONS, 0, [op.encoded])
    assert len(asked.machine._wanted) <= REPLICA_MAX_PENDING


def test_a_flood_of_questions_is_answered_a_few_times() -> None:
    asked = Asked(long_chain(0, 3000))
    answers = sum(len(asked.hear(Kind.FRONTIER, bytes(32), False, [], [])) for _ in range(50))
    assert answers <= 5 * 4
    hellos = sum(len(asked.hear(Kind.HELLO, bytes(32), 0, 0, bytes(32), peer=10)) for _ in range(50))
    assert hellos <= 5
    assert asked.hear(Kind.FRONTIER, bytes(32), False, [], [], now=5.0)
    assert asked.hear(Kind.FRONTIER, bytes(32), False, [], [], peer=11)


def test_what_is_missing_is_looked_for_as_far_as_it_is_sent() -> None:
    """Whoever asks for everything of a long history makes us look at the first batches only."""
    asked = Asked(long_chain(0, 40_000))
    asked.machine.add_neighbour(9, 0.0)
    asked.machine.poll_transmit()
    assert asked.hear(Kind.FRONTIER, bytes(32), False, [], [])
    before = time.thread_time()
    for second in range(1, 21):
        asked.hear(Kind.FRONTIER, bytes(32), False, [], [], now=second * 0.5)
    assert time.thread_time() - before < 0.06


def test_more_chains_than_a_frontier_holds_are_told_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lattica_protocols.replica.sync.REPLICA_MAX_TIPS", 8)
    first, second = member(0, SPACE), member(2, SPACE)
    firsts = [forged(member(1, SPACE), b"", instance=n, parents=[], seq=0) for n in range(30)]
    deliver(first, *firsts[:20])
    deliver(second, *firsts[10:])
    machines = [ReplicaSync[int](each, random.Random(n), 0.0) for n, each in enumerate((first, second))]
    for side, machine in enumerate(machines):
        machine.add_neighbour(1 - side, 0.0)
    for step in range(30):
        for side, machine in enumerate(machines):
            machine.handle_timer(step * 0.5, NOW)
            for peer, data in machine.poll_transmit():
                message = decode_message_untrusted(data)
                assert message.kind != Kind.FRONTIER or len(message.fields[2]) <= 8
                machines[peer].receive(side, message, step * 0.5, NOW)
    assert first.root() == second.root()
    assert first.operations() == 30


def test_announcements_of_one_stranger_are_passed_on_a_few_times() -> None:
    asked, theirs, stranger = Asked(member(0, SPACE)), Presence(SPACE.id), key_of(50)
    asked.machine.add_neighbour(1, 0.0)
    asked.machine.poll_transmit()

    def passed_on(now: float, count: int) -> int:
        records = [theirs.announce(stranger, b"%d" % n, now, NOW + now) for n in range(count)]
        return sum(len(asked.hear(Kind.PRESENCE, [record], now=now)) for record in records)

    assert passed_on(0.0, 100) == REPLICA_PRESENCE_BURST
    assert passed_on(2.0, 100) == 2
    assert passed_on(12.0, 1) == 1


def test_what_waited_for_one_parent_is_taken_in_turns() -> None:
    """Each may take 170 ms, and 2,048 may wait."""
    author, asked = long_chain(1, 1), Asked(member(0, SPACE))
    first = author.graph.counted()[0].op
    waiting = [forged(member(2, SPACE), b"", instance=n, seq=0, parents=[first.id]) for n in range(50)]
    for op in waiting:
        asked.hear(Kind.OPERATIONS, 0, [op.encoded])
    machine = asked.machine
    machine.is_long = lambda: True
    asked.hear(Kind.OPERATIONS, 0, [first.encoded])
    assert asked.replica.operations() == 2
    turns = 0
    while machine.next_timeout() <= 0.0:
        machine.handle_timer(0.0, NOW)
        turns += 1
    assert turns == 49
    assert asked.replica.operations() == 51


def test_a_long_message_is_taken_in_turns() -> None:
    author, machine = long_chain(1, 20), Asked(member(0, SPACE)).machine
    machine.add_neighbour(9, 0.0)
    left: Sequence[Operation] = [entry.op for entry in author.graph.counted()]
    machine.is_long = lambda: True
    turns = 0
    while left:
        left = machine.take_some(9, 3, left, 0.0, NOW)
        turns += 1
    assert turns == 20
    assert machine.replica.operations() == 20
    assert machine.next_timeout() <= SETTLE  # others are told
