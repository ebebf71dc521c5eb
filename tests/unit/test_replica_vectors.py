"""The test vectors of `protocols/specs/replica.md`: `tests/vectors/replica.json`.

`pytest tests/unit/test_replica_vectors.py --rewrite-races` writes them anew; the file is what others read, so a change
of it is a change of the protocol.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from replica_members import NOW, deliver, forged, genesis, key_of, member, put, update_of
from test_replica_placement import WRONG

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.replica.checkpoint import Checkpoint
from lattica_protocols.replica.client_ids import client_id, forked_client
from lattica_protocols.replica.equivocation import Crowd, Fork
from lattica_protocols.replica.genesis import Genesis, provider_key, space_text
from lattica_protocols.replica.messages import Kind as MessageKind
from lattica_protocols.replica.messages import decode_message_untrusted, encode_message
from lattica_protocols.replica.operation import Kind, Operation
from lattica_protocols.replica.presence import Presence
from lattica_protocols.replica.proof import make_proof, verify_proof_untrusted
from lattica_protocols.replica.replica import Replica
from lattica_protocols.replica.short_form import read_row_untrusted, write_row
from lattica_protocols.replica.sync import ReplicaSync
from lattica_protocols.replica.tree import MerkleTree

FILE = Path(__file__).resolve().parents[1] / "vectors" / "replica.json"


def make() -> dict[str, Any]:
    """All vectors, from fixed keys."""
    space = genesis()
    owner, a = member(0, space), member(1, space)
    ops = [put(owner, "model", {"version": 3, "layers": [1, 2]}), put(owner, "model", None)]
    deliver(a, *ops)
    ops.append(put(a, "worker", "a"))
    deliver(owner, ops[-1])
    ops.append(owner.change_members(Kind.GRANT, key_of(5).public_key.data, NOW))
    root = owner.root()
    proof = make_proof(owner, ops[0].id)
    twins = [forged(a, update_of(a, "worker", value)) for value in ("b", "c")]
    forked = Replica(space)
    deliver(forked, *ops, *twins)
    firsts = [forged(a, b"", instance=number, parents=[], seq=0) for number in range(65)]
    crowded = Replica(space)
    deliver(crowded, *ops, *firsts)
    crowd = encode_message(MessageKind.FORKS, space.id, [[op.encoded for op in firsts]])
    checkpoint = owner.make_checkpoint(NOW)
    presence = Presence(space.id).announce(key_of(1), b'{"layers":"0-11"}', 0.0, NOW)
    machine: ReplicaSync[int] = ReplicaSync(owner, random.Random(1), 0.0)
    ids = [bytes([number]) * 32 for number in (1, 2, 3, 255)] + [bytes([1]) * 31 + b"\2"]
    return {
        "keys": [key_of(number).public_key.data.hex() for number in range(3)],
        "seeds": [(bytes([number + 1]) * 32).hex() for number in range(3)],
        "genesis": {
            "bytes": space.encode().hex(),
            "id": space.id.hex(),
            "text": space_text(space.id),
            "provider_key": provider_key(space.id).hex(),
        },
        "client_ids": [
            {"author": key_of(number).public_key.data.hex(), "instance": 7, "id": client_id(_key(number), 7)}
            for number in range(3)
        ],
        "operations": [
            {"bytes": op.encoded.hex(), "id": op.id.hex(), "kind": op.kind, "seq": op.seq, "root_after": _root(ops, n)}
            for n, op in enumerate(ops, 1)
        ],
        "row": [data.hex() for data in write_row(ops)],
        "pushed": write_row(ops[1:2], owner.graph.operation_at)[0].hex(),
        "document": owner.value(),
        "root": root.hex(),
        "fork": {
            "first": twins[0].encoded.hex(),
            "second": twins[1].encoded.hex(),
            "place": list(Fork(*twins).place),
            "client_ids": [forked_client(op.id) for op in twins],
            "excluded": _key(1).hex(),
            "root": forked.root().hex(),
            "document": forked.value(),
        },
        "crowd": {
            "author": _key(1).hex(),
            "instances": "0 to 64",
            "time": firsts[0].time,
            "first": firsts[0].encoded.hex(),
            "message_blake3": blake3(crowd).hexdigest(),
            "place": list(Crowd(firsts).place),
            "root": crowded.root().hex(),
            "document": crowded.value(),
        },
        "tree": [{"ids": [each.hex() for each in ids[:n]], "root": MerkleTree(ids[:n]).root().hex()} for n in range(6)],
        "proof": {"bytes": proof.hex(), "operation": ops[0].id.hex(), "root": root.hex()},
        "checkpoint": {
            "bytes": checkpoint.encode().hex(),
            "id": checkpoint.id.hex(),
            "root": checkpoint.root.hex(),
            "operations": checkpoint.operations,
        },
        "presence": {
            "key": presence[0].hex(),
            "time": presence[1],
            "info": presence[2].hex(),
            "signature": presence[3].hex(),
        },
        "digest": machine.digest().hex(),
        "messages": {
            "HELLO": encode_message(MessageKind.HELLO, space.id, machine.digest(), *owner.rank()).hex(),
            "OPERATIONS": encode_message(MessageKind.OPERATIONS, space.id, 0, [ops[0].encoded]).hex(),
            "WANT": encode_message(MessageKind.WANT, space.id, [ops[0].id]).hex(),
            "GET_GENESIS": encode_message(MessageKind.GET_GENESIS, space.id, space.id).hex(),
        },
        "refused_updates": {name: body.hex() for name, body in WRONG.items() if len(body) < 300},
    }


def _key(number: int) -> bytes:
    return key_of(number).public_key.data


def _root(ops: list[Operation], count: int) -> str:
    replica = Replica(genesis())
    deliver(replica, *ops[:count])
    return replica.root().hex()


@pytest.fixture(scope="module")
def vectors(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.config.getoption("--rewrite-races", default=False):
        FILE.write_text(json.dumps(make(), indent=1) + "\n", "utf-8")
    return json.loads(FILE.read_text("utf-8"))  # type: ignore[no-any-return]


def test_they_are_what_this_code_makes(vectors: dict[str, Any]) -> None:
    assert json.loads(json.dumps(make())) == vectors


def test_a_replica_that_is_fed_the_bytes_comes_to_the_roots(vectors: dict[str, Any]) -> None:
    space = Genesis.decode_untrusted(bytes.fromhex(vectors["genesis"]["bytes"]))
    assert space_text(space.id) == vectors["genesis"]["text"]
    replica = Replica(space)
    for row in vectors["operations"]:
        op = Operation.decode_untrusted(bytes.fromhex(row["bytes"]), space.id)
        assert op.id.hex() == row["id"]
        replica.receive_operation(op, NOW)
        assert replica.root().hex() == row["root_after"]
    assert replica.value() == vectors["document"]
    twins = [Operation.decode_untrusted(bytes.fromhex(vectors["fork"][each]), space.id) for each in ("second", "first")]
    for op in twins:
        replica.receive_operation(op, NOW)
    assert replica.root().hex() == vectors["fork"]["root"]
    assert [author.hex() for author, _, _ in replica.graph.exclusions()] == [vectors["fork"]["excluded"]]
    assert replica.value() == vectors["fork"]["document"]


def test_the_row_gives_the_same_operations(vectors: dict[str, Any]) -> None:
    space = Genesis.decode_untrusted(bytes.fromhex(vectors["genesis"]["bytes"]))
    full = [row["bytes"] for row in vectors["operations"]]
    row = read_row_untrusted([bytes.fromhex(data) for data in vectors["row"]], space.id)
    assert [op.encoded.hex() for op in row.operations] == full
    assert vectors["row"][1] != full[1]
    replica = Replica(space)
    deliver(replica, row.operations[0])
    pushed = read_row_untrusted([bytes.fromhex(vectors["pushed"])], space.id, replica.graph.operation_at)
    assert [op.encoded.hex() for op in pushed.operations] == full[1:2]


def test_proof_checkpoint_and_messages_are_read(vectors: dict[str, Any]) -> None:
    proven = verify_proof_untrusted(bytes.fromhex(vectors["proof"]["bytes"]))
    assert (proven.root.hex(), proven.operation.id.hex()) == (vectors["proof"]["root"], vectors["proof"]["operation"])
    checkpoint = Checkpoint.decode_untrusted(bytes.fromhex(vectors["checkpoint"]["bytes"]), genesis())
    assert checkpoint.id.hex() == vectors["checkpoint"]["id"]
    replica = Replica(genesis())
    assert replica.receive_checkpoint(checkpoint.encode())
    assert replica.value() == vectors["document"]
    for name, data in vectors["messages"].items():
        assert decode_message_untrusted(bytes.fromhex(data)).kind.name == name
    record = vectors["presence"]
    fields = (bytes.fromhex(record["key"]), record["time"], *(bytes.fromhex(record[n]) for n in ("info", "signature")))
    assert Presence(genesis().id).receive_untrusted(fields, 0.0, NOW)  # type: ignore[arg-type]


def test_updates_that_nobody_may_write_are_refused(vectors: dict[str, Any]) -> None:
    for name, body in vectors["refused_updates"].items():
        assert bytes.fromhex(body) == WRONG[name]
        replica = Replica(genesis())
        with pytest.raises(RemoteProtocolError):
            replica.receive_operation(forged(member(1, genesis()), bytes.fromhex(body)), NOW)
