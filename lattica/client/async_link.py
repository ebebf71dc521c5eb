"""One connection of the async client, and the gates its tasks wait at."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio
import anyio.to_thread

from lattica.client.loops import Gate, Loop, current_loop
from lattica.client.wire import connect_error, new_machine, new_socket, no_daemon, session_over, stage
from lattica.errors import ConnectionLost, DeadlineExceeded, InvalidArgument
from lattica.local.channel import LocalChannel
from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.rpc.frames import GOAWAY, HELLO, SERVICE_NOT_FOUND, Buffer

if TYPE_CHECKING:
    from lattica.local.memfd import SegmentPool
    from lattica.rpc.channel import Channel
    from lattica.rpc.methods import Method
    from lattica_protocols.rpc.calls import Call, CallOwner

_STAGE_IN_THREAD_OVER: Final = 4 << 20
"""Bytes: copying more than this takes over a millisecond, which is too long for an event loop."""

ServeRequest = Callable[["AsyncLink", "Call", "Method", bytes, Buffer], None]


class AsyncLink(LocalChannel):
    """A connected socket to the daemon. Made by `connect`; `run` has to run as long as it lives."""

    def __init__(
        self, sock: object, loop: Loop, pool: SegmentPool, methods: Mapping[str, Method], serve: ServeRequest
    ) -> None:
        super().__init__(sock, new_machine(pool), self._collect, clock=loop.time, pool=pool)  # type: ignore[arg-type]
        self.loop = loop
        self.greeted = loop.gate()
        self.machine.session_call.owner = self
        self.on_blocked = loop.want_writable
        self._methods = methods
        self._serve = serve
        self._callers: deque[Gate] = deque()
        """Tasks that wait until the daemon takes one more call."""
        self._writers: deque[Gate] = deque()
        """Tasks that wait until the daemon has read what was written."""
        self._flush_scheduled = False
        self._timer_scope: anyio.CancelScope | None = None
        self._timer_at = float("inf")

    @classmethod
    async def connect(
        cls, path: Path, pool: SegmentPool, methods: Mapping[str, Method], serve: ServeRequest
    ) -> AsyncLink:
        """Raises `DaemonNotRunning`."""
        sock = new_socket()
        try:
            sock.setblocking(False)
            while True:
                try:
                    sock.connect(str(path))
                    break
                except BlockingIOError:  # its queue of connections is full
                    await anyio.sleep(0.01)
        except OSError as error:
            sock.close()
            raise connect_error(path, error) from None
        except BaseException:  # cancelled; raised again
            sock.close()
            raise
        return cls(sock, current_loop(), pool, methods, serve)

    async def run(self) -> None:
        """Live until the connection is over."""
        reason = "the client was closed"
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._run_timer)
                self.loop.soon(self.write_output)
                try:
                    await self.loop.watch(self.sock, self.read, self._writable)
                except ConnectionLost as error:
                    reason = str(error)
                except RemoteProtocolError as error:
                    reason = f"the daemon broke the protocol: {error}"
                group.cancel_scope.cancel()
        finally:
            self.close(reason)
            self.greeted.open()
            self._let_all_in()

    async def wait_greeted(self, path: Path, timeout: float) -> None:
        """Wait for the daemon's greeting. Raises `DaemonNotRunning`."""
        with anyio.move_on_after(timeout):
            await self.greeted.wait()
        if self.machine.peer is None:
            raise no_daemon(path)

    # -- calls --------------------------------------------------------------------------------------------
    async def room(self, deadline: float | None) -> None:
        """Wait until the daemon takes one more call and keeps up."""
        machine = self.machine
        with anyio.CancelScope(deadline=float("inf") if deadline is None else deadline) as scope:
            while not (machine.lost or machine.going_away or (machine.can_open() and not self.congested())):
                await self._wait_in(self._callers)
        if scope.cancelled_caught:
            raise DeadlineExceeded("the deadline passed before the daemon took the call")

    async def _wait_in(self, line: deque[Gate]) -> None:
        gate = self.loop.gate()
        line.append(gate)
        try:
            await gate.wait()
        except BaseException:  # cancelled; raised again
            if gate in line:
                line.remove(gate)
            else:
                _let_in(line)  # it was let in, and will not come
            raise

    def has_room(self) -> bool:
        """`room` would not wait."""
        return self.machine.can_open() and not self.congested()

    def open(
        self,
        method: str,
        head: bytes,
        tails: Sequence[Buffer],
        flags: int,
        deadline: float | None,
        route: bytes,
        owner: CallOwner,
    ) -> Call:
        """Send a REQUEST."""
        machine = self.machine
        if machine.lost or machine.going_away:
            raise session_over()
        now = 0.0 if deadline is None else self.loop.time()
        try:
            call = machine.open_call(
                method, head, tails, flags=flags, deadline=deadline, now=now, route=route, owner=owner
            )
        except LocalProtocolError as error:
            raise InvalidArgument(f"{method}: {error}") from error
        self.flush()
        if deadline is not None and deadline < self._timer_at:
            self.deadlines_changed()
        return call

    async def stage(self, tails: Sequence[Buffer]) -> Sequence[Buffer]:
        """Copy long buffers into shared memory."""
        over = self.machine.limits.detach_over
        if sum(map(len, tails)) > _STAGE_IN_THREAD_OVER:
            return await anyio.to_thread.run_sync(stage, self._pool, tails, over)
        return stage(self._pool, tails, over)

    def call_over(self) -> None:
        """A call of ours is over."""
        _let_in(self._callers)

    def on_frame(self, kind: int, call: Call, head: bytes, tail: Buffer) -> None:
        """Events of the session itself."""
        if kind == HELLO:
            self.greeted.open()
        if kind in (HELLO, GOAWAY):
            self._let_all_in()

    def _let_all_in(self) -> None:
        for line in (self._callers, self._writers):
            while line:
                _let_in(line)

    # -- reading and writing ------------------------------------------------------------------------------
    def flush(self) -> None:
        """Write now when this is the only call, else at the end of the turn, together with what others write."""
        if self._turn.add(self):
            return
        if self.machine.outbound_calls + self.machine.inbound_calls <= 1:
            self.write_output()
        elif not self._flush_scheduled:
            self._flush_scheduled = True
            self.loop.soon(self._flush_now)

    def _flush_now(self) -> None:
        self._flush_scheduled = False
        self.write_output()

    def _writable(self) -> None:
        self.on_writable()
        if not self.congested():
            self._let_all_in()

    async def writable(self) -> None:
        """Wait until the daemon has caught up."""
        while self.congested() and not self.closed:
            await self._wait_in(self._writers)

    def _collect(self, channel: Channel, call: Call, head: bytes, tail: Buffer) -> None:
        method = self._methods.get(call.method)
        if method is None:
            message = f"the worker offers no {call.method}"
            self.machine.fail(call, SERVICE_NOT_FOUND, "ServiceNotFound", message)
        else:
            self._serve(self, call, method, head, tail)

    # -- time ---------------------------------------------------------------------------------------------
    def deadlines_changed(self) -> None:
        when = self.machine.next_timeout()
        if when is not None and when < self._timer_at and self._timer_scope is not None:
            self._timer_at = self._timer_scope.deadline = when

    async def _run_timer(self) -> None:
        while True:
            when = self.machine.next_timeout()
            self._timer_at = float("inf") if when is None else when
            with anyio.CancelScope(deadline=self._timer_at) as scope:
                self._timer_scope = scope
                await anyio.sleep_forever()
            self.expire()


def _let_in(line: deque[Gate]) -> None:
    if line:
        line.popleft().open()


class Waiter:
    """A task that waits for the RESPONSE of one call."""

    __slots__ = ("_gate", "_link", "head", "kind", "tail")

    def __init__(self, link: AsyncLink) -> None:
        self._link = link
        self._gate = link.loop.gate()
        self.kind = 0
        self.head = b""
        self.tail: Buffer = b""

    async def wait(self) -> None:
        await self._gate.wait()

    def on_frame(self, kind: int, call: Call, head: bytes, tail: Buffer) -> None:
        self.kind, self.head, self.tail = kind, head, tail
        self._gate.open()
        self._link.call_over()
