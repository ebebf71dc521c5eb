"""Manifests: what a content id stands for.

A manifest is canonical msgpack (see `canonical.py`); CIDv1 with codec 0x0201 and its BLAKE3 is the content id.

    blob    {"chunk": 1048576, "hashes": bin, "kind": "blob", "size": uint, "tensors": [...], "v": 1}
    paged   {"chunk": 1048576, "kind": "blob", "pages": bin, "size": uint, "tensors": [...], "v": 1}
    folder  {"entries": [[path, size, cid], ...], "kind": "folder", "size": uint, "v": 1}

`hashes` holds the 32-byte BLAKE3 of each chunk, one after another; all chunks have 1 MiB but the last. With more
than 131,072 chunks there are `pages` instead: the BLAKE3 of each page, a page being 32,768 of those digests (the
last fewer) and an object of its own. `tensors` (left out when empty) lists `[name, dtype, [shape], begin, end]` in
order of position. `entries` is sorted by the path's bytes; `cid` is the manifest of that file, never a folder.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

import msgpack
from blake3 import blake3

from lattica_protocols.blobs.canonical import CanonicalReader
from lattica_protocols.blobs.safetensors import Tensor
from lattica_protocols.cid import BLOB_MANIFEST, RAW, Cid
from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.limits import (
    CHUNK_BYTES,
    HASHES_PER_PAGE,
    MAX_BLOB_CHUNKS,
    MAX_FOLDER_ENTRIES,
    MAX_FOLDER_PATH_BYTES,
    MAX_INLINE_CHUNKS,
    MAX_MANIFEST_TENSORS,
    MAX_OBJECT_BYTES,
    MAX_PATH_PART_BYTES,
    MAX_TENSOR_DIMENSIONS,
    MAX_TENSOR_NAME_BYTES,
)
from lattica_protocols.multihash import BLAKE3, SHA2_256, Multihash

DIGEST_BYTES = 32
_MAX_SIZE = MAX_BLOB_CHUNKS * CHUNK_BYTES
_MAX_U63 = (1 << 63) - 1
_MAX_PAGES = MAX_BLOB_CHUNKS // HASHES_PER_PAGE


def chunk_count(size: int) -> int:
    """Chunks of a blob of `size` bytes."""
    return -(-size // CHUNK_BYTES)


@dataclass(frozen=True, slots=True)
class BlobManifest:
    """A file. Either `hashes` or `pages` is set; `with_pages` turns the second into the first."""

    size: int
    hashes: bytes | None
    pages: bytes | None = None
    tensors: tuple[Tensor, ...] = ()

    @property
    def chunk_count(self) -> int:
        return chunk_count(self.size)

    def chunk_size(self, index: int) -> int:
        """Bytes of one chunk: 1 MiB, or less for the last."""
        return min(CHUNK_BYTES, self.size - index * CHUNK_BYTES)

    def chunk_hash(self, index: int) -> bytes:
        if self.hashes is None:
            raise LocalProtocolError("the pages of this manifest have not been put in")
        return self.hashes[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]

    def page_hashes(self) -> list[Multihash]:
        """The objects to fetch before chunks can be verified; empty for all but very large files."""
        pages = self.pages or b""
        return [Multihash(BLAKE3, pages[i : i + DIGEST_BYTES]) for i in range(0, len(pages), DIGEST_BYTES)]

    def with_pages(self, pages: list[bytes]) -> BlobManifest:
        """The same with all chunk digests. The pages' own hashes have been checked by the caller.

        Raises `RemoteProtocolError` when together they are not one digest a chunk.
        """
        hashes = b"".join(pages)
        if len(hashes) != self.chunk_count * DIGEST_BYTES:
            raise RemoteProtocolError("the pages of a manifest do not add up to its chunks")
        return BlobManifest(self.size, hashes, self.pages, self.tensors)


@dataclass(frozen=True, slots=True)
class FolderEntry:
    """One file of a folder; `path` is relative, with `/` between its parts."""

    path: str
    size: int
    cid: Cid


@dataclass(frozen=True, slots=True)
class FolderManifest:
    """Files by path. Empty directories, permissions and links are not part of a folder."""

    entries: tuple[FolderEntry, ...]

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.entries)


Manifest = BlobManifest | FolderManifest


# -- writing --------------------------------------------------------------------------------------------
def make_blob(size: int, hashes: bytes, tensors: tuple[Tensor, ...] = ()) -> tuple[bytes, Cid, list[bytes]]:
    """Manifest bytes, content id and pages (empty but for very large files) of a file.

    `hashes` are the chunks' digests. Tensors are left out when the manifest would be over its limit with them.
    """
    if size > _MAX_SIZE:
        raise LocalProtocolError(f"{size} bytes are over {_MAX_SIZE}, the most for one file: share a folder of parts")
    if len(hashes) != chunk_count(size) * DIGEST_BYTES:
        raise LocalProtocolError("one digest a chunk")
    step = HASHES_PER_PAGE * DIGEST_BYTES
    pages: list[bytes] = []
    if chunk_count(size) > MAX_INLINE_CHUNKS:
        pages = [hashes[i : i + step] for i in range(0, len(hashes), step)]
        manifest = BlobManifest(size, None, b"".join(blake3(page).digest() for page in pages), tensors)
    else:
        manifest = BlobManifest(size, hashes, None, tensors)
    data = encode_manifest(manifest)
    if len(data) > MAX_OBJECT_BYTES:
        data = encode_manifest(BlobManifest(size, manifest.hashes, manifest.pages))
    return data, manifest_cid(data), pages


def encode_manifest(manifest: Manifest) -> bytes:
    """Canonical bytes. Raises `LocalProtocolError` for a folder that breaks the rules on paths."""
    if isinstance(manifest, FolderManifest):
        entries = sorted(manifest.entries, key=lambda e: e.path.encode("utf-8"))
        try:
            _check_entries_untrusted(entries)
        except RemoteProtocolError as error:
            raise LocalProtocolError(str(error)) from None
        rows = [[e.path, e.size, e.cid.to_bytes()] for e in entries]
        data = _pack({"entries": rows, "kind": "folder", "size": manifest.size, "v": 1})
        if len(data) > MAX_OBJECT_BYTES:
            raise LocalProtocolError(f"a folder's manifest of {len(data)} bytes is over {MAX_OBJECT_BYTES}")
        return data
    fields: dict[str, object] = {"chunk": CHUNK_BYTES, "kind": "blob", "size": manifest.size, "v": 1}
    if manifest.pages is not None:
        fields["pages"] = manifest.pages
    else:
        fields["hashes"] = manifest.hashes
    if manifest.tensors:
        fields["tensors"] = [[t.name, t.dtype, list(t.shape), t.begin, t.end] for t in manifest.tensors]
    return _pack(dict(sorted(fields.items())))


def _pack(value: object) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed


def manifest_cid(data: bytes) -> Cid:
    """The content id of manifest bytes."""
    return Cid.v1(BLOB_MANIFEST, BLAKE3, blake3(data).digest())


# -- reading --------------------------------------------------------------------------------------------
def decode_manifest_untrusted(data: bytes) -> Manifest:
    """Parse and check every rule. The hash was checked before (`check_object_untrusted`)."""
    if len(data) > MAX_OBJECT_BYTES:
        raise RemoteProtocolError(f"a manifest of {len(data)} bytes is over {MAX_OBJECT_BYTES}")
    reader = CanonicalReader(data)
    fields: dict[str, object] = {}
    last = ""
    for _ in range(reader.read_keys_untrusted(6)):
        key = reader.read_str_untrusted(16)
        if key <= last:
            raise RemoteProtocolError("keys of a manifest are not in order")
        last = key
        fields[key] = _read_field_untrusted(reader, key)
    reader.expect_end_untrusted()
    if fields.get("v") != 1:
        raise RemoteProtocolError("a manifest of an unknown version")
    keys = fields.keys() - {"tensors"}
    if fields.get("kind") == "folder" and keys == {"entries", "kind", "size", "v"} == fields.keys():
        return _folder_untrusted(fields)
    if fields.get("kind") == "blob" and keys in ({"chunk", h, "kind", "size", "v"} for h in ("hashes", "pages")):
        return _blob_untrusted(fields)
    raise RemoteProtocolError("a manifest of an unknown kind")


def check_object_untrusted(expected: Multihash, data: bytes) -> None:
    """Raise `RemoteProtocolError` unless `data` has the hash `expected`."""
    try:
        fits = expected.matches(data)
    except ValueError as error:
        raise RemoteProtocolError(str(error)) from None
    if not fits:
        raise RemoteProtocolError("bytes that do not have the hash they were asked by")


def is_supported(cid: Cid) -> bool:
    """Whether we can fetch this: our manifests, and raw blocks under SHA2-256 or BLAKE3."""
    if cid.codec == BLOB_MANIFEST:
        return cid.multihash.code == BLAKE3
    return cid.codec == RAW and cid.multihash.code in (SHA2_256, BLAKE3)


def _read_field_untrusted(reader: CanonicalReader, key: str) -> object:
    if key in ("v", "chunk", "size"):
        return reader.read_uint_untrusted(_MAX_U63)
    if key == "kind":
        return reader.read_str_untrusted(16)
    if key == "hashes":
        return reader.read_bin_untrusted(MAX_INLINE_CHUNKS * DIGEST_BYTES)
    if key == "pages":
        return reader.read_bin_untrusted(_MAX_PAGES * DIGEST_BYTES)
    if key == "tensors":
        return [_read_tensor_untrusted(reader) for _ in range(reader.read_array_untrusted(MAX_MANIFEST_TENSORS))]
    if key == "entries":
        return [_read_entry_untrusted(reader) for _ in range(reader.read_array_untrusted(MAX_FOLDER_ENTRIES))]
    raise RemoteProtocolError(f"unknown field {key!r} in a manifest")


def _read_tensor_untrusted(reader: CanonicalReader) -> Tensor:
    if reader.read_array_untrusted(5) != 5:
        raise RemoteProtocolError("a tensor needs five fields")
    name = reader.read_str_untrusted(MAX_TENSOR_NAME_BYTES)
    dtype = reader.read_str_untrusted(32)
    dimensions = reader.read_array_untrusted(MAX_TENSOR_DIMENSIONS)
    shape = tuple([reader.read_uint_untrusted(_MAX_U63) for _ in range(dimensions)])
    return Tensor(name, dtype, shape, reader.read_uint_untrusted(_MAX_U63), reader.read_uint_untrusted(_MAX_U63))


def _read_entry_untrusted(reader: CanonicalReader) -> FolderEntry:
    if reader.read_array_untrusted(3) != 3:
        raise RemoteProtocolError("a folder entry needs three fields")
    path = reader.read_str_untrusted(MAX_FOLDER_PATH_BYTES)
    size = reader.read_uint_untrusted(_MAX_SIZE)
    return FolderEntry(path, size, Cid.from_bytes_untrusted(reader.read_bin_untrusted(128)))


def _blob_untrusted(fields: dict[str, object]) -> BlobManifest:
    size, hashes, pages = fields["size"], fields.get("hashes"), fields.get("pages")
    tensors = fields.get("tensors", [])
    assert isinstance(size, int)
    assert isinstance(tensors, list)
    if fields["chunk"] != CHUNK_BYTES:
        raise RemoteProtocolError(f"chunks of {fields['chunk']} bytes: version 1 has {CHUNK_BYTES}")
    if size > _MAX_SIZE:
        raise RemoteProtocolError(f"a file of {size} bytes is over {_MAX_SIZE}")
    count = chunk_count(size)
    if (count > MAX_INLINE_CHUNKS) != (pages is not None):
        raise RemoteProtocolError("pages belong to files of more than 128 GiB, and only to those")
    wanted = -(-count // HASHES_PER_PAGE) if pages is not None else count
    given = pages if pages is not None else hashes
    assert isinstance(given, bytes)
    if len(given) != wanted * DIGEST_BYTES:
        raise RemoteProtocolError(f"{len(given)} bytes of digests for {count} chunks")
    if "tensors" in fields and not tensors:
        raise RemoteProtocolError("an empty tensor table is left out")
    previous = (0, 0, "")
    for tensor in tensors:
        position = (tensor.begin, tensor.end, tensor.name)
        if position <= previous or not tensor.begin <= tensor.end <= size:
            raise RemoteProtocolError("tensors out of order or out of the file")
        previous = position
    if pages is not None:
        return BlobManifest(size, None, given, tuple(tensors))
    return BlobManifest(size, given, None, tuple(tensors))


def _folder_untrusted(fields: dict[str, object]) -> FolderManifest:
    entries = fields["entries"]
    assert isinstance(entries, list)
    _check_entries_untrusted(entries)
    manifest = FolderManifest(tuple(entries))
    if fields["size"] != manifest.size:
        raise RemoteProtocolError("a folder's size is not that of its files")
    return manifest


# -- paths ----------------------------------------------------------------------------------------------
def _check_entries_untrusted(entries: list[FolderEntry]) -> None:
    """Sorted, unique, safe to create below any directory, and no file where another entry needs a directory."""
    if len(entries) > MAX_FOLDER_ENTRIES:
        raise RemoteProtocolError(f"{len(entries)} files are over the limit of {MAX_FOLDER_ENTRIES} for a folder")
    files: set[str] = set()
    last = b""
    for entry in entries:
        check_path_untrusted(entry.path)
        encoded = entry.path.encode("utf-8")
        if encoded <= last:
            raise RemoteProtocolError("paths of a folder are not in order")
        last = encoded
        if entry.cid.codec != BLOB_MANIFEST or entry.cid.version != 1 or entry.cid.multihash.code != BLAKE3:
            raise RemoteProtocolError(f"{entry.path!r} does not name a blob")
        files.add(entry.path)
    for path in files:
        parent, slash, _ = path.rpartition("/")
        while slash:
            if parent in files:
                raise RemoteProtocolError(f"{parent!r} is a file and a directory")
            parent, slash, _ = parent.rpartition("/")


def check_path_untrusted(path: str) -> None:
    """Raise `RemoteProtocolError` for a path that could leave the destination or that not every system can hold."""
    encoded = path.encode("utf-8")
    if not path or len(encoded) > MAX_FOLDER_PATH_BYTES:
        raise RemoteProtocolError(f"a path of {len(encoded)} bytes")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in path) or "\\" in path:
        raise RemoteProtocolError(f"control character or backslash in the path {path!r}")
    if unicodedata.normalize("NFC", path) != path:
        raise RemoteProtocolError(f"the path {path!r} is not in Unicode form NFC")
    for part in path.split("/"):
        if part in ("", ".", ".."):
            raise RemoteProtocolError(f"the path {path!r} is not plain and relative")
        if len(part.encode("utf-8")) > MAX_PATH_PART_BYTES:
            raise RemoteProtocolError(f"a name of more than {MAX_PATH_PART_BYTES} bytes in a path")
