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

An item stands in the container that it names, else where the one stands that it is next to. The answer follows from
the operation and its past alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import REPLICA_MAX_NESTING
from lattica_protocols.replica.update import Reference, read_content, read_text, read_uint

if TYPE_CHECKING:
    from lattica_protocols.replica.graph import Entry

_DELETED, _BINARY, _STRING, _TYPE, _ANY = 1, 3, 4, 7, 8
_AFTER, _HAS_KEY = 0x80, 0x20
"""Bits of an item: it has a left origin, and no more; it stands under a key, which is not repeated then."""
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
        count, own_at = read_uint(body, at)
        client, at = read_uint(body, own_at)
        own = body[own_at:at]
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
            struct, at = read_struct(body, at, clock, own, client)
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
    beside = None
    if struct.left is not None or struct.right is not None:
        beside = look(struct.left or struct.right)  # type: ignore[arg-type]
        place = beside.place
        if struct.left is not None and struct.right is not None:
            other = look(struct.right)
            if other.place != place:
                raise RemoteProtocolError("an item between two that stand in different containers")
            if other is beside and place is not None and struct.left >= struct.right:  # within one run
                raise RemoteProtocolError("an item between two that stand the other way round")
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
    if struct.kind != _TYPE:
        gone = struct.kind == _DELETED
        if container.kind == _MAP and beside is not None and beside.holds is None and beside.is_gone == gone:
            return beside  # what overwrites a key shares the answer
        return Placed(place, None, gone)
    if container.level >= REPLICA_MAX_NESTING:
        raise RemoteProtocolError(f"values are nested more than {REPLICA_MAX_NESTING} deep")
    return Placed(place, Container(struct.type_number, container.level + 1, (client, struct.clock)), False)


def read_struct(data: bytes, at: int, clock: int, own: bytes, client: int) -> tuple[Struct, int]:
    """An item, and the offset behind it. `IndexError` or `RemoteProtocolError` where it was not checked before.

    `own`: the bytes of `client`, whose item it is: nearly every reference is to the same client's items."""
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
        other, at = (client, at + len(own)) if data.startswith(own, at) else read_uint(data, at)
        place, at = read_uint(data, at)
        left = (other, place)
    if info & 0x40:
        other, at = (client, at + len(own)) if data.startswith(own, at) else read_uint(data, at)
        place, at = read_uint(data, at)
        right = (other, place)
    if not info & 0xC0:
        named, at = read_uint(data, at)
        if named:
            parent, at = read_text(data, at)
            if parent[:1] not in _KIND_OF:
                raise RemoteProtocolError("an item in no container of ours")
        else:
            other, at = (client, at + len(own)) if data.startswith(own, at) else read_uint(data, at)
            place, at = read_uint(data, at)
            parent = (other, place)
        if info & 0x20:
            key, at = read_text(data, at)
    kind = info & 0x1F
    number = data[at] if kind == _TYPE else 0
    length, at = read_content(kind, data, at)
    return Struct(clock, length, kind, number, left, right, parent, key), at


class _Section:
    """The items of one client in a document."""

    __slots__ = ("client", "clocks", "placed", "rows")

    def __init__(self, client: int) -> None:
        self.client = client
        self.clocks: list[int] = []
        self.rows: list[Struct | int] = []
        """An item; or, for a deleted one behind one of the same client, the clock of that one."""
        self.placed: list[Placed | None] = []


def places_of_state_untrusted(state: bytes) -> dict[int, Table]:
    """The places of all items of a document. Raises `RemoteProtocolError` for one that no updates of ours make."""
    found: dict[int, _Section] = {}
    try:
        sections, at = read_uint(state, 0)
        for _ in range(sections):
            count, at = read_uint(state, at)
            client, own_at = read_uint(state, at)
            own = state[at:own_at]
            if client in found or count > len(state):
                raise RemoteProtocolError("a state with two sections of one client")
            found[client] = section = _Section(client)
            at = _read_section(state, own_at, count, own, section)
    except IndexError:
        raise RemoteProtocolError("a state that is cut off") from None
    _place_all(found)
    tables = {}
    for client, section in found.items():
        tables[client] = table = Table()
        table.clocks = section.clocks
        table.placed = section.placed  # type: ignore[assignment]
    return tables


def _read_section(state: bytes, at: int, count: int, own: bytes, section: _Section) -> int:
    """Read `count` items; the offset behind them. What was overwritten in a map is most of a document: a deleted item
    behind another one of its author, for which a number is enough."""
    clock, at = read_uint(state, at)
    clocks, rows, client = section.clocks, section.rows, section.client
    skip = 1 + len(own)
    for _ in range(count):
        clocks.append(clock)
        if state[at] & ~_HAS_KEY == _AFTER | _DELETED and state.startswith(own, at + 1):
            left, at = read_uint(state, at + skip)
            length, at = read_uint(state, at)
            rows.append(left)
            clock += length
        else:
            struct, at = read_struct(state, at, clock, own, client)
            rows.append(struct)
            clock += struct.length
    section.placed = [None] * count
    return at


class _NotPlaced(Exception):
    """Another item is to be placed first: its section, and its index there."""

    def __init__(self, section: _Section, index: int) -> None:
        super().__init__()
        self.item = section, index


def _place_all(found: dict[int, _Section]) -> None:
    """Each after those it names; what goes in a circle is refused."""

    def look(named: Reference) -> Placed:
        section = found.get(named[0])
        index = -1 if section is None else bisect_right(section.clocks, named[1]) - 1
        if section is None or index < 0:
            return GONE
        placed = section.placed[index]
        if placed is None:
            raise _NotPlaced(section, index)
        return placed

    for section in found.values():
        clocks, all_placed = section.clocks, section.placed
        for index, row in enumerate(section.rows):
            if all_placed[index] is not None:
                continue
            if type(row) is int and clocks[0] <= row < clocks[index]:
                left = all_placed[bisect_right(clocks, row) - 1]
                if left is not None and left.place is not None and left.place.key is not None:
                    # as `place_untrusted` says, by the shortest way
                    same = left.holds is None and left.is_gone
                    all_placed[index] = left if same else Placed(left.place, None, True)
                    continue
            _place_from(section, index, look)


def _place_from(section: _Section, index: int, look: Callable[[Reference], Placed]) -> None:
    """Place an item, and before it those that it leads to. No recursion: the way may be long."""
    stack, waiting = [(section, index)], {(section, index)}
    while stack:
        section, index = stack[-1]
        row = section.rows[index]
        if type(row) is int:
            row = Struct(section.clocks[index], 1, _DELETED, 0, (section.client, row), None, None, None)
        assert isinstance(row, Struct)
        try:
            section.placed[index] = place_untrusted(row, section.client, look)
        except _NotPlaced as other:
            if other.item in waiting:
                raise RemoteProtocolError("items that name each other in a circle") from None
            waiting.add(other.item)
            stack.append(other.item)
        else:
            waiting.discard(stack.pop())
