"""Two streams joined into a circuit: what comes from one goes to the other, bytes as they are.

    source connection  --decrypt-->  sink of one stream  --borrow, settle-->  encrypt  --> target connection

No task stands in between. The sink is called by the task that reads the one connection, with memory that holds what
was just decrypted. All of one read is sent from there at once over the other connection, and only what its socket does
not take is copied. When a queue has grown over a mark, the sender gets no more window until it is below, so one
direction holds that mark and one window at most. The mark is lower while all circuits together hold much, and `Ledger`
bounds the sum.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import trio

from lattica.errors import LatticaError
from lattica.transports.muxed_stream import MuxedStream
from lattica_protocols.limits import (
    RELAY_CROWDED_WINDOW_BYTES,
    RELAY_MANY_CIRCUITS,
    RELAY_MAX_HELD,
    RELAY_MAX_WINDOW_BYTES,
    RELAY_WINDOW_BYTES,
)

if TYPE_CHECKING:
    from lattica.interfaces import Stream
    from lattica_protocols.relay.fairness import FairShares, Share

log = logging.getLogger("lattica.relay")

HIGH_WATER: Final = 256 * 1024
"""Bytes in a queue over which its sender is stopped: enough to send until what a new window lets in is here."""
CROWDED_HIGH_WATER: Final = 32 * 1024
"""The same while all circuits together hold `CROWDED_BYTES`: then what leaves is shared by many, and one that cannot
send at once loses nothing by it."""
CROWDED_BYTES: Final = 8 * 1024 * 1024
"""What 32 circuits hold whose targets are slow, or two in the worst case."""


class Half:
    """One direction of a circuit: the sink of the stream it reads."""

    def __init__(self, splice: Splice, reading: Stream, writing: Stream) -> None:
        self.carried = 0
        self.held = 0
        """Bytes queued at the writing stream, as of the last look."""
        self._splice = splice
        self._reading = reading
        self._writing = writing
        self._draining = False
        self._batched: tuple[MuxedStream, MuxedStream] | None = None
        if isinstance(reading, MuxedStream) and isinstance(writing, MuxedStream):
            self._batched = reading, writing
        self._borrowed = 0

    # -- called by the reading connection -----------------------------------------------------------------
    def data_received(self, data: memoryview) -> None:
        try:
            if self._batched is None:
                self._writing.write_through(data)
            elif self._borrowed or self._batched[0].when_read(self._settle):
                self._batched[1].borrow(data)
                self._borrowed += len(data)
                return
            else:
                self._batched[1].write_through(data)
        except LatticaError:
            self._splice.abort("one side does not take any more")
        else:
            self._carried(len(data))

    def _settle(self) -> None:
        """All of one read was delivered."""
        size, self._borrowed = self._borrowed, 0
        if self._batched is not None:
            self._batched[1].settle()
            self._carried(size)

    def _carried(self, size: int) -> None:
        splice = self._splice
        self.carried += size
        splice.ledger.carried_bytes += size
        splice.active = True
        queued = self._writing.queued_bytes()
        splice.ledger.held += queued - self.held
        self.held = queued
        if splice.limit_bytes and self.carried > splice.limit_bytes:
            splice.abort("it carried as much as a circuit may")
            return
        if queued >= splice.ledger.high_water and not self._draining:
            self._draining = True
            self._reading.pause_sink()
            splice.nursery.start_soon(self._drain)
        if splice.ledger.held > RELAY_MAX_HELD:
            splice.ledger.make_room()
        if not splice.shares.spend(splice.share, size):
            splice.pause()

    def eof_received(self) -> None:
        self._splice.nursery.start_soon(self._finish)

    def stream_closed(self, error: Exception | None) -> None:
        if error is not None:
            self._writing.reset()
        self._splice.half_closed()

    # -- flow ---------------------------------------------------------------------------------------------
    async def _drain(self) -> None:
        try:
            await self._writing.drain(self._splice.ledger.high_water)
        except LatticaError:
            self._splice.abort("one side is gone")
        self._draining = False
        self.look()
        self.resume()

    async def _finish(self) -> None:
        try:
            await self._writing.close_write()
        except LatticaError:
            self._splice.abort("one side is gone")

    def look(self) -> None:
        """See again what is queued."""
        queued = 0 if self._splice.over.is_set() else self._writing.queued_bytes()
        self._splice.ledger.held += queued - self.held
        self.held = queued

    def resume(self) -> None:
        """Let the sender go on, if nothing stands against it."""
        if not self._draining and not self._splice.share.stopped and not self._splice.over.is_set():
            self._reading.resume_sink()

    def pause(self) -> None:
        self._reading.pause_sink()

    def limit_window(self, size: int) -> None:
        self._reading.limit_window(size)

    def start(self) -> None:
        self._reading.set_sink(self)

    def reset(self) -> None:
        self._reading.reset()


class Splice:
    """One circuit. `over` is set when both streams are."""

    def __init__(
        self, one: Stream, other: Stream, ledger: Ledger, shares: FairShares, nursery: trio.Nursery, limit_bytes: int
    ) -> None:
        self.over = trio.Event()
        self.active = True
        """Something went through since this was last set to false."""
        self.ledger = ledger
        self.shares = shares
        self.share: Share = shares.join()
        self.nursery = nursery
        self.limit_bytes = limit_bytes
        self.halves = Half(self, one, other), Half(self, other, one)
        self._open = 2
        ledger.add(self)

    def start(self) -> None:
        """From here on bytes flow; what has arrived already goes first."""
        for half in self.halves:
            half.start()

    @property
    def carried(self) -> int:
        """Bytes, both ways."""
        return sum(half.carried for half in self.halves)

    @property
    def held(self) -> int:
        return sum(half.held for half in self.halves)

    def abort(self, reason: str) -> None:
        """End both streams at once."""
        if not self.over.is_set():
            log.debug("circuit_aborted reason=%s", reason)
            for half in self.halves:
                half.reset()
            self._finish()

    def pause(self) -> None:
        """The share of the bandwidth is used up."""
        for half in self.halves:
            half.pause()

    def resume(self) -> None:
        for half in self.halves:
            half.resume()

    def half_closed(self) -> None:
        self._open -= 1
        if self._open <= 0:
            self._finish()

    def _finish(self) -> None:
        if not self.over.is_set():
            self.over.set()
            self.shares.leave(self.share)
            self.ledger.remove(self)


class Ledger:
    """All circuits of a relay, and what they hold together."""

    def __init__(self) -> None:
        self.held = 0
        """At least what is queued: queues that became shorter are seen when somebody looks."""
        self.carried_bytes = 0
        self._circuits: dict[Splice, None] = {}
        self._window = RELAY_MAX_WINDOW_BYTES

    @property
    def high_water(self) -> int:
        """Bytes in one queue over which its sender is stopped."""
        return CROWDED_HIGH_WATER if self.held >= CROWDED_BYTES else HIGH_WATER

    def __iter__(self) -> Iterator[Splice]:
        return iter(list(self._circuits))

    def __len__(self) -> int:
        return len(self._circuits)

    def add(self, splice: Splice) -> None:
        self._circuits[splice] = None
        if not self._fit_windows():
            for half in splice.halves:
                half.limit_window(self._window)

    def remove(self, splice: Splice) -> None:
        if splice in self._circuits:
            del self._circuits[splice]
            for half in splice.halves:
                half.look()
            self._fit_windows()

    def _fit_windows(self) -> bool:
        """Windows such that all circuits together stay within `RELAY_MAX_HELD`; whether that changed them."""
        fair = RELAY_MAX_HELD // max(1, 2 * len(self._circuits)) - HIGH_WATER
        window = RELAY_WINDOW_BYTES if len(self._circuits) < RELAY_MANY_CIRCUITS else RELAY_CROWDED_WINDOW_BYTES
        while window * 2 <= min(fair, RELAY_MAX_WINDOW_BYTES):
            window *= 2
        if window == self._window:
            return False
        self._window = window
        for splice in self._circuits:
            for half in splice.halves:
                half.limit_window(window)
        return True

    def make_room(self) -> None:
        """Look at all queues; if it is really too much, end the circuit that holds the most."""
        for splice in self._circuits:
            for half in splice.halves:
                half.look()
        while self.held > RELAY_MAX_HELD and self._circuits:
            max(self._circuits, key=lambda splice: splice.held).abort("it holds the most of all, and that is too much")
