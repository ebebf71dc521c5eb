"""What an update writes, read from its bytes alone: for logs and for third parties that have no document.

An item that overwrites another does not repeat its place in the update (yrs takes it from the item before), so a
container and key are known for first entries only; the values are there always.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from lattica_protocols.replica.update import parse_update_untrusted, read_text, read_uint

TYPE_NAMES = ("array", "map", "text")


class Written(NamedTuple):
    """One item. `container` and `key` are None where the update does not say them."""

    container: str | None
    key: str | None
    value: Any


def read_contents_untrusted(data: bytes) -> list[Written]:
    """The items of an update. Raises `RemoteProtocolError` for what `parse_update_untrusted` refuses."""
    parse_update_untrusted(data)  # after this, nothing in it is out of bounds
    sections, at = read_uint(data, 0)
    out: list[Written] = []
    if not sections:
        return out
    count, at = read_uint(data, at)
    _, at = read_uint(data, at)
    _, at = read_uint(data, at)
    for _ in range(count):
        info = data[at]
        at += 1
        container = key = None
        if info == 0:
            _, at = read_uint(data, at)
            continue
        for bit in (0x80, 0x40):
            if info & bit:
                _, at = read_uint(data, at)
                _, at = read_uint(data, at)
        if not info & 0xC0:
            named, at = read_uint(data, at)
            if named:
                container, at = read_text(data, at)
            else:
                _, at = read_uint(data, at)
                _, at = read_uint(data, at)
            if info & 0x20:
                key, at = read_text(data, at)
        values, at = _content(info & 0x1F, data, at)
        out += [Written(container, key, value) for value in values]
    return out


def _content(kind: int, data: bytes, at: int) -> tuple[list[Any], int]:
    match kind:
        case 1:
            return [], read_uint(data, at)[1]
        case 3:
            length, at = read_uint(data, at)
            return [data[at : at + length]], at + length
        case 4 | 5:
            text, at = read_text(data, at)
            return [text], at
        case 6:
            _, at = read_text(data, at)
            _, at = read_text(data, at)
            return [], at
        case 7:
            number, at = read_uint(data, at)
            return [f"<{TYPE_NAMES[number]}>"], at
    values: list[Any] = []
    count, at = read_uint(data, at)
    for _ in range(count):
        value, at = _any(data, at)
        values.append(value)
    return values, at


def _any(data: bytes, at: int) -> tuple[Any, int]:
    tag = data[at]
    at += 1
    match tag:
        case 127 | 126:
            return None, at
        case 121 | 120:
            return tag == 120, at
        case 125:
            return _signed(data, at)
        case 124:
            return _number(struct.unpack_from(">f", data, at)[0]), at + 4
        case 123:
            return _number(struct.unpack_from(">d", data, at)[0]), at + 8
        case 122:
            return int.from_bytes(data[at : at + 8], "big", signed=True), at + 8
        case 119:
            return read_text(data, at)
        case 116:
            length, at = read_uint(data, at)
            return data[at : at + length], at + length
    count, at = read_uint(data, at)
    if tag == 117:
        items = []
        for _ in range(count):
            item, at = _any(data, at)
            items.append(item)
        return items, at
    entries = {}
    for _ in range(count):
        key, at = read_text(data, at)
        entries[key], at = _any(data, at)
    return entries, at


def _signed(data: bytes, at: int) -> tuple[int, int]:
    byte = data[at]
    at += 1
    value, negative, shift = byte & 0x3F, bool(byte & 0x40), 6
    while byte & 0x80:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
    return (-value if negative else value), at


def _number(value: float) -> int | float:
    return int(value) if value.is_integer() and abs(value) < 1 << 53 else value
