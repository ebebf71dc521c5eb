"""What names of items mean to somebody with one past.

yrs names an item by (client, clock). A fork has two items under one name, and so have chains that collide; whoever
refers to one of them means the one in its own past. Looked up by stretches of clocks that mean one branch, made once
for each client: an operation may name thousands of items, of a client with thousands of branches.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lattica_protocols.replica.client_ids import ClientIds
    from lattica_protocols.replica.floor import Floor
    from lattica_protocols.replica.graph import Branch, Entry, Past


class Stretch(NamedTuple):
    """Clocks from `start` up to, not including, `end`."""

    start: int
    end: int
    name: int
    """The client id that the items have in the document of the checkpoint, when they are there (`branch` None)."""
    branch: Branch | None
    several: bool = False
    """More than one branch has such items."""

    def entry(self, clock: int) -> Entry | None:
        """The operation with the item `clock`; None: it is in the checkpoint."""
        branch = self.branch
        return None if branch is None else branch.entries[bisect_right(branch.ends, clock)]


class Scope:
    """The items that one past has."""

    def __init__(self, past: Past, client_ids: ClientIds, floor: Floor) -> None:
        self.past = past
        self._client_ids = client_ids
        self._floor = floor
        self._clients: dict[int, tuple[list[int], list[Stretch]]] = {}

    def find(self, client: int, clock: int) -> Stretch | None:
        """What an item's name means; None: it is not in this past."""
        known = self._clients.get(client)
        if known is None:
            stretches = self._stretches(client)
            known = self._clients[client] = [each.start for each in stretches], stretches
        index = bisect_right(known[0], clock) - 1
        if index < 0 or clock >= known[1][index].end:
            return None
        return known[1][index]

    def _stretches(self, client: int) -> list[Stretch]:
        past, branches = self.past, self._client_ids.branches(client)
        if len(past) < len(branches):
            known = [branch for branch in past if branch.client == client]
        else:
            known = [branch for branch in branches if branch in past]
        floor_end = self._floor.vector.get(client, 0)
        spans = [
            Stretch(max(floor_end, branch.start), branch.ends[past[branch] - branch.first_seq], client, branch)
            for branch in known
        ]
        spans += [Stretch(max(floor_end, row[1]), row[2], row[3], None) for row in self._floor.renamed_of(client)]
        spans = [span for span in spans if span.start < span.end]
        out = [Stretch(0, floor_end, client, None)] if floor_end else []
        return out + (spans if len(spans) < 2 else _apart(spans))


def _apart(spans: Sequence[Stretch]) -> list[Stretch]:
    """The same without overlap, in order."""
    turns = sorted([(span.start, 1, n) for n, span in enumerate(spans)] + [(s.end, 0, n) for n, s in enumerate(spans)])
    out: list[Stretch] = []
    open_now: dict[int, None] = {}
    before = 0
    for clock, starts, number in turns:
        if open_now and clock > before:
            out.append(spans[next(iter(open_now))]._replace(start=before, end=clock, several=len(open_now) > 1))
        before = clock
        if starts:
            open_now[number] = None
        else:
            del open_now[number]
    return out
