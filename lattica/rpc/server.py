"""The callee's side: one inbound call, run in the style its method was written in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from lattica.errors import CallCancelled
from lattica.rpc.channel import Speaker
from lattica.rpc.items import ItemReader, ItemWriter
from lattica.rpc.methods import Method, Style, run_in_thread
from lattica.rpc.pool import Job
from lattica.rpc.status import status_of
from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.rpc.calls import Call
from lattica_protocols.rpc.frames import (
    CANCEL,
    CANCELLED,
    CLIENT_STREAM,
    CREDIT,
    END,
    INVALID_ARGUMENT,
    ITEM,
    RESOURCE_EXHAUSTED,
    SERVER_STREAM,
    Buffer,
)
from lattica_protocols.rpc.tensors import decode_args_untrusted, encode_value

if TYPE_CHECKING:
    from lattica_protocols.peer_id import PeerId

_caller: ContextVar[PeerId] = ContextVar("lattica_rpc_caller")


def caller() -> PeerId:
    """Who made the call that the current task or thread handles. `LookupError` outside of a handler."""
    return _caller.get()


class InboundCall(Job):
    """One call from a peer."""

    __slots__ = ("_args", "_call", "_channel", "_kwargs", "_method", "_reader", "_threads", "_writer")

    def __init__(self, channel: Speaker, call: Call, method: Method, threads: trio.CapacityLimiter) -> None:
        super().__init__()
        self._channel = channel
        self._call = call
        self._method = method
        self._threads = threads
        self._args: list[Any] = []
        self._kwargs: dict[str, Any] = {}
        self._reader: ItemReader | None = None
        self._writer: ItemWriter | None = None

    # -- before it runs -----------------------------------------------------------------------------------
    def prepare(self, head: bytes, tail: Buffer) -> bool:
        """Decode the arguments. False when the call was refused."""
        call = self._call
        call.owner = self
        streams = call.flags & (CLIENT_STREAM | SERVER_STREAM)
        try:
            self._args, self._kwargs = decode_args_untrusted(head, tail, call.flags, self._method.max_value)
        except (RemoteProtocolError, LocalProtocolError) as error:
            self._refuse(f"the arguments of {call.method}: {error}")
            return False
        if streams or self._method.takes_stream or self._method.gives_stream:
            return self._prepare_streams(streams)
        return True

    def _prepare_streams(self, streams: int) -> bool:
        """A method that yields needs a caller who iterates, one that takes a stream a caller who sends. The other
        way round is fine: then the one result is the one item, and items are refused when they come."""
        call, method = self._call, self._method
        if method.gives_stream and not streams & SERVER_STREAM:
            self._refuse(f"{call.method} yields items: stream it instead of calling it")
            return False
        if method.takes_stream and not streams & CLIENT_STREAM:
            self._refuse(f"{call.method} takes a stream of items: open_call it and send")
            return False
        self._reader = ItemReader(self._channel, call, method.max_value)
        self._writer = ItemWriter(self._channel, call)
        if streams & CLIENT_STREAM:
            if method.takes_stream or method.fits_with_stream(self._reader, self._args, self._kwargs):
                self._args.insert(0, self._reader)
            else:
                self._reader = None
        return True

    def _refuse(self, message: str) -> None:
        self._channel.machine.fail(self._call, INVALID_ARGUMENT, "InvalidArgument", message)
        self._channel.flush()

    # -- while it runs ------------------------------------------------------------------------------------
    def on_frame(self, kind: int, call: Call, head: bytes, tail: Buffer) -> None:
        reader, writer = self._reader, self._writer
        if kind == CANCEL:
            self.cancel()
            if reader is not None:
                reader.finish(CallCancelled(f"the caller ended {call.method}"))
            if writer is not None:
                writer.wake()
        elif kind == CREDIT and writer is not None:
            writer.wake()
        elif kind == ITEM and reader is not None:
            reader.push(head, tail)
        elif kind == ITEM:
            self.cancel()
            self._refuse(f"{call.method} takes no items")
        elif kind == END and reader is not None:
            reader.finish()

    def run_inline(self) -> None:
        """For methods that neither wait nor compute for long: no task at all."""
        token = _caller.set(self._channel.peer)
        try:
            head, tails = encode_value(self._method.function(*self._args, **self._kwargs))
            self._respond(head, tails)
        except (Exception, SystemExit) as error:  # whatever the handler raises is the caller's answer, and its alone
            self._fail(error)
        finally:
            _caller.reset(token)
            self._call.owner = None  # no cycle for the garbage collector

    async def run(self) -> None:
        call, channel, style = self._call, self._channel, self._method.style
        if call.over:
            return
        _caller.set(channel.peer)
        try:
            if channel.congested():  # the peer does not take the results it has: no further ones are made for it
                await channel.writable()
                if call.over:
                    return
            if style is Style.TASK:
                result = await self._method.function(*self._args, **self._kwargs)
            elif style is Style.TASK_STREAM:
                await self._run_stream()
                return
            elif style is Style.THREAD_STREAM:
                await self._run_thread_stream()
                return
            else:
                work = partial(run_in_thread, self._method.function, *self._args, **self._kwargs)
                result = await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._threads)
            head, tails = encode_value(result)
            if channel.congested():
                await channel.writable()
            self._respond(head, tails)
            channel.flush()
        except trio.Cancelled:
            channel.machine.fail(call, CANCELLED, "Cancelled", f"{call.method} was cancelled by its node")
            channel.flush()
            raise
        except (Exception, SystemExit) as error:  # whatever the handler raises is the caller's answer, and its alone
            self._fail(error)
        except BaseException as error:  # such as asyncio's CancelledError: it means nothing here
            if isinstance(error, (KeyboardInterrupt, GeneratorExit, BaseExceptionGroup)):
                raise
            self._fail(error)
        finally:
            call.owner = None  # no cycle for the garbage collector

    def _respond(self, head: bytes, tails: Sequence[Buffer]) -> None:
        machine, call = self._channel.machine, self._call
        if call.flags & SERVER_STREAM:
            machine.send_item(call, head, tails)
            machine.end(call)
        else:
            machine.respond(call, head, tails)

    def _fail(self, error: BaseException) -> None:
        machine = self._channel.machine
        if isinstance(error, LocalProtocolError):
            machine.fail(self._call, RESOURCE_EXHAUSTED, "InvalidResult", f"the result: {error}")
        elif isinstance(error, TypeError) and (misfit := self._method.misfit(self._args, self._kwargs)) is not None:
            machine.fail(self._call, INVALID_ARGUMENT, "InvalidArgument", f"{self._call.method}: {misfit}")
        else:
            machine.fail(self._call, *status_of(error))
        self._channel.flush()

    async def _run_stream(self) -> None:
        assert self._writer is not None
        generator = self._method.function(*self._args, **self._kwargs)
        try:
            async for item in generator:
                await self._writer.send(item)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):  # its `finally` blocks
                await generator.aclose()
        self._channel.machine.end(self._call)
        self._channel.flush()

    async def _run_thread_stream(self) -> None:
        assert self._writer is not None
        generator: Iterator[Any] = self._method.function(*self._args, **self._kwargs)
        done = object()
        while True:
            step = partial(run_in_thread, next, generator, done)
            item = await trio.to_thread.run_sync(step, abandon_on_cancel=True, limiter=self._threads)
            if item is done:
                break
            await self._writer.send(item)
        self._channel.machine.end(self._call)
        self._channel.flush()
