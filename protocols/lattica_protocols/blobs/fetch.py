"""Which source is asked for which chunk.

Theory of operation. Each source has a *window*: the number of chunks asked of it ahead of time. It follows the
source's rate, so that a quick one always has requests waiting and a slow one holds little hostage:

    window = rate * (0.5 s + 2 * round trip) / chunk + 2          between 2 and 128

(with a window smaller than the path the measured rate is window / round trip, so the formula at least doubles
the window in each round trip until the path is full). When a window is half used up it is filled with one request.

* Missing chunks are taken from a cursor that starts at a random place, so that several peers which fetch from the
  same source soon have different parts for each other. When some sources have only a part, the rarest of the
  next few missing chunks goes first.
* A source from which nothing came for `STALL_SECONDS` gets no more requests and its chunks are given to others;
  what it sends after all is still welcome. After `DROP_SECONDS` it is dropped.
* End game: a source with nothing left to ask for is given the last chunk of the queue of the source that would
  take longest to get to it. Whoever is first wins, the other gets a cancel.
* A source that sends a chunk with a wrong hash is dropped and never asked again in this fetch.

The machine sees indices and times, never bytes. Sources are any hashable keys.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from lattica_protocols.blobs.chunk_set import ChunkRange, ChunkSet, to_ranges
from lattica_protocols.errors import LocalProtocolError
from lattica_protocols.limits import CHUNK_BYTES, MAX_CHUNKS_IN_FLIGHT

K = TypeVar("K", bound=Hashable)

STALL_SECONDS = 5.0
"""No byte for this long while chunks are asked for. A Wi-Fi hand-over or a TCP retransmission takes up to 3 s."""
DROP_SECONDS = 30.0
"""No byte for this long: the source is gone, whatever its connection says."""
END_GAME_SECONDS = 0.5
"""How often an idle source looks whether it could take over a chunk."""
TARGET_SECONDS = 0.5
"""How much of a source's work is asked ahead, beyond the round trip."""
START_WINDOW = 8
MIN_WINDOW = 2
RARITY_CANDIDATES = 32
"""Missing chunks compared for rarity per pick: bounds the work, and a random 32 are as good as all."""
MAX_COPIES = 2
"""Sources asked for the same chunk in the end game, stalled ones not counted."""
_RATE_GAIN = 0.3

_MISSING, _ASSIGNED, _DONE = 0, 1, 2


@dataclass(frozen=True, slots=True)
class RequestChunks(Generic[K]):
    """Ask `source` for these."""

    source: K
    ranges: list[ChunkRange]


@dataclass(frozen=True, slots=True)
class CancelChunks(Generic[K]):
    """Tell `source` that these are not needed any more."""

    source: K
    ranges: list[ChunkRange]


@dataclass(frozen=True, slots=True)
class SourceDropped(Generic[K]):
    """The machine will not use this source any more; close its stream. `liar`: it sent wrong bytes."""

    source: K
    reason: str
    liar: bool


@dataclass(frozen=True, slots=True)
class Starved:
    """No source has any of the chunks that are missing: more sources are needed."""


@dataclass(frozen=True, slots=True)
class Completed:
    """Every wanted chunk is verified."""


FetchEvent = SourceDropped[K] | Starved | Completed
Command = RequestChunks[K] | CancelChunks[K]


@dataclass(slots=True)
class _Source:
    have: ChunkSet
    cursor: int
    progress_at: float
    """When something last came, or when a request was made of an idle source."""
    outstanding: dict[int, float] = field(default_factory=dict)
    """Asked and not answered, in order of asking; the time is that of asking."""
    window: int = START_WINDOW
    rate: float = 0.0
    """Bytes per second, 0 before the first chunk."""
    round_trip: float = 0.0
    last_chunk_at: float = 0.0
    partial: bool = False
    """It does not have all chunks, and is counted in `_partial_holders`."""
    stalled: bool = False
    exhausted: bool = False
    """It has none of the missing chunks; cleared when it gets more or a chunk becomes missing again."""


