"""Makes blobs out of files and folders: hashes them with several threads and enters them into the store.

BLAKE3 and `pread` both let other threads run, so two threads hash at twice the speed of one as long as the disk
follows, and the event loop goes on. Everything here blocks and runs in a worker thread; `stop` ends it early.
"""

from __future__ import annotations

import itertools
import os
import stat
import threading
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from lattica.blobs.files import FileIdentity, copy, read_full, rename_durably, storage_errors
from lattica.blobs.store import BLOB, FOLDER, Blob, BlobStore
from lattica.errors import CallCancelled, FileChanged, InvalidArgument, StorageError
from lattica_protocols.blobs.chunk_set import ChunkSet
from lattica_protocols.blobs.manifest import (
    DIGEST_BYTES,
    FolderEntry,
    FolderManifest,
    chunk_count,
    encode_manifest,
    make_blob,
    manifest_cid,
)
from lattica_protocols.blobs.safetensors import LENGTH_BYTES, Tensor, header_length, parse_header
from lattica_protocols.cid import Cid
from lattica_protocols.errors import LocalProtocolError
from lattica_protocols.limits import CHUNK_BYTES
from lattica_protocols.multihash import BLAKE3, Multihash

HASH_THREADS = min(4, os.cpu_count() or 1)
"""BLAKE3 does 3 GB/s a core; more than four threads wait for the disk."""

Progress = Callable[[int], None]
"""Called from worker threads with the bytes hashed since the last call."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What was shared. Unpacks as `cid, bytes, chunks`."""

    cid: Cid
    bytes: int
    chunks: int

    def __iter__(self) -> itertools.chain[object]:
        return itertools.chain((self.cid, self.bytes, self.chunks))


def share_path(
    store: BlobStore,
    path: Path,
    *,
    copy: bool = False,
    stop: threading.Event,
    progress: Progress | None = None,
) -> Shared:
    """Hash a file or folder and pin it in the store.

    Errors: `StorageError` (cannot be read, not a file), `StorageFull` (with `copy`), `FileChanged`,
    `InvalidArgument` (too large, or names that a folder cannot hold), `CallCancelled` after `stop` was set.
    """
    sharer = _Sharer(store, copy, stop, progress)
    with storage_errors(path):
        path = path.resolve(strict=True)
    try:
        blob = sharer.folder(path) if path.is_dir() else sharer.file(path, pinned=True)
    except LocalProtocolError as error:
        raise InvalidArgument(f"{path}: {error}") from None
    if blob.kind == FOLDER:
        return Shared(blob.cid, blob.size, sharer.chunks)
    return Shared(blob.cid, blob.size, blob.have.count)


