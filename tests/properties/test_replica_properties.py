"""Parsers against garbage, documents against accepted garbage, and the types of a space against plain Python."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from pycrdt import Doc
from replica_byzantine import colliding_instances, judge, play
from replica_members import NOW, deliver, forged, genesis, member, put, update_of

from lattica.replica.space import Space
from lattica.replica.store import SpaceStore
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.replica import client_ids
from lattica_protocols.replica.checkpoint import Checkpoint
from lattica_protocols.replica.contents import read_contents_untrusted
from lattica_protocols.replica.genesis import Genesis, parse_space, space_text
from lattica_protocols.replica.messages import Kind as MessageKind
from lattica_protocols.replica.messages import decode_message_untrusted, encode_message
from lattica_protocols.replica.operation import Operation
from lattica_protocols.replica.plain import document_value
from lattica_protocols.replica.proof import make_proof, verify_proof_untrusted
from lattica_protocols.replica.replica import Replica
from lattica_protocols.replica.short_form import RowWriter, read_row_untrusted, write_row
from lattica_protocols.replica.sync import ReplicaSync
from lattica_protocols.replica.tree import MerkleTree, follow_path_untrusted
from lattica_protocols.replica.update import parse_update_untrusted


def samples() -> dict[str, list[bytes]]:
    """Valid bytes for each parser, to be mutated."""
    space = genesis()
    owner, a = member(0, space), member(1, space)
    ops = [put(owner, "x", {"a": [1, "text", b"b"]}), put(owner, "x", 2)]
    deliver(a, *ops)
    ops.append(put(a, "y", None))
    deliver(owner, ops[-1])
    machine: ReplicaSync[int] = ReplicaSync(owner, random.Random(1), 0.0)
    machine.add_neighbour(1, 0.0)
    other: ReplicaSync[int] = ReplicaSync(member(2, space), random.Random(1), 0.0)
    other.add_neighbour(0, 0.0)
    messages = []
    for _ in range(4):
        for source, target in ((machine, other), (other, machine)):
            for _, data in source.poll_transmit():
                messages.append(data)
                target.receive_message_untrusted(1 if source is other else 0, data, 0.0, NOW)
    return {
        "genesis": [space.encode()],
        "operation": [op.encoded for op in ops],
        "row": [*write_row(ops), *write_row(ops[1:2], owner.graph.operation_at)],
        "update": [op.body for op in ops],
        "message": messages,
        "checkpoint": [owner.make_checkpoint(NOW).encode()],
        "proof": [make_proof(owner, ops[0].id)],
    }


SAMPLES = samples()
HISTORY = Replica(genesis())
deliver(HISTORY, *(Operation.decode_untrusted(data, genesis().id) for data in SAMPLES["operation"][:2]))
PARSERS: dict[str, Any] = {
    "genesis": Genesis.decode_untrusted,
    "operation": lambda data: Operation.decode_untrusted(data, bytes(32)),
    "row": lambda data: read_row_untrusted([*SAMPLES["row"][:2], data], genesis().id, HISTORY.graph.operation_at),
    "update": parse_update_untrusted,
    "message": decode_message_untrusted,
    "checkpoint": lambda data: Checkpoint.decode_untrusted(data, genesis()),
    "proof": verify_proof_untrusted,
}


@st.composite
def mutated(draw: st.DrawFn, name: str) -> bytes:
    """Valid bytes with a few of them changed, cut or put in."""
    data = bytearray(draw(st.sampled_from(SAMPLES[name])))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.integers(0, 3)):
            case 0 if data:
                data[at] = draw(st.integers(0, 255))
            case 1:
                del data[at : at + draw(st.integers(1, 8))]
            case 2:
                data[at:at] = draw(st.binary(max_size=8))
            case _ if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
    return bytes(data)


@pytest.mark.parametrize("name", PARSERS)
@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_garbage_gives_a_remote_error_or_nothing(name: str, data: st.DataObject) -> None:
    raw = data.draw(st.one_of(st.binary(max_size=200), mutated(name)))
    try:
        PARSERS[name](raw)
    except RemoteProtocolError:
        pass


@given(row=st.lists(st.one_of(st.sampled_from(SAMPLES["row"]), mutated("row")), max_size=8), find=st.booleans())
@settings(max_examples=300, deadline=None)
def test_whatever_is_read_from_a_row_is_an_operation_in_full_form(row: list[bytes], find: bool) -> None:
    """What a short form gives could have come in full: the same bytes, the same id, the same bounds."""
    space = genesis().id
    try:
        operations, complete = read_row_untrusted(row, space, HISTORY.graph.operation_at if find else None)
    except RemoteProtocolError:
        return
    assert complete == (len(operations) == len(row))
    for op in operations:
        full = Operation.decode_untrusted(op.encoded, space)
        names = [name for name in Operation.__slots__ if name != "verified"]
        assert [getattr(op, name) for name in names] == [getattr(full, name) for name in names]
    again = read_row_untrusted(write_row(operations), space)
    assert again.complete
    assert [op.encoded for op in again.operations] == [op.encoded for op in operations]


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_history_in_any_order_and_in_any_pieces_is_read_from_its_row(data: st.DataObject) -> None:
    """Three chains that merge now and then; rows are cut, picked from and written by several writers in turn."""
    space = genesis()
    members = [member(0, space), member(1, space), member(1, space, instance=9)]
    ops: list[Operation] = []
    for number in data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=15)):
        if data.draw(st.booleans()):
            deliver(members[number], *ops)
        key, later = f"k{data.draw(st.integers(0, 2))}", data.draw(st.integers(0, 300))
        ops.append(put(members[number], key, number, NOW + later))
    picked = data.draw(st.permutations(ops))[: data.draw(st.integers(0, len(ops)))]
    written: list[bytes] = []
    while len(written) < len(picked):
        writer = RowWriter()
        for op in picked[len(written) : len(written) + data.draw(st.integers(1, 8))]:
            written.append(writer.write(op))
    row = read_row_untrusted(written, space.id)
    assert row.complete
    assert [op.encoded for op in row.operations] == [op.encoded for op in picked]


@given(data=mutated("update"))
@settings(max_examples=400, deadline=None)
def test_an_update_that_is_accepted_does_not_harm_a_document(data: bytes) -> None:
    """Whatever passes the check is applied and read without an exception or a panic."""
    try:
        parse_update_untrusted(data)
    except RemoteProtocolError:
        return
    read_contents_untrusted(data)
    doc: Doc[Any] = Doc()
    for body in SAMPLES["update"][:1]:
        doc.apply_update(body)
    doc.apply_update(data)
    document_value(doc)
    Doc[Any]().apply_update(doc.get_update())


@given(value=st.integers(), data=mutated("update"))
@settings(max_examples=200, deadline=None)
def test_a_members_garbage_leaves_all_replicas_equal(value: int, data: bytes) -> None:
    """Signed by a writer, so only its contents can be wrong: two replicas take or refuse it alike."""
    space = genesis()
    a = member(1, space)
    first = put(a, "x", value % 1000)
    bad = forged(a, data if value % 2 else update_of(a, "x", 1)[:-1] + data[-1:])
    seen = []
    for order in (0, 1):
        replica = Replica(space)
        if order:
            b = member(2, space)
            deliver(replica, put(b, "x", 7))
        deliver(replica, first)
        try:
            replica.receive_operation(Operation.decode_untrusted(bad.encoded, space.id), NOW)
            seen.append("taken")
        except RemoteProtocolError as error:
            seen.append(str(error))
        assert replica.verify().document_equal
    assert seen[0] == seen[1]


@given(seed=st.integers(0, 2**32), rounds=st.integers(2, 24), forks=st.sampled_from([0.0, 0.05, 0.3]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_contradictory_writers_leave_one_document_for_one_root(seed: int, rounds: int, forks: float) -> None:
    """Whatever they name as neighbours, in whatever order it comes: through restarts, loaded states and checkpoints."""
    rng = random.Random(seed)
    judge(*play(rng, rounds, forks), rng)


@given(seed=st.integers(0, 2**32), rounds=st.integers(2, 24), forks=st.sampled_from([0.0, 0.05, 0.3]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_chains_with_one_client_id_leave_one_document_for_one_root(seed: int, rounds: int, forks: float) -> None:
    """The same, of writers some of whom found instances that collide with those of others."""
    rng = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_ids, "CLIENT_BITS", 10)
        judge(*play(rng, rounds, forks, colliding_instances(rng)), rng)


@given(st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=60, unique=True), st.randoms())
def test_the_tree_does_not_know_the_order_and_proves_every_id(keys: list[bytes], rng: random.Random) -> None:
    shuffled = list(keys)
    rng.shuffle(shuffled)
    tree, other = MerkleTree(keys), MerkleTree()
    for key in shuffled:
        other.add(key)
        if rng.random() < 0.3:
            other.root()
    assert tree.root() == other.root()
    assert MerkleTree(keys[1:]).root() != tree.root()
    for key in keys[:5]:
        path = tree.path(key)
        assert follow_path_untrusted(key, path) == tree.root()
        wrong = [(left, bytes(32)) if index == 0 else (left, digest) for index, (left, digest) in enumerate(path)]
        if wrong != path:
            assert follow_path_untrusted(key, wrong) != tree.root()


@given(st.binary(min_size=32, max_size=32))
def test_space_ids_have_one_text(space: bytes) -> None:
    assert parse_space(space_text(space)) == space


def test_messages_are_what_they_were() -> None:
    data = encode_message(MessageKind.HELLO, bytes(32), bytes(32), 3, 9, bytes(32))
    message = decode_message_untrusted(data)
    assert (message.kind, message.fields) == (MessageKind.HELLO, (bytes(32), 3, 9, bytes(32)))


# -- the types against plain Python ------------------------------------------------------------------------------------
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(["a", "b", "c", "é😀"])


class OneWriter(RuleBasedStateMachine):
    """One member writes to all types; a plain model says what has to be there, on it and on a follower."""

    def __init__(self) -> None:
        super().__init__()
        space = genesis()
        self.store = SpaceStore.open(None)
        self.store.add(space, 7)
        replica = member(0, space)
        machine: ReplicaSync[Any] = ReplicaSync(replica, random.Random(1), 0.0)
        self.space = Space(replica, machine, self.store, lambda: None, lambda: NOW, lambda space: None)
        self.follower = Replica(space)
        self.fed = 0
        self.map: dict[str, Any] = {}
        self.list: list[Any] = []
        self.text = ""
        self.counter = 0
        self.set: set[Any] = set()

    def teardown(self) -> None:
        self.store.close()

    @rule(key=KEYS, value=VALUES)
    def set_key(self, key: str, value: Any) -> None:
        self.space[key] = value
        self.map[key] = value

    @rule(key=KEYS, inner=KEYS, value=VALUES)
    def set_inside(self, key: str, inner: str, value: Any) -> None:
        if isinstance(self.map.get(key), dict):
            self.space[key][inner] = value
            self.map[key] = {**self.map[key], inner: value}

    @rule(key=KEYS, value=VALUES)
    def append_inside(self, key: str, value: Any) -> None:
        if isinstance(self.map.get(key), list):
            self.space[key].append(value)
            self.map[key] = [*self.map[key], value]

    @rule(key=KEYS)
    def delete_key(self, key: str) -> None:
        if key in self.map:
            del self.space[key]
            del self.map[key]
        else:
            with pytest.raises(KeyError):
                del self.space[key]

    @rule(at=st.integers(-3, 10), value=VALUES)
    def insert(self, at: int, value: Any) -> None:
        self.space.list("l").insert(at, value)
        self.list.insert(at, value)

    @precondition(lambda self: self.list)
    @rule(at=st.integers(0, 20), value=VALUES)
    def replace(self, at: int, value: Any) -> None:
        at %= len(self.list)
        self.space.list("l")[at] = value
        self.list[at] = value

    @precondition(lambda self: self.list)
    @rule(start=st.integers(0, 5), stop=st.integers(0, 8))
    def delete_slice(self, start: int, stop: int) -> None:
        del self.space.list("l")[start:stop]
        del self.list[start:stop]

    @rule(at=st.integers(0, 30), text=st.text(max_size=5))
    def write_text(self, at: int, text: str) -> None:
        at = min(at, len(self.text))
        self.space.text("t").insert(at, text)
        self.text = self.text[:at] + text + self.text[at:]

    @rule(at=st.integers(0, 30), length=st.integers(0, 5))
    def delete_text(self, at: int, length: int) -> None:
        start, stop = min(at, len(self.text)), min(at + length, len(self.text))
        self.space.text("t").delete(start, stop)
        self.text = self.text[:start] + self.text[stop:]

    @rule(by=st.integers(-5, 9))
    def count(self, by: int) -> None:
        self.space.counter("c").increment(by)
        self.counter += by

    @rule(value=st.integers(0, 4) | st.text(max_size=2))
    def add(self, value: Any) -> None:
        self.space.set("s").add(value)
        self.set.add(value)

    @rule(value=st.integers(0, 4) | st.text(max_size=2))
    def discard(self, value: Any) -> None:
        self.space.set("s").discard(value)
        self.set.discard(value)

    @rule(key=KEYS, value=VALUES)
    def transaction(self, key: str, value: Any) -> None:
        before = self.space.operations()
        with self.space.transaction():
            self.space[key] = value
            self.space.list("l").append(value)
            self.space.counter("c").increment()
        self.map[key] = value
        self.list.append(value)
        self.counter += 1
        assert self.space.operations() == before + 1

    @rule(key=KEYS)
    def failed_transaction(self, key: str) -> None:
        root = self.space.root()
        with pytest.raises(ZeroDivisionError):
            self._fail(key)
        assert self.space.root() == root

    def _fail(self, key: str) -> None:
        with self.space.transaction():
            self.space[key] = "never"
            self.space.text("t").append("never")
            raise ZeroDivisionError

    @invariant()
    def reads_like_the_model(self) -> None:
        space = self.space
        assert space.map().value() == self.map
        assert space.list("l").value() == self.list
        assert list(space.list("l")[1:3]) == self.list[1:3]
        assert str(space.text("t")) == self.text
        assert space.counter("c").value() == self.counter
        assert set(space.set("s")) == self.set
        assert len(space.set("s")) == len(self.set)

    @invariant()
    def a_follower_has_the_same(self) -> None:
        for entry in self.space.replica.graph.counted()[self.fed :]:
            self.follower.receive_operation(Operation.decode_untrusted(entry.op.encoded, self.follower.space), NOW)
            self.fed += 1
        assert self.follower.root() == self.space.root()
        assert self.follower.value() == self.space.replica.value()


TestOneWriter = OneWriter.TestCase
TestOneWriter.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
