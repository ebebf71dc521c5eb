"""Updates that yrs would take and should not: what a member writes by hand has to stand where its type allows it."""

from __future__ import annotations

import random

import pytest
from pycrdt import Doc
from replica_members import NOW, data, deliver, forged, genesis, member, put
from replica_updates import some_update

from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.limits import REPLICA_MAX_NESTING, REPLICA_MAX_STRUCTS
from lattica_protocols.replica.checkpoint import vector_of
from lattica_protocols.replica.client_ids import client_id
from lattica_protocols.replica.operation import Operation
from lattica_protocols.replica.plain import container, document_value, to_shared
from lattica_protocols.replica.replica import Replica
from lattica_protocols.varint import encode_uvarint

SPACE = genesis()
CLIENT = client_id(member(1, SPACE).key.public_key.data, 7)  # type: ignore[union-attr]
U = encode_uvarint


def named(info: int, name: str, content: bytes, key: str = "") -> bytes:
    """An item in a container with a name."""
    at = b"\1" + U(len(name)) + name.encode()
    return bytes([info | (0x20 if key else 0)]) + at + (U(len(key)) + key.encode() if key else b"") + content


def inside(info: int, clock: int, content: bytes, key: str = "") -> bytes:
    """An item inside of another item of the same author."""
    at = b"\0" + U(CLIENT) + U(clock)
    return bytes([info | (0x20 if key else 0)]) + at + (U(len(key)) + key.encode() if key else b"") + content


def beside(info: int, content: bytes, left: int | None = None, right: int | None = None) -> bytes:
    bits = (0 if left is None else 0x80) | (0 if right is None else 0x40)
    named = b"".join(U(CLIENT) + U(clock) for clock in (left, right) if clock is not None)
    return bytes([info | bits]) + named + content


def update(*items: bytes, start: int = 0, deletions: bytes = b"\0") -> bytes:
    return b"\1" + U(len(items)) + U(CLIENT) + U(start) + b"".join(items) + deletions


def nested(start: int, count: int) -> bytes:
    """Maps inside of each other, from the one at the clock before `start`."""
    items = [inside(7, clock - 1, b"\1", "a") if clock else named(7, "m:data", b"\1", "a") for clock in range(count)]
    return update(*(items if not start else [inside(7, start + i - 1, b"\1", "a") for i in range(count)]), start=start)