class _Sharer:
    def __init__(self, store: BlobStore, copy: bool, stop: threading.Event, progress: Progress | None) -> None:
        self._store = store
        self._copy = copy
        self._stop = stop
        self._progress = progress
        self.chunks = 0

    def folder(self, root: Path) -> Blob:
        """Every regular file below `root`. Links to files are followed (model caches are made of them)."""
        entries = []
        for path in _walk(root):
            name = unicodedata.normalize("NFC", str(path.relative_to(root)))
            blob = self.file(path, pinned=False)
            self.chunks += blob.have.count
            entries.append(FolderEntry(name, blob.size, blob.cid))
        manifest = FolderManifest(tuple(entries))
        data = encode_manifest(manifest)
        cid = manifest_cid(data)
        self._store.put_objects([(cid.multihash, data)])
        return self._store.add(cid, FOLDER, manifest.size, ChunkSet(0), path=root, pinned=True)

    def file(self, path: Path, *, pinned: bool) -> Blob:
        with storage_errors(path):
            source = path.resolve(strict=True)
            if not stat.S_ISREG(source.stat().st_mode):
                raise StorageError(f"{path} is not a regular file")
            if source.stat().st_size == 0 and _has_content(source):
                raise StorageError(f"{path} has no size, but content: copy it into a regular file and share that")
            if self._copy:
                return self._copied(source, pinned)
            return self._hashed(source, pinned=pinned, owned=False)

    def _copied(self, source: Path, pinned: bool) -> Blob:
        """Copy first and hash the copy: what is announced is what is kept, whatever happens to the original."""
        temporary = self._store.data_directory / f"copy-{os.getpid()}-{threading.get_ident()}.part"
        reader = os.open(source, os.O_RDONLY)
        try:
            writer = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                before = FileIdentity.of(reader)
                copy(reader, writer, before.size)
                os.fsync(writer)
                if FileIdentity.of(reader) != before or os.fstat(writer).st_size != before.size:
                    raise FileChanged(f"{source} changed while it was being copied")
            finally:
                os.close(writer)
            return self._hashed(temporary, pinned=pinned, owned=True)
        finally:
            os.close(reader)
            temporary.unlink(missing_ok=True)

    def _hashed(self, path: Path, *, pinned: bool, owned: bool) -> Blob:
        fd = os.open(path, os.O_RDONLY)
        try:
            before = FileIdentity.of(fd)
            hashes = hash_chunks(fd, before.size, stop=self._stop, progress=self._progress)
            tensors = read_tensors(fd, before.size)
            if hashes is None or FileIdentity.of(fd) != before:
                raise FileChanged(f"{path} changed while it was being shared: share it again when it is at rest")
        finally:
            os.close(fd)
        data, cid, pages = make_blob(before.size, hashes, tensors)
        digests = [Multihash(BLAKE3, blake3(page).digest()) for page in pages]
        self._store.put_objects([(cid.multihash, data), *zip(digests, pages, strict=True)])
        known = self._store.get(cid.multihash)
        if known is not None and (known.writing or (known.owned and known.complete and not owned)):
            # Our own copy is at least as good; a download that runs into it ends by itself.
            if pinned and not known.pinned:
                self._store.set_pinned(cid, True)
            if not known.writing:
                return known
        identity = before
        if owned:
            final = self._store.data_directory / str(cid)
            rename_durably(path, final)
            path, identity = final, FileIdentity.of(final)
        have = ChunkSet(chunk_count(before.size), full=True)
        return self._store.add(
            cid, BLOB, before.size, have, path=path, owned=owned, identity=identity, pinned=pinned, verified=True
        )


def _has_content(path: Path) -> bool:
    """Of a file whose size is 0: those in /proc are made as they are read."""
    with path.open("rb") as file:
        return bool(file.read(1))


def hash_chunks(
    fd: int, size: int, *, stop: threading.Event, progress: Progress | None = None, threads: int = HASH_THREADS
) -> bytes | None:
    """BLAKE3 of every chunk, one after another; `None` when the file is shorter than `size`."""
    count = chunk_count(size)
    digests = bytearray(count * DIGEST_BYTES)
    numbers = itertools.count()

    def work() -> bool:
        buffer = memoryview(bytearray(min(CHUNK_BYTES, max(size, 1))))
        while (index := next(numbers)) < count:
            if stop.is_set():
                raise CallCancelled("sharing was cancelled")
            wanted = min(CHUNK_BYTES, size - index * CHUNK_BYTES)
            if read_full(fd, buffer[:wanted], index * CHUNK_BYTES) < wanted:
                return False
            digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES] = blake3(buffer[:wanted]).digest()
            if progress is not None:
                progress(wanted)
        return True

    threads = min(threads, count)
    if threads <= 1:
        return bytes(digests) if work() else None
    with ThreadPoolExecutor(threads, thread_name_prefix="lattica-hash") as pool:
        finished = [pool.submit(work) for _ in range(threads)]
        results = [future.result() for future in finished]
    return bytes(digests) if all(results) else None


def read_tensors(fd: int, size: int) -> tuple[Tensor, ...]:
    """The tensor table when the file is a safetensors file, else empty."""
    length = header_length(os.pread(fd, LENGTH_BYTES + 1, 0), size)
    if length is None:
        return ()
    header = bytearray(length)
    if read_full(fd, memoryview(header), LENGTH_BYTES) < length:
        return ()
    return parse_header(bytes(header), size)


def _walk(root: Path) -> list[Path]:
    found = []
    for directory, names, files in os.walk(root, onerror=_raise):
        for name in names:
            if os.path.islink(os.path.join(directory, name)):
                raise StorageError(f"{directory}/{name} is a link to a directory: share that directory by itself")
        found += [Path(directory, name) for name in files]
    for path in found:
        try:
            str(path).encode("utf-8")
        except UnicodeEncodeError:
            raise InvalidArgument(f"{str(path)!r}: the name is not UTF-8") from None
    return found


def _raise(error: OSError) -> None:
    raise error
