"""Proofs that an author cheated: operations with its signature that no member signs who keeps the rules.

    fork     two operations with one place in one chain
    crowd    the first operations of more instances than an author may have

Whoever sees one excludes the author, from a *place* (seq, instance) on that the proof gives, so all do alike in
whatever order things came. Neither needs that the operations in it are admitted: the signatures are enough. A crowd has
65 operations, which is why the first one of a chain has a size limit of its own: a proof fits one message.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import REPLICA_MAX_FIRST_BYTES, REPLICA_MAX_INSTANCES
from lattica_protocols.replica.errors import Refused
from lattica_protocols.replica.operation import Operation

FORK_OPERATIONS = 2
CROWD_OPERATIONS = REPLICA_MAX_INSTANCES + 1
"""How many operations a proof has tells the two apart."""


class Fork:
    """Two operations with one place in one chain."""

    __slots__ = ("operations",)

    def __init__(self, first: Operation, second: Operation) -> None:
        self.operations = tuple(sorted((first, second), key=lambda op: op.id))

    @property
    def author(self) -> bytes:
        return self.operations[0].author

    @property
    def place(self) -> tuple[int, int]:
        """(seq, instance): of several proofs against an author the one with the smallest place decides."""
        return self.operations[0].seq, self.operations[0].instance

    def check_untrusted(self, space: bytes) -> None:
        """Two signed operations, different, of one author, instance and seq."""
        first, second = self.operations
        if first.chain != second.chain or first.seq != second.seq or first.id == second.id:
            raise Refused("the two operations are no fork")
        if not first.check_signature(space) or not second.check_signature(space):
            raise Refused("a fork with a wrong signature")


class Crowd:
    """The first operations of one instance more than an author may have."""

    __slots__ = ("operations",)

    def __init__(self, operations: Iterable[Operation]) -> None:
        self.operations = tuple(sorted(operations, key=lambda op: op.instance))

    @property
    def author(self) -> bytes:
        return self.operations[0].author

    @property
    def place(self) -> tuple[int, int]:
        """The smallest there is: none of the author's operations stands before it."""
        return 0, 0

    def check_untrusted(self, space: bytes) -> None:
        """Signed first operations of one author, of so many instances."""
        ops = self.operations
        instances = {op.instance for op in ops if op.seq == 0 and op.author == self.author}
        if len(ops) != CROWD_OPERATIONS or len(instances) != CROWD_OPERATIONS:
            raise Refused("the operations are not the first ones of too many instances")
        if any(len(op.encoded) > REPLICA_MAX_FIRST_BYTES for op in ops):
            raise Refused("a first operation that is too long")
        if not all(op.check_signature(space) for op in ops):
            raise Refused("a crowd with a wrong signature")


Equivocation = Fork | Crowd


def equivocation_untrusted(row: Sequence[bytes], space: bytes) -> Equivocation:
    """A proof from its operations. It is still to be checked."""
    ops = [Operation.decode_untrusted(data, space) for data in row]
    if len(ops) == FORK_OPERATIONS:
        return Fork(*ops)
    if len(ops) == CROWD_OPERATIONS:
        return Crowd(ops)
    raise RemoteProtocolError(f"a proof of {len(ops)} operations")
