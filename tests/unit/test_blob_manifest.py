"""Manifests and the canonical encoding, against fixed vectors (also in protocols/specs/blobs.md)."""

from __future__ import annotations

import json
import struct

import msgpack
import pytest
from blake3 import blake3

from lattica_protocols.blobs import manifest as m
from lattica_protocols.blobs.canonical import CanonicalReader
from lattica_protocols.blobs.chunk_set import ChunkSet, to_ranges
from lattica_protocols.blobs.safetensors import Tensor, header_length, parse_header
from lattica_protocols.cid import BLOB_MANIFEST, RAW, Cid
from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.limits import CHUNK_BYTES, HASHES_PER_PAGE, MAX_INLINE_CHUNKS
from lattica_protocols.multihash import BLAKE3, SHA2_256, Multihash

VECTORS = [
    # name, content, manifest, content id
    (
        "empty",
        b"",
        "85a56368756e6bce00100000a6686173686573c400a46b696e64a4626c6f62a473697a6500a17601",
        "bagaqihrady276ve4ia4xvwa5ufjitn6vfjevctbyr7ksqmqb5y2j4owkr3ra",
    ),
    (
        "hello",
        b"hello\n",
        "85a56368756e6bce00100000a6686173686573c4208e4c7c1b99dbfd50e7a95185fead5ee1448fa904a2fdd778"
        "eaf5f2dbfd629a99a46b696e64a4626c6f62a473697a6506a17601",
        "bagaqihrawctuaise7zehdx6z64qcnnveha7lbvy27gdnjtjvsqavdjy34akq",
    ),
    (
        "a chunk and a byte",
        bytes(CHUNK_BYTES + 1),
        "85a56368756e6bce00100000a6686173686573c440488de202f73bd976de4e7048f4e1f39a776d86d582b7348f"
        "f53bf432b987fca82d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213a46b696e64"
        "a4626c6f62a473697a65ce00100001a17601",
        "bagaqihraf76szgv4evwdxpl565byxpsoiczwzhpzbpi4alrynqa6ztwvjpza",
    ),
]
"""The manifests were put together byte by byte, not with this code."""


def build(content: bytes) -> tuple[bytes, Cid]:
    chunks = [content[i : i + CHUNK_BYTES] for i in range(0, len(content), CHUNK_BYTES)]
    data, cid, pages = m.make_blob(len(content), b"".join(blake3(chunk).digest() for chunk in chunks))
    assert pages == []
    return data, cid


@pytest.mark.parametrize(("name", "content", "manifest", "cid"), VECTORS, ids=[v[0] for v in VECTORS])
def test_vectors(name: str, content: bytes, manifest: str, cid: str) -> None:
    data, made = build(content)
    assert data.hex() == manifest
    assert str(made) == cid
    assert made.codec == BLOB_MANIFEST == 0x0201
    assert made.multihash == Multihash(BLAKE3, blake3(data).digest())
    decoded = m.decode_manifest_untrusted(data)
    assert isinstance(decoded, m.BlobManifest)
    assert decoded.size == len(content)
    assert m.encode_manifest(decoded) == data


def test_chunk_sizes() -> None:
    decoded = m.decode_manifest_untrusted(build(bytes(2 * CHUNK_BYTES + 5))[0])
    assert isinstance(decoded, m.BlobManifest)
    assert [decoded.chunk_size(i) for i in range(decoded.chunk_count)] == [CHUNK_BYTES, CHUNK_BYTES, 5]
    assert decoded.chunk_hash(2) == blake3(bytes(5)).digest()


