"""The content store: which blobs this node has, where their bytes are, and which chunks of them are right.

Where bytes live. A shared file stays where it is and is served from there (a *reference*): copying would double
the disk space of models that are larger than most disks' free half, and a reflink, where there is one, would keep
the space of a file that its owner has deleted. `copy=True` puts a copy under the store's own directory. A fetched
file is written once, beside its destination, renamed into place, and then is a reference like any other.

What is believed. Nothing but hashes. A chunk leaves this node only after its BLAKE3 was computed here since the
file last changed, `FileIdentity` telling whether it did. A chunk with a wrong hash is dropped from `have`, and the
next fetch of the blob asks others for it. After a crash a partial file is hashed again before it is continued: at
some GB/s this is cheaper than any ordering of writes that would make it unnecessary, and it also finds bit rot.

Layout of the directory: `catalog.sqlite` (see `catalog.py`), `data/` with files that the store owns, named by
content id.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from lattica.blobs.catalog import Catalog, Row
from lattica.blobs.files import FileIdentity, storage_errors
from lattica.blobs.temporary import temporary_directory
from lattica.errors import ContentCorrupt, ContentNotFound
from lattica_protocols.blobs.chunk_set import ChunkSet
from lattica_protocols.blobs.manifest import (
    BlobManifest,
    FolderManifest,
    Manifest,
    decode_manifest_untrusted,
)
from lattica_protocols.cid import Cid
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import MAX_BLOB_CHUNKS
from lattica_protocols.multihash import Multihash

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger("lattica.blobs")

BLOB, FOLDER, RAW_BLOCK = "blob", "folder", "raw"

_MANIFEST_CACHE_BYTES = 16 << 20
"""Decoded manifests kept for serving; one that is larger than this is kept alone."""

GrowthWatcher = Callable[[list[int]], None]
Blobs: TypeAlias = "list[Blob]"
BlobInfos: TypeAlias = "list[BlobInfo]"
Cids: TypeAlias = "list[Cid]"


@dataclass(slots=True, eq=False)
class Blob:
    """One blob of the store. Change it only through the store."""

    cid: Cid
    kind: str
    size: int
    have: ChunkSet
    path: Path | None
    owned: bool
    identity: FileIdentity | None
    pinned: bool
    added: float
    verified: ChunkSet | None = None
    """Chunks whose hash was computed while the file was `identity`; `None`: none in this process."""
    writing: bool = False
    """A download writes into the file: `have` is what it has verified, the file's identity changes all the time."""
    watchers: set[GrowthWatcher] = field(default_factory=set)
    """Told which chunks came in addition, by the task of the download."""

    @property
    def multihash(self) -> Multihash:
        return self.cid.multihash

    @property
    def complete(self) -> bool:
        return self.have.complete


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """What `lattica blobs list` shows."""

    cid: Cid
    kind: str
    bytes: int
    complete: bool
    pinned: bool
    path: Path | None
    chunks: int
    chunks_present: int


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Outcome of verifying one blob: indices of chunks that were dropped because their bytes are wrong or gone."""

    cid: Cid
    chunks: int
    dropped: list[int]


class BlobStore:
    """Open with a directory, close with `close`. Any thread may call; what touches the disk says so."""

    def __init__(self, directory: Path) -> None:
        """Opens or makes the store. Blocks. `StorageError` when the directory cannot be used."""
        self.directory = Path(directory)
        self.data_directory = self.directory / "data"
        with storage_errors(self.directory):
            self.data_directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.catalog = Catalog(self.directory / "catalog.sqlite")
        self.lock = threading.RLock()
        self._blobs: dict[Multihash, Blob] = {}
        self._manifests: OrderedDict[Multihash, Manifest] = OrderedDict()
        for row in self.catalog.rows():
            try:
                blob = _from_row(row)
                if blob.multihash.to_bytes() != row.multihash:
                    raise ValueError("the row of another blob")
            except (RemoteProtocolError, ValueError, TypeError) as error:
                log.error("catalog_row_skipped cid=%r error=%s", row.cid, error)
                continue
            self._blobs[blob.multihash] = blob

    @classmethod
    @contextmanager
    def open(cls, home: Path | None) -> Iterator[BlobStore]:
        """The store of a home directory, in `home/blobs`; `None`: one in a temporary directory, gone afterwards."""
        if home is None:
            with temporary_directory() as directory, closing(cls(directory)) as store:
                yield store
        else:
            with closing(cls(home / "blobs")) as store:
                yield store

    def close(self) -> None:
        """Note what running downloads have; then nothing works any more."""
        for blob in self._blobs.values():
            if blob.writing:
                self.save(blob)
        self.catalog.close()

    # -- looking ------------------------------------------------------------------------------------------
    def get(self, multihash: Multihash) -> Blob | None:
        return self._blobs.get(multihash)

    def require(self, cid: Cid) -> Blob:
        """`ContentNotFound` when the store knows nothing of `cid`."""
        blob = self._blobs.get(cid.multihash)
        if blob is None:
            raise ContentNotFound(f"{cid} is not in the store")
        return blob

    def blobs(self) -> Blobs:
        return [*self._blobs.values()]

    def list(self) -> BlobInfos:
        """All blobs, oldest first."""
        return [
            BlobInfo(b.cid, b.kind, b.size, b.complete, b.pinned, b.path, b.have.count, len(b.have))
            for b in sorted(self._blobs.values(), key=lambda b: (b.added, b.cid))
        ]

    def find_object(self, multihash: Multihash) -> bytes | None:
        """A manifest, a page of digests or a raw block. Reads the database."""
        return self.catalog.find_object(multihash.to_bytes())

    def manifest(self, blob: Blob) -> Manifest:
        """Decoded, with all chunk digests. Reads the database the first time. `ContentCorrupt` when it is damaged."""
        multihash = blob.multihash
        with self.lock:
            cached = self._manifests.get(multihash)
            if cached is not None:
                self._manifests.move_to_end(multihash)
                return cached
        manifest = self._load_manifest(blob)
        with self.lock:
            self._manifests[multihash] = manifest
            while len(self._manifests) > 1 and self._cached_bytes() > _MANIFEST_CACHE_BYTES:
                self._manifests.popitem(last=False)
        return manifest

    def blob_manifest(self, blob: Blob) -> BlobManifest:
        manifest = self.manifest(blob)
        if not isinstance(manifest, BlobManifest):
            raise ContentCorrupt(f"{blob.cid} is a folder")
        return manifest

    def _load_manifest(self, blob: Blob) -> Manifest:
        try:
            manifest = decode_manifest_untrusted(self._checked_object(blob.multihash, blob.cid))
            if isinstance(manifest, BlobManifest) and manifest.hashes is None:
                pages = [self._checked_object(page, blob.cid) for page in manifest.page_hashes()]
                return manifest.with_pages(pages)
        except RemoteProtocolError as error:
            raise ContentCorrupt(f"the manifest of {blob.cid} is damaged: {error}") from None
        return manifest

    def _checked_object(self, multihash: Multihash, cid: Cid) -> bytes:
        data = self.catalog.find_object(multihash.to_bytes())
        if data is None or not multihash.matches(data):
            self.catalog.delete_object(multihash.to_bytes())
            raise ContentCorrupt(f"the manifest of {cid} is damaged or gone: fetch or share it again")
        return data

    def _cached_bytes(self) -> int:
        return sum(
            len(m.hashes or b"") + 200 * len(m.tensors) if isinstance(m, BlobManifest) else 200 * len(m.entries)
            for m in self._manifests.values()
        )

    # -- adding -------------------------------------------------------------------------------------------
    def put_objects(self, objects: Iterable[tuple[Multihash, bytes]]) -> None:
        """Keep manifests, pages or raw blocks whose hashes have been checked. Writes the database."""
        for multihash, data in objects:
            self.catalog.put_object(multihash.to_bytes(), data)

    def add(
        self,
        cid: Cid,
        kind: str,
        size: int,
        have: ChunkSet,
        *,
        path: Path | None = None,
        owned: bool = False,
        identity: FileIdentity | None = None,
        pinned: bool = False,
        verified: bool = False,
    ) -> Blob:
        """Enter a blob, or say where it is now. `verified`: all of `have` was hashed while the file was `identity`."""
        with self.lock:
            blob = self._blobs.get(cid.multihash)
            if blob is None:
                blob = Blob(cid, kind, size, have, path, owned, identity, pinned, time.time())
                self._blobs[cid.multihash] = blob
            else:
                self._leave_file(blob, path)
                blob.have, blob.path, blob.owned, blob.identity = have, path, owned, identity
                blob.pinned = blob.pinned or pinned
            blob.verified = have.copy() if verified else None
        self.save(blob)
        return blob

    def _leave_file(self, blob: Blob, new_path: Path | None) -> None:
        if blob.owned and blob.path is not None and blob.path != new_path:
            with storage_errors(blob.path):
                blob.path.unlink(missing_ok=True)

    def save(self, blob: Blob) -> None:
        """Write the row. Blocks for a moment."""
        with self.lock:
            have = None if blob.complete else blob.have.to_bytes()
            row = Row(
                blob.multihash.to_bytes(),
                blob.cid.to_bytes(),
                blob.kind,
                blob.size,
                blob.have.count,
                have,
                None if blob.path is None else str(blob.path),
                blob.owned,
                blob.identity,
                blob.pinned,
                blob.added,
            )
        self.catalog.put(row)

    def drop_chunk(self, blob: Blob, index: int) -> None:
        """A chunk turned out to be wrong: it is missing from now on. Writes the database."""
        with self.lock:
            blob.have.discard(index)
            if blob.verified is not None:
                blob.verified.discard(index)
        self.save(blob)

    # -- keeping and removing -----------------------------------------------------------------------------
    def set_pinned(self, cid: Cid, pinned: bool) -> None:
        """Pinned blobs survive `collect_garbage`. `ContentNotFound` for a blob that is not there."""
        blob = self.require(cid)
        blob.pinned = pinned
        self.save(blob)

    def remove(self, cid: Cid) -> int:
        """Forget a blob (a folder with those of its files that nothing else needs); delete files that the store owns.

        Returns the bytes freed. A file that was shared in place stays. Blocks.
        """
        blob = self.require(cid)
        doomed = [blob]
        if blob.kind == FOLDER:
            children = self._children(blob)
            with self.lock:
                del self._blobs[blob.multihash]
                needed = self._needed()
                self._blobs[blob.multihash] = blob
            doomed += [child for child in children if child.multihash not in needed]
        freed = sum(self._remove(one) for one in doomed)
        self._remove_orphans()
        return freed

    def collect_garbage(self) -> tuple[Cids, int]:
        """Forget what nobody pinned and no download writes; delete it where the store owns the file. Blocks.

        Returns what was removed and the bytes freed.
        """
        with self.lock:
            needed = self._needed()
            doomed = [b for b in self._blobs.values() if not b.writing and b.multihash not in needed]
        freed = sum(self._remove(blob) for blob in doomed)
        return [blob.cid for blob in doomed], freed + self._remove_orphans()

    def stored_bytes(self) -> int:
        """Disk space of the files that the store owns. Blocks."""
        total = 0
        for path in self.data_directory.iterdir():
            try:
                total += path.stat().st_blocks * 512
            except FileNotFoundError:
                continue
        return total

    def multihashes_in_folders(self) -> set[Multihash]:
        """Files that belong to some folder of the store. Reads the database."""
        folders = [blob for blob in self.blobs() if blob.kind == FOLDER]
        return {child.multihash for folder in folders for child in self._children(folder)}

    def _children(self, folder: Blob) -> Blobs:
        try:
            manifest = self.manifest(folder)
        except ContentCorrupt:
            return []
        assert isinstance(manifest, FolderManifest)
        found = (self._blobs.get(entry.cid.multihash) for entry in manifest.entries)
        return [*{blob.multihash: blob for blob in found if blob is not None}.values()]

    def _needed(self) -> set[Multihash]:
        """Pinned blobs and the files of pinned folders."""
        needed: set[Multihash] = set()
        for blob in self.blobs():
            if blob.pinned:
                needed.add(blob.multihash)
                if blob.kind == FOLDER:
                    needed.update(child.multihash for child in self._children(blob))
        return needed

    def _remove(self, blob: Blob) -> int:
        freed = 0
        if blob.owned and blob.path is not None:
            with storage_errors(blob.path):
                if blob.path.exists():
                    freed = blob.path.stat().st_blocks * 512
                    blob.path.unlink()
        with self.lock:
            self._blobs.pop(blob.multihash, None)
            self._manifests.pop(blob.multihash, None)
        self.catalog.delete(blob.multihash.to_bytes())
        return freed

    def _remove_orphans(self) -> int:
        """Delete objects that belong to no blob. Bytes freed."""
        wanted: set[bytes] = set()
        for blob in self.blobs():
            wanted.add(blob.multihash.to_bytes())
            if blob.kind == BLOB:
                try:
                    wanted.update(page.to_bytes() for page in self.blob_manifest(blob).page_hashes())
                except ContentCorrupt:
                    continue
        freed = 0
        for key, size in self.catalog.object_keys():
            if key not in wanted:
                self.catalog.delete_object(key)
                freed += size
        return freed


def _from_row(row: Row) -> Blob:
    """Raises `RemoteProtocolError`, `ValueError` or `TypeError` for what we never wrote."""
    if row.kind not in (BLOB, FOLDER, RAW_BLOCK) or not 0 <= row.chunks <= MAX_BLOB_CHUNKS or row.size < 0:
        raise ValueError(f"a {row.kind!r} of {row.size!r} bytes in {row.chunks!r} chunks")
    if row.have is None:
        have = ChunkSet(row.chunks, full=True)
    else:
        have = ChunkSet.from_bytes_untrusted(row.chunks, row.have)
    return Blob(
        Cid.from_bytes_untrusted(row.cid),
        row.kind,
        row.size,
        have,
        None if row.path is None else Path(row.path),
        row.owned,
        row.identity,
        row.pinned,
        row.added,
    )
