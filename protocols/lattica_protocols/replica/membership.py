"""Who may write, as a function of the grants, removals and hand-overs that an operation has in its past.

Everything here is observed-remove: a removal takes away the grants that its author had seen, so a grant concurrent
with it stays; a hand-over gives away the ownership its author had. One `Membership` belongs to one set of such
operations and is shared by all operations with the same set in their past.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lattica_protocols.replica.operation import Kind

if TYPE_CHECKING:
    from lattica_protocols.replica.graph import Entry


class Membership:
    """Writers and owners after a set of changes. Immutable."""

    __slots__ = ("changes", "former", "owners", "writers")

    def __init__(
        self,
        base: Membership | None,
        changes: frozenset[Entry],
        owners: frozenset[bytes],
        writers: frozenset[bytes],
        former: frozenset[bytes],
    ) -> None:
        self.changes = changes
        self.owners = owners
        """Keys that may grant, remove and hand over. One, unless an owner equivocated."""
        self.writers = writers
        """Keys that may write, owners included."""
        self.former = former
        """Keys that could once and no more."""


class MembershipTable:
    """Makes each membership once."""

    def __init__(self, owners: Iterable[bytes], writers: Iterable[bytes], former: Iterable[bytes] = ()) -> None:
        first_owners = frozenset(owners)
        self._first_writers = frozenset(writers)
        self._former = frozenset(former)
        self.base = Membership(None, frozenset(), first_owners, self._first_writers | first_owners, self._former)
        self._known: dict[frozenset[Entry], Membership] = {self.base.changes: self.base}

    def merged(self, parts: Iterable[Membership], change: Entry | None = None) -> Membership:
        """The membership after all changes in `parts`, and `change`."""
        changes: frozenset[Entry] = frozenset()
        for part in parts:
            changes |= part.changes
        if change is not None:
            changes |= {change}
        found = self._known.get(changes)
        if found is None:
            found = self._known[changes] = self._make(changes)
        return found

    def _make(self, changes: frozenset[Entry]) -> Membership:
        base = self.base
        removals: dict[bytes, list[Entry]] = {}
        given_up: dict[bytes, list[Entry]] = {}
        for entry in changes:
            if entry.op.kind == Kind.REMOVE:
                removals.setdefault(entry.op.body, []).append(entry)
            elif entry.op.kind == Kind.HAND_OVER:
                given_up.setdefault(entry.op.author, []).append(entry)
        owners = {key for key in base.owners if key not in given_up}
        writers = {key for key in self._first_writers | base.owners if key not in removals}
        ever = set(self._first_writers | base.owners | self._former)
        for entry in changes:
            key = entry.op.body
            if entry.op.kind == Kind.REMOVE:
                continue
            ever.add(key)
            if not any(entry in removal.before.changes for removal in removals.get(key, ())):
                writers.add(key)
            if entry.op.kind == Kind.HAND_OVER and not any(
                entry in other.before.changes for other in given_up.get(key, ())
            ):
                owners.add(key)
        writers |= owners
        return Membership(base, changes, frozenset(owners), frozenset(writers), frozenset(ever - writers))
