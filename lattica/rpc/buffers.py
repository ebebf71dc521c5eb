"""Buffers for tails that are used again once nobody looks at them any more.

Arrays of a received message lie over its tail, so only the application's own references tell when a tail is free.
CPython counts them: a buffer whose one reference is the pool's own is free. Fresh memory from the kernel costs four
to six times as much as the copy into it (measured: 1 GB/s into fresh blocks of 256 KiB, 6 GB/s into used ones).
"""

from __future__ import annotations

import sys
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from lattica_protocols.rpc.frames import Buffer

if TYPE_CHECKING:
    import numpy

POOLED_OVER: Final = 16 << 10
"""Below, the C library's own lists are as good."""
POOL_BYTES: Final = 128 << 20
"""Kept at most. Two tensors of 64 MiB, or 512 of 256 KiB."""
_LOOKED_AT: Final = 8
"""Buffers of one size looked at before a new one is made."""
_OWN_REFERENCES: Final = 3
"""The pool's, the local variable's and the one of the argument of `getrefcount`."""


class TailPool:
    """Gives writable buffers of any length. `trim` every few seconds frees what was not used since the last time."""

    def __init__(self, max_bytes: int = POOL_BYTES) -> None:
        self._max_bytes = max_bytes
        self._by_size: dict[int, deque[numpy.ndarray[Any, Any]]] = {}
        self._used: set[int] = set()
        """Sizes that were asked for since the last trim."""
        self.kept_bytes = 0

    def allocate(self, length: int) -> Buffer:
        """A buffer of exactly `length` bytes, its contents undefined."""
        if length <= POOLED_OVER:
            return bytearray(length)
        import numpy

        step = 1 << max(12, length.bit_length() - 4)
        size = -(-length // step) * step  # up to 1/8 longer, so that similar lengths share buffers
        self._used.add(size)
        buffers = self._by_size.setdefault(size, deque())
        for _ in range(min(_LOOKED_AT, len(buffers))):
            buffer: numpy.ndarray[Any, Any] = buffers[0]
            buffers.rotate(-1)
            if sys.getrefcount(buffer) == _OWN_REFERENCES:
                return _view(buffer, length)
        buffer = numpy.empty(size, numpy.uint8)
        if self.kept_bytes + size <= self._max_bytes:
            buffers.append(buffer)
            self.kept_bytes += size
        return _view(buffer, length)

    def trim(self) -> None:
        """Let go of buffers of sizes not asked for lately. Those in use live on with whoever uses them."""
        for size in self._by_size.keys() - self._used:
            self.kept_bytes -= size * len(self._by_size.pop(size))
        self._used.clear()


def _view(buffer: numpy.ndarray[Any, Any], length: int) -> memoryview:
    whole: Any = buffer
    return memoryview(whole)[:length]
