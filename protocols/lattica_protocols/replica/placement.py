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
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import (
    REPLICA_MAX_CUTS,
    REPLICA_MAX_NESTING,
    REPLICA_MAX_PLACES,
    REPLICA_MAX_STRUCTS,
)
from lattica_protocols.replica.order import Run, is_gap
from lattica_protocols.replica.update import (
    Piece,
    Reference,
    TooMuch,
    deletions_only,
    read_content,
    read_text,
    read_uint,
)
from lattica_protocols.varint import encode_uvarint

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
    """What tells it apart: its name, or client and clock of its item in the operation that made it, and that one's id:
    two sides of a fork, or two chains with one client id, have items with the same client and clock."""


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


class Work:
    """How often yrs has to look for the place of an item of one update, or how many items it has.

    yrs puts an item behind its left origin and then walks over what others put there: over a whole list at worst. It
    need not where the left origin is new itself: for an item that goes on behind the last one that the update put into
    the same list or under the same key, and for the first one in a list that the update made. For the first one under
    a key it walks over what was written under that key, so over each item of a map once at most.
    """

    __slots__ = ("client", "items", "last", "maker", "places", "start")

    def __init__(self, client: int, start: int, maker: bytes) -> None:
        self.client = client
        self.maker = maker
        self.start = start
        self.items = self.places = 0
        self.last: dict[Place, int] = {}

    def fits(self, struct: Struct, placed: Placed) -> bool:
        """Count an item; False when it is one too many."""
        self.items += 1
        place = placed.place
        if place is None:
            return self.items <= REPLICA_MAX_STRUCTS
        last = self.last.get(place)
        self.last[place] = struct.clock + struct.length - 1
        if last is None:
            name = place.container.name
            made = isinstance(name, tuple) and name[::2] == (self.client, self.maker) and name[1] >= self.start
            free = placed.run is None or made
        else:
            free = struct.left == (self.client, last)
        self.places += not free
        return self.places <= REPLICA_MAX_PLACES and self.items <= REPLICA_MAX_STRUCTS

    def too_much(self) -> TooMuch:
        """Why it does not fit."""
        if self.items > REPLICA_MAX_STRUCTS:
            return TooMuch(f"an update of more than {REPLICA_MAX_STRUCTS} items")
        return TooMuch(f"an update that puts items into lists or texts at more than {REPLICA_MAX_PLACES} places")


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

    def check_untrusted(self, body: bytes, find: Find, deletions: Sequence[Piece] = (), maker: bytes = b"") -> Places:
        """Where the items of the parsed update of the operation `maker` stand, for `Entry.places`.

        Raises `RemoteProtocolError` when one stands where it may not, and `TooMuch` when the update is too much work
        for yrs."""
        if body[:2] == b"\1\1" and len(deletions) <= REPLICA_MAX_CUTS:
            placed = self._place_one(body, find, maker)
            if placed is not None:
                return placed
        placing = _Placing(body, find, self._floor_at, maker)
        while True:
            try:
                places = placing.run()
                if len(deletions) > REPLICA_MAX_CUTS:
                    placing.count_cuts(deletions)
                    if sum(placing.cutting) > REPLICA_MAX_CUTS:
                        raise TooMuch(
                            f"an update that deletes at more than {REPLICA_MAX_CUTS} places of lists or texts"
                        )
                return places
            except _Unknown as unknown:
                self._learn(unknown.entry)

    def _place_one(self, body: bytes, find: Find, maker: bytes) -> Placed | None:
        """The place of the only item of an update, as most have; None when something else is to be placed before it."""
        client, end = read_uint(body, 2)
        clock, at = read_uint(body, end)
        struct, _ = read_struct(body, at, clock, body[2:end], client)

        def look(named: Reference) -> Placed:
            found = find(*named)
            if isinstance(found, tuple):
                return self._floor_at(found)
            known = found.places
            if known is None:
                raise _Unknown(found)
            return known if type(known) is Placed else known.at(named[1])

        try:
            return place_untrusted(struct, client, look, maker)
        except _Unknown:
            return None

    def cut(self, body: bytes, find: Find, deletions: Sequence[Piece]) -> list[bytes]:
        """An update of ours as several, none of which is too much work. Raises `RemoteProtocolError` when an item
        stands where it may not."""
        placing = _Placing(body, find, self._floor_at, may_cut=True)
        while True:
            try:
                placing.run()
                placing.count_cuts(deletions)
                return placing.parts() + placing.deletion_parts(deletions)
            except _Unknown as unknown:
                self._learn(unknown.entry)

    def _learn(self, entry: Entry) -> None:
        """Fill in the table of an operation and of all that leads to it. No recursion: the way may be long."""
        stack = [(entry, _Placing(entry.op.body, self._find_from(entry), self._floor_at, entry.op.id))]
        while stack:
            entry, placing = stack[-1]
            try:
                if entry.places is None:
                    entry.places = placing.run()
                stack.pop()
            except _Unknown as unknown:
                entry = unknown.entry
                stack.append((entry, _Placing(entry.op.body, self._find_from(entry), self._floor_at, entry.op.id)))

    def _floor_at(self, name: Reference) -> Placed:
        """An item of the checkpoint's document."""
        if self._floor is None:
            self._floor = places_of_state_untrusted(self._state)
        floor = self._floor.get(name[0])
        return GONE if floor is None else floor.at(name[1])


