"""Updates that a member could write by hand: any structure that the grammar knows, right or wrong, from a seed."""

from __future__ import annotations

import random

from lattica_protocols.varint import encode_uvarint

Known = dict[int, int]
"""Clock behind the items of each client."""
NAMES = ("m:data", "l:x", "t:x", "c:x", "s:x")
TYPE, DELETED = 7, 1


def some_update(rng: random.Random, client: int, start: int, known: Known) -> bytes:
    """An update of up to six items of `client` from the clock `start`, on top of `known`, and a few deletions."""
    clock, out, count = start, b"", rng.randrange(7)
    for _ in range(count):
        item, length = _item(rng, client, clock, known)
        out += item
        clock += length
    head = b"\1" + b"".join(map(encode_uvarint, (count, client, start))) if count else b"\0"
    return head + out + _deletions(rng, {**known, client: clock})


def _item(rng: random.Random, client: int, clock: int, known: Known) -> tuple[bytes, int]:
    if rng.random() < 0.03:
        length = rng.choice((1, 2, 1 << 20))
        return b"\0" + encode_uvarint(length), length
    kind = rng.choice((8, 8, 8, 4, 7, 7, 3, 5, 6, 1, 2))
    content, length = _content(rng, kind)
    info, place = kind, b""
    for bit in (0x80, 0x40):
        if rng.random() < 0.4 and (named := _reference(rng, {**known, client: clock})):
            info |= bit
            place += named
    if not info & 0xC0:
        named = _reference(rng, {**known, client: clock}) if rng.random() < 0.5 else b""
        name = rng.choice(NAMES).encode()
        place = b"\0" + named if named else b"\1" + encode_uvarint(len(name)) + name
        if rng.random() < 0.6:
            info |= 0x20
            place += b"\1" + rng.choice(b"abc").to_bytes(1, "big")
    elif rng.random() < 0.2:
        info |= 0x20
    return bytes([info]) + place + content, length


def _content(rng: random.Random, kind: int) -> tuple[bytes, int]:
    match kind:
        case 1:
            length = rng.choice((1, 3, 1 << 30))
            return encode_uvarint(length), length
        case 2:
            return b"\1\4true", 1
        case 3:
            return b"\2ab", 1
        case 4:
            text = rng.choice(("a", "hello", "é", "😀", "a😀b"))
            return encode_uvarint(len(text.encode())) + text.encode(), len(text.encode("utf-16-le")) // 2
        case 5:
            return b"\4true", 1
        case 6:
            return b"\1b\4true", 1
        case 7:
            return bytes([rng.randrange(4)]), 1
    values = [rng.choice((b"\x7e", b"\x7f", b"\x78", b"\x7d\x05", b"\x77\x01a", b"\x76\1\1a\x7e", b"\x75\0"))]
    if rng.random() < 0.3:
        values *= rng.randrange(1, 4)
    return encode_uvarint(len(values)) + b"".join(values), len(values)


def _reference(rng: random.Random, known: Known) -> bytes:
    there = [client for client, end in known.items() if end]
    if not there:
        return b""
    client = rng.choice(there)
    return encode_uvarint(client) + encode_uvarint(rng.randrange(known[client]))


def _deletions(rng: random.Random, known: Known) -> bytes:
    there = [client for client, end in known.items() if end and rng.random() < 0.3]
    out = encode_uvarint(len(there))
    for client in there:
        firsts = sorted(rng.randrange(known[client]) for _ in range(rng.randrange(1, 3)))
        out += encode_uvarint(client) + encode_uvarint(len(firsts))
        for first in firsts:
            out += encode_uvarint(first) + encode_uvarint(rng.randrange(1, min(known[client] - first, 5) + 1))
    return out
