"""Bytes of a stream in, frames out: the part of the machine that cuts.

Chunks of any size are fine and cost linear work. A chunk of whole small frames is copied once and then
sliced. A long tail goes straight into the buffer that the allocator gave for it: each of its bytes is copied
once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.rpc.frames import HEADER, HEADER_SIZE, Buffer

DIRECT_OVER = 16 << 10
"""Tails longer than this and not yet complete get their buffer at once."""

_EMPTY = memoryview(b"")


class OnFrame(Protocol):
    """Takes one frame. `tail` is None when it was `length` bytes, over the limit, and thrown away."""

    def __call__(
        self, kind: int, flags: int, call_id: int, head: bytes, tail: Buffer | None, length: int, /
    ) -> None: ...


class FrameReader:
    """Cuts one stream into frames.

    `open_tail(kind, id, length)` gives a writable buffer for a tail, or None to throw the tail away.
    """

    __slots__ = (
        "_filled",
        "_frame",
        "_left",
        "_need",
        "_on_frame",
        "_open_tail",
        "_partial",
        "_tail",
        "_view",
    )

    def __init__(self, on_frame: OnFrame, open_tail: Callable[[int, int, int], Buffer | None]) -> None:
        self._on_frame = on_frame
        self._open_tail = open_tail
        self._partial = bytearray()
        """The beginning of a frame, up to `_need` bytes. Empty between frames."""
        self._need = HEADER_SIZE
        self._left = 0
        """Bytes of a long tail that have not come yet."""
        self._frame: tuple[int, int, int, bytes, int] | None = None
        """The frame that a long tail belongs to: kind, flags, call id, head, tail length."""
        self._tail: Buffer | None = None
        self._view = _EMPTY
        self._filled = 0

    def receive_data(self, data: Buffer) -> None:
        """Take more bytes; `data` is not kept."""
        if self._left or self._partial:
            data = self._continue(memoryview(data))
            if not len(data):
                return
        chunk = bytes(data)
        unpack = HEADER.unpack_from
        on_frame = self._on_frame
        position, end_of_chunk = 0, len(chunk)
        while end_of_chunk - position >= HEADER_SIZE:
            body, kind, flags, head_length, call_id = unpack(chunk, position)
            start = position + HEADER_SIZE
            head_end = start + head_length
            end = start + body
            if end > end_of_chunk:
                break
            if head_end == end:
                on_frame(kind, flags, call_id, chunk[start:end], b"", 0)
            elif head_end < end:
                tail = (
                    bytearray(chunk[head_end:end])
                    if end - head_end <= DIRECT_OVER
                    else self._copy_tail(kind, call_id, memoryview(chunk)[head_end:end])
                )
                on_frame(kind, flags, call_id, chunk[start:head_end], tail, end - head_end)
            else:
                raise RemoteProtocolError(f"frame of kind {kind}: head is longer than the body")
            position = end
        if position < end_of_chunk:
            self._continue(memoryview(chunk)[position:])

    def _copy_tail(self, kind: int, call_id: int, data: memoryview) -> Buffer | None:
        tail = self._open_tail(kind, call_id, len(data))
        if tail is not None:
            memoryview(tail)[:] = data
        return tail

    def _continue(self, data: memoryview) -> memoryview:
        """Go on with the frame that has begun. Gives back what is after it."""
        partial = self._partial
        while len(data):
            if self._left:
                data = self._fill_tail(data)
                if not self._left:
                    return data
                continue
            missing = self._need - len(partial)
            partial += data[:missing]
            data = data[missing:]
            if len(partial) < self._need:
                return data
            if self._grow():
                return data
        return data

    def _grow(self) -> bool:
        """`_partial` is as long as was needed: find out what is needed next. True: the frame is complete."""
        partial = self._partial
        body, kind, flags, head_length, call_id = HEADER.unpack_from(partial)
        head_end = HEADER_SIZE + head_length
        tail_length = body - head_length
        if tail_length < 0:
            raise RemoteProtocolError(f"frame of kind {kind}: head is longer than the body")
        direct = tail_length > DIRECT_OVER
        need = head_end if direct else HEADER_SIZE + body
        if len(partial) < need:
            self._need = need
            return False
        frame = bytes(partial)
        self._partial = bytearray()
        self._need = HEADER_SIZE
        if direct:
            self._frame = (kind, flags, call_id, frame[HEADER_SIZE:head_end], tail_length)
            self._tail = self._open_tail(kind, call_id, tail_length)
            self._view = _EMPTY if self._tail is None else memoryview(self._tail)
            self._filled, self._left = 0, tail_length
            return False
        tail: Buffer = bytearray(frame[head_end:]) if tail_length else b""
        self._on_frame(kind, flags, call_id, frame[HEADER_SIZE:head_end], tail, tail_length)
        return True

    def _fill_tail(self, data: memoryview) -> memoryview:
        take = min(self._left, len(data))
        if self._tail is not None:
            self._view[self._filled : self._filled + take] = data[:take]
            self._filled += take
        self._left -= take
        if not self._left and self._frame is not None:
            (kind, flags, call_id, head, length), tail = self._frame, self._tail
            self._frame, self._tail, self._view = None, None, _EMPTY
            self._on_frame(kind, flags, call_id, head, tail, length)
        return data[take:]
