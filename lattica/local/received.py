"""Segments of other processes: checked, mapped, and told when their tail is not looked at any more.

What is checked before one is mapped: it is ordinary memory, it can never shrink (F_SEAL_SHRINK), and the tail lies
inside it. A mapping that the sender cut off would end the receiver with SIGBUS; with the seal it cannot. The contents
are not sealed, so a sender could change them later; both sides belong to the same user (the server asks the kernel),
who can read and write the memory of both anyway.

A sender uses its segments again, so what was mapped once stays mapped for some seconds, while the sender is there. A
segment is known by its inode, which lives as long as our mapping does.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from functools import partial
from typing import Final, NamedTuple, Protocol

from lattica.local.segment import (
    HEADER,
    HEADER_BYTES,
    IDLE_SECONDS,
    RELEASED,
    RELEASED_AT,
    SHARED,
    forks,
    live,
    watched_view,
)
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import LOCAL_MAX_KEPT, LOCAL_MAX_KEPT_BYTES, LOCAL_MAX_MAPPINGS, RPC_MAX_TAIL

Inode = tuple[int, int]

WHOLE_WITHIN: Final = 4
"""A segment at most so many times as long as its tail is mapped as a whole, for longer tails that may follow in it. Our
senders use a segment for tails of a quarter of it and more."""
SMALLEST_SEGMENT: Final = 1 << 20


class Sender(Protocol):
    """A connection that segments come from."""

    closed: bool


class _Kept(NamedTuple):
    mapping: mmap.mmap
    sender: Sender
    since: float


class ReceivedSegments:
    """The mappings of one process. Safe to use from several threads."""

    def __init__(self) -> None:
        self._kept: dict[Inode, _Kept] = {}
        """Of segments that we released, oldest first."""
        self._kept_bytes = 0
        self._lock = threading.RLock()  # a finalizer may run in the middle of a method
        self._now = 0.0

    def map_untrusted(self, fd: int, sender: Sender) -> memoryview | bytearray:
        """The tail in a segment that came from `sender`; the caller still has to close `fd`.

        Raises `RemoteProtocolError` when it is anything but a segment as described in `lattica.local.segment`.
        """
        try:
            status = os.fstat(fd)
            inode = (status.st_dev, status.st_ino)
            mapping = self._take(inode)
            if mapping is None:
                _check_untrusted(fd, status.st_size)
                length: int = HEADER.unpack(os.pread(fd, HEADER.size, 0))[0]
            else:
                length = HEADER.unpack_from(mapping)[0]
            if length > RPC_MAX_TAIL or HEADER_BYTES + length > status.st_size:
                raise RemoteProtocolError(f"a memfd of {status.st_size} bytes came for a tail of {length}")
            if live.value >= LOCAL_MAX_MAPPINGS or length == 0:
                return _copy_untrusted(fd, length)
            if mapping is None or HEADER_BYTES + length > len(mapping):
                mapping = mmap.mmap(fd, _mapped_bytes(length, status.st_size))
        except OSError as error:  # sealed against writing, opened for reading only
            raise RemoteProtocolError(f"a memfd came that cannot be mapped: {error.strerror}") from None
        live.add(1)
        return watched_view(mapping, length, partial(self._release, inode, mapping, sender, forks.value))

    def trim(self, now: float) -> bool:
        """Unmap what was not used for long. True when something is left to unmap later."""
        with self._lock:
            self._now = now
            for inode, kept in list(self._kept.items()):
                if now - kept.since > IDLE_SECONDS:
                    self._forget(inode)
            return bool(self._kept)

    def sender_gone(self, sender: Sender) -> None:
        """It has closed: unmap what came from it and nobody looks at, and the rest when that ends."""
        with self._lock:
            for inode, kept in list(self._kept.items()):
                if kept.sender is sender:
                    self._forget(inode)

    def abandon(self) -> None:
        """In the child of a fork, which calls nothing else afterwards."""
        self._lock = threading.RLock()  # the thread that held it is not there
        self._kept.clear()

    def _take(self, inode: Inode) -> mmap.mmap | None:
        with self._lock:
            return self._forget(inode) if inode in self._kept else None

    def _release(self, inode: Inode, mapping: mmap.mmap, sender: Sender, born: int) -> None:
        live.add(-1)
        if born != forks.value:
            mapping[RELEASED_AT : RELEASED_AT + 1] = SHARED
            return
        with self._lock:
            if inode not in self._kept and not sender.closed and len(mapping) <= LOCAL_MAX_KEPT_BYTES:
                self._kept[inode] = _Kept(mapping, sender, self._now)
                self._kept_bytes += len(mapping)
                while len(self._kept) > LOCAL_MAX_KEPT or self._kept_bytes > LOCAL_MAX_KEPT_BYTES:
                    self._forget(next(iter(self._kept)))
        mapping[RELEASED_AT : RELEASED_AT + 1] = RELEASED

    def _forget(self, inode: Inode) -> mmap.mmap:
        kept = self._kept.pop(inode)
        self._kept_bytes -= len(kept.mapping)
        return kept.mapping


def _mapped_bytes(length: int, size: int) -> int:
    whole = size <= HEADER_BYTES + max(SMALLEST_SEGMENT, WHOLE_WITHIN * length)
    return size if whole else HEADER_BYTES + length


def _check_untrusted(fd: int, size: int) -> None:
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        block = os.fstatvfs(fd).f_bsize
    except OSError:
        raise RemoteProtocolError("a file descriptor came that is not a memfd") from None
    if not seals & fcntl.F_SEAL_SHRINK:
        raise RemoteProtocolError("a memfd came that is not sealed against shrinking")
    if block != mmap.PAGESIZE:  # huge pages are not there until they are touched, and then perhaps never: SIGBUS
        raise RemoteProtocolError("a memfd of huge pages came")
    if size < HEADER_BYTES:
        raise RemoteProtocolError(f"a memfd of {size} bytes came, without a header")


def _copy_untrusted(fd: int, length: int) -> bytearray:
    copy = bytearray(length)
    view, filled = memoryview(copy), 0
    while filled < length:
        got = os.preadv(fd, [view[filled:]], HEADER_BYTES + filled)
        if got == 0:
            raise RemoteProtocolError("a memfd came that became shorter")
        filled += got
    os.pwrite(fd, RELEASED, RELEASED_AT)
    return copy
