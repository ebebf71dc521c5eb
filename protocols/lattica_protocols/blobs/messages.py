"""The frames of `/lattica/blobs/1`: a header of 16 bytes, then the payload.

    u8 kind | u8 flags | u16 zero | u32 blob | u32 arg | u32 payload length          (big endian)

`blob` is a number that the client gave to a blob (in WANT) or to an object request, for this stream.

    to the server
    01 WANT     payload: multihash of the manifest               answered by HAVE; later HAVE_MORE while it grows
    02 OBJECT   payload: multihash                               answered by DATA
    03 CHUNKS   payload: ranges                                  answered by CHUNK or GONE for each, in any order
    04 CANCEL   payload: ranges that are no longer wanted        what has not been sent yet is not sent
    05 DONE     no payload: the number `blob` is forgotten

    to the client
    81 HAVE     flags: 0 nothing, 1 a part, 2 all. arg: number of chunks. payload: a bitmap, for a part
    82 DATA     flags: 0 not found, 1 found. payload: the object
    83 CHUNK    arg: index. payload: the chunk
    84 HAVE_MORE  payload: ranges that are there now, too
    85 GONE     arg: index. The chunk is not there any more

Ranges are pairs (u32 first, u32 count), count at least 1. Bitmaps are those of `chunk_set.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum

from lattica_protocols.blobs.chunk_set import ChunkRange
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import (
    CHUNK_BYTES,
    MAX_BLOB_CHUNKS,
    MAX_CHUNK_RANGES,
    MAX_MULTIHASH_DIGEST_BYTES,
    MAX_OBJECT_BYTES,
)

HEADER = struct.Struct(">BBHIII")
_RANGE = struct.Struct(">II")


class Kind(IntEnum):
    """See the table at the top; from 0x81 on they are the server's."""

    WANT = 0x01
    OBJECT = 0x02
    CHUNKS = 0x03
    CANCEL = 0x04
    DONE = 0x05
    HAVE = 0x81
    DATA = 0x82
    CHUNK = 0x83
    HAVE_MORE = 0x84
    GONE = 0x85


class Have(IntEnum):
    """Flags of HAVE."""

    NOTHING = 0
    PART = 1
    ALL = 2


_MULTIHASH_LIMIT = MAX_MULTIHASH_DIGEST_BYTES + 12
_RANGES_LIMIT = MAX_CHUNK_RANGES * _RANGE.size

TO_SERVER: dict[int, int] = {
    Kind.WANT: _MULTIHASH_LIMIT,
    Kind.OBJECT: _MULTIHASH_LIMIT,
    Kind.CHUNKS: _RANGES_LIMIT,
    Kind.CANCEL: _RANGES_LIMIT,
    Kind.DONE: 0,
}
"""Kinds a server accepts, with the largest payload of each."""

TO_CLIENT: dict[int, int] = {
    Kind.HAVE: MAX_BLOB_CHUNKS // 8,
    Kind.DATA: MAX_OBJECT_BYTES,
    Kind.CHUNK: CHUNK_BYTES,
    Kind.HAVE_MORE: _RANGES_LIMIT,
    Kind.GONE: 0,
}


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header; `length` bytes of payload follow."""

    kind: int
    flags: int
    blob: int
    arg: int
    length: int


def encode_header(kind: Kind, blob: int, arg: int = 0, length: int = 0, flags: int = 0) -> bytes:
    return HEADER.pack(kind, flags, 0, blob, arg, length)


def encode_frame(kind: Kind, blob: int, payload: bytes = b"", *, arg: int = 0, flags: int = 0) -> bytes:
    return HEADER.pack(kind, flags, 0, blob, arg, len(payload)) + payload


def encode_ranges(ranges: Iterable[ChunkRange]) -> bytes:
    return b"".join([_RANGE.pack(first, count) for first, count in ranges])


def decode_ranges_untrusted(payload: bytes, chunk_count: int) -> list[ChunkRange]:
    """Pairs of first index and count, all below `chunk_count` and together not more than that."""
    if not payload or len(payload) % _RANGE.size or len(payload) > _RANGES_LIMIT:
        raise RemoteProtocolError(f"{len(payload)} bytes are no list of ranges")
    out = []
    total = 0
    for first, count in _RANGE.iter_unpack(payload):
        total += count
        if count == 0 or first + count > chunk_count:
            raise RemoteProtocolError(f"range {first}+{count} of a blob of {chunk_count} chunks")
        out.append((first, count))
    if total > chunk_count:
        raise RemoteProtocolError("ranges that overlap")
    return out


def decode_header_untrusted(data: bytes, accepted: dict[int, int]) -> Header:
    """Parse 16 bytes; `accepted` are the kinds allowed in this direction."""
    kind, flags, zero, blob, arg, length = HEADER.unpack(data)
    limit = accepted.get(kind)
    if limit is None:
        raise RemoteProtocolError(f"frame of kind 0x{kind:02x} in this direction")
    if zero:
        raise RemoteProtocolError("reserved bytes of a frame are not zero")
    if length > limit:
        raise RemoteProtocolError(f"payload of {length} bytes for a {Kind(kind).name} frame: the limit is {limit}")
    return Header(kind, flags, blob, arg, length)


Target = Callable[[Header], memoryview | None]
"""Says where the payload of a frame goes: a buffer of exactly its length, or `None` to throw it away."""


class FrameReader:
    """Cuts a byte stream into frames, copying each byte once: into the buffer that `target` gives.

    `target(header)` is called once a header is complete and may raise `RemoteProtocolError`; `complete(header,
    buffer)` is called when the payload is there.
    """

    def __init__(
        self,
        accepted: dict[int, int],
        target: Target,
        complete: Callable[[Header, memoryview | None], None],
    ) -> None:
        self._accepted = accepted
        self._target = target
        self._complete = complete
        self._head = bytearray()
        self._header: Header | None = None
        self._buffer: memoryview | None = None
        self._filled = 0

    @property
    def between_frames(self) -> bool:
        """Whether an end of stream here cuts nothing off."""
        return self._header is None and not self._head

    def receive_untrusted(self, data: bytes | bytearray | memoryview) -> None:
        """More bytes. `data` is not kept."""
        view = memoryview(data)
        while len(view):
            header = self._header
            if header is None:
                take = HEADER.size - len(self._head)
                self._head += view[:take]
                view = view[take:]
                if len(self._head) < HEADER.size:
                    return
                header = decode_header_untrusted(bytes(self._head), self._accepted)
                self._head.clear()
                self._buffer = self._target(header)
                self._header, self._filled = header, 0
            take = min(len(view), header.length - self._filled)
            if take:
                if self._buffer is not None:
                    self._buffer[self._filled : self._filled + take] = view[:take]
                self._filled += take
                view = view[take:]
            if self._filled == header.length:
                buffer, self._buffer, self._header = self._buffer, None, None
                self._complete(header, buffer)

    def take_unfinished(self) -> memoryview | None:
        """The buffer of the frame that was cut off, for its owner to take back. Ends the reader."""
        buffer, self._buffer = self._buffer, None
        return buffer