VALUE, WORD = b"\1\x7e", b"\2hi"
WRONG = {
    "a list item in a map": update(named(8, "m:data", VALUE)),
    "a key in a list": update(named(8, "l:x", VALUE, "k")),
    "text in a list": update(named(4, "l:x", WORD)),
    "a value in a text": update(named(8, "t:x", VALUE)),
    "a type in a text": update(named(7, "t:x", b"\1")),
    "a format in a text": update(named(6, "t:x", b"\1b\4true")),
    "an embed in a text": update(named(5, "t:x", b"\4true")),
    "JSON, of which yrs reads one text more": update(named(2, "l:x", b"\1\4true")),
    "two values under one key": update(named(8, "m:data", b"\2\x7e\x7e", "k")),
    "an item inside of a plain value": update(named(8, "m:data", VALUE, "k"), inside(8, 0, VALUE, "z")),
    "an item between two containers": update(named(8, "l:x", VALUE), named(8, "l:y", VALUE), beside(8, VALUE, 0, 1)),
    "an item beside two keys": update(
        named(8, "m:data", VALUE, "a"), named(8, "m:data", VALUE, "b"), beside(8, VALUE, 0, 1)
    ),
    "a value that stands before another of its key": update(named(8, "m:data", VALUE, "a"), beside(8, VALUE, None, 0)),
    "an item between two in the wrong order": update(named(8, "l:x", b"\3\x7e\x7e\x7e"), beside(8, VALUE, 2, 1)),
    "an item before and behind the same one": update(named(8, "l:x", VALUE), beside(8, VALUE, 0, 0)),
    "an item whose right neighbour is above its left one": update(
        named(8, "l:x", VALUE), beside(8, VALUE, 0), beside(8, VALUE, 1, 0)
    ),
    "an item between two of a run with one between": update(named(8, "l:x", b"\3\x7e\x7e\x7e"), beside(8, VALUE, 0, 2)),
    "an item between two of a text with one between": update(named(4, "t:x", b"\3abc"), beside(4, WORD, 0, 2)),
    "an item at the start before one that hangs below another": update(
        named(8, "l:x", VALUE), beside(8, VALUE, 0), beside(8, VALUE, None, 1)
    ),
    "an item before one that hangs below an item between": update(
        named(8, "l:x", VALUE), beside(8, VALUE, 0), beside(8, VALUE, 1), beside(8, VALUE, 0, 2)
    ),
    "types nested too deep": nested(0, REPLICA_MAX_NESTING + 1),
    "too many items": update(*[named(8, "l:x", VALUE)] * (REPLICA_MAX_STRUCTS + 1)),
    "deletions that overlap": update(
        named(8, "l:x", b"\3\x7e\x7e\x7e"), deletions=b"\1" + U(CLIENT) + b"\2" + b"\0\3" + b"\1\2"
    ),
    "deletions of one client twice": update(
        named(8, "l:x", b"\3\x7e\x7e\x7e"), deletions=b"\2" + (U(CLIENT) + b"\1\0\1") * 2
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_item_where_it_may_not_stand_is_refused_and_changes_nothing(name: str) -> None:
    a, other = member(1, SPACE), Replica(SPACE)
    with pytest.raises(RemoteProtocolError):
        other.receive_operation(forged(a, WRONG[name]), NOW)
    assert other.operations() == 0
    assert other.value() == {}


def test_nesting_adds_up_over_operations_checkpoints_and_restarts() -> None:
    """200,000 types in each other end a process when the outermost is deleted; they could come one by one."""
    owner, a = member(0, SPACE), member(1, SPACE)
    deliver(a, forged(a, nested(0, REPLICA_MAX_NESTING - 1)))
    deliver(owner, *[entry.op for entry in a.graph.counted()])
    fits, too_deep = nested(REPLICA_MAX_NESTING - 1, 1), nested(REPLICA_MAX_NESTING, 1)
    deliver(a, forged(a, fits))
    with pytest.raises(RemoteProtocolError, match="nested"):
        a.receive_operation(forged(a, too_deep), NOW)
    stored = [(entry.op.encoded, entry.end - entry.start) for entry in a.graph.counted()]
    again = Replica(SPACE)
    again.load(stored)
    with pytest.raises(RemoteProtocolError, match="nested"):
        again.receive_operation(forged(a, too_deep), NOW)
    deliver(owner, a.graph.counted()[-1].op)
    a.receive_checkpoint(owner.make_checkpoint(NOW).encode())
    assert a.graph.counted() == []
    ended = a.graph.floor.chains[a.key.public_key.data, 7]  # type: ignore[union-attr]
    after = forged(a, too_deep, seq=ended.seq + 1, parents=[ended.last])
    with pytest.raises(RemoteProtocolError, match="nested"):
        a.receive_operation(after, NOW)
    inner = container(a.doc, "m:data")
    for _ in range(REPLICA_MAX_NESTING - 1):
        inner = inner["a"]
    with pytest.raises(LocalProtocolError, match="nested"), a.transaction(NOW):
        inner["a"] = to_shared({"b": {"c": 1}})
    with a.transaction(NOW):
        del container(a.doc, "m:data")["a"]
    assert data(a) == {}


def test_a_state_that_is_nested_too_deep_is_not_loaded() -> None:
    doc = Doc[object]()
    count = REPLICA_MAX_NESTING * 3
    doc.apply_update(nested(0, count))
    with pytest.raises(RemoteProtocolError, match="nested"):
        vector_of(doc.get_update())
    with pytest.raises(RemoteProtocolError):
        vector_of(doc.get_update()[:-9])


def test_lists_that_grow_in_any_order_are_taken() -> None:
    """Two members insert anywhere, also inside of a list that was deleted meanwhile."""
    rng = random.Random(1)
    members = [member(1, SPACE), member(2, SPACE)]
    reader = Replica(SPACE)
    with members[0].transaction(NOW):
        container(members[0].doc, "m:data")["list"] = to_shared([0])
    deliver(members[1], *[entry.op for entry in members[0].graph.counted()])
    for number in range(120):
        one, two = rng.sample(members, 2)
        with one.transaction(NOW):
            inner = container(one.doc, "m:data")["list"]
            for target in (container(one.doc, "l:x"), inner):
                target.insert(rng.randrange(len(target) + 1), rng.choice([number, to_shared({"n": [number]})]))
                if len(target) > 3 and rng.random() < 0.4:
                    del target[rng.randrange(len(target))]
        if rng.random() < 0.4:
            deliver(two, *[entry.op for entry in one.graph.counted()])
    for one, two in (members, members[::-1]):
        deliver(two, *[entry.op for entry in one.graph.counted()])
    with members[0].transaction(NOW):
        del container(members[0].doc, "m:data")["list"]
    with members[1].transaction(NOW):
        inner = container(members[1].doc, "m:data")["list"]
        for number in range(8):
            inner.insert(rng.randrange(len(inner) + 1), number)
    late = members[1].graph.counted()[-1].op
    deliver(members[0], late)
    deliver(reader, *[entry.op for entry in members[0].graph.counted()])
    deliver(members[1], *[entry.op for entry in members[0].graph.counted()])
    assert reader.value() == members[0].value() == members[1].value()
    assert reader.verify().ok


def test_what_yrs_does_not_take_is_left_out_and_the_rest_stays() -> None:
    """The checks leave nothing of this kind; if one is wrong, neither the process nor the document breaks."""
    a, other = member(1, SPACE), Replica(SPACE)
    put(a, "x", 1)
    good = [entry.op for entry in a.graph.counted()]
    bad = forged(a, update(named(8, "m:data", VALUE, "k"), inside(8, 1, VALUE, "z"), start=1))
    with other.batch():
        deliver(other, *good)
        other._apply(other.graph.admit(bad, None, span=(1, 3)))
    assert other.operations() == 2
    assert data(other) == {"x": 1}
    b = member(2, SPACE)
    deliver(b, *good)
    put(b, "y", 2)
    deliver(other, *[entry.op for entry in b.graph.counted()])
    assert data(other) == {"x": 1, "y": 2}


@pytest.mark.parametrize("seed", range(0, 4000, 250))
def test_whatever_is_accepted_leaves_all_replicas_equal(seed: int) -> None:
    for number in range(seed, seed + 25):
        _play(random.Random(number))


def _play(rng: random.Random) -> None:
    """Two members write by hand, and take what the other wrote or not; two readers get it in different orders."""
    members = [member(1, SPACE), member(2, SPACE)]
    put(members[0], "a", {"x": [1, {"y": 2}]})
    deliver(members[1], *[entry.op for entry in members[0].graph.counted()])
    for _ in range(8):
        one, two = rng.sample(members, 2)
        if rng.random() < 0.3:
            deliver(one, *[entry.op for entry in two.graph.counted()])
        assert one.key is not None
        chain = (one.key.public_key.data, one.instance)
        tip = one.graph.tip(chain)
        known: dict[int, int] = {}
        for entry in one.graph.counted():
            known[entry.branch.client] = max(known.get(entry.branch.client, 0), entry.end)
        op = forged(one, some_update(rng, client_id(*chain), tip.end if tip else 0, known))
        try:
            one.receive_operation(Operation.decode_untrusted(op.encoded, SPACE.id), NOW)
        except RemoteProtocolError:
            continue
    readers = [Replica(SPACE), Replica(SPACE)]
    for reader, order in zip(readers, (members, members[::-1]), strict=True):
        deliver(reader, *{entry.op.id: entry.op for each in order for entry in each.graph.counted()}.values())
        assert not reader._left_out
        assert reader.verify().ok
        again = Doc[object]()
        again.apply_update(reader.doc.get_update())
        assert document_value(again) == reader.value()
    assert readers[0].root() == readers[1].root()
    assert readers[0].value() == readers[1].value()
    one = members[0]
    with one.transaction(NOW):
        container(one.doc, "l:x").append(3)
        container(one.doc, "m:data").clear()
    assert one.verify().ok
