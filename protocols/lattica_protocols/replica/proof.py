"""What a third party is shown: that an operation of an author is part of the state with a root. Checked offline.

Wire: canonical msgpack, an array

    [1, genesis: bin, checkpoint id: bin 32, count: uint, exclusions digest: bin 32, operation: bin,
     path: [[left: bool, hash: bin 32], …], rights: [operation: bin, …]]

`rights` are the operations that show the author's right: from the owner or a first writer (then it is empty) by grants
and hand-overs to the author, each signed by a key that the ones before give the right to grant. That none of them was
removed in between is what the members of the space checked; the proof shows that the author once had the right, and
the root (from a member that the verifier trusts for it) that the members took the operation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgpack

from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.limits import REPLICA_MAX_OPERATION_BYTES, REPLICA_MAX_PROOF_BYTES, REPLICA_MAX_WRITERS
from lattica_protocols.replica.contents import read_contents_untrusted
from lattica_protocols.replica.genesis import Genesis
from lattica_protocols.replica.operation import Kind, Operation
from lattica_protocols.replica.replica import root_of
from lattica_protocols.replica.tree import MAX_PATH, follow_path_untrusted

if TYPE_CHECKING:
    from lattica_protocols.replica.replica import Replica

VERSION = 1


@dataclass(frozen=True, slots=True)
class Proven:
    """What a proof shows."""

    genesis: Genesis
    operation: Operation
    root: bytes
    """The root the operation is part of; compare it with one that you got from whom you trust."""


def make_proof(replica: Replica, operation: bytes) -> bytes:
    """The proof for an operation by its id. `LocalProtocolError` when it is not in the state."""
    entry = replica.graph.entries.get(operation)
    if entry is None or not entry.counted:
        raise LocalProtocolError("no operation with this id is part of the state (a checkpoint may have replaced it)")
    steps = [[left, other] for left, other in replica.tree.path(operation)]
    checkpoint = bytes(32) if replica.checkpoint is None else replica.checkpoint.id
    rights = [] if entry.op.kind != Kind.EDIT else _rights(replica, entry.op.author)
    fields = [
        VERSION,
        replica.genesis.encode(),
        checkpoint,
        len(replica.tree),
        replica.exclusions_digest(),
        entry.op.encoded,
        steps,
        rights,
    ]
    return bytes(msgpack.packb(fields))


def _rights(replica: Replica, author: bytes) -> list[bytes]:
    """Grants and hand-overs that lead to `author`."""
    genesis = replica.genesis
    if author == genesis.owner or author in genesis.writers:
        return []
    changes = [entry.op for entry in replica.graph.counted() if entry.op.kind in (Kind.GRANT, Kind.HAND_OVER)]
    handed = [Operation.decode_untrusted(data, replica.space) for data in replica.graph.floor.handed_over]
    out: list[bytes] = []
    wanted = author
    kinds: tuple[Kind, ...] = (Kind.GRANT, Kind.HAND_OVER)
    while wanted != genesis.owner and len(out) < REPLICA_MAX_WRITERS:
        found = next((op for op in reversed([*handed, *changes]) if op.body == wanted and op.kind in kinds), None)
        if found is None:
            raise LocalProtocolError("a checkpoint replaced the grants that would show the author's right")
        out.append(found.encoded)
        wanted, kinds = found.author, (Kind.HAND_OVER,)
    return out[::-1]


def verify_proof_untrusted(data: bytes) -> Proven:
    """Check a proof. Raises `RemoteProtocolError` when it proves nothing."""
    if len(data) > REPLICA_MAX_PROOF_BYTES + REPLICA_MAX_OPERATION_BYTES:
        raise RemoteProtocolError(f"proof of {len(data)} bytes")
    try:
        fields = msgpack.unpackb(
            data, use_list=False, max_array_len=REPLICA_MAX_WRITERS, max_map_len=0, max_str_len=0, max_ext_len=0
        )
        version, genesis_bytes, checkpoint, count, exclusions, encoded, path, rights = fields
        steps = [(bool(left), bytes(other)) for left, other in path[: MAX_PATH + 1]]
        sizes = {len(other) for _, other in steps} | {len(checkpoint), len(exclusions)}
        if version != VERSION or sizes != {32} or type(count) is not int or not 0 <= count < 1 << 53:
            raise RemoteProtocolError("not a proof of this version")
        genesis = Genesis.decode_untrusted(bytes(genesis_bytes))
        operation = _checked_untrusted(encoded, genesis)
        granted = [_checked_untrusted(right, genesis) for right in rights]
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError):
        raise RemoteProtocolError("not a proof") from None
    owners, writers = {genesis.owner}, {genesis.owner, *genesis.writers}
    for right in granted:
        if right.author not in owners or right.kind not in (Kind.GRANT, Kind.HAND_OVER):
            raise RemoteProtocolError("a grant in the proof that no owner signed")
        writers.add(right.body)
        if right.kind == Kind.HAND_OVER:
            owners.add(right.body)
    if operation.kind == Kind.EDIT and operation.author not in writers:
        raise RemoteProtocolError("the proof does not show that the author had a right to write")
    tree = follow_path_untrusted(operation.id, steps)
    return Proven(genesis, operation, root_of(genesis.id, checkpoint, count, exclusions, tree))


def _checked_untrusted(data: object, genesis: Genesis) -> Operation:
    if type(data) is not bytes:
        raise RemoteProtocolError("not a proof")
    operation = Operation.decode_untrusted(data, genesis.id)
    if not operation.check_signature(genesis.id):
        raise RemoteProtocolError("an operation in the proof has a wrong signature")
    return operation


def changes_of(operation: Operation) -> list[dict[str, Any]]:
    """What an operation writes, as far as its own bytes show: `[{container, key, value}]`."""
    if operation.kind != Kind.EDIT:
        return [{"container": None, "key": Kind(operation.kind).name.lower(), "value": operation.body.hex()}]
    return [written._asdict() for written in read_contents_untrusted(operation.body)] if operation.body else []
