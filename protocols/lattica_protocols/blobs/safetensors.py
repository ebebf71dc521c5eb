"""The tensor table of a safetensors file (https://github.com/huggingface/safetensors#format).

    u64 LE header length || JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {}} || data

Offsets there count from the first byte behind the header; in a manifest they count from the start of the file, so
that a range of bytes maps to chunks by division. A file is recognised by its content and not by its name: equal
bytes have to give equal content ids.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TypeGuard

from lattica_protocols.limits import (
    CHUNK_BYTES,
    MAX_MANIFEST_TENSORS,
    MAX_TENSOR_DIMENSIONS,
    MAX_TENSOR_NAME_BYTES,
)

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 64 << 20
"""The format allows 100 MB; a header this large has more tensors than a manifest lists."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: bytes `begin` to `end` (exclusive) of the file, row-major, little-endian."""

    name: str
    dtype: str
    """As safetensors writes it: `F32`, `BF16`, `F8_E4M3`, ..."""
    shape: tuple[int, ...]
    begin: int
    end: int

    def chunks(self) -> range:
        """The chunks this tensor's bytes lie in."""
        return range(self.begin // CHUNK_BYTES, (self.end + CHUNK_BYTES - 1) // CHUNK_BYTES)


def header_length(start: bytes, file_size: int) -> int | None:
    """Length of the JSON header of a file that begins with `start` (9 bytes), `None` when it is no safetensors."""
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if len(start) <= LENGTH_BYTES or start[LENGTH_BYTES] != ord("{"):
        return None
    return length if 2 <= length <= min(file_size - LENGTH_BYTES, MAX_HEADER_BYTES) else None


def parse_header(header: bytes, file_size: int) -> tuple[Tensor, ...]:
    """The tensors in order of their position; empty when this is not a well-formed header."""
    try:
        table = json.loads(header.decode("utf-8"))
    except (ValueError, RecursionError):
        return ()
    if not isinstance(table, dict) or len(table) > MAX_MANIFEST_TENSORS:
        return ()
    base = LENGTH_BYTES + len(header)
    tensors = []
    for name, entry in table.items():
        if name == "__metadata__":
            continue
        tensor = _tensor(name, entry, base, file_size)
        if tensor is None:
            return ()
        tensors.append(tensor)
    return tuple(sorted(tensors, key=lambda t: (t.begin, t.end, t.name)))


def _tensor(name: str, entry: object, base: int, file_size: int) -> Tensor | None:
    if not isinstance(entry, dict):
        return None
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    try:
        name_bytes = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        return None
    if name_bytes > MAX_TENSOR_NAME_BYTES or not isinstance(dtype, str) or not dtype.isascii() or len(dtype) > 32:
        return None
    if not _is_uints(shape) or not _is_uints(offsets):
        return None
    if len(shape) > MAX_TENSOR_DIMENSIONS or len(offsets) != 2:
        return None
    begin, end = base + offsets[0], base + offsets[1]
    if not base <= begin <= end <= file_size:
        return None
    return Tensor(name, dtype, tuple(shape), begin, end)


def _is_uints(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