class _Placing:
    """The items of an update, placed one after the other. After `_Unknown` it goes on where it stopped."""

    def __init__(
        self,
        body: bytes,
        find: Find,
        floor_at: Callable[[Reference], Placed],
        maker: bytes = b"",
        may_cut: bool = False,
    ) -> None:
        self.body = body
        self.maker = maker
        self.find = find
        self.floor_at = floor_at
        self.may_cut = may_cut
        self.cuts: list[tuple[int, int, int]] = []
        """Where parts begin: offset, clock, items before."""
        self.cutting: list[bool] = []
        self.table = Table()
        self.count = self.client = self.clock = self.start = 0
        self.own = b""
        """The bytes of `client`."""
        sections, at = read_uint(body, 0)
        if sections:
            self.count, own_at = read_uint(body, at)
            self.client, at = read_uint(body, own_at)
            self.own = body[own_at:at]
            self.clock, at = read_uint(body, at)
            self.start = self.clock
        self.at = at
        self.work = Work(self.client, self.start, maker)

    def look(self, named: Reference) -> Placed:
        client, clock = named
        if client == self.client and clock >= self.start and self.count:
            return self.table.at(clock)
        found = self.find(client, clock)
        if isinstance(found, tuple):
            return self.floor_at(found)
        known = found.places
        if known is None:
            raise _Unknown(found)
        return known if type(known) is Placed else known.at(clock)

    def run(self) -> Places:
        table, count = self.table, self.count
        while len(table.placed) < count:
            struct, behind = read_struct(self.body, self.at, self.clock, self.own, self.client)
            placed = place_untrusted(struct, self.client, self.look, self.maker)
            if count > 1 and not self.work.fits(struct, placed):
                if not self.may_cut:
                    raise self.work.too_much()
                self.cuts.append((self.at, self.clock, len(table.placed)))
                self.work = Work(self.client, self.clock, self.maker)
                self.work.fits(struct, placed)
            table.clocks.append(self.clock)
            table.placed.append(placed)
            self.clock += struct.length
            self.at = behind
        return table.placed[0] if count == 1 else table

    def count_cuts(self, deletions: Sequence[Piece]) -> None:
        """Which deletions may cut a run, into `cutting`."""
        while len(self.cutting) < len(deletions):
            self.cutting.append(self._may_cut_run(deletions[len(self.cutting)]))

    def _may_cut_run(self, deletion: Piece) -> bool:
        client, clock, length = deletion
        ends = self.look((client, clock)), self.look((client, clock + length - 1))
        return any(end.run is not None and end.holds is None for end in ends)

    def parts(self) -> list[bytes]:
        """The items, cut where one was too much; without deletions."""
        out = []
        rows = [*self.cuts, (self.at, self.clock, self.count)]
        sections, at = read_uint(self.body, 0)
        for _ in range(3 if sections else 0):
            _, at = read_uint(self.body, at)
        first, clock, before = at, self.start, 0
        for behind, next_clock, items in rows:
            if items > before:
                head = b"\1" + b"".join(map(encode_uvarint, (items - before, self.client, clock)))
                out.append(head + self.body[first:behind] + b"\0")
            first, clock, before = behind, next_clock, items
        return out

    def deletion_parts(self, deletions: Sequence[Piece]) -> list[bytes]:
        """Updates that only delete. Types come first: what is in them is gone with them, not piece by piece."""
        cuts = [each for each, cuts in zip(deletions, self.cutting, strict=True) if cuts]
        others = [each for each, cuts in zip(deletions, self.cutting, strict=True) if not cuts]
        out = []
        while cuts or others:
            chunk, others = others[:REPLICA_MAX_STRUCTS], others[REPLICA_MAX_STRUCTS:]
            if not others:
                room = min(REPLICA_MAX_CUTS, REPLICA_MAX_STRUCTS - len(chunk))
                chunk, cuts = chunk + cuts[:room], cuts[room:]
            out.append(deletions_only(sorted(chunk)))
        return out


def place_untrusted(struct: Struct, client: int, look: Callable[[Reference], Placed], maker: bytes = b"") -> Placed:
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
    return Placed(place, Container(struct.type_number, container.level + 1, (client, struct.clock, maker)), False, run)


def _run_untrusted(struct: Struct, client: int, left: Placed | None, right: Placed | None) -> Run:
    """The run that an item of a list or text begins. Raises `RemoteProtocolError` when its origins are no neighbours in
    anybody's list."""
    above = None if left is None else left.run
    at = 0 if struct.left is None else struct.left[1]
    after = None if right is None or right.run is None or struct.right is None else (right.run, struct.right[1])
    if after is not None and not is_gap(None if above is None else (above, at), after):
        raise RemoteProtocolError("an item between two that were never neighbours")
    return Run(client, struct.clock, above, at)


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
