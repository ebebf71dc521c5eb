"""The asking side of one stream of `/lattica/blobs/1`: one source.

Chunks go straight into buffers of the runtime: `take_buffer(length)` is called when a chunk begins and gets the
bytes copied in as they come. What arrives unasked ends the stream, except for chunks that were cancelled: those
cross on the wire and are thrown away.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lattica_protocols.blobs.chunk_set import ChunkRange, ChunkSet
from lattica_protocols.blobs.messages import (
    TO_CLIENT,
    FrameReader,
    Have,
    Header,
    Kind,
    decode_ranges_untrusted,
    encode_frame,
    encode_ranges,
)
from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.limits import MAX_BLOB_CHUNKS, MAX_CHUNK_RANGES
from lattica_protocols.multihash import Multihash


@dataclass(frozen=True, slots=True)
class HaveReceived:
    """What the source has of a blob: `None` is nothing."""

    blob: int
    have: ChunkSet | None


@dataclass(frozen=True, slots=True)
class MoreReceived:
    """The source has these, too."""

    blob: int
    ranges: list[ChunkRange]


@dataclass(frozen=True, slots=True)
class ObjectReceived:
    """An object, its hash not checked yet; `None`: the source does not have it."""

    request: int
    data: bytes | None


@dataclass(frozen=True, slots=True)
class ChunkReceived:
    """A chunk, its hash not checked yet. `buffer` is the one that `take_buffer` gave."""

    blob: int
    index: int
    buffer: memoryview


@dataclass(frozen=True, slots=True)
class GoneReceived:
    """The source will not send this chunk."""

    blob: int
    index: int


SourceEvent = HaveReceived | MoreReceived | ObjectReceived | ChunkReceived | GoneReceived


@dataclass(slots=True)
class _Blob:
    sizes: Callable[[int], int] | None
    expected: set[int]
    cancelled: set[int]
    count: int | None = None


class BlobSource:
    """One outbound stream. `take_buffer(length)` returns a writable buffer of that length."""

    def __init__(self, take_buffer: Callable[[int], memoryview]) -> None:
        self._take_buffer = take_buffer
        self._reader = FrameReader(TO_CLIENT, self._target, self._on_frame)
        self._out: deque[bytes] = deque()
        self._events: deque[SourceEvent] = deque()
        self._blobs: dict[int, _Blob] = {}
        self._objects: dict[int, int] = {}

    # -- network --------------------------------------------------------------------------------------------
    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Raises `RemoteProtocolError` when the source broke a rule; the stream is over then."""
        self._reader.receive_untrusted(data)

    def poll_transmit(self) -> list[bytes]:
        out = list(self._out)
        self._out.clear()
        return out

    def next_event(self) -> SourceEvent | None:
        return self._events.popleft() if self._events else None

    def take_unfinished(self) -> memoryview | None:
        """The buffer of a chunk that was cut off when the stream ended."""
        return self._reader.take_unfinished()

    # -- application ----------------------------------------------------------------------------------------
    def want(self, blob: int, multihash: Multihash) -> None:
        """Ask what the source has; answered by `HaveReceived`."""
        if blob in self._blobs:
            raise LocalProtocolError(f"the number {blob} is in use")
        self._blobs[blob] = _Blob(None, set(), set())
        self._out.append(encode_frame(Kind.WANT, blob, multihash.to_bytes()))

    def set_chunk_sizes(self, blob: int, count: int, sizes: Callable[[int], int]) -> None:
        """The manifest is known now. Raises `RemoteProtocolError` when the source spoke of another number of chunks."""
        entry = self._blobs[blob]
        if entry.count is not None and entry.count != count:
            raise RemoteProtocolError(f"a source speaks of {entry.count} chunks, the manifest of {count}")
        entry.count, entry.sizes = count, sizes

    def request_object(self, request: int, multihash: Multihash, max_bytes: int) -> None:
        """Ask for an object; answered by `ObjectReceived`."""
        if request in self._objects:
            raise LocalProtocolError(f"the number {request} is in use")
        self._objects[request] = max_bytes
        self._out.append(encode_frame(Kind.OBJECT, request, multihash.to_bytes()))

    def request_chunks(self, blob: int, ranges: list[ChunkRange]) -> None:
        """Ask for chunks; `set_chunk_sizes` has been called."""
        entry = self._blobs[blob]
        if entry.sizes is None:
            raise LocalProtocolError("the sizes of the chunks are not known yet")
        indices = _indices(ranges)
        entry.expected.update(indices)
        entry.cancelled.difference_update(indices)
        self._send_ranges(Kind.CHUNKS, blob, ranges)

    def cancel_chunks(self, blob: int, ranges: list[ChunkRange]) -> None:
        """Take requests back. A chunk that is already under way is thrown away when it comes."""
        entry = self._blobs[blob]
        asked = entry.expected.intersection(_indices(ranges))
        entry.expected -= asked
        entry.cancelled |= asked
        self._send_ranges(Kind.CANCEL, blob, ranges)

    def done(self, blob: int) -> None:
        """Forget the blob."""
        if self._blobs.pop(blob, None) is not None:
            self._out.append(encode_frame(Kind.DONE, blob))

    def _send_ranges(self, kind: Kind, blob: int, ranges: list[ChunkRange]) -> None:
        for i in range(0, len(ranges), MAX_CHUNK_RANGES):
            self._out.append(encode_frame(kind, blob, encode_ranges(ranges[i : i + MAX_CHUNK_RANGES])))

    # -- frames ---------------------------------------------------------------------------------------------
    def _target(self, header: Header) -> memoryview | None:
        if header.kind == Kind.DATA:
            limit = self._objects.get(header.blob)
            if limit is None or header.length > limit:
                raise RemoteProtocolError(f"an object of {header.length} bytes that was not asked for, or is too large")
            return memoryview(bytearray(header.length))
        if header.kind != Kind.CHUNK:
            return memoryview(bytearray(header.length))
        entry = self._blobs.get(header.blob)
        if entry is None:
            return None  # forgotten by `done` while it was under way
        if header.arg in entry.cancelled:
            return None
        if header.arg not in entry.expected or entry.sizes is None:
            raise RemoteProtocolError(f"chunk {header.arg} was not asked for")
        if header.length != entry.sizes(header.arg):
            raise RemoteProtocolError(f"chunk {header.arg} with {header.length} bytes")
        return self._take_buffer(header.length)

    def _on_frame(self, header: Header, buffer: memoryview | None) -> None:
        if header.kind == Kind.DATA:
            self._objects.pop(header.blob, None)
            if header.flags not in (0, 1):
                raise RemoteProtocolError(f"unknown flags {header.flags}")
            data = bytes(buffer or b"") if header.flags == 1 else None
            self._events.append(ObjectReceived(header.blob, data))
            return
        entry = self._blobs.get(header.blob)
        if entry is None:
            return
        if header.kind == Kind.CHUNK:
            entry.cancelled.discard(header.arg)
            if buffer is not None:
                entry.expected.discard(header.arg)
                self._events.append(ChunkReceived(header.blob, header.arg, buffer))
        elif header.kind == Kind.GONE:
            entry.cancelled.discard(header.arg)
            if header.arg in entry.expected:
                entry.expected.remove(header.arg)
                self._events.append(GoneReceived(header.blob, header.arg))
        elif header.kind == Kind.HAVE:
            self._on_have(header, entry, bytes(buffer or b""))
        else:
            if entry.count is None:
                raise RemoteProtocolError("HAVE_MORE before HAVE")
            ranges = decode_ranges_untrusted(bytes(buffer or b""), entry.count)
            self._events.append(MoreReceived(header.blob, ranges))

    def _on_have(self, header: Header, entry: _Blob, payload: bytes) -> None:
        if header.flags == Have.NOTHING:
            self._events.append(HaveReceived(header.blob, None))
            return
        if header.flags not in (Have.PART, Have.ALL) or header.arg > MAX_BLOB_CHUNKS:
            raise RemoteProtocolError(f"HAVE with flags {header.flags} and {header.arg} chunks")
        if entry.count is not None and entry.count != header.arg:
            raise RemoteProtocolError(f"a source speaks of {header.arg} chunks, the manifest of {entry.count}")
        entry.count = header.arg
        if header.flags == Have.ALL:
            have = ChunkSet(header.arg, full=True)
        else:
            have = ChunkSet.from_bytes_untrusted(header.arg, payload)
        self._events.append(HaveReceived(header.blob, have))


def _indices(ranges: Iterable[ChunkRange]) -> set[int]:
    return {index for first, count in ranges for index in range(first, first + count)}
