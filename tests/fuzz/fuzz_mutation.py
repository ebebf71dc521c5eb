"""Turns valid messages into nearly valid ones. Everything is decided by the `random.Random` that is passed in.

A message is a list of parts: the frames of a transcript, or one part for a plain encoding. Mutations of the list find
broken order and repetition, mutations of the bytes find broken fields, and `stretch` finds what is not linear.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

MAX_BYTES = 256 * 1024
"""One case: long enough for work that grows with the square of the input to show."""

NUMBERS = [
    *(n.to_bytes(1, "big") for n in (0, 1, 2, 0x7F, 0x80, 0xFF)),
    *(n.to_bytes(2, order) for n in (0, 1, 255, 0x7FFF, 0x8000, 0xFFFF) for order in ("big", "little")),
    *(n.to_bytes(4, order) for n in (0, 1, 0xFFFF, 0x7FFFFFFF, 1 << 31, 0xFFFFFFFF) for order in ("big", "little")),
    *(
        n.to_bytes(8, order)
        for n in (0, 1, 1 << 31, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
        for order in ("big", "little")
    ),
    b"\x80\x80\x80\x80\x10",
    b"\xff\xff\xff\xff\x0f",
    b"\xff" * 8 + b"\x7f",
    b"\xff" * 9 + b"\x01",
    b"\x80" * 12,
    b"\x80\x00",
    # msgpack: lengths that claim more than there is, extensions, numbers at their edges
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xdb\x00\x10\x00\x00",
    b"\xc9\x00\x00\x00\x02\x01",
    b"\xd8\x01",
    b"\xd8\x05",
    b"\xc1",
    b"\xc0",
    b"\xcb\x7f\xf8" + bytes(6),
    b"\xd7\xff" + b"\xff" * 8,
    b"\xc7\x0c\xff" + b"\xff" * 12,
]
"""Values on which lengths and counts break."""


def random_bytes(rng: random.Random, longest: int = 4096) -> bytes:
    return rng.randbytes(int(longest ** rng.random()))


# -- one part -------------------------------------------------------------------------------------------------------
def _flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _set(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] = rng.randrange(256)


def _step(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at] = (data[at] + rng.choice((-1, 1, -16, 16))) & 0xFF


def _overwrite(data: bytearray, rng: random.Random) -> None:
    number, at = rng.choice(NUMBERS), rng.randrange(len(data))
    data[at : at + len(number)] = number


def _insert(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.choice(NUMBERS) if rng.random() < 0.5 else random_bytes(rng, 64)


def _delete(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    del data[at : at + int(len(data) ** rng.random())]


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def _repeat(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    end = min(len(data), start + int(256 ** rng.random()))
    times = int((MAX_BYTES / (end - start)) ** rng.random()) if end > start else 0
    data[start:start] = data[start:end] * times


_BYTE_MUTATIONS: list[Callable[[bytearray, random.Random], None]] = [
    _flip,
    _flip,
    _set,
    _step,
    _overwrite,
    _overwrite,
    _insert,
    _delete,
    _cut,
    _repeat,
]


def _mutate_bytes(part: bytes, rng: random.Random) -> bytes:
    data = bytearray(part)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not data:
            return random_bytes(rng, 64)
        rng.choice(_BYTE_MUTATIONS)(data, rng)
    return bytes(data)


# -- the list -------------------------------------------------------------------------------------------------------
def _mutate_order(parts: list[bytes], rng: random.Random) -> None:
    at, action = rng.randrange(len(parts)), rng.randrange(4)
    if action == 0:
        parts[at:at] = [parts[at]] * rng.choice((1, 1, 2, 50))
    elif action == 1:
        del parts[at]
    elif action == 2:
        other = rng.randrange(len(parts))
        parts[at], parts[other] = parts[other], parts[at]
    else:
        stretch(parts, at, rng)


def stretch(parts: list[bytes], at: int, rng: random.Random) -> None:
    """Repeat one part as often as `MAX_BYTES` allows."""
    size = len(parts[at])
    if size:
        parts[at:at] = [parts[at]] * min(20_000, MAX_BYTES // size)


def mutate(seed: Sequence[bytes], others: Sequence[bytes], rng: random.Random) -> list[bytes]:
    """A case made from `seed`; `others` are parts of other messages to splice in. One in 16 is pure noise."""
    if not seed or rng.random() < 1 / 16:
        return [random_bytes(rng)]
    parts = list(seed)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if not parts:
            break
        choice = rng.random()
        if len(parts) > 1 and choice < 0.35:
            _mutate_order(parts, rng)
        elif others and choice < 0.45:
            _splice(parts, rng.choice(others), rng)
        else:
            at = rng.randrange(len(parts))
            parts[at] = _mutate_bytes(parts[at], rng)
    out: list[bytes] = []
    total = 0
    for part in parts:
        out.append(part[: MAX_BYTES - total])
        total += len(out[-1])
        if total >= MAX_BYTES:
            break
    return out


def _splice(parts: list[bytes], other: bytes, rng: random.Random) -> None:
    at = rng.randrange(len(parts))
    part = parts[at]
    if rng.random() < 0.5 or not part:
        parts[at:at] = [other]
    else:
        cut = rng.randrange(len(part))
        parts[at] = part[:cut] + other[rng.randrange(len(other) + 1) :]


def pieces(data: bytes, rng: random.Random) -> list[bytes]:
    """`data` as a network may deliver it: whole, in a few pieces, or (when it is short) byte by byte."""
    style = rng.random()
    if style < 0.4 or len(data) < 2:
        return [data]
    if style < 0.5 and len(data) <= 2048:
        return [data[i : i + 1] for i in range(len(data))]
    cuts = sorted(rng.randrange(1, len(data)) for _ in range(rng.choice((1, 3, 10))))
    edges = [0, *cuts, len(data)]
    return [data[a:b] for a, b in pairwise(edges)]
