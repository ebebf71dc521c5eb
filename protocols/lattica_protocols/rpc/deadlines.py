"""Deadlines of calls: a heap whose dead entries are swept out in bulk.

Nearly every call ends long before its deadline, so removing its entry at once would be wasted work. An entry is
dead when its call is over; as soon as more than half can be dead the heap is rebuilt: O(1) per call. Entries hold
numbers only, so a call that is over is freed at once and the garbage collector has nothing to look at.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Final

from lattica_protocols.errors import LocalProtocolError
from lattica_protocols.rpc.calls import Call

_SWEEP_FROM: Final = 256
_MAX_MILLISECONDS: Final = 0xFFFFFFFF
"""49 days. More, and infinity, are sent as this."""


def milliseconds_left(deadline: float, now: float) -> int:
    """A deadline as a REQUEST has it, at least 1: one that has passed ends the call on the other side, too.

    Raises `LocalProtocolError` when it is not a number.
    """
    left = (deadline - now) * 1000
    if 1 <= left < _MAX_MILLISECONDS:
        return int(left)
    if left != left:
        raise LocalProtocolError("a deadline that is not a number")
    return 1 if left < 1 else _MAX_MILLISECONDS


class Deadlines:
    """Calls by deadline. `calls` are those that are not over, by id."""

    __slots__ = ("_calls", "_heap", "_sweep_at")

    def __init__(self, calls: dict[int, Call]) -> None:
        self._calls = calls
        self._heap: list[tuple[float, int]] = []
        self._sweep_at = _SWEEP_FROM

    def add(self, when: float, call_id: int) -> None:
        """Remember that the call of this id ends at `when`, which is its `deadline`."""
        heap = self._heap
        heappush(heap, (when, call_id))
        if len(heap) > self._sweep_at:
            heap[:] = [entry for entry in heap if self._find(entry) is not None]
            heapify(heap)
            self._sweep_at = max(_SWEEP_FROM, 2 * len(heap))

    def next_timeout(self) -> float | None:
        """The earliest deadline of a call that is not over."""
        heap = self._heap
        while heap:
            if self._find(heap[0]) is not None:
                return heap[0][0]
            heappop(heap)
        return None

    def pop_expired(self, now: float) -> list[Call]:
        """The calls whose deadline is not after `now`."""
        expired = []
        heap = self._heap
        while heap and heap[0][0] <= now:
            call = self._find(heappop(heap))
            if call is not None:
                expired.append(call)
        return expired

    def _find(self, entry: tuple[float, int]) -> Call | None:
        call = self._calls.get(entry[1])
        return call if call is not None and call.deadline == entry[0] else None  # the id may be in use again