def test_very_large_files_have_pages() -> None:
    count = MAX_INLINE_CHUNKS + 1
    hashes = bytes(range(256)) * (count // 8) + bytes(32)
    data, _, pages = m.make_blob(MAX_INLINE_CHUNKS * CHUNK_BYTES + 1, hashes)
    assert len(pages) == 5
    assert len(pages[0]) == HASHES_PER_PAGE * 32
    assert len(data) < 1000
    decoded = m.decode_manifest_untrusted(data)
    assert isinstance(decoded, m.BlobManifest)
    with pytest.raises(LocalProtocolError):
        decoded.chunk_hash(0)
    for expected, page in zip(decoded.page_hashes(), pages, strict=True):
        m.check_object_untrusted(expected, page)
    whole = decoded.with_pages(pages)
    assert whole.chunk_hash(count - 1) == hashes[-32:]
    with pytest.raises(RemoteProtocolError):
        decoded.with_pages(pages[:-1])


def test_folder_round_trip_and_order() -> None:
    cid = build(b"x")[1]
    manifest = m.FolderManifest(tuple(m.FolderEntry(path, 1, cid) for path in ("b/z", "a", "b/ä")))
    data = m.encode_manifest(manifest)
    decoded = m.decode_manifest_untrusted(data)
    assert isinstance(decoded, m.FolderManifest)
    assert [entry.path for entry in decoded.entries] == ["a", "b/z", "b/ä"]
    assert decoded.size == 3
    assert m.encode_manifest(decoded) == data


BAD_PATHS = [
    "", "/etc/passwd", "../x", "a/../b", "a//b", "a/", "./a", "a/.", "..", "a\x00b", "a\nb", "C:\\x", "e\u0301",
    "x" * 256, "/".join(["d" * 200] * 6),
]  # fmt: skip


@pytest.mark.parametrize("path", BAD_PATHS, ids=repr)
def test_paths_that_are_refused(path: str) -> None:
    with pytest.raises(RemoteProtocolError):
        m.check_path_untrusted(path)
    entry = m.FolderEntry(path, 1, build(b"x")[1])
    with pytest.raises(LocalProtocolError):
        m.encode_manifest(m.FolderManifest((entry,)))


def folder_bytes(*rows: tuple[str, int, bytes]) -> bytes:
    fields = {"entries": [list(r) for r in rows], "kind": "folder", "size": sum(r[1] for r in rows), "v": 1}
    return bytes(msgpack.packb(fields))


def test_folders_that_are_refused() -> None:
    cid = build(b"x")[1].to_bytes()
    m.decode_manifest_untrusted(folder_bytes(("a", 1, cid), ("b", 1, cid)))
    for rows in (
        [("b", 1, cid), ("a", 1, cid)],
        [("a", 1, cid), ("a", 1, cid)],
        [("a", 1, cid), ("a/b", 1, cid)],
        [("a", 1, cid), ("a.b", 1, cid), ("a/b/c", 1, cid)],
        [("a", 1, Cid.v1(RAW, SHA2_256, bytes(32)).to_bytes())],
    ):
        with pytest.raises(RemoteProtocolError):
            m.decode_manifest_untrusted(folder_bytes(*rows))


def test_blobs_that_are_refused() -> None:
    good = {"chunk": CHUNK_BYTES, "hashes": bytes(32), "kind": "blob", "size": 5, "v": 1}
    m.decode_manifest_untrusted(msgpack.packb(good))
    bad: list[dict[str, object]] = [
        {**good, "chunk": 1024},
        {**good, "hashes": bytes(64)},
        {**good, "hashes": b""},
        {**good, "kind": "blub"},
        {**good, "size": 1 << 62},
        {**good, "size": -1},
        {**good, "v": 2},
        {**good, "zzz": 1},
        {"chunk": CHUNK_BYTES, "kind": "blob", "pages": bytes(32), "size": 5, "v": 1},
        dict(reversed(good.items())),
        {k: v for k, v in good.items() if k != "hashes"},
        dict(sorted({**good, "tensors": []}.items())),
        dict(sorted({**good, "tensors": [["a", "F32", [1], 0, 6]]}.items())),
        dict(sorted({**good, "tensors": [["a", "F32", [1], 3, 2]]}.items())),
        dict(sorted({**good, "tensors": [["b", "F32", [1], 1, 2], ["a", "F32", [1], 1, 2]]}.items())),
    ]
    for fields in bad:
        with pytest.raises(RemoteProtocolError):
            m.decode_manifest_untrusted(msgpack.packb(fields))
    with pytest.raises(RemoteProtocolError):
        m.decode_manifest_untrusted(msgpack.packb(good) + b"\x00")


def test_only_the_shortest_form_is_read() -> None:
    for wire in (b"\xcc\x05", b"\xcd\x00\xff", b"\xce\x00\x00\xff\xff", b"\xcf" + (0xFFFFFFFF).to_bytes(8, "big")):
        with pytest.raises(RemoteProtocolError):
            CanonicalReader(wire).read_uint_untrusted(1 << 63)
    with pytest.raises(RemoteProtocolError):
        CanonicalReader(b"\xd9\x01a").read_str_untrusted(10)
    with pytest.raises(RemoteProtocolError):
        CanonicalReader(b"\xc5\x00\x01a").read_bin_untrusted(10)
    with pytest.raises(RemoteProtocolError):
        CanonicalReader(b"\xdc\x00\x01\x01").read_array_untrusted(10)


def safetensors(header: dict[str, object], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_tensor_table_of_a_safetensors_file() -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "b": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [4, 12]},
        "a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
    }
    content = safetensors(header, bytes(12))
    length = header_length(content[:9], len(content))
    assert length is not None
    tensors = parse_header(content[8 : 8 + length], len(content))
    base = 8 + length
    assert tensors == (Tensor("a", "F32", (), base, base + 4), Tensor("b", "BF16", (2, 2), base + 4, base + 12))
    assert tensors[0].chunks() == range(1)
    data, _, _ = m.make_blob(len(content), blake3(content).digest(), tensors)
    decoded = m.decode_manifest_untrusted(data)
    assert isinstance(decoded, m.BlobManifest)
    assert decoded.tensors == tensors


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 99]},
        {"dtype": "F32", "shape": [1], "data_offsets": [3, 1]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 1]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 1]},
        {"dtype": 3, "shape": [1], "data_offsets": [0, 1]},
        {"shape": [1], "data_offsets": [0, 1]},
        [],
    ],
)
def test_malformed_headers_make_plain_files(entry: object) -> None:
    assert parse_header(json.dumps({"a": entry}).encode(), 50) == ()


