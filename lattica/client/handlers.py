"""Inbound calls of the sync client: handlers in threads, quick ones in the reading thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lattica.client.wire import caller_of, decode_request, handler_error
from lattica.rpc.methods import Method, Style
from lattica.rpc.server import _caller
from lattica_protocols.rpc.calls import Call
from lattica_protocols.rpc.frames import INVALID_ARGUMENT, ITEM, SERVER_STREAM, Buffer
from lattica_protocols.rpc.tensors import encode_value

if TYPE_CHECKING:
    from lattica.client.link import Link
    from lattica.client.threads import HandlerThreads

Request = tuple[Call, Method, bytes, Buffer]


def serve_requests(link: Link, requests: Sequence[Request], threads: HandlerThreads) -> None:
    """Run the requests of one read. Called by the reading thread, without the lock."""
    jobs = []
    for call, method, head, tail in requests:
        if method.style is Style.INLINE:
            _run(link, call, method, head, tail, None)
        else:
            jobs.append(partial(_run, link, call, method, head, tail, threads))
    if jobs:
        threads.submit(jobs)
    with link.lock:
        link.flush()


def _run(
    link: Link, call: Call, method: Method, head: bytes, tail: Buffer, threads: HandlerThreads | None
) -> None:
    """One call, from its arguments to its answer. The answer is written now unless more jobs wait, whose answers leave
    with it; the reading thread writes within a millisecond at the latest."""
    if call.over:
        return
    request = decode_request(call, method, head, tail)
    if len(request) == 3:
        _fail(link, call, request)
        return
    args, kwargs = request
    token = _caller.set(caller_of(call))
    try:
        result = method.function(*args, **kwargs)
        if method.style is Style.THREAD_STREAM:
            _Sender(link, call).send_all(iter(result))
            return
        value, tails = encode_value(result)
        del result
        _respond(link, call, value, tails, threads)
    except BaseException as error:  # whatever the handler raises is the caller's answer; no signal arrives in threads
        _fail(link, call, handler_error(error, call, method, args, kwargs))
    finally:
        _caller.reset(token)


def _respond(
    link: Link, call: Call, head: bytes, tails: Sequence[Buffer], threads: HandlerThreads | None
) -> None:
    staged = link.stage(tails)
    with link.lock:
        if call.flags & SERVER_STREAM:  # the caller iterates: the one result is the one item
            if not call.over:
                link.machine.send_item(call, head, staged)
            link.machine.end(call)
        else:
            link.machine.respond(call, head, staged)
        if threads is not None and not threads.waiting():
            link.flush()


def _fail(link: Link, call: Call, status: tuple[int, str, str]) -> None:
    with link.lock:
        link.machine.fail(call, *status)
        link.flush()


class _Sender:
    """Sends what a generator yields, as fast as the caller takes it."""

    def __init__(self, link: Link, call: Call) -> None:
        self._link = link
        self._call = call
        self._changed = threading.Condition(link.lock)
        with link.lock:
            call.owner = self

    def on_frame(self, kind: int, call: Call, head: bytes, tail: Buffer) -> None:
        if kind == ITEM:
            self._link.machine.fail(call, INVALID_ARGUMENT, "InvalidArgument", f"{call.method} takes no items")
            self._link.flush()
        self._changed.notify()

    def send_all(self, items: Iterator[Any]) -> None:
        """Send every item, then the end. Closes the generator when the caller has had enough."""
        try:
            for item in items:
                head, tails = encode_value(item)
                if not self._send(head, self._link.stage(tails)):
                    return
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()
        with self._link.lock:
            self._link.machine.end(self._call)
            self._link.flush()

    def _send(self, head: bytes, tails: Sequence[Buffer]) -> bool:
        link, call = self._link, self._call
        with link.lock:
            while not call.over and not call.can_send():
                self._changed.wait()
            if call.over:
                return False
            link.machine.send_item(call, head, tails)
            link.flush()
        return True


def check_methods(name: str, methods: dict[str, Method]) -> None:
    """The sync client has no event loop for `async def`."""
    for method, found in methods.items():
        if found.style in (Style.TASK, Style.TASK_STREAM):
            raise ValueError(f"{name}.{method} is async: serve it with lattica.aconnect(), or write a plain def")


