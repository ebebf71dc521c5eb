"""What an operation has to keep to be admitted, one rule after the other; and that a refused one changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pycrdt import Array, Doc, Map, Text, XmlFragment
from replica_members import NOW, data, deliver, forged, genesis, key_of, member, put, update_of

from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.limits import REPLICA_MAX_CLOCK_SKEW, REPLICA_MAX_UPDATE_BYTES
from lattica_protocols.replica.errors import MissingParents, NotYet, Refused
from lattica_protocols.replica.operation import Kind, Operation
from lattica_protocols.replica.plain import container
from lattica_protocols.replica.replica import Replica
from lattica_protocols.replica.update import parse_update_untrusted


def fresh_update(client: int, key: str = "k", clock_filler: int = 0) -> bytes:
    doc: Doc[object] = Doc(client_id=client)
    shared = doc.get("m:data", type=Map)
    for number in range(clock_filler):
        shared[f"f{number}"] = number
    seen: list[bytes] = []
    subscription = doc.observe(lambda event: seen.append(event.update))
    shared[key] = 1
    doc.unobserve(subscription)
    return seen[0]


def deletion(client: int, clock: int, length: int) -> bytes:
    from lattica_protocols.varint import encode_uvarint

    return b"\x00\x01" + encode_uvarint(client) + b"\x01" + encode_uvarint(clock) + encode_uvarint(length)


def own(replica: Replica) -> int:
    return replica.doc.client_id


REFUSED: dict[str, tuple[Callable[[Replica, Replica], Operation], str]] = {
    "another's client id": (
        lambda a, b: forged(a, update_of(a, "k", 1, client=own(b))),
        "client id",
    ),
    "a client id of nobody": (lambda a, b: forged(a, fresh_update(12345)), "client id"),
    "a clock that was used": (lambda a, b: forged(a, fresh_update(own(a))), "start at clock 0"),
    "a clock ahead": (lambda a, b: forged(a, fresh_update(own(a), clock_filler=9)), "start at clock 9"),
    "deleting what is not there": (lambda a, b: forged(a, deletion(own(b), 5, 1)), "not in its past"),
    "deleting its own future": (lambda a, b: forged(a, deletion(own(a), 0, 99)), "not there yet"),
    "wrong sequence": (lambda a, b: forged(a, b"", seq=7), "operation before it"),
    "no predecessor": (
        lambda a, b: forged(a, b"", parents=[max(a.graph.heads)], seq=2, instance=99),
        "operation before it",
    ),
    "time going back": (lambda a, b: forged(a, b"", time=5), "time is before"),
    "a grant of no owner": (lambda a, b: forged(a, key_of(9).public_key.data, Kind.GRANT), "only the owner"),
    "removing the owner": (
        lambda a, b: forged(b, key_of(0).public_key.data, Kind.REMOVE),
        "only the owner",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_operation_that_breaks_a_rule_is_refused_and_changes_nothing(name: str) -> None:
    make, reason = REFUSED[name]
    space = genesis()
    owner, a, b = (member(number, space) for number in range(3))
    for op in (put(a, "x", 1), put(a, "x", 2)):
        deliver(owner, op)
        deliver(b, op)
    op = put(b, "y", 1)
    deliver(owner, op)
    deliver(a, op)
    root, value = owner.root(), owner.value()
    bad = make(a, b)
    with pytest.raises(Refused, match=reason):
        owner.receive_operation(Operation.decode_untrusted(bad.encoded, space.id), NOW)
    assert (owner.root(), owner.value()) == (root, value)
    assert owner.verify().ok
    # The author can go on as if nothing had been.
    deliver(owner, put(a, "z", 3))
    assert data(owner) == {"x": 2, "y": 1, "z": 3}


def test_a_stranger_and_a_forged_signature_are_refused() -> None:
    space = genesis()
    owner, a = member(0, space), member(1, space)
    stranger = member(8, space)
    bad = forged(stranger, fresh_update(own(stranger)))
    with pytest.raises(Refused, match="no right"):
        owner.receive_operation(bad, NOW)
    op = put(a, "x", 1)
    changed = Operation.decode_untrusted(op.encoded[:-1] + bytes([op.encoded[-1] ^ 1]), space.id)
    with pytest.raises(Refused, match="signature"):
        owner.receive_operation(changed, NOW)
    elsewhere = Operation.decode_untrusted(op.encoded, bytes(32))
    assert not elsewhere.check_signature(bytes(32)), "signed for another space"


def test_what_may_heal_is_told_apart() -> None:
    space = genesis()
    owner, a = member(0, space), member(1, space)
    first, second = put(a, "x", 1), put(a, "x", 2)
    with pytest.raises(MissingParents) as caught:
        owner.receive_operation(second, NOW)
    assert caught.value.missing == [first.id]
    early = put(a, "x", 3, NOW + REPLICA_MAX_CLOCK_SKEW + 5)
    deliver(owner, first, second)
    with pytest.raises(NotYet, match="ahead of ours"):
        owner.receive_operation(early, NOW)
    owner.receive_operation(early, NOW + 10)
    assert data(owner) == {"x": 3}


def test_rights_end_with_the_removal_that_the_author_knew() -> None:
    space = genesis()
    owner, a = member(0, space), member(1, space)
    deliver(a, owner.change_members(Kind.REMOVE, key_of(1).public_key.data, NOW))
    with pytest.raises(LocalProtocolError, match="no writer"):
        put(a, "x", 1)
    with pytest.raises(Refused, match="no right"):
        owner.receive_operation(forged(a, fresh_update(own(a))), NOW)
    with pytest.raises(LocalProtocolError, match="no writer"):
        owner.change_members(Kind.REMOVE, key_of(9).public_key.data, NOW)


def test_the_owner_hands_over() -> None:
    space = genesis()
    owner, a, b = (member(number, space) for number in range(3))
    handed = owner.change_members(Kind.HAND_OVER, key_of(1).public_key.data, NOW)
    deliver(a, handed)
    deliver(b, handed)
    granted = a.change_members(Kind.GRANT, key_of(5).public_key.data, NOW)
    deliver(owner, granted)
    deliver(b, granted)
    with pytest.raises(LocalProtocolError, match="only the owner"):
        owner.change_members(Kind.REMOVE, key_of(2).public_key.data, NOW)
    new = member(5, space)
    deliver(new, handed, granted)
    deliver(b, put(new, "x", 1))
    assert data(b) == {"x": 1}
    with pytest.raises(Refused, match="cannot be removed"):
        b.receive_operation(forged(a, key_of(1).public_key.data, Kind.REMOVE), NOW)
    # Who only knows the genesis accepts the new owner's checkpoint: it shows the hand-over.
    joiner = Replica(space)
    assert joiner.receive_checkpoint(a.make_checkpoint(NOW).encode())
    with pytest.raises(RemoteProtocolError, match="nobody signed"):
        joiner.receive_checkpoint(b.make_checkpoint(NOW).encode())


def test_what_cannot_be_shared_leaves_the_document_as_it_was() -> None:
    owner = member(0, genesis())
    put(owner, "x", 1)
    root = owner.root()
    with pytest.raises(LocalProtocolError, match="over the limit"):
        put(owner, "big", b"x" * (REPLICA_MAX_UPDATE_BYTES + 1))
    with pytest.raises(LocalProtocolError, match="object"):
        put(owner, "odd", object())
    with pytest.raises(ZeroDivisionError):
        write_and_fail(owner)
    assert data(owner) == {"x": 1}
    assert owner.root() == root
    put(owner, "y", 2)
    assert owner.verify().ok


def write_and_fail(replica: Replica) -> None:
    with replica.transaction(NOW):
        container(replica.doc, "m:data")["y"] = 1
        raise ZeroDivisionError


@pytest.mark.parametrize("kind", [XmlFragment, Doc])
def test_types_that_are_not_ours_are_refused(kind: type) -> None:
    doc: Doc[object] = Doc(client_id=5)
    seen: list[bytes] = []
    doc.observe(lambda event: seen.append(event.update))
    if kind is Doc:
        doc.get("m:data", type=Map)["sub"] = Doc()
    else:
        from pycrdt import XmlElement

        doc.get("m:data", type=XmlFragment).children.append(XmlElement("p"))
    with pytest.raises(RemoteProtocolError, match=r"not allowed|only array, map and text"):
        parse_update_untrusted(seen[0])


def test_containers_have_names_of_ours() -> None:
    doc: Doc[object] = Doc(client_id=5)
    seen: list[bytes] = []
    doc.observe(lambda event: seen.append(event.update))
    doc.get("anything", type=Map)["x"] = 1
    with pytest.raises(RemoteProtocolError, match="no container"):
        parse_update_untrusted(seen[0])


def test_what_pycrdt_writes_is_read() -> None:
    """All content types we use, and clocks that continue: text counts in UTF-16 units."""
    doc: Doc[object] = Doc(client_id=(1 << 53) - 1)
    seen: list[bytes] = []
    doc.observe(lambda event: seen.append(event.update))
    shared = doc.get("m:data", type=Map)
    shared["a"] = Map({"list": Array([1, None, "x", b"y", {"k": [1.5]}]), "text": Text("hi")})
    shared["a"]["text"].insert(1, "héllo\U0001f600")
    shared["a"]["text"].format(0, 2, {"bold": True})
    shared["a"]["list"].extend([True, 1 << 60])
    del shared["a"]["list"][1:3]
    shared["a"] = 2
    del shared["a"]
    clock = 0
    for update in seen:
        parsed = parse_update_untrusted(update)
        if parsed.end > parsed.start:
            assert (parsed.client, parsed.start) == ((1 << 53) - 1, clock)
            clock = parsed.end
    assert clock > 20
