"""Reads chunks out of files, and lets none through that does not have its hash.

A hash is computed at the first read of a chunk in the life of the process and whenever `FileIdentity` says that
the file may have changed; after that a chunk costs one copy out of the page cache. Files are read, never mapped: a
mapped file that its owner truncates kills the process that looks at it.
"""

from __future__ import annotations

import errno
import os
import sys
from collections import OrderedDict
from typing import TYPE_CHECKING

from blake3 import blake3

from lattica.blobs.files import FileIdentity, read_full
from lattica.blobs.store import BLOB, VerifyReport
from lattica.errors import ContentCorrupt
from lattica_protocols.limits import CHUNK_BYTES

if TYPE_CHECKING:
    from lattica.blobs.store import Blob, BlobStore
    from lattica_protocols.multihash import Multihash

_OPEN_FILES = 64
"""File descriptors kept open. Reading one chunk each of many files costs an `open` beyond that."""
_READ_AHEAD = 8 * CHUNK_BYTES
_NOWAIT = os.RWF_NOWAIT if sys.platform == "linux" else 0


class _OpenFile:
    """A file descriptor that is closed when the last thread that reads from it lets go."""

    __slots__ = ("fd", "path")

    def __init__(self, path: str) -> None:
        self.fd = -1
        self.path = path
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class ChunkReader:
    """Reads chunks of the blobs of one store. Threads may share it."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._files: OrderedDict[Multihash, _OpenFile] = OrderedDict()

    def read_nowait(self, blob: Blob, index: int, buffer: memoryview) -> bool:
        """Fill `buffer` (the size of the chunk) if that takes no disk access and no hash; True when it did."""
        if not _NOWAIT or blob.verified is None or index not in blob.verified:
            return False
        try:
            file = self._open(blob)
            if not blob.writing and FileIdentity.of(file.fd) != blob.identity:
                return False
            offset, done = index * CHUNK_BYTES, 0
            while done < len(buffer):
                got = os.preadv(file.fd, [buffer[done:]], offset + done, _NOWAIT)
                if got == 0:
                    return False
                done += got
        except OSError:
            return False  # EAGAIN: not in the page cache. Anything else: `read` meets it again and reports it.
        return True

    def read(self, blob: Blob, index: int, buffer: memoryview, *, force: bool = False) -> None:
        """Fill `buffer` with a chunk that has its hash. Blocks. `force`: hash it in any case.

        `ContentCorrupt` when the bytes are wrong, cut off or cannot be read: the chunk is dropped from the store.
        """
        expected = self._store.blob_manifest(blob).chunk_hash(index)
        try:
            file = self._open(blob)
            before = FileIdentity.of(file.fd)
            if sys.platform == "linux":
                os.posix_fadvise(file.fd, index * CHUNK_BYTES, _READ_AHEAD, os.POSIX_FADV_WILLNEED)
            got = read_full(file.fd, buffer, index * CHUNK_BYTES)
            known = before == blob.identity or blob.writing
            if not force and known and blob.verified is not None and index in blob.verified and got == len(buffer):
                return
            right = got == len(buffer) and blake3(buffer).digest() == expected
            after = FileIdentity.of(file.fd)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EACCES, errno.EMFILE, errno.ENFILE):
                # An unmounted disk comes back: the chunk is not written off.
                raise ContentCorrupt(f"{blob.path} cannot be read: {error.strerror}") from None
            self._store.drop_chunk(blob, index)
            raise ContentCorrupt(f"chunk {index} of {blob.cid} cannot be read: {error.strerror}") from None
        if not right:
            self._store.drop_chunk(blob, index)
            raise ContentCorrupt(f"chunk {index} of {blob.cid} in {blob.path} does not have its hash any more")
        if not blob.writing:
            self._note_verified(blob, index, before, after)

    def forget(self, multihash: Multihash) -> None:
        """Close the file of a blob that moved or was removed."""
        with self._store.lock:
            self._files.pop(multihash, None)

    def _note_verified(self, blob: Blob, index: int, before: FileIdentity, after: FileIdentity) -> None:
        with self._store.lock:
            if before != after:
                return
            if blob.verified is None or blob.identity != after:
                blob.verified = type(blob.have)(blob.have.count)
                blob.identity = after
            blob.verified.add(index)

    def _open(self, blob: Blob) -> _OpenFile:
        with self._store.lock:
            file = self._files.get(blob.multihash)
            if file is not None and file.path == str(blob.path):
                self._files.move_to_end(blob.multihash)
                return file
            if blob.path is None:
                raise FileNotFoundError(errno.ENOENT, "no file")
            file = self._files[blob.multihash] = _OpenFile(str(blob.path))
            while len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
            return file


def verify_blob(store: BlobStore, blob: Blob) -> VerifyReport:
    """Hash every chunk that should be there; wrong ones are dropped. Blocks, for as long as reading the file takes."""
    if blob.kind != BLOB:
        intact = store.find_object(blob.multihash)
        return VerifyReport(blob.cid, 1, [] if intact is not None and blob.multihash.matches(intact) else [0])
    reader = ChunkReader(store)
    buffer = memoryview(bytearray(CHUNK_BYTES))
    dropped = []
    for index in list(blob.have):
        try:
            reader.read(blob, index, buffer[: min(CHUNK_BYTES, blob.size - index * CHUNK_BYTES)], force=True)
        except ContentCorrupt:
            dropped.append(index)
    return VerifyReport(blob.cid, blob.have.count, dropped)
