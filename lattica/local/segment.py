"""Long tails between processes of one machine, as memory that both sides map: what a segment looks like.

A segment is a memfd:

    offset 0     u64  length of the tail (native byte order: it never leaves the machine)
    offset 8     u8   released: the receiver writes 1 when nothing over the tail is left, 2 when forks may look at it
    offset 4096  ...  the tail; the rest of the segment is not used

`memfd` is the side that owns segments and lends them, `received` the side that gets them. Both keep what costs time to
make: memory touched for the first time takes three times as long as a copy into memory that was touched before (64 MiB:
45 ms into a new memfd, 12 ms into a used one), and pages that a new mapping meets for the first time a microsecond
each, even where they exist already (64 MiB: 16,384 of them when written, 6 to 16 ms).

A fork leaves a view of a tail in two processes, of which neither sees when the other is done with it. What was viewed
before is therefore released with a 2: the sender forgets the segment, and the kernel frees it with the last mapping.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import threading
import weakref
from collections.abc import Callable
from typing import Final

AVAILABLE: Final = hasattr(os, "memfd_create") and hasattr(fcntl, "F_ADD_SEALS")
"""Linux. Elsewhere tails stay in the socket."""

HEADER: Final = struct.Struct("=QB")
HEADER_BYTES: Final = 4096
"""A page, so the tail is aligned as any tensor wants it."""
RELEASED_AT: Final = 8
RELEASED: Final = b"\x01"
SHARED: Final = b"\x02"
IDLE_SECONDS: Final = 10.0
"""How long unused memory and mappings are kept: longer than the pause between two steps of a training loop."""


def watched_view(mapping: mmap.mmap, length: int, unused: Callable[[], None]) -> memoryview:
    """The tail of `length` bytes in a mapped segment. `unused` is called, in whatever thread, when neither the view nor
    anything made from it is left."""
    import numpy  # long tails only: programs that never have one start faster

    array = numpy.frombuffer(mapping, numpy.uint8, length, HEADER_BYTES)
    weakref.finalize(array, unused).atexit = False
    return memoryview(array)  # type: ignore[arg-type]


class Count:
    """A number that several threads change."""

    def __init__(self) -> None:
        self.value = 0
        self.reset_lock()

    def reset_lock(self) -> None:
        """In the child of a fork: the thread that held the lock is not there."""
        self._lock = threading.RLock()  # a finalizer may run in the middle of `add`

    def add(self, change: int) -> None:
        with self._lock:
            self.value += change


live: Final = Count()
"""Received tails that are looked at; each holds a file descriptor."""
viewed: Final = Count()
"""Tails of our own that are looked at; each holds two."""
forks: Final = Count()
"""Counts up before and after every fork: what was viewed while it had another value may be in two processes."""


def _one_more_fork() -> None:
    forks.add(1)


def _in_child() -> None:
    for count in (live, viewed, forks):
        count.reset_lock()
    _one_more_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_one_more_fork, after_in_parent=_one_more_fork, after_in_child=_in_child)
