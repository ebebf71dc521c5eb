"""Members of a space without a network, for tests: they edit, and what they made is handed around."""

from __future__ import annotations

import random
from typing import Any

from pycrdt import Doc, Map

from lattica_protocols.keys import PrivateKey
from lattica_protocols.replica.equivocation import Fork
from lattica_protocols.replica.errors import MissingParents
from lattica_protocols.replica.genesis import Genesis
from lattica_protocols.replica.operation import Kind, Operation
from lattica_protocols.replica.plain import container, to_shared
from lattica_protocols.replica.replica import Replica

NOW = 1_800_000_000.0


def key_of(number: int) -> PrivateKey:
    return PrivateKey.generate(bytes([number + 1]) * 32)


def genesis(writers: int = 2) -> Genesis:
    """Owned by key 0; keys 1 to `writers` may write."""
    keys = [key_of(number).public_key.data for number in range(writers + 1)]
    return Genesis.create(keys[0], "test", bytes(16), keys[1:])


def member(number: int, space: Genesis, instance: int = 7) -> Replica:
    return Replica(space, key=key_of(number), instance=instance, rng=random.Random(number))


def put(replica: Replica, key: str, value: object, now: float = NOW) -> Operation:
    """Set a key of the map `data`."""
    with replica.transaction(now) as made:
        container(replica.doc, "m:data")[key] = to_shared(value)
    return made[0]


def data(replica: Replica) -> Any:
    return replica.value().get("m:data", {})


def forged(replica: Replica, body: bytes, kind: int = Kind.EDIT, **other: Any) -> Operation:
    """The member's next operation with any contents, signed by its key; not taken in by the member itself."""
    assert replica.key is not None
    tip = replica.graph.tip((replica.key.public_key.data, replica.instance))
    previous = [] if tip is None else [tip.op.id]
    fields: dict[str, Any] = {
        "kind": kind,
        "instance": replica.instance,
        "seq": 0 if tip is None else tip.op.seq + 1,
        "parents": [*previous, *sorted(replica.graph.heads.difference(previous))],
        "time": int(NOW),
        "body": body,
    }
    return Operation.seal(replica.key, replica.space, **(fields | other))


def update_of(replica: Replica, key: str, value: object, client: int | None = None) -> bytes:
    """The update of an edit on top of the replica's document, under any client id."""
    doc: Doc[Any] = Doc(client_id=replica.doc.client_id if client is None else client)
    doc.apply_update(replica.doc.get_update())
    seen: list[bytes] = []
    subscription = doc.observe(lambda event: seen.append(event.update))
    doc.get("m:data", type=Map)[key] = to_shared(value)
    doc.unobserve(subscription)
    return seen[0]


def deliver(replica: Replica, *ops: Operation | Fork) -> None:
    """Hand over operations and proofs in any order: those whose parents are missing wait."""
    left = list(ops)
    while left:
        waiting = []
        for op in left:
            if isinstance(op, Fork):
                replica.receive_fork(op)
                continue
            try:
                replica.receive_operation(Operation.decode_untrusted(op.encoded, replica.space), NOW)
            except MissingParents:
                waiting.append(op)
        assert len(waiting) < len(left), "operations whose parents are not among them"
        left = waiting
