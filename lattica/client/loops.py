"""What the async client needs of an event loop and anyio has no quick way for: waking one task, and writing once at the
end of a turn. One small class for trio and one for asyncio."""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio

    import trio


class Gate(Protocol):
    """One task waits, once; anybody opens. Opening before, twice, or after the task was cancelled is fine."""

    async def wait(self) -> None: ...

    def open(self) -> None: ...


class Loop(ABC):
    """The event loop that runs now."""

    @abstractmethod
    def time(self) -> float:
        """The clock of deadlines, the same as anyio's."""

    @abstractmethod
    def gate(self) -> Gate: ...

    @abstractmethod
    async def watch(
        self, sock: socket.socket, on_readable: Callable[[], None], on_writable: Callable[[], None]
    ) -> None:
        """Call `on_readable` whenever the socket can be read, until it raises or this is cancelled. `on_writable` is
        called once after each `want_writable`. An exception of either comes out of here."""

    @abstractmethod
    def want_writable(self) -> None:
        """See `watch`."""

    @abstractmethod
    def soon(self, callback: Callable[[], None]) -> None:
        """Call it after the tasks that are ready now have run. Works while `watch` runs."""


def current_loop() -> Loop:
    """For the library that runs the calling task."""
    import sniffio

    return _TrioLoop() if sniffio.current_async_library() == "trio" else _AsyncioLoop()


def cancelled() -> bool:
    """Whether the calling task is being cancelled, by a scope or (asyncio) by `Task.cancel`."""
    import anyio
    import sniffio

    if anyio.current_effective_deadline() == float("-inf"):
        return True
    if sniffio.current_async_library() == "trio":
        return False
    import asyncio

    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class _TrioGate:
    __slots__ = ("_opened", "_task")

    def __init__(self) -> None:
        self._opened = False
        self._task: trio.lowlevel.Task | None = None

    async def wait(self) -> None:
        import trio

        if self._opened:
            await trio.lowlevel.checkpoint()
            return
        self._task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._abort)

    def _abort(self, _: object) -> trio.lowlevel.Abort:
        import trio

        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED

    def open(self) -> None:
        import trio

        self._opened = True
        task, self._task = self._task, None
        if task is not None:
            trio.lowlevel.reschedule(task)


class _TrioLoop(Loop):
    def __init__(self) -> None:
        import trio

        self.time = trio.current_time  # type: ignore[method-assign]
        self._callbacks: list[Callable[[], None]] = []
        self._callback_gate = _TrioGate()
        self._write_gate = _TrioGate()

    def time(self) -> float:
        raise NotImplementedError

    def gate(self) -> Gate:
        return _TrioGate()

    async def watch(
        self, sock: socket.socket, on_readable: Callable[[], None], on_writable: Callable[[], None]
    ) -> None:
        import trio

        error: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run_callbacks)
            nursery.start_soon(self._run_writer, sock, on_writable)
            try:
                while True:
                    await trio.lowlevel.wait_readable(sock)
                    on_readable()
            except Exception as raised:  # carried over the end of the nursery, which would wrap it into a group
                error = raised
            nursery.cancel_scope.cancel()
        if error is not None:
            raise error

    async def _run_callbacks(self) -> None:
        while True:
            await self._callback_gate.wait()
            self._callback_gate = _TrioGate()
            callbacks, self._callbacks = self._callbacks, []
            for callback in callbacks:
                callback()

    async def _run_writer(self, sock: socket.socket, on_writable: Callable[[], None]) -> None:
        import trio

        while True:
            await self._write_gate.wait()
            self._write_gate = _TrioGate()
            await trio.lowlevel.wait_writable(sock)
            on_writable()

    def want_writable(self) -> None:
        self._write_gate.open()

    def soon(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)
        self._callback_gate.open()


class _AsyncioGate:
    __slots__ = ("_future",)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._future: asyncio.Future[None] = loop.create_future()

    async def wait(self) -> None:
        await self._future

    def open(self) -> None:
        if not self._future.done():
            self._future.set_result(None)


class _AsyncioLoop(Loop):
    def __init__(self) -> None:
        import asyncio

        self._loop = asyncio.get_running_loop()
        self.time = self._loop.time  # type: ignore[method-assign]
        self._sock: socket.socket | None = None
        self._on_writable: Callable[[], None] = lambda: None

    def time(self) -> float:
        raise NotImplementedError

    def gate(self) -> Gate:
        return _AsyncioGate(self._loop)

    async def watch(
        self, sock: socket.socket, on_readable: Callable[[], None], on_writable: Callable[[], None]
    ) -> None:
        from sniffio import current_async_library_cvar

        # To start a task, anyio has to know its library, which asyncio tells in tasks only. Callbacks run in a copy of
        # this context.
        current_async_library_cvar.set("asyncio")
        end: asyncio.Future[None] = self._loop.create_future()

        def guarded(function: Callable[[], None]) -> Callable[[], None]:
            def call() -> None:
                try:
                    function()
                except Exception as error:  # asyncio would only log it; whoever awaits `watch` gets it
                    self._loop.remove_reader(sock)
                    if not end.done():
                        end.set_exception(error)

            return call

        def writable() -> None:
            self._loop.remove_writer(sock)
            on_writable()

        self._sock = sock
        self._on_writable = guarded(writable)
        self._loop.add_reader(sock, guarded(on_readable))
        try:
            await end
        finally:
            self._sock = None
            self._loop.remove_reader(sock)
            self._loop.remove_writer(sock)

    def want_writable(self) -> None:
        if self._sock is not None:
            self._loop.add_writer(self._sock, self._on_writable)

    def soon(self, callback: Callable[[], None]) -> None:
        self._loop.call_soon(callback)


