"""Long tails between processes of one machine, as memory that both sides map.

A segment is a memfd:

    offset 0     u64  length of the tail (native byte order: it never leaves the machine)
    offset 8     u8   released: the receiver writes 1 when nothing over the mapping is left, 2 when forks may look
    offset 4096  ...  the tail; the rest of the segment is not used

Touching fresh memory costs three times as much as copying into memory that was touched before (64 MiB: 45 ms into a
new memfd, 12 ms into a used one), so a sender keeps its segments and uses them again after the receiver's release.

What the receiver checks before it maps: the segment is ordinary memory, it can never shrink (F_SEAL_SHRINK), and the
tail lies inside it. A mapping that the sender cut off would end the receiver with SIGBUS; with the seal it cannot. The
contents are not sealed, so a sender could change them later; both sides belong to the same user (the server asks the
kernel), who can read and write the memory of both anyway.

A fork leaves a mapping in two processes, of which neither sees when the other is done with it. What was mapped before
is therefore released with a 2: the sender forgets the segment, and the kernel frees it with the last mapping.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Final

from lattica.rpc.buffers import TailPool
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import (
    LOCAL_FD_OVER,
    LOCAL_MAX_LENT,
    LOCAL_MAX_LENT_BYTES,
    LOCAL_MAX_MAPPINGS,
    LOCAL_POOL_BYTES,
    RPC_MAX_TAIL,
)
from lattica_protocols.rpc.frames import Buffer

AVAILABLE: Final = hasattr(os, "memfd_create") and hasattr(fcntl, "F_ADD_SEALS")
"""Linux. Elsewhere tails stay in the socket."""

HEADER_BYTES: Final = 4096
"""A page, so the tail is aligned as any tensor wants it."""
IDLE_SECONDS: Final = 10.0
"""How long an unused segment is kept: longer than the pause between two steps of a training loop."""

_HEADER = struct.Struct("=QB")
_RELEASED_AT: Final = 8
_RELEASED: Final = b"\x01"
_SHARED: Final = b"\x02"
_MAX_IOV: Final = 512
"""Buffers of one pwritev: the kernel takes 1,024."""


class Segment:
    """Memory that this process owns and lends."""

    __slots__ = ("capacity", "fd", "idle_since", "mapping", "pool", "shared")

    def __init__(self, fd: int, capacity: int, pool: SegmentPool) -> None:
        self.fd = fd
        self.pool = pool
        self.capacity = capacity
        """Bytes of a tail that fit."""
        self.idle_since = 0.0
        self.shared = False
        """Released, but not to be used again."""
        self.mapping: weakref.ref[OwnedTail] | None = None
        """Through which we may still look at it ourselves."""

    def released(self) -> bool:
        """The receiver needs it no more."""
        if self.mapping is not None and self.mapping() is not None:
            return False
        state = os.pread(self.fd, 1, _RELEASED_AT)
        self.shared = state == _SHARED
        return state in (_RELEASED, _SHARED)

    def label(self, length: int) -> None:
        """Say how long the tail is that it carries now."""
        os.pwrite(self.fd, _HEADER.pack(length, 0), 0)

    def close(self) -> None:
        """Give the memory back. What others have mapped stays theirs."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.close()


class OwnedTail(mmap.mmap):
    """A segment mapped here, to be filled by the network. It goes back to its pool when nothing over it is left,
    unless it was lent to another process meanwhile."""

    segment: Segment
    lent = False
    in_use = False
    """Set once it is mapped: the object exists, and ends, also when that failed."""
    born = 0
    """`_forks.value` when it was mapped."""

    def __del__(self) -> None:
        if self.in_use:
            _owned.add(-1)
            if self.lent:
                return
            if self.born == _forks.value:
                self.segment.pool.give_back(self.segment)
            else:
                self.segment.close()


class ReceivedTail(mmap.mmap):
    """A segment of another process, mapped here. Tells it when nothing over the mapping is left."""

    in_use = False
    born = 0
    """Both as in `OwnedTail`."""

    def __del__(self) -> None:
        if self.in_use:
            _live.add(-1)
            self[_RELEASED_AT : _RELEASED_AT + 1] = _RELEASED if self.born == _forks.value else _SHARED


class _Count:
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


_live = _Count()
"""Received tails that are mapped; each holds a file descriptor."""
_owned = _Count()
"""Tails of our own that are mapped; each holds two."""
_forks = _Count()
"""Counts up before and after every fork: what was mapped while it had another value may be in two processes."""


def _one_more_fork() -> None:
    _forks.add(1)


def _in_child() -> None:
    for count in (_live, _owned, _forks):
        count.reset_lock()
    _one_more_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_one_more_fork, after_in_parent=_one_more_fork, after_in_child=_in_child)


