"""What one operation may cost those who take it: places that yrs has to look for, runs that it has to cut."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from replica_members import NOW, deliver, forged, genesis, member, put
from test_replica_placement import VALUE, WORD, beside, inside, named, update

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import REPLICA_MAX_CUTS, REPLICA_MAX_PLACES, REPLICA_MAX_STRUCTS
from lattica_protocols.replica.client_ids import client_id
from lattica_protocols.replica.operation import Operation
from lattica_protocols.replica.plain import container, to_shared
from lattica_protocols.replica.replica import Replica
from lattica_protocols.varint import encode_uvarint

U = encode_uvarint
SPACE = genesis()
CLIENTS = [client_id(member(number, SPACE).key.public_key.data, 7) for number in range(3)]  # type: ignore[union-attr]
SECONDS = 1.0
"""Ten times what the costliest operation takes here, and a sixth of what it took before there were these limits."""


def deleting(client: int, count: int) -> bytes:
    """Every other one of a client's items, from the second on."""
    return b"\1" + U(client) + U(count) + b"".join(U(2 * number + 1) + b"\1" for number in range(count))


def values(count: int) -> bytes:
    return named(8, "l:x", U(count) + b"\x7e" * count)


def text(count: int) -> bytes:
    return named(4, "t:x", U(count) + b"a" * count)


ONE, MANY = named(8, "l:x", VALUE), 2 * REPLICA_MAX_CUTS + 2
TOO_MUCH = {
    "places at the start of a list": update(*[ONE] * (REPLICA_MAX_PLACES + 1)),
    "places in a text": update(*[named(4, "t:x", WORD)] * (REPLICA_MAX_PLACES + 1)),
    "places behind one item": update(ONE, *[beside(8, VALUE, 0)] * (REPLICA_MAX_PLACES + 1)),
    "places before the one before": update(ONE, *[beside(8, VALUE, None, n) for n in range(REPLICA_MAX_PLACES)]),
    "first values of one key": update(*[named(8, "m:data", VALUE, "k")] * (REPLICA_MAX_PLACES + 2)),
    "places in a list that it makes": update(
        named(7, "m:data", b"\0", "k"), *[inside(8, 0, VALUE)] * (REPLICA_MAX_PLACES + 2)
    ),
    "cuts in a run of values": update(values(MANY), deletions=deleting(CLIENTS[1], REPLICA_MAX_CUTS + 1)),
    "cuts in a text": update(text(MANY), deletions=deleting(CLIENTS[1], REPLICA_MAX_CUTS + 1)),
    "items": update(*[named(8, "m:data", VALUE, f"{n:04}") for n in range(REPLICA_MAX_STRUCTS + 1)]),
}


def started(number: int) -> Replica:
    """A member with an empty operation: the first one of a chain has to be short."""
    author = member(number, SPACE)
    deliver(author, forged(author, b""))
    return author


@pytest.mark.parametrize("name", TOO_MUCH)
def test_one_more_than_the_limit_is_refused(name: str) -> None:
    author, replica = started(1), Replica(SPACE)
    deliver(replica, *[entry.op for entry in author.graph.counted()])
    with pytest.raises(RemoteProtocolError, match=r"more than \d+ (places|items)"):
        replica.receive_operation(forged(author, TOO_MUCH[name]), NOW)


FITS = {
    "as many places": update(*[ONE] * REPLICA_MAX_PLACES),
    "a list written from its start to its end": update(ONE, *[beside(8, VALUE, n) for n in range(1000)]),
    "a key written again and again": update(
        named(8, "m:data", VALUE, "k"), *[beside(8, VALUE, n) for n in range(1000)]
    ),
    "many keys": update(*[named(8, "m:data", VALUE, f"{n:04}") for n in range(REPLICA_MAX_STRUCTS)]),
    "many lists": update(
        *[item for n in range(500) for item in (named(7, "m:data", b"\0", f"{n}"), inside(8, 2 * n, VALUE))]
    ),
}


@pytest.mark.parametrize("name", FITS)
def test_what_costs_little_is_taken(name: str) -> None:
    author, replica = started(1), Replica(SPACE)
    deliver(replica, *[entry.op for entry in author.graph.counted()])
    replica.receive_operation(forged(author, FITS[name]), NOW)
    assert replica.value()


def write(replica: Replica, edit: Callable[[Replica], None]) -> list[Operation]:
    with replica.transaction(NOW) as made:
        edit(replica)
    return made


def fill_from_the_front(replica: Replica) -> None:
    for number in range(100):
        container(replica.doc, "l:x").insert(0, number)