def test_not_safetensors() -> None:
    assert header_length(b"", 0) is None
    assert header_length(struct.pack("<Q", 10) + b"x", 100) is None
    assert header_length(struct.pack("<Q", 1000) + b"{", 100) is None
    assert parse_header(b"[]", 10) == ()
    assert parse_header(b"\xff", 10) == ()


def test_chunk_set() -> None:
    chunks = ChunkSet(11)
    for index in (0, 3, 10, 3):
        chunks.add(index)
    assert (len(chunks), list(chunks), 3 in chunks, 11 in chunks, -1 in chunks) == (3, [0, 3, 10], True, False, False)
    assert chunks.to_bytes() == b"\x09\x04"
    assert ChunkSet.from_bytes_untrusted(11, b"\x09\x04") == chunks
    assert list(chunks.missing()) == [1, 2, 4, 5, 6, 7, 8, 9]
    chunks.discard(3)
    chunks.discard(3)
    assert len(chunks) == 2
    assert ChunkSet(9, full=True).complete
    assert ChunkSet(0).complete
    for count, wire in ((11, b"\x09"), (11, b"\x09\x0c"), (0, b"\x00")):
        with pytest.raises(RemoteProtocolError):
            ChunkSet.from_bytes_untrusted(count, wire)


def test_ranges() -> None:
    assert to_ranges([3, 4, 5, 9, 0, 1]) == [(3, 3), (9, 1), (0, 2)]
    assert to_ranges([]) == []
