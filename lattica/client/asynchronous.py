"""The async client: `async with lattica.aconnect() as lat`, under trio or asyncio."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio

from lattica.client.async_handlers import HandlerTasks
from lattica.client.async_items import OpenCall
from lattica.client.async_link import AsyncLink, Waiter
from lattica.client.spaces import SpaceHandle
from lattica.client.verbs import DaemonVerbs, OnProgress
from lattica.client.wire import (
    CONNECT_TIMEOUT,
    DAEMON,
    RECONNECT_SECONDS,
    call_error,
    check_service_name,
    decode_result,
    encode_call,
    expect_callers,
    route_of,
    session_over,
)
from lattica.errors import ConnectionLost, DaemonNotRunning, LatticaError
from lattica.local.memfd import SegmentPool
from lattica.local.paths import socket_path
from lattica.rpc.methods import Method, methods_of
from lattica_protocols.rpc.frames import CLIENT_STREAM, RESPONSE, SERVER_STREAM

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

    from lattica.client.verbs import Peer
    from lattica_protocols.rpc.calls import Call

TRIM_SECONDS = 5.0


@asynccontextmanager
async def aconnect(
    home: str | os.PathLike[str] | None = None, *, timeout: float = CONNECT_TIMEOUT
) -> AsyncIterator[AsyncClient]:
    """Connect to the daemon on this machine while the block runs.

    `home`: the daemon's home directory; `None`: `LATTICA_HOME` or the default one. `timeout`: seconds to wait for the
    daemon. Raises `DaemonNotRunning`.
    """
    raised: BaseException | None = None
    async with anyio.create_task_group() as group:
        client = AsyncClient(home, timeout, group)
        try:
            await client.reconnect()
            yield client
        except (Exception, KeyboardInterrupt, SystemExit) as error:  # the group would wrap it
            raised = error
        finally:
            client._shut()
            group.cancel_scope.cancel()
    if raised is not None:
        raise raised


class AsyncClient(DaemonVerbs):
    """A connection to the daemon. All methods belong to the event loop that `aconnect` ran in.

    `peer` arguments are peer ids, as text in either form or as objects; `None` is the daemon itself. For arguments and
    results see `Client`.
    """

    def __init__(self, home: str | os.PathLike[str] | None, timeout: float, group: TaskGroup) -> None:
        self.path = socket_path(home)
        """The daemon's socket."""
        self._timeout = timeout
        self._group = group
        self._tasks = HandlerTasks(group)
        self._pool = SegmentPool()
        self._methods: dict[str, Method] = {}
        self._services: dict[str, list[str]] = {}
        self._link: AsyncLink | None = None
        self._connecting = anyio.Lock()
        self._closing = False

    # -- calls --------------------------------------------------------------------------------------------
    async def call(
        self, peer: Peer | None, method: str, /, *args: object, timeout: float | None = None, **kwargs: object
    ) -> Any:
        """Call `"service.method"` of a peer and wait for the result; `timeout` in seconds, connecting included.

        Cancelling cancels the handler. Errors: `RemoteError` (the handler raised), `ServiceNotFound`,
        `InvalidArgument`, `ResourceExhausted`, `DeadlineExceeded`, `CallCancelled`, `ConnectError` (no connection to
        the peer), `ConnectionLost` (the peer or the daemon went away while the call ran), `PeerMisbehaved`,
        `DaemonNotRunning`.
        """
        return await self._call(route_of(peer), method, args, kwargs, timeout)

    async def stream(
        self, peer: Peer | None, method: str, /, *args: object, timeout: float | None = None, **kwargs: object
    ) -> AsyncIterator[Any]:
        """Call a method that yields, and iterate over what it yields. Leaving the loop early: close the iterator
        (`contextlib.aclosing`), or use `open_call`. `timeout`, for all of it, and errors as in `call`."""
        async with self._open_call(route_of(peer), method, args, kwargs, timeout, SERVER_STREAM) as call:
            async for item in call:
                yield item

    def open_call(
        self,
        peer: Peer | None,
        method: str,
        /,
        *args: object,
        sends: bool = True,
        receives: bool = True,
        timeout: float | None = None,
        **kwargs: object,
    ) -> OpenCall:
        """A call that streams, for `async with`. `sends`: we `send` items and `end`; `receives`: the method yields
        items (otherwise it returns one `result()`). `timeout` and errors as in `call`; they are raised where the object
        is used."""
        flags = (CLIENT_STREAM if sends else 0) | (SERVER_STREAM if receives else 0)
        return self._open_call(route_of(peer), method, args, kwargs, timeout, flags)

    async def _call(
        self,
        route: bytes,
        method: str,
        args: Sequence[object],
        kwargs: Mapping[str, object],
        timeout: float | None,
    ) -> Any:
        head, tails, flags = encode_call(method, args, kwargs)
        link = self._link
        if link is None or link.closed:
            link = await self.reconnect()
        deadline = None if timeout is None else link.loop.time() + timeout
        if tails:
            tails = await link.stage(tails)
        if not link.has_room():
            await link.room(deadline)
        waiter = Waiter(link)
        call = link.open(method, head, tails, flags, deadline, route, waiter)
        try:
            await waiter.wait()
        except BaseException:  # cancelled: the handler is to stop, too; raised again
            _cancel(link, call)
            raise
        if waiter.kind != RESPONSE:
            raise call_error(waiter.head, method, not route)
        return decode_result(method, waiter.head, waiter.tail)

    def _open_call(
        self,
        route: bytes,
        method: str,
        args: Sequence[object],
        kwargs: Mapping[str, object],
        timeout: float | None,
        stream_flags: int,
    ) -> OpenCall:
        head, tails, flags = encode_call(method, args, kwargs)

        async def start(owner: OpenCall) -> tuple[AsyncLink, Call]:
            link = await self.reconnect()
            deadline = None if timeout is None else link.loop.time() + timeout
            staged = await link.stage(tails) if tails else tails
            if not link.has_room():
                await link.room(deadline)
            return link, link.open(method, head, staged, flags | stream_flags, deadline, route, owner)

        return OpenCall(method, not route, start)

    # -- services -----------------------------------------------------------------------------------------
    async def serve(self, name: str, service: object) -> None:
        """Offer the public methods of an object, or a mapping of functions, as `name.method` to all peers.

        `async def` runs in a task, `async` and plain generators stream, plain `def` runs in a thread, and with
        `@lattica.nonblocking` at once. Several workers may offer the same name: the daemon spreads the calls over those
        that are least busy. Raises `ValueError` when the name is no name, `InvalidArgument` when it is the daemon's.
        """
        check_service_name(name)
        expect_callers()
        methods = methods_of(service)
        if name in self._services:
            raise ValueError(f"the service {name} is offered already")
        self._methods |= {f"{name}.{method}": found for method, found in methods.items()}
        self._services[name] = sorted(methods)
        try:
            await self._register(name)
        except LatticaError:
            self._forget(name)
            raise

    async def unserve(self, name: str) -> None:
        """Stop offering a service; calls that run finish. Does nothing when there is none of that name."""
        if name in self._services:
            self._forget(name)
            await self._call(b"", "local.unregister", (name,), {}, self._timeout)

    def _forget(self, name: str) -> None:
        for method in self._services.pop(name, []):
            self._methods.pop(f"{name}.{method}", None)

    async def _register(self, name: str) -> None:
        await self._call(b"", "local.register", (name, self._services[name]), {}, self._timeout)

    # -- the daemon ---------------------------------------------------------------------------------------
    async def daemon(self, method: str, /, *args: object, timeout: float | None = None) -> Any:
        return await self._call(b"", f"{DAEMON}.{method}", args, {}, timeout)

    def daemon_stream(self, method: str, /, *args: object, timeout: float | None = None) -> AsyncIterator[Any]:
        return self.stream(None, f"{DAEMON}.{method}", *args, timeout=timeout)

    def space(self, space: str) -> SpaceHandle:
        """A space of the daemon, by id or name; its methods return awaitables. Asks nothing yet."""
        return SpaceHandle(self, space)

    async def share(self, path: str | os.PathLike[str], *, progress: OnProgress | None = None) -> str:
        """Add a file or folder to the store, announce it, and return its content id."""
        cid: str = (await self.share_details(path, progress=progress))["cid"]
        return cid

    async def _daemon_last(
        self, method: str, args: Sequence[object], timeout: float | None, progress: OnProgress | None
    ) -> dict[str, Any]:
        async with self._open_call(b"", f"{DAEMON}.{method}", args, {}, timeout, SERVER_STREAM) as call:
            async for item in call:
                if item["state"] == "done":
                    return {key: value for key, value in item.items() if key != "state"}
                if progress is not None:
                    progress(item)
        raise ConnectionLost(f"the daemon ended {method} without a result")

    async def _daemon_list(self, method: str, args: Sequence[object], timeout: float | None) -> list[Any]:
        return [item async for item in self.daemon_stream(method, *args, timeout=timeout)]

    # -- connecting ---------------------------------------------------------------------------------------
    async def reconnect(self) -> AsyncLink:
        """Connect unless the connection is up, and offer the services again. Raises `DaemonNotRunning`."""
        link = self._link
        if link is not None and not link.closed:
            return link
        async with self._connecting:
            link = self._link
            if link is not None and not link.closed:
                return link
            if self._closing:
                raise session_over()
            link = await AsyncLink.connect(self.path, self._pool, self._methods, self._tasks.serve)
            self._group.start_soon(self._run_link, link)
            try:
                await link.wait_greeted(self.path, self._timeout)
            except BaseException:  # also cancelled: nobody would use it; raised again
                link.hang_up()
                raise
            self._link = link
        for name in list(self._services):
            await self._register(name)
        return link

    async def _run_link(self, link: AsyncLink) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(self._trim)
            await link.run()
            group.cancel_scope.cancel()
        while self._services and not self._closing and (self._link is link or self._link is None):
            await anyio.sleep(RECONNECT_SECONDS)
            try:
                await self.reconnect()
            except (DaemonNotRunning, ConnectionLost):
                continue

    async def _trim(self) -> None:
        while True:
            await anyio.sleep(TRIM_SECONDS)
            self._pool.trim(anyio.current_time())

    def _shut(self) -> None:
        self._closing = True
        self._pool.close()


def _cancel(link: AsyncLink, call: Call) -> None:
    if not call.over:
        link.machine.cancel(call)
        link.flush()
        link.call_over()
