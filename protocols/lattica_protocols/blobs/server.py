"""The serving side of one stream of `/lattica/blobs/1`.

The machine answers nothing from its own knowledge: it reports `WantReceived` and `ObjectRequested`, the runtime
looks and calls `tell_have` and `send_object`. Chunk requests go into a queue in the order they came;
`next_chunk` hands out the next one when the runtime has room for it, and the runtime sends `chunk_header` and then
the bytes themselves, which never pass through here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict, deque
from dataclasses import dataclass

from lattica_protocols.blobs.chunk_set import ChunkRange, ChunkSet
from lattica_protocols.blobs.messages import (
    TO_SERVER,
    FrameReader,
    Have,
    Header,
    Kind,
    decode_ranges_untrusted,
    encode_frame,
    encode_header,
    encode_ranges,
)
from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.limits import (
    MAX_BLOB_CHUNKS,
    MAX_CHUNK_RANGES,
    MAX_QUEUED_CHUNKS,
    MAX_QUEUED_OBJECTS,
    MAX_WANTED_BLOBS_PER_STREAM,
)
from lattica_protocols.multihash import Multihash


@dataclass(frozen=True, slots=True)
class WantReceived:
    """The client wants to know what we have of a blob. Answer with `tell_have`."""

    blob: int
    multihash: Multihash


@dataclass(frozen=True, slots=True)
class ObjectRequested:
    """The client wants a manifest, a page or a raw block. Answer with `send_object`."""

    request: int
    multihash: Multihash


@dataclass(frozen=True, slots=True)
class WantEnded:
    """The client does not need this blob any more."""

    blob: int


ServerEvent = WantReceived | ObjectRequested | WantEnded


class BlobServer:
    """One inbound stream."""

    def __init__(self) -> None:
        self._reader = FrameReader(TO_SERVER, lambda header: memoryview(bytearray(header.length)), self._on_frame)
        self._out: deque[bytes] = deque()
        self._events: deque[ServerEvent] = deque()
        self._chunk_counts: dict[int, int | None] = {}  # None: asked, not answered yet
        self._queue: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._objects = 0

    # -- network --------------------------------------------------------------------------------------------
    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Raises `RemoteProtocolError` when the client broke a rule; the stream is over then."""
        self._reader.receive_untrusted(data)

    def poll_transmit(self) -> list[bytes]:
        """Control frames to send before any further chunk."""
        out = list(self._out)
        self._out.clear()
        return out

    def next_event(self) -> ServerEvent | None:
        return self._events.popleft() if self._events else None

    # -- application ----------------------------------------------------------------------------------------
    def tell_have(self, blob: int, have: ChunkSet | None) -> None:
        """Answer a want. `None`: we know nothing of this blob."""
        if self._chunk_counts.get(blob, 0) is not None:
            raise LocalProtocolError(f"nobody waits for what we have of blob {blob}")
        if have is None:
            del self._chunk_counts[blob]
            self._out.append(encode_frame(Kind.HAVE, blob, flags=Have.NOTHING))
            return
        self._chunk_counts[blob] = have.count
        if have.complete:
            self._out.append(encode_frame(Kind.HAVE, blob, arg=have.count, flags=Have.ALL))
        else:
            self._out.append(encode_frame(Kind.HAVE, blob, have.to_bytes(), arg=have.count, flags=Have.PART))

    def tell_have_more(self, blob: int, ranges: list[ChunkRange]) -> None:
        """These chunks can be asked for now, too."""
        if self._chunk_counts.get(blob) is None:
            return
        for i in range(0, len(ranges), MAX_CHUNK_RANGES):
            self._out.append(encode_frame(Kind.HAVE_MORE, blob, encode_ranges(ranges[i : i + MAX_CHUNK_RANGES])))

    def send_object(self, request: int, data: bytes | None) -> None:
        """Answer an object request; `None`: we do not have it."""
        self._objects -= 1
        if data is None:
            self._out.append(encode_frame(Kind.DATA, request, flags=0))
        else:
            self._out.append(encode_header(Kind.DATA, request, length=len(data), flags=1))
            self._out.append(data)

    def next_chunk(self) -> tuple[int, int] | None:
        """(blob, index) of the chunk to send next. Send it, or call `tell_gone`."""
        if not self._queue:
            return None
        key, _ = self._queue.popitem(last=False)
        return key

    def peek_chunk(self) -> tuple[int, int] | None:
        """What `next_chunk` will give, for reading ahead."""
        return next(iter(self._queue)) if self._queue else None

    def tell_gone(self, blob: int, index: int) -> None:
        """The chunk cannot be sent: it is not there or not intact."""
        self._out.append(encode_frame(Kind.GONE, blob, arg=index))

    def queued_chunks(self) -> int:
        return len(self._queue)

    # -- frames ---------------------------------------------------------------------------------------------
    def _on_frame(self, header: Header, buffer: memoryview | None) -> None:
        payload = bytes(buffer or b"")
        blob = header.blob
        if header.kind == Kind.WANT:
            if blob in self._chunk_counts:
                raise RemoteProtocolError(f"the number {blob} is already in use")
            if len(self._chunk_counts) >= MAX_WANTED_BLOBS_PER_STREAM:
                raise RemoteProtocolError(f"more than {MAX_WANTED_BLOBS_PER_STREAM} blobs on one stream")
            multihash = Multihash.from_bytes_untrusted(payload)
            self._chunk_counts[blob] = None
            self._events.append(WantReceived(blob, multihash))
        elif header.kind == Kind.OBJECT:
            if self._objects >= MAX_QUEUED_OBJECTS:
                raise RemoteProtocolError(f"more than {MAX_QUEUED_OBJECTS} object requests at a time")
            multihash = Multihash.from_bytes_untrusted(payload)
            self._objects += 1
            self._events.append(ObjectRequested(blob, multihash))
        elif header.kind == Kind.CHUNKS:
            self._enqueue(blob, decode_ranges_untrusted(payload, self._count_untrusted(blob)))
        elif header.kind == Kind.CANCEL:
            self._cancel(blob, decode_ranges_untrusted(payload, self._count_untrusted(blob)))
        else:
            self._count_untrusted(blob)
            del self._chunk_counts[blob]
            for key in [key for key in self._queue if key[0] == blob]:
                del self._queue[key]
            self._events.append(WantEnded(blob))

    def _count_untrusted(self, blob: int) -> int:
        count = self._chunk_counts.get(blob)
        if count is None:
            raise RemoteProtocolError(f"blob {blob} was not asked for, or not answered")
        return count

    def _enqueue(self, blob: int, ranges: list[ChunkRange]) -> None:
        if len(self._queue) + sum(count for _, count in ranges) > MAX_QUEUED_CHUNKS:
            raise RemoteProtocolError(f"more than {MAX_QUEUED_CHUNKS} chunk requests at a time")
        for first, count in ranges:
            for index in range(first, first + count):
                self._queue[blob, index] = None

    def _cancel(self, blob: int, ranges: list[ChunkRange]) -> None:
        if sum(count for _, count in ranges) <= len(self._queue):
            for first, count in ranges:
                for index in range(first, first + count):
                    self._queue.pop((blob, index), None)
            return
        # A few queued requests and long ranges: the work has to be bounded by the first, not by the second.
        ranges.sort()
        for key in [key for key in self._queue if key[0] == blob]:
            at = bisect_right(ranges, (key[1], MAX_BLOB_CHUNKS)) - 1
            if at >= 0 and key[1] < sum(ranges[at]):
                del self._queue[key]
