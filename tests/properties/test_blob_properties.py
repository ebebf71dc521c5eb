"""Whatever a peer sends: a value that was allowed, or `RemoteProtocolError`."""

from __future__ import annotations

import contextlib

from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from lattica_protocols.blobs import manifest as m
from lattica_protocols.blobs.chunk_set import ChunkSet, to_ranges
from lattica_protocols.blobs.messages import (
    TO_CLIENT,
    TO_SERVER,
    FrameReader,
    Header,
    Kind,
    decode_header_untrusted,
    decode_ranges_untrusted,
    encode_frame,
    encode_ranges,
)
from lattica_protocols.blobs.safetensors import Tensor, parse_header
from lattica_protocols.blobs.server import BlobServer, ObjectRequested, WantReceived
from lattica_protocols.blobs.source import BlobSource
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import CHUNK_BYTES
from lattica_protocols.multihash import BLAKE3, Multihash

NAME = Multihash(BLAKE3, bytes(32))
tensors = st.lists(
    st.builds(
        Tensor,
        st.text(st.characters(codec="utf-8"), max_size=20),
        st.sampled_from(["F32", "BF16"]),
        st.lists(st.integers(0, 2**40), max_size=4).map(tuple),
        st.integers(1, 100),
        st.integers(100, 5000),
    ),
    max_size=5,
    unique_by=lambda t: (t.begin, t.end, t.name),
).map(lambda ts: tuple(sorted(ts, key=lambda t: (t.begin, t.end, t.name))))


@given(st.integers(5000, 40 * CHUNK_BYTES), tensors)
def test_blobs_round_trip(size: int, table: tuple[Tensor, ...]) -> None:
    hashes = b"".join(blake3(bytes([i])).digest() for i in range(m.chunk_count(size)))
    data, cid, _ = m.make_blob(size, hashes, table)
    assert m.decode_manifest_untrusted(data) == m.BlobManifest(size, hashes, None, table)
    m.check_object_untrusted(cid.multihash, data)


@given(st.binary(max_size=300))
def test_manifest_garbage(data: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        m.encode_manifest(m.decode_manifest_untrusted(data))


@given(st.integers(0, 200), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_canonical(at: int, value: int) -> None:
    data = bytearray(m.make_blob(5000, bytes(32), (Tensor("a", "F32", (3,), 10, 22),))[0])
    data[at % len(data)] = value
    with contextlib.suppress(RemoteProtocolError):
        assert m.encode_manifest(m.decode_manifest_untrusted(bytes(data))) == data


@given(st.text())
def test_paths(path: str) -> None:
    with contextlib.suppress(RemoteProtocolError, UnicodeEncodeError):
        m.check_path_untrusted(path)
        assert not path.startswith("/")
        assert ".." not in path.split("/")
        assert "\x00" not in path


@given(st.binary(max_size=200), st.integers(0, 300))
def test_safetensors_headers(header: bytes, size: int) -> None:
    for tensor in parse_header(header, size):
        assert 0 <= tensor.begin <= tensor.end <= size


@given(st.sets(st.integers(0, 99)))
def test_bitmaps_round_trip(indices: set[int]) -> None:
    chunks = ChunkSet(100)
    for index in indices:
        chunks.add(index)
    assert ChunkSet.from_bytes_untrusted(100, chunks.to_bytes()) == chunks
    assert set(chunks) == indices
    assert set(chunks) | set(chunks.missing()) == set(range(100))
    ranges = to_ranges(sorted(indices))
    if ranges:
        assert decode_ranges_untrusted(encode_ranges(ranges), 100) == ranges


@given(st.integers(0, 100), st.binary(max_size=20))
def test_bitmap_garbage(count: int, data: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        assert ChunkSet.from_bytes_untrusted(count, data).to_bytes() == data


@given(st.binary(max_size=64), st.integers(0, 10))
def test_range_garbage(data: bytes, count: int) -> None:
    with contextlib.suppress(RemoteProtocolError):
        for first, length in decode_ranges_untrusted(data, count):
            assert 0 <= first < first + length <= count


@given(st.binary(min_size=16, max_size=16))
def test_header_garbage(data: bytes) -> None:
    for accepted in (TO_SERVER, TO_CLIENT):
        with contextlib.suppress(RemoteProtocolError):
            header = decode_header_untrusted(data, accepted)
            assert header.length <= accepted[header.kind]


frames = st.builds(
    encode_frame,
    st.sampled_from(list(Kind)),
    st.integers(0, 2),
    st.one_of(
        st.binary(max_size=40),
        st.just(NAME.to_bytes()),
        st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=3).map(encode_ranges),
    ),
    arg=st.integers(0, 5),
    flags=st.integers(0, 3),
)
wires = st.lists(st.one_of(frames, st.binary(max_size=40)), max_size=12).map(b"".join)


@given(wires, st.integers(1, 50))
def test_a_server_survives_everything(wire: bytes, piece: int) -> None:
    server = BlobServer()
    with contextlib.suppress(RemoteProtocolError):
        for i in range(0, len(wire), piece):
            server.receive_data(wire[i : i + piece])
            while (event := server.next_event()) is not None:
                if isinstance(event, WantReceived):
                    server.tell_have(event.blob, ChunkSet(5, full=True))
                elif isinstance(event, ObjectRequested):
                    server.send_object(event.request, b"x")
            while (key := server.next_chunk()) is not None:
                assert 0 <= key[1] < 5
            server.poll_transmit()


@given(wires, st.integers(1, 50))
def test_a_source_survives_everything(wire: bytes, piece: int) -> None:
    source = BlobSource(lambda length: memoryview(bytearray(length)))
    source.want(0, NAME)
    source.set_chunk_sizes(0, 5, lambda index: 8)
    source.request_chunks(0, [(0, 5)])
    source.request_object(1, NAME, 30)
    source.cancel_chunks(0, [(1, 1)])
    with contextlib.suppress(RemoteProtocolError):
        for i in range(0, len(wire), piece):
            source.receive_data(wire[i : i + piece])
            while source.next_event() is not None:
                pass


@given(st.lists(st.binary(max_size=100), max_size=6), st.integers(1, 40))
def test_frames_survive_any_cut(payloads: list[bytes], piece: int) -> None:
    seen: list[tuple[int, bytes]] = []

    def complete(header: Header, buffer: memoryview | None) -> None:
        seen.append((header.arg, bytes(buffer or b"")))

    reader = FrameReader(TO_CLIENT, lambda header: memoryview(bytearray(header.length)), complete)
    wire = b"".join(encode_frame(Kind.CHUNK, 0, p, arg=i) for i, p in enumerate(payloads))
    for i in range(0, len(wire), piece):
        reader.receive_untrusted(wire[i : i + piece])
    assert seen == list(enumerate(payloads))
    assert reader.between_frames
