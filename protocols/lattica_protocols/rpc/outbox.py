"""What an RPC connection has to say and nobody took yet: frames of the control stream, and detached tails."""

from __future__ import annotations

from collections.abc import Sequence

from lattica_protocols.errors import LocalProtocolError
from lattica_protocols.limits import RPC_MAX_HEAD, RPC_MAX_TAIL, RPC_SPILL_OVER
from lattica_protocols.rpc.frames import HEADER, Buffer, encode_detached, encode_frame


class Outbox:
    """Turns frames into buffers."""

    __slots__ = ("_detached", "_frames", "_long", "_next_tail_id", "detach_over", "peer_tail", "unsent")

    def __init__(self, detach_over: int | None) -> None:
        self.detach_over = detach_over
        """Longer tails go another way, bytes; `None`: none does."""
        self.peer_tail = RPC_MAX_TAIL
        """Longest tail that the other side takes, bytes."""
        self.unsent = 0
        """Bytes in here, tails included."""
        self._next_tail_id = 0
        self._frames: list[Buffer] = []
        self._detached: list[tuple[int, int, Sequence[Buffer]]] = []
        self._long = False

    def add_encoded(self, frame: bytes) -> None:
        """Queue a whole frame."""
        self._frames.append(frame)
        self.unsent += len(frame)

    def add(self, kind: int, flags: int, call_id: int, head: bytes, tails: Sequence[Buffer] = ()) -> int:
        """Queue one frame. The bytes of head and tails, which is what it costs against credit.

        `LocalProtocolError`: a length is over its limit, and nothing was queued.
        """
        head_length = len(head)
        if not tails:
            self._frames.append(HEADER.pack(head_length, kind, flags, head_length, call_id) + head)
            self.unsent += head_length + HEADER.size
            return head_length
        length = sum(map(len, tails))
        if head_length > RPC_MAX_HEAD or length > self.peer_tail:
            raise LocalProtocolError(f"a message of {length} bytes is over the limit of {self.peer_tail}")
        if self.detach_over is not None and length > self.detach_over:
            tail_id = self._next_tail_id
            self._next_tail_id = (tail_id + 1) & 0xFFFFFFFF
            self._frames.append(encode_detached(kind, flags, call_id, head, tail_id, length))
            self._detached.append((tail_id, length, tails))
        else:
            self._frames.append(encode_frame(kind, flags, call_id, head, length))
            self._frames.extend(tails)
            if length > RPC_SPILL_OVER:
                self._long = True
        self.unsent += head_length + length
        return head_length + length

    def take_frames(self) -> list[Buffer]:
        """Buffers for the control stream, in order. Short output comes as one buffer."""
        frames, self._frames = self._frames, []
        self.unsent = 0
        if len(frames) > 1 and not self._long:
            return [b"".join(frames)]
        self._long = False
        return frames

    def take_detached(self) -> list[tuple[int, int, Sequence[Buffer]]]:
        """`(tail id, length, buffers)`. After `take_frames`, whose frames name them."""
        detached = self._detached
        if detached:
            self._detached = []
        return detached

    def clear(self) -> None:
        """Nobody will take anything any more."""
        self._frames.clear()
        self._detached.clear()
        self.unsent = 0
