"""Inbound calls of the async client: `async def` in tasks that are used again, plain `def` in threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.to_thread

from lattica.client.async_items import ItemReader, ItemWriter
from lattica.client.loops import cancelled
from lattica.client.wire import HANDLER_THREADS, caller_of, decode_request, handler_error
from lattica.errors import CallCancelled
from lattica.rpc.methods import Method, Style, run_in_thread
from lattica.rpc.server import _caller
from lattica_protocols.rpc.calls import Call
from lattica_protocols.rpc.frames import (
    CANCEL,
    CANCELLED,
    CLIENT_STREAM,
    CREDIT,
    END,
    INVALID_ARGUMENT,
    ITEM,
    SERVER_STREAM,
    Buffer,
)
from lattica_protocols.rpc.tensors import encode_value

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

    from lattica.client.async_link import AsyncLink
    from lattica.client.loops import Gate

MAX_IDLE: Final = 256
"""Parked tasks kept for later calls."""


class HandlerTasks:
    """Runs inbound calls in tasks of one group; a task that is done waits for the next call."""

    def __init__(self, group: TaskGroup) -> None:
        self._group = group
        self._idle: list[_Seat] = []
        self.threads = anyio.CapacityLimiter(HANDLER_THREADS)

    def serve(self, link: AsyncLink, call: Call, method: Method, head: bytes, tail: Buffer) -> None:
        """Run a method for a REQUEST."""
        job = InboundCall(link, call, method, self.threads)
        if not job.prepare(head, tail):
            return
        if method.style is Style.INLINE:
            job.run_inline()
        elif self._idle:
            seat = self._idle.pop()
            seat.job = job
            seat.gate.open()
        else:
            self._group.start_soon(self._work, job)

    async def _work(self, job: InboundCall) -> None:
        waiting: InboundCall | None = job
        while True:
            with anyio.CancelScope() as scope:  # one for many jobs: used up when one of them is cancelled
                while True:
                    if waiting is None:
                        if len(self._idle) >= MAX_IDLE:
                            return
                        waiting = await self._next(job.link)
                    job, waiting = waiting, None
                    job.scope = scope
                    try:
                        await job.run()
                    finally:
                        job.scope = None

    async def _next(self, link: AsyncLink) -> InboundCall:
        seat = _Seat(link.loop.gate())
        self._idle.append(seat)
        try:
            await seat.gate.wait()
        except BaseException:  # cancelled; raised again
            if seat in self._idle:
                self._idle.remove(seat)
            raise
        assert seat.job is not None
        return seat.job


class _Seat:
    """A parked task."""

    __slots__ = ("gate", "job")

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.job: InboundCall | None = None


class InboundCall:
    """One call that the daemon brought in."""

    __slots__ = ("_args", "_call", "_kwargs", "_method", "_reader", "_threads", "_writer", "link", "scope")

    def __init__(self, link: AsyncLink, call: Call, method: Method, threads: anyio.CapacityLimiter) -> None:
        self.link = link
        self.scope: anyio.CancelScope | None = None
        """Set while it runs."""
        self._call = call
        self._method = method
        self._threads = threads
        self._args: list[Any] = []
        self._kwargs: dict[str, Any] = {}
        self._reader: ItemReader | None = None
        self._writer: ItemWriter | None = None

    def prepare(self, head: bytes, tail: Buffer) -> bool:
        """Decode the arguments. False when the call was refused."""
        call, method = self._call, self._method
        call.owner = self
        request = decode_request(call, method, head, tail)
        if len(request) == 3:
            self._fail(request)
            return False
        self._args, self._kwargs = request
        if call.flags & CLIENT_STREAM:
            reader = ItemReader(self.link, call)
            if method.takes_stream or method.fits_with_stream(reader, self._args, self._kwargs):
                self._reader = reader
                self._args.insert(0, reader)
        if call.flags & SERVER_STREAM:
            self._writer = ItemWriter(self.link, call)
        return True

    def on_frame(self, kind: int, call: Call, head: bytes, tail: Buffer) -> None:
        if kind == CANCEL:
            self._cancel()
            if self._reader is not None:
                self._reader.finish(CallCancelled(f"the caller ended {call.method}"))
            if self._writer is not None:
                self._writer.wake()
        elif kind == CREDIT and self._writer is not None:
            self._writer.wake()
        elif kind == ITEM and self._reader is not None:
            self._reader.push(head, tail)
        elif kind == ITEM:
            self._cancel()
            self._fail((INVALID_ARGUMENT, "InvalidArgument", f"{call.method} takes no items"))
        elif kind == END and self._reader is not None:
            self._reader.finish()

    def _cancel(self) -> None:
        if self.scope is not None:
            self.scope.cancel()

    def run_inline(self) -> None:
        """For methods that neither wait nor compute for long: no task at all."""
        token = _caller.set(caller_of(self._call))
        try:
            head, tails = encode_value(self._method.function(*self._args, **self._kwargs))
            self._respond(head, tails)
        except (Exception, SystemExit) as error:  # whatever the handler raises is the caller's answer, and its alone
            self._fail(handler_error(error, self._call, self._method, self._args, self._kwargs))
        finally:
            _caller.reset(token)

    async def run(self) -> None:
        call, method = self._call, self._method
        if call.over:
            return
        _caller.set(caller_of(call))
        try:
            if method.style is Style.TASK:
                result = await method.function(*self._args, **self._kwargs)
            elif method.style is Style.TASK_STREAM:
                await self._run_stream()
                return
            elif method.style is Style.THREAD_STREAM:
                await self._run_thread_stream()
                return
            else:
                work = partial(run_in_thread, method.function, *self._args, **self._kwargs)
                result = await anyio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._threads)
            head, tails = encode_value(result)
            del result
            if tails:
                tails = await self.link.stage(tails)
            if self.link.congested():
                await self.link.writable()
            self._respond(head, tails)
        except (Exception, SystemExit) as error:  # whatever the handler raises is the caller's answer, and its alone
            self._fail(handler_error(error, call, method, self._args, self._kwargs))
        except BaseException as error:  # the worker is cancelled, or the handler lets out what is not meant for us
            if cancelled() or isinstance(error, (KeyboardInterrupt, GeneratorExit, BaseExceptionGroup)):
                self._fail((CANCELLED, "Cancelled", f"{call.method} was cancelled by its worker"))
                raise
            # A CancelledError of something that the handler waited for, not its own: no reason to end the worker.
            self._fail(handler_error(error, call, method, self._args, self._kwargs))
        finally:
            self._args, self._kwargs = [], {}

    def _respond(self, head: bytes, tails: Sequence[Buffer]) -> None:
        machine, call = self.link.machine, self._call
        if call.flags & SERVER_STREAM:  # the caller iterates: the one result is the one item
            if not call.over:
                machine.send_item(call, head, tails)
            machine.end(call)
        else:
            machine.respond(call, head, tails)
        self.link.flush()

    def _fail(self, status: tuple[int, str, str]) -> None:
        self.link.machine.fail(self._call, *status)
        self.link.flush()

    async def _run_stream(self) -> None:
        assert self._writer is not None
        generator = self._method.function(*self._args, **self._kwargs)
        try:
            async for item in generator:
                await self._writer.send(item)
        finally:
            with anyio.move_on_after(5, shield=True):  # its `finally` blocks
                await generator.aclose()
        self._end()

    async def _run_thread_stream(self) -> None:
        assert self._writer is not None
        generator: Iterator[Any] = self._method.function(*self._args, **self._kwargs)
        done = object()
        while True:
            step = partial(run_in_thread, next, generator, done)
            item = await anyio.to_thread.run_sync(step, abandon_on_cancel=True, limiter=self._threads)
            if item is done:
                break
            await self._writer.send(item)
        self._end()

    def _end(self) -> None:
        self.link.machine.end(self._call)
        self.link.flush()