def delete_every_other(replica: Replica) -> None:
    items = container(replica.doc, "l:x")
    for at in range(len(items) // 2):
        del items[at]
    container(replica.doc, "m:data").pop("nested", None)


def edit_everything(replica: Replica) -> None:
    container(replica.doc, "m:data")["keys"] = to_shared({f"{n}": n for n in range(2 * REPLICA_MAX_STRUCTS)})
    for at in range(40):
        container(replica.doc, "t:x").insert(at // 2, "ab")
        container(replica.doc, "l:x").insert(2 * at, to_shared([at, {"a": at}]))
        container(replica.doc, "l:y").append(at)
    del container(replica.doc, "l:x")[3:9]


def test_a_transaction_that_is_too_much_for_one_operation_becomes_several() -> None:
    writer, reader = member(1, SPACE), Replica(SPACE)
    put(writer, "nested", [1])
    with writer.transaction(NOW):
        container(writer.doc, "l:x").extend(list(range(400)))
        container(writer.doc, "m:data")["nested"].extend(list(range(400)))
    counts = [len(write(writer, edit)) for edit in (fill_from_the_front, delete_every_other, edit_everything)]
    assert counts[0] == -(-100 // REPLICA_MAX_PLACES)
    assert counts[1] == -(-250 // REPLICA_MAX_CUTS)
    assert counts[2] > 2
    deliver(reader, *[entry.op for entry in writer.graph.counted()])
    assert reader.value() == writer.value()
    assert reader.root() == writer.root()
    assert reader.verify().ok
    again = member(1, SPACE)
    again.load([(entry.op.encoded, entry.end - entry.start) for entry in writer.graph.counted()])
    for edit in (fill_from_the_front, delete_every_other, edit_everything):
        write(again, edit)
    deliver(reader, *[entry.op for entry in again.graph.counted()])
    assert reader.value() == again.value()


def test_a_transaction_that_fits_stays_one_operation() -> None:
    writer = started(1)
    made = write(
        writer, lambda replica: container(replica.doc, "l:x").extend([to_shared({"a": [n]}) for n in range(500)])
    )
    made += write(writer, lambda replica: container(replica.doc, "l:x").clear())
    assert len(made) == 2


def cost(replica: Replica, op: Operation) -> float:
    op = Operation.decode_untrusted(op.encoded, SPACE.id)
    before = time.thread_time()
    replica.receive_operation(op, NOW)
    return time.thread_time() - before


def test_the_costliest_operations_on_a_list_of_100_000_do_not_stall_a_daemon() -> None:
    low, high = sorted((1, 2), key=lambda number: CLIENTS[number])
    filling, replica = started(low), Replica(SPACE)
    deliver(replica, *[entry.op for entry in filling.graph.counted()])
    clock = 0
    while clock < 100_000:
        items = [b"\x87" + U(CLIENTS[low]) + U(max(0, clock + n - 1)) + b"\0" for n in range(REPLICA_MAX_STRUCTS)]
        items[0] = items[0] if clock else named(7, "l:x", b"\0")
        body = b"\1" + b"".join(map(U, (len(items), CLIENTS[low], clock))) + b"".join(items) + b"\0"
        op = forged(filling, body)
        deliver(filling, op)
        deliver(replica, op)
        clock += len(items)
    other = member(high, SPACE)
    head = b"\1" + U(REPLICA_MAX_PLACES) + U(CLIENTS[high]) + b"\0"
    assert cost(replica, forged(other, head + ONE * REPLICA_MAX_PLACES + b"\0")) < SECONDS
    assert cost(replica, forged(filling, b"\0\1" + U(CLIENTS[low]) + b"\1\0" + U(clock))) < SECONDS


def test_after_a_restart_the_places_of_many_operations_are_learned_once() -> None:
    """Each of an update's items or deletions may name an operation of its own; 4,096 took 12 s."""
    author, other = member(2, SPACE), started(1)
    first = other.graph.counted()[0].op
    for number in range(2000):
        put(author, f"{number:04}", number)
    stored = [(entry.op.encoded, entry.end - entry.start) for entry in author.graph.counted()]
    deliver(other, *[entry.op for entry in author.graph.counted()])
    named = [U(CLIENTS[2]) + U(number) for number in range(2000)]
    overwriting = b"\1" + U(2000) + U(CLIENTS[1]) + b"\0" + b"".join(b"\x88" + each + VALUE for each in named) + b"\0"
    deletions = b"\0\1" + U(CLIENTS[2]) + U(2000) + b"".join(U(number) + b"\1" for number in range(2000))
    for body in (overwriting, deletions):
        replica = Replica(SPACE)
        replica.load(stored)
        deliver(replica, first)
        assert cost(replica, forged(other, body)) < SECONDS
