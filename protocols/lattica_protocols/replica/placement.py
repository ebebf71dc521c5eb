"""Where the items of an update stand: in which container, under which key. Looked at before it touches a document.

yrs trusts an update to have been made by yrs. Items that nobody who uses the types could make (a list item in a map, an
item between two that stand in different containers, one inside of a plain value) make it panic, or make replicas that
got them in another order differ for ever. And it deletes nested types by recursion: nested a hundred thousand deep,
their deletion ends the process. So each item has to stand where its type allows it:

    in a map, counter or set    with a key; one plain value, bytes or a type
    in a list                   without a key; plain values, bytes or a type
    in a text                   without a key; text
    anywhere                    deleted content
    beside others               both in the same container and under the same key
    in a type                   not in a plain value, at most 64 types deep
    in a list or text           between two that could be neighbours: `order.py`

An item stands in the container that it names, else where the one stands that it is next to. The answer follows from
the operation and its past alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import REPLICA_MAX_NESTING
from lattica_protocols.replica.order import Run, is_gap
from lattica_protocols.replica.update import Reference, read_content, read_text, read_uint

if TYPE_CHECKING:
    from lattica_protocols.replica.graph import Entry

_DELETED, _BINARY, _STRING, _TYPE, _ANY = 1, 3, 4, 7, 8
_ARRAY, _MAP, _TEXT = 0, 1, 2
_KIND_OF = {"m": _MAP, "c": _MAP, "s": _MAP, "l": _ARRAY, "t": _TEXT}
_CONTENTS = {
    _ARRAY: frozenset([_DELETED, _BINARY, _TYPE, _ANY]),
    _MAP: frozenset([_DELETED, _BINARY, _TYPE, _ANY]),
    _TEXT: frozenset([_DELETED, _STRING]),
}


class Container(NamedTuple):
    """A map, list or text."""

    kind: int
    level: int
    """Types around it: 0 for one with a name."""
    name: object
    """What tells it apart: its name, or the client and clock of its item in the update that made it."""


class Place(NamedTuple):
    """Where an item stands."""

    container: Container
    key: str | None


class Struct(NamedTuple):
    """An item, or a run of them, as it is in an update."""

    clock: int
    length: int
    kind: int
    type_number: int
    left: Reference | None
    right: Reference | None
    parent: Reference | str | None
    key: str | None


class Placed(NamedTuple):
    """A run of items and where it stands; None: what yrs drops, because what it stood in is gone."""

    place: Place | None
    holds: Container | None
    """What it is itself, when it is a type."""
    is_gone: bool
    """Deleted content: it may be a parent, and what is put into it is dropped."""
    run: Run | None = None
    """Its place in the order of a list or text; None in a map, and for what is dropped."""


GONE = Placed(None, None, True)


class Table:
    """The items of one client in one update, in the order of their clocks."""

    __slots__ = ("clocks", "placed")

    def __init__(self) -> None:
        self.clocks: list[int] = []
        self.placed: list[Placed] = []

    def at(self, clock: int) -> Placed:
        if len(self.placed) == 1:
            return self.placed[0]
        return self.placed[bisect_right(self.clocks, clock) - 1]


Places = Table | Placed
"""Those of an update; of one with a single item, as most edits are, that item's."""
Find = Callable[[int, int], Any]
"""The operation (`Entry`) with an item, by client and clock; or, when a checkpoint replaced it, the item's name
in the state (a `Reference`)."""


class _Unknown(Exception):
    """The table of an operation is needed first."""

    def __init__(self, entry: Entry) -> None:
        super().__init__()
        self.entry = entry