class Fetch(Generic[K]):
    """Chunks of one blob from many sources."""

    def __init__(
        self,
        chunk_count: int,
        *,
        rng: random.Random,
        have: Iterable[int] = (),
        wanted: Iterable[int] | None = None,
    ) -> None:
        """`have` are chunks that are already there. `wanted`: only these are fetched (`None`: all)."""
        self._count = chunk_count
        self._rng = rng
        if wanted is None:
            self._state = bytearray(chunk_count)
        else:
            self._state = bytearray([_DONE]) * chunk_count
            for index in wanted:
                self._state[index] = _MISSING
        for index in have:
            self._state[index] = _DONE
        self._left = chunk_count - self._state.count(_DONE)
        self._sources: dict[K, _Source] = {}
        self._askers: dict[int, list[K]] = {}
        self._in_hand: Counter[int] = Counter()
        """Chunks that came and are being verified, and in how many copies."""
        self._liars: set[K] = set()
        self._partial_holders = bytearray(chunk_count)
        self._partial_sources = 0
        self._commands: deque[Command[K]] = deque()
        self._events: deque[FetchEvent[K]] = deque()
        self._starved = False
        self._end_game_at: float | None = None
        if not self._left:
            self._events.append(Completed())

    # -- state ----------------------------------------------------------------------------------------------
    @property
    def chunks_left(self) -> int:
        """Wanted chunks that are not verified yet."""
        return self._left

    @property
    def complete(self) -> bool:
        return self._left == 0

    @property
    def starved(self) -> bool:
        """Nothing is asked for, because no source has any of the missing chunks."""
        return self._starved

    def sources(self) -> list[K]:
        """Sources in use."""
        return list(self._sources)

    def is_liar(self, source: K) -> bool:
        """Whether it sent wrong bytes before: `add_source` refuses it."""
        return source in self._liars

    def waits_for(self, source: K) -> bool:
        """Whether it was asked for something that has not come."""
        entry = self._sources.get(source)
        return entry is not None and bool(entry.outstanding)

    def window(self, source: K) -> int:
        """How many chunks may be asked of a source at a time."""
        return self._sources[source].window

    # -- the network said something -------------------------------------------------------------------------
    def add_source(self, source: K, have: ChunkSet, now: float) -> None:
        """A source told what it has. `have` is copied when it is a part. Liars are ignored."""
        if have.count != self._count:
            raise LocalProtocolError(f"a source of {have.count} chunks for a blob of {self._count}")
        if source in self._sources:
            raise LocalProtocolError("this source is already there")
        if source in self._liars:
            return
        start = self._rng.randrange(self._count) if self._count else 0
        entry = self._sources[source] = _Source(have.copy(), start, now)
        self._set_partial(entry, not have.complete)
        self._fill(now)

    def receive_more(self, source: K, ranges: list[ChunkRange], now: float) -> None:
        """A partial source has more now."""
        entry = self._sources.get(source)
        if entry is None or not entry.partial:
            return
        for first, count in ranges:
            for index in range(first, first + count):
                if index not in entry.have:
                    entry.have.add(index)
                    self._partial_holders[index] = min(255, self._partial_holders[index] + 1)
        entry.exhausted = False
        self._set_partial(entry, not entry.have.complete)
        self._fill(now)

    def receive_progress(self, source: K, now: float) -> None:
        """Bytes of an answer came. Cheap: called for every piece."""
        entry = self._sources.get(source)
        if entry is None:
            return
        entry.progress_at = now
        if entry.stalled:
            self._revive(entry)
            self._fill(now)

    def receive_chunk(self, source: K, index: int, size: int, now: float) -> bool:
        """A chunk came, not verified yet. Whether it is still needed: then one of `chunk_verified`,
        `chunk_corrupt` and `chunk_lost` follows."""
        entry = self._sources.get(source)
        if entry is None:
            if self._state[index] == _DONE:
                return False
            self._in_hand[index] += 1
            return True
        asked_at = entry.outstanding.pop(index, None)
        self._forget_asker(index, source)
        entry.progress_at = now
        if entry.stalled:
            self._revive(entry)
        if asked_at is not None:
            self._measure(entry, size, asked_at, now)
        if self._state[index] == _DONE:
            self._fill(now)
            return False
        self._state[index] = _ASSIGNED
        self._in_hand[index] += 1
        self._fill(now)
        return True

    def receive_gone(self, source: K, index: int, now: float) -> None:
        """The source does not have this chunk after all."""
        entry = self._sources.get(source)
        if entry is None:
            return
        self._set_partial(entry, True)
        if index in entry.have:
            entry.have.discard(index)
            self._partial_holders[index] = max(0, self._partial_holders[index] - 1)
        entry.outstanding.pop(index, None)
        entry.progress_at = now
        self._forget_asker(index, source)
        self._release(index)
        self._fill(now)

    def remove_source(self, source: K, now: float) -> None:
        """Its stream is gone. What it was asked for goes to others."""
        entry = self._sources.pop(source, None)
        if entry is None:
            return
        self._set_partial(entry, False)
        for index in entry.outstanding:
            self._forget_asker(index, source)
            self._release(index)
        self._fill(now)

    # -- the application said something ---------------------------------------------------------------------
    def chunk_verified(self, index: int, now: float) -> None:
        """The chunk has the right hash and is stored."""
        if self._state[index] == _DONE:
            return
        self._state[index] = _DONE
        self._left -= 1
        del self._in_hand[index]
        for source in self._askers.pop(index, []):
            entry = self._sources[source]
            del entry.outstanding[index]
            self._commands.append(CancelChunks(source, [(index, 1)]))
        if not self._left:
            self._events.append(Completed())
        else:
            self._fill(now)

    def chunk_corrupt(self, source: K, index: int, now: float) -> None:
        """`source` sent wrong bytes: it is dropped for good, the chunk is fetched from somebody else."""
        self._put_down(index)
        self._drop(source, f"sent wrong bytes for chunk {index}", now, liar=True)
        self._fill(now)

    def chunk_lost(self, index: int, now: float) -> None:
        """A chunk that came could not be kept, by no fault of its source: it is missing again."""
        self._put_down(index)
        self._fill(now)

    # -- time -----------------------------------------------------------------------------------------------
    def next_timeout(self) -> float | None:
        deadlines = [
            entry.progress_at + (DROP_SECONDS if entry.stalled else self._patience(entry))
            for entry in self._sources.values()
            if entry.outstanding
        ]
        if self._end_game_at is not None:
            deadlines.append(self._end_game_at)
        return min(deadlines) if deadlines else None

    def handle_timer(self, now: float) -> None:
        """Look for stalled sources, and for chunks that an idle source should take over."""
        for source, entry in list(self._sources.items()):
            if not entry.outstanding:
                continue
            # The same sums as in `next_timeout`: a difference that is rounded would be due for ever.
            if now >= entry.progress_at + DROP_SECONDS:
                self._drop(source, f"sent nothing for {DROP_SECONDS:.0f} s", now, liar=False)
            elif now >= entry.progress_at + self._patience(entry) and not entry.stalled:
                entry.stalled = True
                for index in entry.outstanding:
                    if self._live_askers(index) == 0:
                        self._release(index, force=True)
        self._fill(now)

    @staticmethod
    def _patience(entry: _Source) -> float:
        return max(STALL_SECONDS, 8 * entry.round_trip)

    # -- results --------------------------------------------------------------------------------------------
    def poll_commands(self) -> list[Command[K]]:
        """Requests and cancels to send, drained after each call above."""
        out = list(self._commands)
        self._commands.clear()
        return out

    def next_event(self) -> FetchEvent[K] | None:
        return self._events.popleft() if self._events else None

    # -- choosing -------------------------------------------------------------------------------------------
    def _fill(self, now: float) -> None:
        """Fill every window that is half used up; then see whether somebody is idle."""
        if not self._left:
            return
        idle = False
        for source, entry in self._sources.items():
            if entry.stalled or len(entry.outstanding) * 2 > entry.window:
                continue
            picked = []
            while not entry.exhausted and len(entry.outstanding) < entry.window:
                index = self._pick(entry)
                if index < 0:
                    entry.exhausted = True
                    break
                self._assign(source, entry, index, now)
                picked.append(index)
            if picked:
                self._commands.append(RequestChunks(source, to_ranges(picked)))
            idle |= not entry.outstanding
        self._end_game_at = None
        if idle:
            self._steal(now)
        self._check_starved()

    def _assign(self, source: K, entry: _Source, index: int, now: float) -> None:
        if not entry.outstanding:
            entry.progress_at = now
            entry.last_chunk_at = now
        entry.outstanding[index] = now
        self._state[index] = _ASSIGNED
        self._askers.setdefault(index, []).append(source)

    def _pick(self, entry: _Source) -> int:
        """A missing chunk that the source has, -1 when there is none."""
        if entry.have.complete and not self._partial_sources:
            index = self._state.find(_MISSING, entry.cursor)
            if index < 0:
                index = self._state.find(_MISSING)
            entry.cursor = index + 1
            return index
        best, best_holders, seen = -1, 256, 0
        for index in self._missing_from(entry.cursor):
            if index in entry.have:
                if self._partial_holders[index] < best_holders:
                    best, best_holders = index, self._partial_holders[index]
                seen += 1
                if seen == RARITY_CANDIDATES or best_holders == 0:
                    break
        if best >= 0:
            entry.cursor = best + 1
        return best

    def _missing_from(self, cursor: int) -> Iterable[int]:
        find = self._state.find
        index = find(_MISSING, cursor)
        while index >= 0:
            yield index
            index = find(_MISSING, index + 1)
        index = find(_MISSING, 0, cursor)
        while index >= 0:
            yield index
            index = find(_MISSING, index + 1, cursor)

    def _steal(self, now: float) -> None:
        """Give idle sources the chunks that would otherwise come last."""
        for source, entry in self._sources.items():
            if entry.outstanding or entry.stalled:
                continue
            victim = self._latest_chunk(source, entry, now)
            if victim is not None:
                self._assign(source, entry, victim, now)
                self._commands.append(RequestChunks(source, [(victim, 1)]))
            elif any(other.outstanding for other in self._sources.values()):
                self._end_game_at = now + END_GAME_SECONDS

    def _latest_chunk(self, thief: K, entry: _Source, now: float) -> int | None:
        own_seconds = (CHUNK_BYTES / entry.rate if entry.rate else 0.0) + entry.round_trip
        worst, worst_seconds = None, 1.5 * own_seconds + 0.05
        for source, other in self._sources.items():
            if source == thief or not other.outstanding:
                continue
            for index in reversed(other.outstanding):
                if index not in self._in_hand and index in entry.have and self._live_askers(index) < MAX_COPIES:
                    quiet = now - other.progress_at
                    queue_seconds = len(other.outstanding) * CHUNK_BYTES / other.rate if other.rate else quiet
                    seconds = max(queue_seconds, quiet)
                    if seconds > worst_seconds:
                        worst, worst_seconds = index, seconds
                    break
        return worst

    def _check_starved(self) -> None:
        starved = not any(entry.outstanding for entry in self._sources.values()) and _MISSING in self._state
        if starved and not self._starved:
            self._events.append(Starved())
        self._starved = starved

    # -- bookkeeping ----------------------------------------------------------------------------------------
    def _measure(self, entry: _Source, size: int, asked_at: float, now: float) -> None:
        if not entry.rate:
            entry.round_trip = now - asked_at  # includes the first chunk's transfer: an upper bound
        seconds = max(now - max(entry.last_chunk_at, asked_at), 1e-6)
        sample = size / seconds
        entry.rate = sample if not entry.rate else entry.rate + _RATE_GAIN * (sample - entry.rate)
        entry.last_chunk_at = now
        seconds_ahead = TARGET_SECONDS + 2 * entry.round_trip
        entry.window = max(MIN_WINDOW, min(MAX_CHUNKS_IN_FLIGHT, int(entry.rate * seconds_ahead / CHUNK_BYTES) + 2))

    def _live_askers(self, index: int) -> int:
        return sum(not self._sources[source].stalled for source in self._askers.get(index, ()))

    def _forget_asker(self, index: int, source: K) -> None:
        askers = self._askers.get(index)
        if askers is not None and source in askers:
            askers.remove(source)
            if not askers:
                del self._askers[index]

    def _release(self, index: int, *, force: bool = False) -> None:
        """Make a chunk missing again, unless a copy is in hand or somebody who is not stalled was asked for it."""
        if self._state[index] != _ASSIGNED or index in self._in_hand:
            return
        if force or not self._live_askers(index):
            self._state[index] = _MISSING
            for entry in self._sources.values():
                entry.exhausted = False

    def _put_down(self, index: int) -> None:
        """A copy that was in hand is of no use."""
        self._in_hand[index] -= 1
        if self._in_hand[index] <= 0:
            del self._in_hand[index]
        self._release(index)

    def _revive(self, entry: _Source) -> None:
        """A stalled source goes on: what nobody else has taken over is its own again."""
        entry.stalled = False
        for index in entry.outstanding:
            if self._state[index] == _MISSING:
                self._state[index] = _ASSIGNED

    def _drop(self, source: K, reason: str, now: float, *, liar: bool) -> None:
        if liar:
            self._liars.add(source)
        if source in self._sources:
            self._events.append(SourceDropped(source, reason, liar))
            self.remove_source(source, now)

    def _set_partial(self, entry: _Source, partial: bool) -> None:
        """Count a source's chunks among those of the partial holders, or no longer."""
        if entry.partial == partial:
            return
        entry.partial = partial
        change = 1 if partial else -1
        self._partial_sources += change
        for index in entry.have:
            self._partial_holders[index] = max(0, min(255, self._partial_holders[index] + change))
