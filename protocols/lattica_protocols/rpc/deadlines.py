"""Deadlines of calls: a heap whose dead entries are swept out in bulk.

Nearly every call ends long before its deadline, so removing its entry at once would be wasted work. An entry
is dead when its call is over; as soon as more than half can be dead the heap is rebuilt: O(1) per call.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from lattica_protocols.rpc.calls import Call


class Deadlines:
    """Calls by deadline."""

    __slots__ = ("_heap", "_sequence", "_sweep_at")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Call]] = []
        self._sequence = 0
        self._sweep_at = 256

    def add(self, when: float, call: Call) -> None:
        """Remember that `call` ends at `when`."""
        heap = self._heap
        self._sequence += 1
        heappush(heap, (when, self._sequence, call))
        if len(heap) > self._sweep_at:
            heap[:] = [entry for entry in heap if not entry[2].over]
            heapify(heap)
            self._sweep_at = max(256, 2 * len(heap))

    def next_timeout(self) -> float | None:
        """The earliest deadline of a call that is not over."""
        heap = self._heap
        while heap:
            if not heap[0][2].over:
                return heap[0][0]
            heappop(heap)
        return None

    def pop_expired(self, now: float) -> list[Call]:
        """The calls whose deadline is not after `now`."""
        expired = []
        while (when := self.next_timeout()) is not None and when <= now:
            expired.append(heappop(self._heap)[2])
        return expired