class Placement:
    """Places of the items of one graph. Those that were stored are read when something refers to them."""

    def __init__(self, state: bytes, find_from: Callable[[Entry], Find]) -> None:
        """`state`: the document of the checkpoint that the graph stands on. `find_from(entry)` finds what `entry`
        names."""
        self._state = state
        self._find_from = find_from
        self._floor: dict[int, Table] | None = None

    def check_untrusted(self, body: bytes, find: Find) -> Places:
        """Where the items of a parsed update stand, for `Entry.places`. Raises `RemoteProtocolError` when one stands
        where it may not."""
        while True:
            try:
                return self._place(body, find)
            except _Unknown as unknown:
                self._learn(unknown.entry)

    def _learn(self, entry: Entry) -> None:
        """Fill in the table of an operation and of all that leads to it. No recursion: the way may be long."""
        stack = [entry]
        while stack:
            entry = stack[-1]
            try:
                if entry.places is None:
                    entry.places = self._place(entry.op.body, self._find_from(entry))
                stack.pop()
            except _Unknown as unknown:
                stack.append(unknown.entry)

    def _place(self, body: bytes, find: Find) -> Places:
        table = Table()
        sections, at = read_uint(body, 0)
        if not sections:
            return table
        count, at = read_uint(body, at)
        client, at = read_uint(body, at)
        clock, at = read_uint(body, at)
        start = clock

        def look(named: Reference) -> Placed:
            if named[0] == client and named[1] >= start:
                return table.at(named[1])
            found = find(*named)
            if not isinstance(found, tuple):
                known = found.places
                if known is None:
                    raise _Unknown(found)
                return known if type(known) is Placed else known.at(named[1])
            if self._floor is None:
                self._floor = places_of_state_untrusted(self._state)
            floor = self._floor.get(found[0])
            return GONE if floor is None else floor.at(found[1])

        for _ in range(count):
            struct, at = read_struct(body, at, clock)
            placed = place_untrusted(struct, client, look)
            table.clocks.append(clock)
            table.placed.append(placed)
            clock += struct.length
        return table.placed[0] if count == 1 else table


def place_untrusted(struct: Struct, client: int, look: Callable[[Reference], Placed]) -> Placed:
    """Where an item stands, by what it names. Raises `RemoteProtocolError`."""
    if struct.kind == 0:
        return GONE
    place: Place | None
    left = None if struct.left is None else look(struct.left)
    right = None if struct.right is None else look(struct.right)
    beside = left or right
    if beside is not None:
        place = beside.place
        if left is not None and right is not None and right.place != place:
            raise RemoteProtocolError("an item between two that stand in different containers")
    elif isinstance(struct.parent, str):
        place = Place(Container(_KIND_OF[struct.parent[0]], 0, struct.parent), struct.key)
    else:
        assert struct.parent is not None
        parent = look(struct.parent)
        if parent.holds is None and not parent.is_gone:
            raise RemoteProtocolError("an item inside of a plain value")
        place = None if parent.holds is None else Place(parent.holds, struct.key)
    if place is None:
        return GONE
    container = place.container
    if struct.kind not in _CONTENTS[container.kind] or (place.key is None) == (container.kind == _MAP):
        raise RemoteProtocolError("an item that its container cannot have")
    if container.kind == _MAP and struct.right is not None:
        raise RemoteProtocolError("a value under a key that stands before another")
    if container.kind == _MAP and struct.length > 1 and struct.kind != _DELETED:
        raise RemoteProtocolError("several values under one key")
    run = None if container.kind == _MAP else _run_untrusted(struct, client, left, right)
    if struct.kind != _TYPE:
        gone = struct.kind == _DELETED
        if container.kind == _MAP and beside is not None and beside.holds is None and beside.is_gone == gone:
            return beside  # what overwrites a key shares the answer
        return Placed(place, None, gone, run)
    if container.level >= REPLICA_MAX_NESTING:
        raise RemoteProtocolError(f"values are nested more than {REPLICA_MAX_NESTING} deep")
    return Placed(place, Container(struct.type_number, container.level + 1, (client, struct.clock)), False, run)


