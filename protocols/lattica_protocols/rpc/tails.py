"""Detached tails: which are still to come, which came early, and which nobody wants any more."""

from __future__ import annotations

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import RPC_MAX_DISCARDED_TAILS, RPC_MAX_EARLY_TAILS
from lattica_protocols.rpc.calls import Call, Waiting
from lattica_protocols.rpc.frames import Buffer


class DetachedTails:
    """A tail and its frame arrive in either order, under one tail id."""

    def __init__(self) -> None:
        self._expected: dict[int, tuple[Call, Waiting]] = {}
        self._early: dict[int, Buffer] = {}
        self._unwanted: dict[int, int] = {}
        self.early_bytes = 0

    def expect(self, call: Call, frame: Waiting) -> None:
        """A frame came; its tail may be here already, else it comes later."""
        tail = self._take_early(frame.tail_id, frame.length)
        if tail is not None:
            frame.tail = tail
        else:
            self._expected[frame.tail_id] = (call, frame)

    def discard(self, tail_id: int, length: int) -> None:
        """Nobody wants this tail: the call is over, or the message was refused."""
        if tail_id in self._expected:
            del self._expected[tail_id]
        elif self._take_early(tail_id, length) is not None:
            return
        if len(self._unwanted) >= RPC_MAX_DISCARDED_TAILS:
            raise RemoteProtocolError("too many detached tails that never came")
        self._unwanted[tail_id] = length

    def wanted(self, tail_id: int, length: int) -> bool:
        """Whether to keep the tail that is about to arrive. Raises when its length is not as announced."""
        announced = self._unwanted.get(tail_id)
        if announced is None:
            if tail_id in self._expected:
                announced = self._expected[tail_id][1].length
            elif tail_id in self._early:
                raise RemoteProtocolError(f"tail {tail_id} came twice")
        if announced is not None and announced != length:
            raise RemoteProtocolError(f"tail {tail_id} has {length} bytes, announced were {announced}")
        return tail_id not in self._unwanted

    def arrived(self, tail_id: int, tail: Buffer) -> Call | None:
        """Keep the tail. The call whose frame waited for it, if any."""
        if not self.wanted(tail_id, len(tail)):
            del self._unwanted[tail_id]
            return None
        found = self._expected.pop(tail_id, None)
        if found is not None:
            found[1].tail = tail
            return found[0]
        if len(self._early) >= RPC_MAX_EARLY_TAILS:
            raise RemoteProtocolError("too many detached tails without a frame")
        self._early[tail_id] = tail
        self.early_bytes += len(tail)
        return None

    def dropped(self, tail_id: int) -> None:
        """The unwanted tail went by."""
        self._unwanted.pop(tail_id, None)

    def clear(self) -> None:
        """The connection is gone."""
        self._expected.clear()
        self._early.clear()
        self._unwanted.clear()
        self.early_bytes = 0

    def _take_early(self, tail_id: int, length: int) -> Buffer | None:
        if tail_id in self._expected or tail_id in self._unwanted:
            raise RemoteProtocolError(f"tail {tail_id} was announced twice")
        tail = self._early.pop(tail_id, None)
        if tail is not None:
            self.early_bytes -= len(tail)
            if len(tail) != length:
                raise RemoteProtocolError(f"tail {tail_id} has {len(tail)} bytes, announced were {length}")
        return tail
