"""Segments that this process owns: memory for long tails, lent to other processes of the machine and taken back.

A sender keeps its segments, and its own mappings of them, and uses them again after the receiver's release; why is
told in `segment`.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Final

from lattica.local.received import ReceivedSegments
from lattica.local.segment import (
    AVAILABLE,
    HEADER,
    HEADER_BYTES,
    IDLE_SECONDS,
    RELEASED,
    RELEASED_AT,
    SHARED,
    forks,
    viewed,
    watched_view,
)
from lattica.rpc.buffers import TailPool
from lattica_protocols.limits import (
    LOCAL_FD_OVER,
    LOCAL_MAX_KEPT,
    LOCAL_MAX_LENT,
    LOCAL_MAX_LENT_BYTES,
    LOCAL_MAX_MAPPINGS,
    LOCAL_POOL_BYTES,
)
from lattica_protocols.rpc.frames import Buffer

_MAX_IOV: Final = 512
"""Buffers of one pwritev: the kernel takes 1,024."""


class Segment:
    """Memory that this process owns and lends."""

    __slots__ = ("capacity", "fd", "idle_since", "lent", "mapping", "pool", "shared", "view_id", "viewed")

    def __init__(self, fd: int, capacity: int, pool: SegmentPool) -> None:
        self.fd = fd
        self.pool = pool
        self.capacity = capacity
        """Bytes of a tail that fit."""
        self.idle_since = 0.0
        self.shared = False
        """Released, but not to be used again."""
        self.mapping: mmap.mmap | None = None
        self.viewed = False
        """We may look at its tail ourselves."""
        self.view_id = 0
        """Where it stands in the pool's `viewed`."""
        self.lent = False
        """It goes back to the pool by the receiver's release, not when our view ends."""

    def released(self) -> bool:
        """The receiver needs it no more, and neither do we."""
        if self.viewed:
            return False
        state = os.pread(self.fd, 1, RELEASED_AT)
        self.shared = self.shared or state == SHARED
        return state in (RELEASED, SHARED)

    def label(self, length: int) -> None:
        """Say how long the tail is that it carries now."""
        os.pwrite(self.fd, HEADER.pack(length, 0), 0)

    def view(self, length: int) -> memoryview:
        """Its tail, to be filled. Raises `OSError` when it cannot be mapped."""
        if self.mapping is None:
            self.mapping = mmap.mmap(self.fd, HEADER_BYTES + self.capacity)
        self.viewed, self.lent = True, False
        viewed.add(1)
        view = watched_view(self.mapping, length, partial(self._unused, forks.value))
        self.view_id = id(view.obj)
        self.pool.viewed[self.view_id] = self
        return view

    def _unused(self, born: int) -> None:
        viewed.add(-1)
        self.viewed = False
        self.pool.viewed.pop(self.view_id, None)
        if born != forks.value:
            self.shared = True
        if not self.lent:
            self.pool.give_back(self)

    def close(self) -> None:
        """Give the memory back. What others have mapped stays theirs."""
        self.mapping = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.close()