class SegmentPool:
    """Segments of one process. Safe to use from several threads."""

    def __init__(self, max_idle_bytes: int = LOCAL_POOL_BYTES) -> None:
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

        Buffers that make up a whole `OwnedTail` are not copied.
        """
        if len(buffers) == 1:
            owned = _whole_owned_tail(buffers[0])
            if owned is not None:
                owned.lent = True
                owned.segment.label(length)
                return owned.segment
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
        return self._map(segment, length)

    def allocate(self, length: int) -> Buffer:
        """Memory for a tail of `length` bytes: if it is then sent over a local socket, nothing is copied."""
        return self._map(self._take(length), length)

    def _map(self, segment: Segment, length: int) -> Buffer:
        try:
            mapping = OwnedTail(segment.fd, HEADER_BYTES + length)
        except OSError:
            segment.close()
            raise
        mapping.segment, mapping.in_use, mapping.born = segment, True, _forks.value
        segment.mapping = weakref.ref(mapping)
        _owned.add(1)
        return memoryview(mapping)[HEADER_BYTES:]

    def allocate_tail(self, length: int) -> Buffer:
        """The allocator of a machine: shared memory for what is worth it, ordinary memory for the rest, and for all
        once `LOCAL_MAX_MAPPINGS` are in use: a peer must not take our file descriptors."""
        if length > LOCAL_FD_OVER and AVAILABLE and _owned.value < LOCAL_MAX_MAPPINGS:
            try:
                return self.allocate(length)
            except OSError:  # no file descriptor is left
                return self._ordinary.allocate(length)
        return self._ordinary.allocate(length)

    def give_back(self, segment: Segment) -> None:
        """The segment is free again."""
        with self._lock:
            if segment.fd < 0:
                return  # the garbage collector ended it together with its mapping
            if self._closed or segment.shared or self._idle_bytes + segment.capacity > self._max_idle_bytes:
                segment.close()
            else:
                segment.idle_since = self.now
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
            return bool(keep)

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

    def _take(self, length: int) -> Segment:
        with self._lock:
            best: Segment | None = None
            for segment in [segment for segment in self._idle if segment.fd < 0]:
                self._idle.remove(segment)  # likewise, and the mapping had given it back before
                self._idle_bytes -= segment.capacity
            for segment in self._idle:
                fits = length <= segment.capacity <= 4 * length
                if fits and (best is None or segment.capacity < best.capacity):
                    best = segment
            if best is not None:
                self._idle.remove(best)
                self._idle_bytes -= best.capacity
                best.mapping = None
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


def map_tail_untrusted(fd: int) -> memoryview | bytearray:
    """The tail in a segment that another process sent; the caller still has to close `fd`.

    Raises `RemoteProtocolError` when it is anything but a segment as described above.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        size = os.fstat(fd).st_size
        block = os.fstatvfs(fd).f_bsize
    except OSError:
        raise RemoteProtocolError("a file descriptor came that is not a memfd") from None
    if not seals & fcntl.F_SEAL_SHRINK:
        raise RemoteProtocolError("a memfd came that is not sealed against shrinking")
    if block != mmap.PAGESIZE:  # huge pages are not there until they are touched, and then perhaps never: SIGBUS
        raise RemoteProtocolError("a memfd of huge pages came")
    if size < HEADER_BYTES:
        raise RemoteProtocolError(f"a memfd of {size} bytes came, without a header")
    length: int = _HEADER.unpack(os.pread(fd, _HEADER.size, 0))[0]
    if length > RPC_MAX_TAIL or HEADER_BYTES + length > size:
        raise RemoteProtocolError(f"a memfd of {size} bytes came for a tail of {length}")
    try:
        if _live.value >= LOCAL_MAX_MAPPINGS:
            return _copy_tail_untrusted(fd, length)
        mapping = ReceivedTail(fd, HEADER_BYTES + length)
    except OSError as error:  # sealed against writing, opened for reading only
        raise RemoteProtocolError(f"a memfd came that cannot be mapped: {error.strerror}") from None
    mapping.in_use, mapping.born = True, _forks.value
    _live.add(1)
    return memoryview(mapping)[HEADER_BYTES:]


def _copy_tail_untrusted(fd: int, length: int) -> bytearray:
    copy = bytearray(length)
    view, filled = memoryview(copy), 0
    while filled < length:
        got = os.preadv(fd, [view[filled:]], HEADER_BYTES + filled)
        if got == 0:
            raise RemoteProtocolError("a memfd came that became shorter")
        filled += got
    os.pwrite(fd, _RELEASED, _RELEASED_AT)
    return copy


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


def _whole_owned_tail(buffer: Buffer) -> OwnedTail | None:
    if isinstance(buffer, memoryview) and isinstance(buffer.obj, OwnedTail):
        mapping = buffer.obj
        if not mapping.lent and len(buffer) == len(mapping) - HEADER_BYTES:
            return mapping
    return None
