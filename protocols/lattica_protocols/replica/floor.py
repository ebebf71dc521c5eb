"""What a checkpoint leaves of the operations it replaced: enough to go on from, and to recognise them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

COVERED_PREFIX = 8
"""Bytes of an operation's id by which a covered one is recognised."""


@dataclass(frozen=True, slots=True)
class ChainEnd:
    """Where a chain stood."""

    seq: int
    end: int
    """The clock behind its items."""
    last: bytes
    """Id of its last operation."""
    time: int


@dataclass(frozen=True)
class Floor:
    """The state that operations build on: empty for a new space, else a checkpoint's."""

    owners: frozenset[bytes]
    writers: frozenset[bytes]
    former: frozenset[bytes] = frozenset()
    chains: dict[tuple[bytes, int], ChainEnd] = field(default_factory=dict)
    vector: dict[int, int] = field(default_factory=dict)
    """Clock behind the items of each client in the document of the checkpoint."""
    heads: frozenset[bytes] = frozenset()
    excluded: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    """Equivocators, with the place of the fork: (seq, instance)."""
    covered: frozenset[bytes] = frozenset()
    renamed: tuple[tuple[int, int, int, int], ...] = ()
    """(client, start, end, name): items of equivocators that have another name in the document."""
    handed_over: tuple[bytes, ...] = ()
    """The HAND_OVER operations so far, in order."""
    state: bytes = b""
    """The document of the checkpoint."""

    @classmethod
    def empty(cls, owner: bytes, writers: Iterable[bytes]) -> Floor:
        return cls(frozenset([owner]), frozenset(writers))

    @cached_property
    def _renamed_of(self) -> dict[int, list[tuple[int, int, int, int]]]:
        out: dict[int, list[tuple[int, int, int, int]]] = {}
        for row in self.renamed:
            out.setdefault(row[0], []).append(row)
        return out

    def renamed_of(self, client: int) -> Sequence[tuple[int, int, int, int]]:
        """The rows of `renamed` of one client."""
        return self._renamed_of.get(client, ())

    def covers(self, operation: bytes) -> bool:
        """Whether the checkpoint replaced this operation."""
        return operation[:COVERED_PREFIX] in self.covered
