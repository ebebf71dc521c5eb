"""A file in the making: written chunk by chunk in any order, continued after a crash, published by a rename.

The data is written once, into `.NAME.CID.part` beside its destination, with its whole size reserved at the start.
Continuing means to hash what is there: extents that were never written are skipped, so this costs what was fetched
at some GB/s, and it trusts neither the order in which the kernel wrote nor anybody who had the file in between.

Large files are written past the page cache: a model of 100 GB would push everything else out of memory, and its last
sync would take as long as the fetch. It also saves a copy and fresh pages, half of the processor time of a fetch.
"""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING

from blake3 import blake3

from lattica.blobs.files import (
    FileIdentity,
    clone,
    data_extents,
    new_buffer,
    open_direct,
    preallocate,
    read_full,
    rename_durably,
    storage_errors,
    write_all,
)
from lattica.errors import CallCancelled
from lattica_protocols.blobs.chunk_set import ChunkSet
from lattica_protocols.limits import CHUNK_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lattica_protocols.blobs.manifest import BlobManifest
    from lattica_protocols.cid import Cid

_NAME_MAX = 255
_DIRECT_OVER = 64 << 20
"""Bytes of a file from which on it is written past the page cache. Smaller ones are likely read next."""
_BLOCK = 4096
"""Direct writes have to be multiples of the block size, which is at most a page on what people use."""


def part_path(dest: Path, cid: Cid) -> Path:
    """Where `cid` grows until it becomes `dest`. The same for every attempt."""
    name = f".{dest.name}.{str(cid)[-12:]}.part"
    if len(os.fsencode(name)) > _NAME_MAX:
        name = f".{str(cid)[-24:]}.part"
    return dest.with_name(name)


class PartFile:
    """All methods block; they may run in several threads at once, each for chunks of its own."""

    def __init__(self, path: Path, manifest: BlobManifest) -> None:
        """Opens or makes the file. `StorageError`, `StorageFull`: nothing is left behind that was not there before."""
        self.path = path
        self.manifest = manifest
        self.have = ChunkSet(manifest.chunk_count)
        self._stop = threading.Event()
        self._direct_fd = -1
        existed = path.exists()
        with storage_errors(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                if os.fstat(self._fd).st_size > manifest.size:
                    os.ftruncate(self._fd, manifest.size)
                if not existed:
                    preallocate(self._fd, manifest.size)
                if manifest.size >= _DIRECT_OVER:
                    self._direct_fd = open_direct(path)
            except OSError:
                os.close(self._fd)
                if not existed:
                    path.unlink()
                raise

    def stop(self) -> None:
        """Make `adopt` or `seed` that run in another thread end soon with `CallCancelled`."""
        self._stop.set()

    def close(self) -> None:
        for fd in (self._fd, self._direct_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct_fd = -1

    # -- what is already there ----------------------------------------------------------------------------
    def adopt(self) -> int:
        """Hash what an earlier attempt left. Returns the bytes that are right; they are in `have` from now on."""
        with storage_errors(self.path):
            reused = sum(self._adopt_chunk(index, buffer) for index, buffer in self._written_chunks())
            if not self.have.complete:
                preallocate(self._fd, self.manifest.size)
        return reused

    def _written_chunks(self) -> Iterator[tuple[int, memoryview]]:
        buffer = memoryview(new_buffer(CHUNK_BYTES))
        nxt = 0
        for start, end in data_extents(self._fd, min(self.manifest.size, os.fstat(self._fd).st_size)):
            for index in range(max(nxt, start // CHUNK_BYTES), (end - 1) // CHUNK_BYTES + 1):
                yield index, buffer[: self.manifest.chunk_size(index)]
                nxt = index + 1

    def _adopt_chunk(self, index: int, buffer: memoryview) -> int:
        self._check_stop()
        if index in self.have or read_full(self._fd, buffer, index * CHUNK_BYTES) < len(buffer):
            return 0
        if blake3(buffer).digest() != self.manifest.chunk_hash(index):
            return 0
        self.have.add(index)
        return len(buffer)

    def seed(self, source: Path) -> int:
        """Take over chunks that are right from another file. Returns their bytes; 0 when it cannot be read."""
        try:
            fd = os.open(source, os.O_RDONLY)
        except OSError:
            return 0
        try:
            if len(self.have) == 0 and os.fstat(fd).st_size == self.manifest.size and clone(fd, self._fd):
                return self.adopt()
            buffer = memoryview(new_buffer(CHUNK_BYTES))
            taken = 0
            for index in list(self.have.missing()):
                self._check_stop()
                piece = buffer[: self.manifest.chunk_size(index)]
                try:
                    got = read_full(fd, piece, index * CHUNK_BYTES)
                except OSError:
                    continue
                if got == len(piece) and blake3(piece).digest() == self.manifest.chunk_hash(index):
                    self.write(index, piece)
                    self.have.add(index)
                    taken += got
            return taken
        finally:
            os.close(fd)

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise CallCancelled("the fetch was cancelled")

    # -- what comes ---------------------------------------------------------------------------------------
    def verify_and_write(self, index: int, data: memoryview) -> bool:
        """Store a chunk if it has its hash. The caller adds it to `have`, in one thread."""
        if blake3(data).digest() != self.manifest.chunk_hash(index):
            return False
        self.write(index, data)
        return True

    def write(self, index: int, data: memoryview) -> None:
        with storage_errors(self.path):
            if not self._write_direct(data, index * CHUNK_BYTES):
                write_all(self._fd, data, index * CHUNK_BYTES)

    def _write_direct(self, data: memoryview, offset: int) -> bool:
        """False when this one cannot be written that way: the last of a file, or memory not at a page boundary."""
        if self._direct_fd < 0 or len(data) % _BLOCK:
            return False
        try:
            return os.pwrite(self._direct_fd, data, offset) == len(data)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False

    def sync(self) -> None:
        """Write back what the page cache holds, so that the last one before the rename is short."""
        with storage_errors(self.path):
            os.fdatasync(self._fd)

    # -- the end ------------------------------------------------------------------------------------------
    def publish(self, dest: Path) -> FileIdentity:
        """Everything is there: make it durable and give it its name. Replaces a file of that name."""
        with storage_errors(dest):
            os.ftruncate(self._fd, self.manifest.size)
            os.fsync(self._fd)
            rename_durably(self.path, dest)
            return FileIdentity.of(self._fd)