class SegmentPool:
    """Segments of one process, its own and those it received. Safe to use from several threads."""

    def __init__(self, max_idle_bytes: int = LOCAL_POOL_BYTES) -> None:
        self.received = ReceivedSegments()
        self.viewed: dict[int, Segment] = {}
        """By the id of the object that the view of a segment is over."""
        self._max_idle_bytes = max_idle_bytes
        self._ordinary = TailPool()
        self._idle: list[Segment] = []
        self._idle_bytes = 0
        self._lock = threading.RLock()  # a finalizer may run in the middle of a method
        self._closed = False
        self.now = 0.0
        """Of the last `trim`; any monotonic clock in seconds."""

    def store(self, buffers: Sequence[Buffer], length: int) -> Segment:
        """A segment with the bytes of `buffers`, to be lent. Raises `OSError` when there is no memory for it.

        The whole view of a segment, as `stage` and `allocate` return it, is not copied.
        """
        segment = self._viewed_as(buffers[0]) if len(buffers) == 1 else None
        if segment is not None:
            segment.lent = True
            segment.label(length)
            return segment
        segment = self._take(length)
        try:
            _write_all(segment.fd, buffers)
            segment.label(length)
        except OSError:
            segment.close()
            raise
        return segment

    def stage(self, buffers: Sequence[Buffer], length: int) -> Buffer:
        """Copy `buffers` into shared memory now; `store` of what this returns copies nothing."""
        segment = self._take(length)
        try:
            _write_all(segment.fd, buffers)
        except OSError:
            segment.close()
            raise
        return self._view(segment, length)

    def allocate(self, length: int) -> Buffer:
        """Memory for a tail of `length` bytes: if it is then sent over a local socket, nothing is copied."""
        return self._view(self._take(length), length)

    def _view(self, segment: Segment, length: int) -> Buffer:
        try:
            return segment.view(length)
        except OSError:
            segment.close()
            raise

    def _viewed_as(self, buffer: Buffer) -> Segment | None:
        """The segment that the buffer is the whole view of, unless it is lent already."""
        if not isinstance(buffer, memoryview):
            return None
        segment = self.viewed.get(id(buffer.obj))
        whole = segment is not None and len(buffer) == len(buffer.obj) and not segment.lent  # type: ignore[arg-type]
        return segment if whole else None

    def allocate_tail(self, length: int) -> Buffer:
        """The allocator of a machine: shared memory for what is worth it, ordinary memory for the rest, and for all
        once `LOCAL_MAX_MAPPINGS` are in use: a peer must not take our file descriptors."""
        if length > LOCAL_FD_OVER and AVAILABLE and viewed.value < LOCAL_MAX_MAPPINGS:
            try:
                return self.allocate(length)
            except OSError:  # no file descriptor is left
                return self._ordinary.allocate(length)
        return self._ordinary.allocate(length)

    def give_back(self, segment: Segment) -> None:
        """The segment is free again."""
        with self._lock:
            if segment.fd < 0:
                return  # whoever it was lent to is gone
            if self._closed or segment.shared or self._idle_bytes + segment.capacity > self._max_idle_bytes:
                segment.close()
            else:
                segment.idle_since = self.now
                if len(self._idle) >= LOCAL_MAX_KEPT:
                    segment.mapping = None
                self._idle.append(segment)
                self._idle_bytes += segment.capacity

    def trim(self, now: float) -> bool:
        """Free what was idle for long. True when something is left to trim later."""
        self._ordinary.trim()
        with self._lock:
            self.now = now
            keep = []
            for segment in self._idle:
                if now - segment.idle_since > IDLE_SECONDS:
                    self._idle_bytes -= segment.capacity
                    segment.close()
                else:
                    keep.append(segment)
            self._idle = keep
        mapped = self.received.trim(now)
        return bool(keep) or mapped

    def close(self) -> None:
        """Free all that is idle now, and the rest as it comes back."""
        with self._lock:
            self._closed = True
            for segment in self._idle:
                segment.close()
            self._idle.clear()
            self._idle_bytes = 0

    def abandon(self) -> None:
        """In the child of a fork, which has descriptors of its own for the same segments: close them."""
        self._lock = threading.RLock()  # the thread that held it is not there
        self.close()
        self.received.abandon()

    def _take(self, length: int) -> Segment:
        with self._lock:
            best: Segment | None = None
            for segment in self._idle:
                fits = length <= segment.capacity <= 4 * length
                if fits and (best is None or segment.capacity < best.capacity):
                    best = segment
            if best is not None:
                self._idle.remove(best)
                self._idle_bytes -= best.capacity
                return best
        return self._new_segment(length)

    def _new_segment(self, length: int) -> Segment:
        capacity = 1 << max(20, (length - 1).bit_length())  # untouched pages cost nothing, and sizes meet again
        fd = os.memfd_create("lattica-tail", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        segment = Segment(fd, capacity, self)  # which closes it when one of these fails
        os.ftruncate(fd, HEADER_BYTES + capacity)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return segment


class LentSegments:
    """What one receiver has not released yet, oldest first."""

    def __init__(self) -> None:
        self._lent: deque[Segment] = deque()
        self.bytes = 0

    def add(self, segment: Segment) -> None:
        self._lent.append(segment)
        self.bytes += segment.capacity
        while len(self._lent) > LOCAL_MAX_LENT or self.bytes > LOCAL_MAX_LENT_BYTES:
            oldest = self._lent.popleft()
            self.bytes -= oldest.capacity
            oldest.close()  # if it is still on its way: file descriptors in a message are the kernel's own

    def collect(self) -> None:
        """Take back what was released, looking at 16 at most: a receiver may keep some for ever."""
        lent = self._lent
        for _ in range(min(len(lent), 16)):
            segment = lent.popleft()
            if segment.released():
                self.bytes -= segment.capacity
                segment.pool.give_back(segment)
            else:
                lent.append(segment)

    def close(self) -> None:
        """The receiver is gone. Its segments are not used again: it may still look at them."""
        for segment in self._lent:
            segment.close()
        self._lent.clear()
        self.bytes = 0


def _write_all(fd: int, buffers: Sequence[Buffer]) -> None:
    offset = HEADER_BYTES
    waiting = deque(memoryview(buffer) for buffer in buffers if len(buffer))
    while waiting:
        batch = [waiting.popleft() for _ in range(min(len(waiting), _MAX_IOV))]
        written = os.pwritev(fd, batch, offset)
        offset += written
        for index, view in enumerate(batch):
            if written < len(view):
                waiting.extendleft(reversed([view[written:], *batch[index + 1 :]]))
                break
            written -= len(view)


