"""Who of the sources of a fetch has to make room for peers that wait.

A fetch uses `MAX_FETCH_SOURCES` sources at a time. Saying "I have it" costs nothing, so a crowd that says so and sends
nothing, or a byte now and then, could take all places. While others wait, therefore, every `PERIOD` seconds

* each source that was asked for something all the while and sent less than `TRICKLE_BYTES` makes room;
* when there is none, in every second period the slowest one does: who sends just enough is found out by comparison.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from lattica_protocols.limits import MAX_FETCH_SOURCES

if TYPE_CHECKING:
    from lattica.blobs.search import SourceSearch
    from lattica.blobs.source_stream import SourceStream

PERIOD: Final = 3.0
"""Seconds. A source has one to two of them to show something; a TCP retransmission takes up to 3 s."""
TRICKLE_BYTES: Final = 8 << 10
"""In one period: 3 kB/s, at which one chunk takes over five minutes."""


class Places:
    """Looks at the sources of one search once in a period."""

    def __init__(self, search: SourceSearch) -> None:
        self._search = search
        self._periods = 0
        self._owed: set[SourceStream] = set()
        """Sources that were asked for something when the last period ended."""

    def make_room(self) -> list[SourceStream]:
        """Displace whom the rules above name; call it at the end of a period."""
        search = self._search
        sources = list(search.active.values())
        owing = [source for source in sources if source.owes()]
        judged = sorted((s for s in owing if s in self._owed), key=lambda source: source.received_bytes)
        self._periods += 1
        needed = len(search.waiting) - (MAX_FETCH_SOURCES - len(sources))
        displaced = []
        if needed > 0:
            displaced = [source for source in judged if source.received_bytes < TRICKLE_BYTES][:needed]
            if not displaced and self._periods % 2 == 0:
                displaced = judged[:1]
        for source in sources:
            source.received_bytes = 0
        self._owed = set(owing).difference(displaced)
        for source in displaced:
            search.displace(source)
        return displaced
