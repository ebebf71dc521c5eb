"""The two directions of a call that streams, as seen by the code that reads and writes items."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final

import outcome
import trio

from lattica.errors import CallCancelled, PeerMisbehaved
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import RPC_MAX_VALUE
from lattica_protocols.rpc.calls import Call
from lattica_protocols.rpc.frames import Buffer
from lattica_protocols.rpc.tensors import decode_value_untrusted, encode_value

if TYPE_CHECKING:
    from lattica.rpc.channel import Speaker

_YIELD_EVERY: Final = 32
"""Items taken or sent without waiting before the scheduler gets its turn: about 300 us of work."""


class Parking:
    """One task that waits, and whoever wakes it. Waking nobody is fine."""

    __slots__ = ("_task",)

    def __init__(self) -> None:
        self._task: trio.lowlevel.Task | None = None

    async def park(self) -> None:
        """Wait for `wake`. `RuntimeError` when another task waits already."""
        if self._task is not None:
            raise RuntimeError("another task reads or writes this call already")
        self._task = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._task = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def wake(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            trio.lowlevel.reschedule(task, outcome.Value(None))


class ItemReader:
    """Items that arrive, an asynchronous iterator. Taking one lets the sender send another."""

    def __init__(self, channel: Speaker, call: Call, max_value: int = RPC_MAX_VALUE) -> None:
        self._channel = channel
        self._call = call
        self._max_value = max_value
        self._items: deque[tuple[bytes, Buffer]] = deque()
        self._ended = False
        self._error: Exception | None = None
        self._parking = Parking()
        self._until_yield = _YIELD_EVERY

    def push(self, head: bytes, tail: Buffer) -> None:
        self._items.append((head, tail))
        self._parking.wake()

    def finish(self, error: Exception | None = None) -> None:
        """No more items: the iterator ends, or raises `error` after those that are here."""
        if not self._ended:
            self._ended = True
            self._error = error
            self._parking.wake()

    def __aiter__(self) -> ItemReader:
        return self

    async def __anext__(self) -> Any:
        self._until_yield -= 1
        if self._until_yield and self._items:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            self._until_yield = _YIELD_EVERY
            await trio.lowlevel.checkpoint()
        while not self._items:
            if self._ended:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            await self._parking.park()
        head, tail = self._items.popleft()
        self._channel.machine.grant(self._call, 1, len(head) + len(tail))
        self._channel.flush()
        try:
            return decode_value_untrusted(head, tail, self._max_value)
        except RemoteProtocolError as error:
            raise PeerMisbehaved(f"an item of {self._call.method} cannot be decoded: {error}") from None


class ItemWriter:
    """Sends items while the other side grants credit."""

    def __init__(self, channel: Speaker, call: Call) -> None:
        self._channel = channel
        self._call = call
        self._parking = Parking()
        self._until_yield = _YIELD_EVERY

    def wake(self) -> None:
        """There is credit, or the call is over."""
        self._parking.wake()

    async def send(self, value: object) -> None:
        """Send one item; waits while the other side does not keep up. `CallCancelled` when the call is over.

        Buffers in `value` must not change until they were sent, which this does not wait for.
        """
        channel, call = self._channel, self._call
        head, tails = encode_value(value)
        self._until_yield -= 1
        if self._until_yield:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            self._until_yield = _YIELD_EVERY
            await trio.lowlevel.checkpoint()
        while not call.over and not call.can_send():
            await self._parking.park()
        if not call.over and channel.congested():
            await channel.writable()
        if call.over:
            raise CallCancelled(f"the other side ended {call.method}")
        channel.machine.send_item(call, head, tails)
        channel.flush()