def _run_untrusted(struct: Struct, client: int, left: Placed | None, right: Placed | None) -> Run:
    """The run that an item of a list or text begins. Raises `RemoteProtocolError` when its origins are no neighbours in
    anybody's list."""
    above = None if left is None else left.run
    at = 0 if struct.left is None else struct.left[1]
    after = None if right is None or right.run is None or struct.right is None else (right.run, struct.right[1])
    if after is not None and not is_gap(None if above is None else (above, at), after):
        raise RemoteProtocolError("an item between two that were never neighbours")
    return Run(client, struct.clock, above, at)


def read_struct(data: bytes, at: int, clock: int) -> tuple[Struct, int]:
    """An item, and the offset behind it. `IndexError` or `RemoteProtocolError` where it was not checked before."""
    info = data[at]
    at += 1
    if info == 0:
        length, at = read_uint(data, at)
        return Struct(clock, length, 0, 0, None, None, None, None), at
    left: Reference | None = None
    right: Reference | None = None
    parent: Reference | str | None = None
    key = None
    if info & 0x80:
        other, at = read_uint(data, at)
        place, at = read_uint(data, at)
        left = (other, place)
    if info & 0x40:
        other, at = read_uint(data, at)
        place, at = read_uint(data, at)
        right = (other, place)
    if not info & 0xC0:
        named, at = read_uint(data, at)
        if named:
            parent, at = read_text(data, at)
            if parent[:1] not in _KIND_OF:
                raise RemoteProtocolError("an item in no container of ours")
        else:
            other, at = read_uint(data, at)
            place, at = read_uint(data, at)
            parent = (other, place)
        if info & 0x20:
            key, at = read_text(data, at)
    kind = info & 0x1F
    number = data[at] if kind == _TYPE else 0
    length, at = read_content(kind, data, at)
    return Struct(clock, length, kind, number, left, right, parent, key), at


def places_of_state_untrusted(state: bytes) -> dict[int, Table]:
    """The places of all items of a document. Raises `RemoteProtocolError` for one that no updates of ours make."""
    structs: dict[int, list[Struct]] = {}
    clocks: dict[int, list[int]] = {}
    try:
        sections, at = read_uint(state, 0)
        for _ in range(sections):
            count, at = read_uint(state, at)
            client, at = read_uint(state, at)
            clock, at = read_uint(state, at)
            if client in structs or count > len(state):
                raise RemoteProtocolError("a state with two sections of one client")
            structs[client] = rows = []
            for _ in range(count):
                struct, at = read_struct(state, at, clock)
                rows.append(struct)
                clock += struct.length
            clocks[client] = [row.clock for row in rows]
    except IndexError:
        raise RemoteProtocolError("a state that is cut off") from None
    return _place_all(structs, clocks)


def _place_all(structs: dict[int, list[Struct]], clocks: dict[int, list[int]]) -> dict[int, Table]:
    """Each after those it names; what goes in a circle is refused."""
    done: dict[Reference, Placed] = {}
    for first in [(client, index) for client, rows in structs.items() for index in range(len(rows))]:
        stack = [first]
        waiting: set[Reference] = set()
        while stack:
            client, index = row = stack[-1]
            if row in done:
                stack.pop()
                continue
            struct = structs[client][index]
            named = [each for each in (struct.left, struct.right, struct.parent) if isinstance(each, tuple)]
            rows = [(other, bisect_right(clocks.get(other, ()), clock) - 1) for other, clock in named]
            needed = [each for each in rows if each[1] >= 0 and each not in done]
            if needed:
                if row in waiting:
                    raise RemoteProtocolError("items that name each other in a circle")
                waiting.add(row)
                stack += needed
                continue
            at = dict(zip(named, rows, strict=True))
            done[row] = place_untrusted(struct, client, lambda each, at=at: done.get(at[each], GONE))  # type: ignore[misc]
            stack.pop()
    tables = {}
    for client, rows_of in structs.items():
        tables[client] = table = Table()
        table.clocks = clocks[client]
        table.placed = [done[client, index] for index in range(len(rows_of))]
    return tables
