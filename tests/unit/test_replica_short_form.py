"""Operations in a row: what the short form leaves out is made anew, and what is not here is asked for."""

from __future__ import annotations

import random

import pytest
from replica_members import NOW, deliver, forged, genesis, key_of, member, put, update_of

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.replica.messages import Kind as MessageKind
from lattica_protocols.replica.messages import decode_message_untrusted, encode_message
from lattica_protocols.replica.operation import Kind, Operation
from lattica_protocols.replica.plain import container
from lattica_protocols.replica.replica import Replica
from lattica_protocols.replica.short_form import RowReader, RowWriter, Unresolved, read_row_untrusted, write_row
from lattica_protocols.replica.sync import FRONTIER_PAUSE, ReplicaSync
from lattica_protocols.varint import encode_uvarint

SPACE = genesis()


def history() -> list[Operation]:
    """Two chains that merge, a deletion, a grant, and an instance of its own."""
    owner, a = member(0, SPACE), member(1, SPACE)
    ops = [put(owner, "x", 1), put(owner, "x", 2, NOW + 5), put(owner, "y", [1, {"z": b"b"}], NOW + 5)]
    deliver(a, *ops)
    ops += [put(a, "x", 3, NOW + 6), put(a, "w", "text", NOW + 400)]
    ops.append(put(owner, "v", None, NOW + 7))
    deliver(owner, *ops[3:5])
    with owner.transaction(NOW + 8) as made:
        del container(owner.doc, "m:data")["x"]  # no items: its body does not say the client
    ops += made
    ops.append(owner.change_members(Kind.GRANT, key_of(5).public_key.data, NOW + 9))
    b = member(1, SPACE, instance=8)
    deliver(b, *ops)
    ops += [put(b, "u", 1, NOW + 10), put(b, "u", 2, NOW + 10)]
    return ops


def exact(ops: list[Operation]) -> list[bytes]:
    return [op.encoded for op in ops]


def test_a_row_gives_the_operations_it_was_made_of() -> None:
    ops = history()
    data = write_row(ops)
    row = read_row_untrusted(data, SPACE.id)
    assert row.complete
    assert exact(row.operations) == exact(ops)
    assert [op.id for op in row.operations] == [op.id for op in ops]
    assert not any(op.verified for op in row.operations)
    assert all(op.check_signature(SPACE.id) for op in row.operations)
    # the first of each chain is full, what follows is not
    assert [each[0] == 0x98 for each in data] == [op.seq == 0 for op in ops]
    assert all(len(short) <= len(op.encoded) - 70 for short, op in zip(data, ops, strict=True) if op.seq)


def test_a_writer_that_starts_anew_goes_on_with_the_row() -> None:
    ops = history()
    for cut in range(len(ops)):
        first, second = RowWriter(), RowWriter()
        data = [first.write(op) for op in ops[:cut]] + [second.write(op) for op in ops[cut:]]
        assert exact(read_row_untrusted(data, SPACE.id).operations) == exact(ops)


def test_a_long_row_names_parents_as_far_back_as_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lattica_protocols.replica.short_form._WINDOW", 2)
    ops = history()
    reader, writer = RowReader(SPACE.id), RowWriter()
    assert exact([reader.read_untrusted(writer.write(op)) for op in ops]) == exact(ops)
    assert len(writer._place) <= 2


def test_what_is_pushed_follows_what_the_receiver_has() -> None:
    ops = history()
    sender, receiver = Replica(SPACE), Replica(SPACE)
    deliver(sender, *ops)
    deliver(receiver, *ops[:2])
    data = write_row(ops[2:3], sender.graph.operation_at)
    assert len(data[0]) == len(ops[2].body) + 64 + 1 + 1 + 1
    with pytest.raises(Unresolved):
        RowReader(SPACE.id).read_untrusted(data[0])
    row = read_row_untrusted(data, SPACE.id, receiver.graph.operation_at)
    assert exact(row.operations) == exact(ops[2:3])
    assert not read_row_untrusted(data, SPACE.id, Replica(SPACE).graph.operation_at).complete


def test_one_that_follows_the_other_side_of_a_fork_is_not_taken_for_a_wrong_signature() -> None:
    a = member(1, SPACE)
    first = put(a, "x", 0)
    one = forged(a, update_of(a, "x", 1))
    two = forged(a, update_of(a, "x", 2))
    deliver(a, one)
    after = put(a, "x", 3)
    with_one, with_two, with_both = Replica(SPACE), Replica(SPACE), Replica(SPACE)
    deliver(with_one, first, one, after)
    deliver(with_two, first, two)
    deliver(with_both, first, one, two)
    data = write_row([after], with_one.graph.operation_at)
    for replica in (with_two, with_both):
        row = read_row_untrusted(data, SPACE.id, replica.graph.operation_at)
        assert (row.operations, row.complete) == ([], False)


