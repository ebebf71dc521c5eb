"""What an edit may contain: reading yrs updates (encoding v1) without applying them, and renaming ids in them.

yrs names each item by (client, clock); the clocks of a client are contiguous. Replicas that are given two different
items of one name diverge for ever, so an update is read before it touches a document. Allowed is: items of one client
(the author's), contiguous; references (origins, parents, deletions) are listed for the graph, which looks whether
the author can have seen them. Refused are gaps, sub-documents, XML, moves, weak links, and containers with other
names than ours.

    update    = uvarint sections || section* || deletions                  sections: 0 or 1
    section   = uvarint structs || uvarint client || uvarint clock || struct*
    struct    = 00 uvarint length                                          collected (GC)
              | info [origin] [right origin] [parent] [key] content        info: 80 origin, 40 right origin, 20 key, and
                                                                           the content's kind in the low 5 bits
    origin    = uvarint client || uvarint clock
    parent    = 01 string (name of a container) | 00 uvarint client || uvarint clock         without both origins
    deletions = uvarint clients || (uvarint client || uvarint ranges || (uvarint clock || uvarint length)*)*

    content   1 deleted: length     3 binary    4 string (clock: UTF-16 units)    5 embed: JSON    6 format: key, JSON
              7 type: 0 array, 1 map, 2 text    8 any: plain values

A container's name is a letter for its type and a name: `m:` map, `l:` list, `t:` text, `c:` counter, `s:` set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import (
    REPLICA_MAX_DEPTH,
    REPLICA_MAX_NAME_BYTES,
    REPLICA_MAX_STRUCTS,
    REPLICA_MAX_UPDATE_BYTES,
)
from lattica_protocols.varint import encode_uvarint

MAX_CLOCK = 1 << 32
"""yrs counts clocks in 32 bits."""
MAX_CLIENT = 1 << 53
"""Client ids are integers that JavaScript holds exactly."""
CONTAINER_KINDS = "mltcs"

_GC, _SKIP = 0, 10
_DELETED, _, _BINARY, _STRING, _EMBED, _FORMAT, _TYPE, _ANY = range(1, 9)

Reference = tuple[int, int]
"""Client and clock of an item."""
Piece = tuple[int, int, int]
"""(client, clock, length)."""


class TooMuch(RemoteProtocolError):
    """One update is too much work. What was made here is cut into several."""


@dataclass(slots=True)
class ParsedUpdate:
    """What an update contains. `client` is meaningless when `start == end`."""

    client: int = 0
    client_bytes: bytes = b""
    """The same as it stands in the update."""
    start: int = 0
    end: int = 0
    """The clocks of its own items: `start` up to, not including, `end`."""
    references: list[Reference] = field(default_factory=list)
    """Items of others (or earlier own ones) that its items name."""
    deletions: list[tuple[int, int, int]] = field(default_factory=list)
    """(client, clock, length)."""
    marks: list[tuple[int, int, int, int]] = field(default_factory=list)
    """Where client ids stand, for `rename`: (offset, end, client, clock)."""
    deletions_at: int = 0
    """Offset of the deletions."""


def parse_update_untrusted(data: bytes, *, max_structs: int = REPLICA_MAX_STRUCTS) -> ParsedUpdate:
    """Read an update; whatever is not allowed raises `RemoteProtocolError`, too many items or deletions `TooMuch`.
    5 to 10 µs for a small edit."""
    if len(data) > REPLICA_MAX_UPDATE_BYTES:
        raise RemoteProtocolError(f"update of {len(data)} bytes is over {REPLICA_MAX_UPDATE_BYTES}")
    parsed = ParsedUpdate()
    try:
        at = _read_structs(data, parsed, max_structs)
        parsed.deletions_at = at
        at = _read_deletions(data, at, parsed, max_structs)
    except IndexError:
        raise RemoteProtocolError("update that is cut off") from None
    if at != len(data):
        raise RemoteProtocolError(f"{len(data) - at} bytes behind an update")
    return parsed


def rename(data: bytes, parsed: ParsedUpdate, pieces_of: Callable[[int, int, int], Sequence[Piece]]) -> bytes:
    """The same update with other client ids. `pieces_of(client, clock, length)` cuts a range where its name changes."""
    out, last = [], 0
    for start, end, client, clock in parsed.marks:
        out += [data[last:start], encode_uvarint(pieces_of(client, clock, 1)[0][0])]
        last = end
    out.append(data[last : parsed.deletions_at])
    out.append(_encode_deletions(piece for each in parsed.deletions for piece in pieces_of(*each)))
    return b"".join(out)


def deletions_only(deletions: Iterable[Piece]) -> bytes:
    """An update that only deletes."""
    return b"\0" + _encode_deletions(deletions)


def _encode_deletions(deletions: Iterable[Piece]) -> bytes:
    ranges: dict[int, list[tuple[int, int]]] = {}
    for client, clock, length in deletions:
        ranges.setdefault(client, []).append((clock, length))
    out = [encode_uvarint(len(ranges))]
    for client, cut in ranges.items():
        out += [encode_uvarint(client), encode_uvarint(len(cut))]
        out += [encode_uvarint(clock) + encode_uvarint(length) for clock, length in cut]
    return b"".join(out)


def filler(client: int, length: int) -> bytes:
    """An update with one collected item of `length` clocks: what stands before the items of a renamed operation."""
    if not length:
        return b"\x00\x00"
    return b"\x01\x01" + encode_uvarint(client) + b"\x00\x00" + encode_uvarint(length) + b"\x00"


def is_container(name: str) -> bool:
    """Whether this can be the name of a container: `<kind>:<name>`."""
    return len(name) > 2 and name[0] in CONTAINER_KINDS and name[1] == ":"


def read_uint(data: bytes, at: int) -> tuple[int, int]:
    byte = data[at]
    at += 1
    if byte < 0x80:
        return byte, at
    value, shift = byte & 0x7F, 7
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
        if shift > 56:
            raise RemoteProtocolError("number too long in an update")
    if not byte:
        raise RemoteProtocolError("number in an update not in its shortest form")
    return value, at


def _bytes(data: bytes, at: int) -> tuple[bytes, int]:
    length, at = read_uint(data, at)
    end = at + length
    if end > len(data):
        raise RemoteProtocolError("update that is cut off")
    return data[at:end], end


def read_text(data: bytes, at: int) -> tuple[str, int]:
    raw, at = _bytes(data, at)
    try:
        return raw.decode(), at
    except UnicodeDecodeError:
        raise RemoteProtocolError("text in an update is not UTF-8") from None


def _id(data: bytes, at: int, parsed: ParsedUpdate) -> int:
    """Note a reference to an item; the offset behind it."""
    own = parsed.client_bytes
    if own and data.startswith(own, at):  # nearly every reference of a small edit is to the author's own items
        client, middle = parsed.client, at + len(own)
    else:
        client, middle = read_uint(data, at)
    clock, end = read_uint(data, middle)
    if client >= MAX_CLIENT or clock >= MAX_CLOCK:
        raise RemoteProtocolError("reference out of range in an update")
    if client == parsed.client and clock >= parsed.end:
        raise RemoteProtocolError("item in an update that names a later one")
    parsed.references.append((client, clock))
    parsed.marks.append((at, middle, client, clock))
    return end


def _read_structs(data: bytes, parsed: ParsedUpdate, max_structs: int) -> int:
    sections, at = read_uint(data, 0)
    if sections == 0:
        return at
    if sections > 1:
        raise RemoteProtocolError("update with items of several clients")
    count, at = read_uint(data, at)
    if not count:
        raise RemoteProtocolError("update with a section without items")
    if count > max_structs:
        raise TooMuch(f"an update of more than {max_structs} items")
    client, middle = read_uint(data, at)
    clock, end = read_uint(data, middle)
    if not 0 < client < MAX_CLIENT:
        raise RemoteProtocolError("client id out of range in an update")
    parsed.client = client
    parsed.client_bytes = data[at:middle]
    parsed.start = parsed.end = clock
    parsed.marks.append((at, middle, client, clock))
    at = end
    for _ in range(count):
        length, at = _read_struct(data, at, parsed)
        if length <= 0:
            raise RemoteProtocolError("empty item in an update")
        clock += length
        if clock >= MAX_CLOCK:
            raise RemoteProtocolError("clock out of range in an update")
        parsed.end = clock
    return at


def _read_struct(data: bytes, at: int, parsed: ParsedUpdate) -> tuple[int, int]:
    """One struct: its length in clocks and the offset behind it."""
    info = data[at]
    at += 1
    if info == _GC:
        return read_uint(data, at)
    if info & 0x80:
        at = _id(data, at, parsed)
    if info & 0x40:
        at = _id(data, at, parsed)
    if not info & 0xC0:
        named, at = read_uint(data, at)
        if named == 1:
            name, at = read_text(data, at)
            if not is_container(name) or len(name) > REPLICA_MAX_NAME_BYTES + 2:
                raise RemoteProtocolError(f"{name[:40]!r} in an update is no container's name")
        elif named == 0:
            at = _id(data, at, parsed)
        else:
            raise RemoteProtocolError("item in an update with an unknown kind of parent")
        if info & 0x20:
            _, at = read_text(data, at)
    if info & 0x1F == _ANY and data[at] == 1:
        return 1, _skip_any(data, at + 1, 0)  # one plain value: what most edits are
    return read_content(info & 0x1F, data, at)


def read_content(kind: int, data: bytes, at: int) -> tuple[int, int]:
    """The length of a content in clocks and the offset behind it. Kind 2 (JSON) is not taken: nothing here writes it,
    and yrs reads one text more than it says, so it would see other items than we do."""
    if kind == _ANY:
        count, at = read_uint(data, at)
        if count > len(data):
            raise RemoteProtocolError("update that is cut off")
        for _ in range(count):
            at = _skip_any(data, at, 0)
        return count, at
    if kind == _STRING:
        text, at = read_text(data, at)
        return len(text) if text.isascii() else len(text.encode("utf-16-le")) // 2, at
    if kind == _DELETED:
        return read_uint(data, at)
    if kind == _TYPE:
        number, at = read_uint(data, at)
        if number > 2:
            raise RemoteProtocolError(f"type {number} in an update: only array, map and text are shared types here")
        return 1, at
    if kind == _BINARY:
        return 1, _bytes(data, at)[1]
    if kind == _FORMAT:
        _, at = read_text(data, at)
        return 1, _json(data, at)
    if kind == _EMBED:
        return 1, _json(data, at)
    raise RemoteProtocolError(f"content of kind {kind} in an update is not allowed")


def _json(data: bytes, at: int) -> int:
    """A JSON text. Only plain words and numbers: nothing here writes others, and parsers differ in the rest."""
    text, at = read_text(data, at)
    if text not in ("true", "false", "null") and not (text.isascii() and text.isdigit() and len(text) < 16):
        raise RemoteProtocolError("JSON in an update that is no plain word or number")
    return at


def _skip_any(data: bytes, at: int, depth: int) -> int:
    """The offset behind a plain value."""
    tag = data[at]
    at += 1
    if tag in (127, 126, 121, 120):
        return at
    if tag == 125:
        return _skip_signed(data, at)
    if tag in (124, 123, 122):
        at += 4 if tag == 124 else 8
        if at > len(data):
            raise RemoteProtocolError("update that is cut off")
        return at
    if tag == 119:
        return read_text(data, at)[1]
    if tag == 116:
        return _bytes(data, at)[1]
    if tag not in (117, 118):
        raise RemoteProtocolError(f"plain value of an unknown kind {tag} in an update")
    if depth >= REPLICA_MAX_DEPTH:
        raise RemoteProtocolError("plain values nested too deep in an update")
    count, at = read_uint(data, at)
    if count > len(data):
        raise RemoteProtocolError("update that is cut off")
    for _ in range(count):
        if tag == 118:
            at = read_text(data, at)[1]
        at = _skip_any(data, at, depth + 1)
    return at


def _skip_signed(data: bytes, at: int) -> int:
    for length in range(9):
        if data[at + length] < 0x80:
            return at + length + 1
    raise RemoteProtocolError("number too long in an update")


def _read_deletions(data: bytes, at: int, parsed: ParsedUpdate, max_structs: int) -> int:
    clients, at = read_uint(data, at)
    total = 0
    own = parsed.client_bytes
    seen: set[int] = set()
    for _ in range(clients):
        if own and data.startswith(own, at):
            client, at = parsed.client, at + len(own)
        else:
            client, at = read_uint(data, at)
        ranges, at = read_uint(data, at)
        if client >= MAX_CLIENT or ranges > len(data) or client in seen:
            raise RemoteProtocolError("deletion out of range in an update")
        seen.add(client)
        behind = 0
        for _ in range(ranges):
            clock, at = read_uint(data, at)
            length, at = read_uint(data, at)
            total += 1
            if not 0 < length < MAX_CLOCK or clock + length > MAX_CLOCK:
                raise RemoteProtocolError("deletion out of range in an update")
            if total > max_structs:
                raise TooMuch(f"an update with more than {max_structs} deletions")
            if clock < behind:
                # yrs writes them in order and joined. Else one update could name all there is thousands of times.
                raise RemoteProtocolError("deletions in an update that are not in order")
            behind = clock + length
            parsed.deletions.append((client, clock, length))
    return at
