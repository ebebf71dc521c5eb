"""Which chunks of a blob somebody has: a set of indices below a fixed count.

Wire: a bitmap of ceil(count / 8) bytes, chunk `i` in byte `i >> 3` at bit `i & 7` (least significant first),
padding bits zero. In memory one byte a chunk: `bytearray.find` then looks for the next missing chunk at the speed
of `memchr`, and a terabyte costs one megabyte.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lattica_protocols.errors import RemoteProtocolError

_SPREAD = [bytes((byte >> bit) & 1 for bit in range(8)) for byte in range(256)]
_GATHER = {spread: byte for byte, spread in enumerate(_SPREAD)}

ChunkRange = tuple[int, int]
"""First index and count."""


class ChunkSet:
    """A set of chunk indices in `range(count)`. `len()` is how many are in it."""

    __slots__ = ("_flags", "_size", "count")

    def __init__(self, count: int, *, full: bool = False) -> None:
        self.count = count
        self._flags = bytearray(b"\x01" * count if full else count)
        self._size = count if full else 0

    def __contains__(self, index: int) -> bool:
        return 0 <= index < self.count and self._flags[index] == 1

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        at = self._flags.find(1)
        while at >= 0:
            yield at
            at = self._flags.find(1, at + 1)

    def __eq__(self, other: object) -> bool:
        return self._flags == other._flags if isinstance(other, ChunkSet) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    @property
    def complete(self) -> bool:
        return self._size == self.count

    def add(self, index: int) -> None:
        if not self._flags[index]:
            self._flags[index] = 1
            self._size += 1

    def discard(self, index: int) -> None:
        if self._flags[index]:
            self._flags[index] = 0
            self._size -= 1

    def copy(self) -> ChunkSet:
        out = ChunkSet(0)
        out.count, out._flags, out._size = self.count, bytearray(self._flags), self._size
        return out

    def missing(self) -> Iterator[int]:
        """Indices that are not in the set, ascending."""
        at = self._flags.find(0)
        while at >= 0:
            yield at
            at = self._flags.find(0, at + 1)

    def to_bytes(self) -> bytes:
        """The bitmap."""
        flags = bytes(self._flags) + bytes(-self.count % 8)
        return bytes(_GATHER[flags[i : i + 8]] for i in range(0, len(flags), 8))

    @classmethod
    def from_bytes_untrusted(cls, count: int, data: bytes) -> ChunkSet:
        """The inverse of `to_bytes`: the length has to fit `count`, padding bits have to be zero."""
        if len(data) != (count + 7) // 8:
            raise RemoteProtocolError(f"a bitmap of {len(data)} bytes for {count} chunks")
        flags = bytearray(b"".join([_SPREAD[byte] for byte in data]))
        if any(flags[count:]):
            raise RemoteProtocolError("padding of a bitmap is not zero")
        del flags[count:]
        out = cls(0)
        out.count, out._flags, out._size = count, flags, flags.count(1)
        return out


def to_ranges(indices: Iterable[int]) -> list[ChunkRange]:
    """Runs of consecutive indices, in the order given."""
    out: list[ChunkRange] = []
    for index in indices:
        if out and out[-1][0] + out[-1][1] == index:
            out[-1] = (out[-1][0], out[-1][1] + 1)
        else:
            out.append((index, 1))
    return out