def test_nothing_in_a_row_follows_what_could_not_be_read() -> None:
    ops = history()
    data = write_row(ops[:5])
    lost = RowWriter(lambda client, seq: ops[1] if seq == 1 else None).write(ops[2])  # by `seq`: not resolved here
    row = read_row_untrusted([data[0], data[1], lost, data[3], data[4]], SPACE.id)
    assert not row.complete
    assert exact(row.operations) == exact([ops[0], ops[1], ops[3], ops[4]])
    row = read_row_untrusted([data[0], lost, data[2]], SPACE.id)
    assert exact(row.operations) == exact(ops[:1])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        b"\x20" + bytes(100),
        b"\x97" + bytes(100),
        b"\x00\x00" + bytes(63),
        b"\x00\x00" + bytes(64),  # no body to find the client in
        b"\x00\x00" + bytes(64) + b"\x01\x81\x01\x05",
        b"\x10\x00\x00" + bytes(100),  # no other parents
        b"\x10\x00\x80\x02" + bytes(100),
        b"\x14\x05\x00\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01" + bytes(100),
    ],
)
def test_malformed_short_forms_are_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as error:
        RowReader(SPACE.id).read_untrusted(data)
    assert not isinstance(error.value, Unresolved)


def test_a_parent_before_the_row_is_refused() -> None:
    ops = history()
    first, second = write_row(ops[:2])
    for back in (2, 900, 1 << 60):
        named = b"\x10" + second[1:2] + b"\x01" + encode_uvarint(back) + second[2:]
        reader = RowReader(SPACE.id)
        reader.read_untrusted(first)
        with pytest.raises(RemoteProtocolError, match="before the first"):
            reader.read_untrusted(named)


def test_what_no_operation_may_say_is_refused_in_the_short_form_too() -> None:
    ops = history()
    first, second = write_row(ops[:2])
    wrong = [
        b"\x00\xff\xff\xff\xff\xff\xff\x01" + second[2:],  # a time beyond all
        b"\x01" + second[1:],  # a grant whose body is no key
        second + bytes(256 << 10),
        b"\x10" + second[1:2] + b"\x01\x01" + second[2:],  # the one before it, named twice
    ]
    for data in wrong:
        reader = RowReader(SPACE.id)
        reader.read_untrusted(first)
        with pytest.raises(RemoteProtocolError):
            reader.read_untrusted(data)


def test_a_push_that_cannot_be_read_is_answered_with_a_frontier_once_in_a_while() -> None:
    ops = history()
    replica = Replica(SPACE)
    deliver(replica, ops[0])
    machine: ReplicaSync[int] = ReplicaSync(replica, random.Random(1), 0.0)
    machine.add_neighbour(1, 0.0)
    machine.poll_transmit()
    whole = Replica(SPACE)
    deliver(whole, *ops)
    data = encode_message(MessageKind.OPERATIONS, SPACE.id, 0, write_row(ops[2:3], whole.graph.operation_at))

    def sent() -> list[MessageKind]:
        return [decode_message_untrusted(message).kind for _, message in machine.poll_transmit()]

    machine.receive_message_untrusted(1, data, 1.0, NOW)
    assert sent() == [MessageKind.FRONTIER]
    for _ in range(5):
        machine.receive_message_untrusted(1, data, 1.0, NOW)
    assert sent() == []
    assert machine.next_timeout() == 1.0 + FRONTIER_PAUSE  # what came meanwhile is asked for then
    machine.handle_timer(1.0 + FRONTIER_PAUSE, NOW)
    assert MessageKind.FRONTIER in sent()
    assert machine.next_timeout() > 1.0 + FRONTIER_PAUSE
    machine.receive_message_untrusted(7, data, 9.0, NOW)  # from somebody who is no neighbour
    assert sent() == []
    assert machine.counters["refused"] == 0


def test_a_pushed_edit_is_taken_in_the_short_form() -> None:
    owner, a = member(0, SPACE), member(1, SPACE)
    machines: list[ReplicaSync[int]] = [ReplicaSync(each, random.Random(1), 0.0) for each in (owner, a)]
    for number, machine in enumerate(machines):
        machine.add_neighbour(1 - number, 0.0)
        machine.poll_transmit()
    for value in range(3):
        op = put(owner, "x", value)
        machines[0].push([op])
        ((_, data),) = machines[0].poll_transmit()
        assert not value or len(data) == len(op.body) + 64 + 3 + 16
        machines[1].receive_message_untrusted(0, data, 0.0, NOW)
        assert a.root() == owner.root()
    assert machines[1].counters["unresolved"] == 0
