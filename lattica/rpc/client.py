"""The caller's side: a unary call is one parked task, a streaming call an object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import outcome
import trio

from lattica.errors import (
    CallCancelled,
    ConnectionLost,
    DeadlineExceeded,
    InvalidArgument,
    LatticaError,
    PeerMisbehaved,
)
from lattica.rpc.items import ItemReader, ItemWriter, Parking
from lattica.rpc.peer_channel import PeerChannel
from lattica.rpc.status import error_from_head_untrusted
from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.rpc.calls import Call, CallOwner
from lattica_protocols.rpc.frames import (
    CLIENT_STREAM,
    CREDIT,
    ERROR,
    ITEM,
    RESPONSE,
    SERVER_STREAM,
    Buffer,
)
from lattica_protocols.rpc.tensors import decode_value_untrusted, encode_args

if TYPE_CHECKING:
    from lattica.rpc.service import RpcService


class _Waiter:
    """The task that waits for one RESPONSE."""

    __slots__ = ("channel", "head", "kind", "tail", "task")

    def __init__(self, channel: PeerChannel) -> None:
        self.channel = channel
        self.task: trio.lowlevel.Task | None = None
        self.kind = 0
        self.head = b""
        self.tail: Buffer = b""

    def on_frame(self, kind: int, call: Call, head: bytes, tail: Buffer) -> None:
        self.kind, self.head, self.tail = kind, head, tail
        if self.task is not None:
            trio.lowlevel.reschedule(self.task, outcome.Value(None))
        if self.channel.capacity:
            self.channel.capacity.unpark()


class SessionOver(ConnectionLost):
    """The session takes no new calls; nothing was sent, so another session can be tried."""


async def unary_call(
    channel: PeerChannel,
    method: str,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    deadline: float | None,
) -> Any:
    """One call on a session. Errors: those of `RpcService.call`."""
    head, tails, flags = _encode_args(method, args, kwargs)
    if not channel.machine.can_open() or channel.congested():
        await _room_for_call(channel, deadline)
    waiter = _Waiter(channel)
    call = _open(channel, method, head, tails, flags, deadline, waiter)
    if waiter.kind == 0:
        waiter.task = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            waiter.task = None
            channel.machine.cancel(call)
            channel.flush()
            if channel.capacity:
                channel.capacity.unpark()
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
    else:
        await trio.lowlevel.checkpoint()
    if waiter.kind != RESPONSE:
        raise error_from_head_untrusted(waiter.head)
    return decode_result(method, waiter.head, waiter.tail)


def decode_result(method: str, head: bytes, tail: Buffer) -> Any:
    """The value of a RESPONSE. `PeerMisbehaved` when it cannot be decoded."""
    try:
        return decode_value_untrusted(head, tail)
    except RemoteProtocolError as error:
        raise PeerMisbehaved(f"the result of {method} cannot be decoded: {error}") from None
    except LocalProtocolError as error:
        raise InvalidArgument(f"the result of {method}: {error}") from None


def _encode_args(
    method: str, args: Sequence[object], kwargs: Mapping[str, object]
) -> tuple[bytes, Sequence[Buffer], int]:
    try:
        return encode_args(args, kwargs)
    except LocalProtocolError as error:
        raise InvalidArgument(f"an argument of {method}: {error}") from error


async def _room_for_call(channel: PeerChannel, deadline: float | None) -> None:
    """Wait until the peer takes one more call and reads what we write."""
    machine = channel.machine
    with trio.CancelScope(deadline=float("inf") if deadline is None else deadline) as scope:
        while not (machine.lost or machine.going_away or machine.can_open()):
            await channel.capacity.park()
        if channel.congested():
            await channel.writable()
    if scope.cancelled_caught:
        raise DeadlineExceeded("the deadline passed before the peer took the call")


def _open(
    channel: PeerChannel,
    method: str,
    head: bytes,
    tails: Sequence[Buffer],
    flags: int,
    deadline: float | None,
    owner: CallOwner,
) -> Call:
    machine = channel.machine
    if machine.lost or machine.going_away:
        raise SessionOver(f"the session with {channel.peer.short()} is over")
    now = 0.0 if deadline is None else trio.current_time()
    try:
        call = machine.open_call(method, head, tails, flags=flags, deadline=deadline, now=now, owner=owner)
    except LocalProtocolError as error:
        raise InvalidArgument(f"{method}: {error}") from error
    channel.flush()
    if deadline is not None:
        channel.deadline_added(deadline)
    return call


class ItemStream:
    """The items of one server-streaming call, an asynchronous iterator. Dropping it cancels the call."""

    def __init__(self, call: OpenCall) -> None:
        self._call = call
        self._token: trio.lowlevel.TrioToken | None = None

    def __aiter__(self) -> ItemStream:
        return self

    async def __anext__(self) -> Any:
        if self._token is None:
            await self._call.__aenter__()
            self._token = trio.lowlevel.current_trio_token()
        return await self._call.__anext__()

    async def aclose(self) -> None:
        """Cancel the call unless it is over."""
        if self._token is not None:
            self._call.cancel()
        await trio.lowlevel.checkpoint()

    def __del__(self) -> None:
        if self._token is None or self._call.is_over():
            return
        if trio.lowlevel.in_trio_run():
            self._call.cancel()
        else:  # the garbage collector of another thread
            try:
                self._token.run_sync_soon(self._call.cancel)
            except trio.RunFinishedError:
                pass  # and the call with it


class OpenCall:
    """A call that streams, in one direction or both: an async context manager and an async iterator.

    Leaving the block cancels the call unless it is over. One task may read and another may write.
    """

    def __init__(
        self,
        service: RpcService,
        peer: Any,
        method: str,
        args: Sequence[object],
        kwargs: Mapping[str, object],
        *,
        sends: bool,
        receives: bool,
        deadline: float | None,
    ) -> None:
        self._service = service
        self._peer = peer
        self._method = method
        self._encoded = _encode_args(method, args, kwargs)
        self._flags = (CLIENT_STREAM if sends else 0) | (SERVER_STREAM if receives else 0)
        self._deadline = deadline
        self._error: LatticaError | None = None
        self._result: tuple[bytes, Buffer] | None = None
        self._parking = Parking()

    async def __aenter__(self) -> OpenCall:
        head, tails, flags = self._encoded
        while True:
            self._channel = channel = await self._service.channel(self._peer, self._deadline)
            if not channel.machine.can_open() or channel.congested():
                await _room_for_call(channel, self._deadline)
            try:
                self._call = _open(channel, self._method, head, tails, flags | self._flags, self._deadline, self)
            except SessionOver:
                continue
            break
        del self._encoded
        self._reader = ItemReader(channel, self._call)
        self._writer = ItemWriter(channel, self._call)
        if self._error is not None:
            self._reader.finish(self._error)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    def cancel(self) -> None:
        """End the call: the handler on the other side is cancelled. Does nothing when it is over."""
        if not self._call.over:
            self._channel.machine.cancel(self._call)
            self._channel.flush()
            self._over(CallCancelled(f"{self._method} was cancelled here"))

    def is_over(self) -> bool:
        """The last frame was sent or received."""
        return self._call.over

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
        self._channel.machine.end(self._call)
        self._channel.flush()
        await trio.lowlevel.checkpoint()

    def __aiter__(self) -> OpenCall:
        return self

    async def __anext__(self) -> Any:
        return await self._reader.__anext__()

    async def result(self) -> Any:
        """What a method returned that does not yield. Ends our direction first."""
        await self.end()
        if self._flags & SERVER_STREAM:  # the one result is the one item
            async for item in self._reader:
                return item
        while self._result is None:
            if self._error is not None:
                raise self._error
            await self._parking.park()
        return decode_result(self._method, *self._result)

    def on_frame(self, kind: int, call: Call, head: bytes, tail: Buffer) -> None:
        if kind == ITEM:
            self._reader.push(head, tail)
        elif kind == CREDIT:
            self._writer.wake()
        else:
            call.owner = None  # no cycle for the garbage collector
            if kind == RESPONSE:
                self._result = (head, tail)
            self._over(error_from_head_untrusted(head) if kind == ERROR else None)

    def _over(self, error: LatticaError | None) -> None:
        self._error = error
        if hasattr(self, "_reader"):
            self._reader.finish(error)
            self._writer.wake()
        self._parking.wake()
        if self._channel.capacity:
            self._channel.capacity.unpark()
