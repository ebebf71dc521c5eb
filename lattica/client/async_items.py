"""The two directions of a streaming call in the async client."""

from __future__ import annotations

from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Any

import anyio.lowlevel

from lattica.client.loops import Gate
from lattica.client.wire import call_error, decode_result
from lattica.errors import CallCancelled, InvalidArgument, LatticaError
from lattica_protocols.errors import LocalProtocolError
from lattica_protocols.rpc.calls import Call
from lattica_protocols.rpc.frames import CREDIT, END, ERROR, ITEM, RESPONSE, SERVER_STREAM, Buffer
from lattica_protocols.rpc.tensors import encode_value

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from lattica.client.async_link import AsyncLink


class ItemReader:
    """Items that arrive, an asynchronous iterator. Taking one lets the sender send another."""

    def __init__(self, link: AsyncLink, call: Call) -> None:
        self._link = link
        self._call = call
        self._items: deque[tuple[bytes, Buffer]] = deque()
        self._ended = False
        self._error: Exception | None = None
        self._gate: Gate | None = None

    def push(self, head: bytes, tail: Buffer) -> None:
        self._items.append((head, tail))
        self._wake()

    def finish(self, error: Exception | None = None) -> None:
        """No more items: the iterator ends, or raises `error` after those that are here."""
        if not self._ended:
            self._ended = True
            self._error = error
            self._wake()

    def _wake(self) -> None:
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.open()

    def __aiter__(self) -> ItemReader:
        return self

    async def __anext__(self) -> Any:
        if self._items:
            await anyio.lowlevel.checkpoint()
        while not self._items:
            if self._ended:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            self._gate = self._link.loop.gate()
            await self._gate.wait()
        head, tail = self._items.popleft()
        self._link.machine.grant(self._call, 1, len(head) + len(tail))
        self._link.flush()
        return decode_result(self._call.method, head, tail)


class ItemWriter:
    """Sends items while the other side grants credit."""

    def __init__(self, link: AsyncLink, call: Call) -> None:
        self._link = link
        self._call = call
        self._gate: Gate | None = None

    def wake(self) -> None:
        """There is credit, or the call is over."""
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.open()

    async def send(self, value: object) -> None:
        """Send one item; waits while the other side does not keep up. `CallCancelled` when the call is over,
        `LocalProtocolError` when the value cannot be sent."""
        link, call = self._link, self._call
        head, tails = encode_value(value)
        if tails:
            tails = await link.stage(tails)
        await anyio.lowlevel.checkpoint()
        while not call.over and not call.can_send():
            self._gate = link.loop.gate()
            await self._gate.wait()
        if not call.over and link.congested():
            await link.writable()
        if call.over:
            raise CallCancelled(f"the other side ended {call.method}")
        link.machine.send_item(call, head, tails)
        link.flush()


class OpenCall:
    """A call that streams, in one direction or both: an async context manager and an async iterator.

    Leaving the block cancels the call unless it is over. One task may read while another writes.
    """

    _link: AsyncLink
    _call: Call
    _reader: ItemReader
    _writer: ItemWriter

    def __init__(
        self, method: str, to_daemon: bool, start: Callable[[OpenCall], Awaitable[tuple[AsyncLink, Call]]]
    ) -> None:
        self._method = method
        self._to_daemon = to_daemon
        self._start = start
        self._error: LatticaError | None = None
        self._over = False
        self._result: tuple[bytes, Buffer] | None = None
        self._result_gate: Gate | None = None

    async def __aenter__(self) -> OpenCall:
        self._link, self._call = await self._start(self)
        self._reader = ItemReader(self._link, self._call)
        self._writer = ItemWriter(self._link, self._call)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    def cancel(self) -> None:
        """End the call: the handler on the other side is cancelled. Does nothing when it is over."""
        if not self._over:
            self._link.machine.cancel(self._call)
            self._link.flush()
            self._finish(CallCancelled(f"{self._method} was cancelled here"))

    async def send(self, value: object) -> None:
        """Send one item; waits while the handler does not keep up.

        Raises the call's error when it is over, and `InvalidArgument` when the value cannot be sent.
        """
        try:
            await self._writer.send(value)
        except LocalProtocolError as error:
            raise InvalidArgument(f"an item of {self._method}: {error}") from error
        except CallCancelled:
            if self._error is not None:
                raise self._error from None
            raise

    async def end(self) -> None:
        """No more items from here."""
        self._link.machine.end(self._call)
        self._link.flush()
        await anyio.lowlevel.checkpoint()

    def __aiter__(self) -> OpenCall:
        return self

    async def __anext__(self) -> Any:
        return await self._reader.__anext__()

    async def result(self) -> Any:
        """What a method returned that does not yield. Ends our direction first."""
        await self.end()
        if self._call.flags & SERVER_STREAM:  # the one result is the one item
            async for item in self._reader:
                return item
            return None
        while self._result is None:
            if self._over:
                raise self._error or CallCancelled(f"{self._method} ended without a result")
            self._result_gate = self._link.loop.gate()
            await self._result_gate.wait()
        return decode_result(self._method, *self._result)

    def on_frame(self, kind: int, call: Call, head: bytes, tail: Buffer) -> None:
        if kind == ITEM:
            self._reader.push(head, tail)
        elif kind == CREDIT:
            self._writer.wake()
        elif kind == RESPONSE:
            self._result = (head, tail)
            self._finish(None)
        elif kind == END:
            self._finish(None)
        elif kind == ERROR:
            self._finish(call_error(head, self._method, self._to_daemon))

    def _finish(self, error: LatticaError | None) -> None:
        self._over = True
        self._error = error
        self._reader.finish(error)
        self._writer.wake()
        if self._result_gate is not None:
            self._result_gate.open()
        self._link.call_over()
