"""The sync client: `lattica.connect()`.

Calls may come from any thread. Handlers of services are plain functions; they run in a few threads of the client's own,
those marked `@lattica.nonblocking` in the thread that reads the socket.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lattica.client.handlers import Request, check_methods, serve_requests
from lattica.client.link import Link, Waiter
from lattica.client.spaces import SyncSpaceHandle
from lattica.client.streams import OpenCall
from lattica.client.threads import HandlerThreads
from lattica.client.verbs import DaemonVerbs, OnProgress
from lattica.client.wire import (
    CONNECT_TIMEOUT,
    DAEMON,
    HANDLER_THREADS,
    RECONNECT_SECONDS,
    call_error,
    check_service_name,
    decode_result,
    encode_call,
    expect_callers,
    route_of,
    session_over,
)
from lattica.errors import ConnectionLost, DaemonNotRunning, DeadlineExceeded, LatticaError
from lattica.local.memfd import SegmentPool
from lattica.local.paths import socket_path
from lattica.rpc.methods import Method, methods_of
from lattica_protocols.rpc.frames import CLIENT_STREAM, RESPONSE, SERVER_STREAM, Buffer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lattica.client.verbs import Peer
    from lattica_protocols.rpc.calls import Call


def connect(
    home: str | os.PathLike[str] | None = None,
    *,
    timeout: float = CONNECT_TIMEOUT,
    handler_threads: int = HANDLER_THREADS,
) -> Client:
    """Connect to the daemon on this machine.

    `home`: the daemon's home directory; `None`: `LATTICA_HOME` or the default one. `timeout`: seconds to wait for the
    daemon. `handler_threads`: plain handlers that run at once. Raises `DaemonNotRunning`.
    """
    client = Client(home, timeout=timeout, handler_threads=handler_threads)
    try:
        client.reconnect()
    except BaseException:  # KeyboardInterrupt as well: its threads would live on; raised again
        client.close()
        raise
    return client


class Client(DaemonVerbs):
    """A connection to the daemon. Use it as a context manager, or `close` it. Safe to use from several threads.

    `peer` arguments are peer ids, as text in either form or as objects; `None` is the daemon itself. Arguments and
    results: None, bool, int, float, str, bytes, datetime, lists, dicts, NumPy arrays, torch tensors and buffers; arrays
    that arrive lie over the received memory. Arguments must not change until the call returns.
    """

    def __init__(
        self, home: str | os.PathLike[str] | None, *, timeout: float, handler_threads: int = HANDLER_THREADS
    ) -> None:
        self.path = socket_path(home)
        """The daemon's socket."""
        self._timeout = timeout
        self._pool = SegmentPool()
        self._handler_threads = handler_threads
        self._threads = HandlerThreads(handler_threads, "lattica-handler")
        self._methods: dict[str, Method] = {}
        self._services: dict[str, list[str]] = {}
        self._link: Link | None = None
        self._connecting = threading.Lock()
        self._closed = threading.Event()
        _clients.add(self)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection: calls that run fail, services are offered no more. Safe to call twice."""
        self._closed.set()
        link, self._link = self._link, None
        if link is not None:
            link.end("the client was closed")
            if link.thread is not threading.current_thread():
                link.thread.join()
        self._threads.close()
        self._pool.close()

    @property
    def connected(self) -> bool:
        """Whether the connection to the daemon is up. The next call connects when it is not."""
        link = self._link
        return link is not None and not link.closed

    # -- calls --------------------------------------------------------------------------------------------
    def call(
        self, peer: Peer | None, method: str, /, *args: object, timeout: float | None = None, **kwargs: object
    ) -> Any:
        """Call `"service.method"` of a peer and wait for the result; `timeout` in seconds, connecting included.

        Errors: `RemoteError` (the handler raised), `ServiceNotFound`, `InvalidArgument`, `ResourceExhausted`,
        `DeadlineExceeded`, `CallCancelled`, `ConnectError` (no connection to the peer), `ConnectionLost` (the peer or
        the daemon went away while the call ran), `PeerMisbehaved`, `DaemonNotRunning`.
        """
        route = route_of(peer)
        return self._wait(*self._start(route, method, args, kwargs, timeout, Waiter), timeout)

    def submit(
        self, peer: Peer | None, method: str, /, *args: object, timeout: float | None = None, **kwargs: object
    ) -> Future[Any]:
        """Like `call`, but does not wait: many calls can be in flight from one thread. Cancelling the future before
        it is done cancels the call. The result is decoded in the client's reading thread. `timeout` and errors as in
        `call`; the future has them."""
        future = _Future(method, not route_of(peer))
        link, future.call, _ = self._start(route_of(peer), method, args, kwargs, timeout, future.bound)
        future.link = link
        return future

    def stream(
        self, peer: Peer | None, method: str, /, *args: object, timeout: float | None = None, **kwargs: object
    ) -> Iterator[Any]:
        """Call a method that yields, and iterate over what it yields. Leaving the loop early ends the call when the
        iterator is closed or collected. `timeout`, for all of it, and errors as in `call`."""
        with self._open(route_of(peer), method, args, kwargs, timeout, SERVER_STREAM) as call:
            yield from call

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
        """A call that streams, for a `with` block. `sends`: we `send` items and `end`; `receives`: the method yields
        items (otherwise it returns one `result()`). `timeout` and errors as in `call`; they are raised where the object
        is used."""
        flags = (CLIENT_STREAM if sends else 0) | (SERVER_STREAM if receives else 0)
        return self._open(route_of(peer), method, args, kwargs, timeout, flags)

    def _open(
        self,
        route: bytes,
        method: str,
        args: Sequence[object],
        kwargs: Mapping[str, object],
        timeout: float | None,
        flags: int,
    ) -> OpenCall:
        deadline = _deadline(timeout)

        def owner(link: Link) -> OpenCall:
            return OpenCall(link, method, deadline, not route)

        call: OpenCall = self._start(route, method, args, kwargs, timeout, owner, flags)[2]
        return call

    def _start(
        self,
        route: bytes,
        method: str,
        args: Sequence[object],
        kwargs: Mapping[str, object],
        timeout: float | None,
        make_owner: Any,
        stream_flags: int = 0,
    ) -> tuple[Link, Call, Any]:
        """Send a REQUEST: where it went, the call, and its owner."""
        head, tails, flags = encode_call(method, args, kwargs)
        link = self._link
        if link is None or link.closed:
            link = self.reconnect()
        if tails:
            tails = link.stage(tails)
        deadline = _deadline(timeout)
        if threading.current_thread() is link.thread:
            raise RuntimeError("a nonblocking handler cannot call: it runs in the thread that would read the answer")
        owner = make_owner(link)
        with link.lock:
            call = link.open(method, head, tails, flags | stream_flags, deadline, route, owner)
            if stream_flags:
                owner.call = call
        return link, call, owner

    def _wait(self, link: Link, call: Call, waiter: Waiter, timeout: float | None) -> Any:
        try:
            done = waiter.wait(timeout)
        except BaseException:  # KeyboardInterrupt: the handler is to stop, too; raised again
            self._cancel(link, call)
            raise
        if not done:
            self._cancel(link, call)
            if not waiter.kind:
                raise DeadlineExceeded(f"the deadline of {call.method} has passed")
        if waiter.kind != RESPONSE:
            raise call_error(waiter.head, call.method, not call.route)
        return decode_result(call.method, waiter.head, waiter.tail)

    def _cancel(self, link: Link, call: Call) -> None:
        with link.lock:
            if not call.over:
                link.machine.cancel(call)
                link.flush()
                link.call_over()

    # -- services -----------------------------------------------------------------------------------------
    def serve(self, name: str, service: object) -> None:
        """Offer the public methods of an object, or a mapping of functions, as `name.method` to all peers.

        Plain methods run in threads, generators stream, `@lattica.nonblocking` ones run at once. Several workers may
        offer the same name: the daemon spreads the calls over those that are least busy. Raises `ValueError` when the
        name is taken by the daemon or no name, or when a method is `async`.
        """
        check_service_name(name)
        expect_callers()
        methods = methods_of(service)
        check_methods(name, methods)
        if name in self._services:
            raise ValueError(f"the service {name} is offered already")
        self._methods |= {f"{name}.{method}": found for method, found in methods.items()}
        self._services[name] = sorted(methods)
        try:
            self._register(name)
        except LatticaError:
            self._forget(name)
            raise

    def unserve(self, name: str) -> None:
        """Stop offering a service; calls that run finish. Does nothing when there is none of that name."""
        if name in self._services:
            self._forget(name)
            self._ask_daemon("local.unregister", name)

    def serve_forever(self) -> None:
        """Wait until the client is closed by another thread, or interrupted."""
        self._closed.wait()

    def _forget(self, name: str) -> None:
        for method in self._services.pop(name, []):
            self._methods.pop(f"{name}.{method}", None)

    def _register(self, name: str) -> None:
        self._ask_daemon("local.register", name, self._services[name])

    def _ask_daemon(self, method: str, *args: object) -> None:
        self._wait(*self._start(b"", method, args, {}, self._timeout, Waiter), self._timeout)

    # -- the daemon ---------------------------------------------------------------------------------------
    def daemon(self, method: str, /, *args: object, timeout: float | None = None) -> Any:
        return self._wait(*self._start(b"", f"{DAEMON}.{method}", args, {}, timeout, Waiter), timeout)

    def daemon_stream(self, method: str, /, *args: object, timeout: float | None = None) -> Iterator[Any]:
        return self.stream(None, f"{DAEMON}.{method}", *args, timeout=timeout)

    def space(self, space: str) -> SyncSpaceHandle:
        """A space of the daemon, by id or name, that reads like a dict. Asks nothing yet."""
        return SyncSpaceHandle(self, space)

    def share(self, path: str | os.PathLike[str], *, progress: OnProgress | None = None) -> str:
        """Add a file or folder to the store, announce it, and return its content id."""
        cid: str = self.share_details(path, progress=progress)["cid"]
        return cid

    def _daemon_last(
        self, method: str, args: Sequence[object], timeout: float | None, progress: OnProgress | None
    ) -> dict[str, Any]:
        for item in self.daemon_stream(method, *args, timeout=timeout):
            if item["state"] == "done":
                return {key: value for key, value in item.items() if key != "state"}
            if progress is not None:
                progress(item)
        raise ConnectionLost(f"the daemon ended {method} without a result")

    def _daemon_list(self, method: str, args: Sequence[object], timeout: float | None) -> list[Any]:
        return list(self.daemon_stream(method, *args, timeout=timeout))

    # -- connecting ---------------------------------------------------------------------------------------
    def reconnect(self) -> Link:
        """Connect unless the connection is up, and offer the services again. Raises `DaemonNotRunning`."""
        with self._connecting:
            link = self._link
            if link is not None and not link.closed:
                return link
            if self._closed.is_set():
                raise session_over()
            link = Link(
                self.path,
                self._timeout,
                methods=self._methods,
                pool=self._pool,
                threads=self._threads,
                serve=self._serve_requests,
                on_lost=self._lost,
            )
            self._link = link
        for name in list(self._services):
            self._register(name)
        return link

    def _serve_requests(self, link: Link, requests: list[Request]) -> None:
        serve_requests(link, requests, self._threads)

    def _lost(self, link: Link) -> None:
        """Called by the thread of a link that is over: a client that offers services has to come back by itself."""
        while self._services and not self._closed.wait(RECONNECT_SECONDS):
            try:
                self.reconnect()
            except (DaemonNotRunning, ConnectionLost):
                continue
            return


def _deadline(timeout: float | None) -> float | None:
    """Threads cannot wait for longer than 292 years, nor for infinity: that is no deadline."""
    return None if timeout is None or timeout >= threading.TIMEOUT_MAX else time.monotonic() + timeout


class _Future(Future[Any]):
    """The result of one call to come."""

    def __init__(self, method: str, to_daemon: bool) -> None:
        super().__init__()
        self.link: Link | None = None
        self.call: Call | None = None
        self._method = method
        self._to_daemon = to_daemon

    def bound(self, link: Link) -> _Future:
        self.link = link
        return self

    def cancel(self) -> bool:
        """Cancel the call. False when it is done already."""
        if not super().cancel():
            return False
        link, call = self.link, self.call
        if link is not None and call is not None:
            with link.lock:
                link.machine.cancel(call)
                link.flush()
                link.call_over()
        return True

    def on_frame(self, kind: int, call: Call, head: bytes, tail: Buffer) -> None:
        assert self.link is not None
        self.link.call_over()
        self.link.finished.append(lambda: self._finish(kind, head, tail))

    def _finish(self, kind: int, head: bytes, tail: Buffer) -> None:
        if not self.set_running_or_notify_cancel():
            return
        try:
            if kind != RESPONSE:
                raise call_error(head, self._method, self._to_daemon)
            self.set_result(decode_result(self._method, head, tail))
        except LatticaError as error:
            self.set_exception(error)


_clients: weakref.WeakSet[Client] = weakref.WeakSet()


def _after_fork() -> None:
    """A child of a fork has no reading thread: it connects anew when it calls. The parent's connection was abandoned by
    the time this is called."""
    for client in list(_clients):
        client._link = None
        client._connecting = threading.Lock()
        client._threads = HandlerThreads(client._handler_threads, "lattica-handler")
        client._services.clear()
        client._methods.clear()
        client._pool.abandon()
        client._pool = SegmentPool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
