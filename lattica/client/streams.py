"""A call of the sync client that streams, in one direction or both."""

from __future__ import annotations

import threading
import time
from collections import deque
from types import TracebackType
from typing import Any

from lattica.client.link import Link
from lattica.client.wire import call_error, decode_result, session_over
from lattica.errors import CallCancelled, DeadlineExceeded, InvalidArgument, LatticaError
from lattica_protocols.errors import LocalProtocolError
from lattica_protocols.rpc.calls import Call
from lattica_protocols.rpc.frames import END, ERROR, ITEM, RESPONSE, SERVER_STREAM, Buffer
from lattica_protocols.rpc.tensors import encode_value


class OpenCall:
    """A context manager and an iterator over the items that arrive. Leaving the block cancels a call that still runs.

    One thread may read while another writes. Made by `Client.open_call` and `Client.stream`.
    """

    def __init__(self, link: Link, method: str, deadline: float | None, to_daemon: bool) -> None:
        self._link = link
        self._method = method
        self._deadline = deadline
        self._to_daemon = to_daemon
        self._changed = threading.Condition(link.lock)
        self._items: deque[tuple[bytes, Buffer]] = deque()
        self._error: LatticaError | None = None
        self._result: tuple[bytes, Buffer] | None = None
        self._over = False
        self.call: Call | None = None
        """Set once the REQUEST is out."""

    def __enter__(self) -> OpenCall:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    def __iter__(self) -> OpenCall:
        return self

    def __next__(self) -> Any:
        with self._link.lock:
            while not self._items:
                if self._over:
                    if self._error is not None:
                        raise self._error
                    raise StopIteration
                self._wait()
            head, tail = self._items.popleft()
            assert self.call is not None
            self._link.machine.grant(self.call, 1, len(head) + len(tail))
            self._link.flush()
        return decode_result(self._method, head, tail)

    def send(self, value: object) -> None:
        """Send one item; waits while the other side does not keep up. Raises the call's error when it is over.

        Raises `InvalidArgument` when the value cannot be sent.
        """
        try:
            head, tails = encode_value(value)
        except LocalProtocolError as error:
            raise InvalidArgument(f"an item of {self._method}: {error}") from error
        link = self._link
        with link.lock:
            call = self.call
            assert call is not None
            while not self._over and not call.can_send():
                self._wait()
            if self._over:
                raise self._error or CallCancelled(f"the other side ended {self._method}")
            try:
                link.machine.send_item(call, head, tails)
            except LocalProtocolError as error:
                raise InvalidArgument(f"an item of {self._method}: {error}") from error
            link.flush()

    def end(self) -> None:
        """No more items from here."""
        with self._link.lock:
            if self.call is not None:
                self._link.machine.end(self.call)
                self._link.flush()

    def result(self) -> Any:
        """What a method returned that does not yield. Ends our direction first."""
        self.end()
        if self.call is not None and self.call.flags & SERVER_STREAM:  # the one result is the one item
            return next(self, None)
        with self._link.lock:
            while self._result is None:
                if self._error is not None:
                    raise self._error
                self._wait()
            head, tail = self._result
        return decode_result(self._method, head, tail)

    def cancel(self) -> None:
        """End the call: the handler on the other side is told. Does nothing when it is over."""
        with self._link.lock:
            self._cancel(CallCancelled(f"{self._method} was cancelled here"))

    def _cancel(self, error: LatticaError) -> None:
        if self.call is not None and not self._over:
            self._link.machine.cancel(self.call)
            self._link.flush()
            self._finish(error)

    def _wait(self) -> None:
        """Wait for an event of the call; holds the lock. Raises `DeadlineExceeded`."""
        left = None
        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            if left <= 0:
                error = DeadlineExceeded(f"the deadline of {self._method} has passed")
                self._cancel(error)
                raise error
        self._changed.wait(left)
        if self._link.closed and not self._over:
            self._finish(session_over())

    def on_frame(self, kind: int, call: Call, head: bytes, tail: Buffer) -> None:
        if kind == ITEM:
            self._items.append((head, tail))
        elif kind == RESPONSE:
            self._result = (head, tail)
            self._finish(None)
        elif kind == END:
            self._finish(None)
        elif kind == ERROR:
            self._finish(call_error(head, self._method, self._to_daemon))
        self._changed.notify_all()

    def _finish(self, error: LatticaError | None) -> None:
        self._over = True
        self._error = error
        self._link.call_over()
        self._changed.notify_all()
