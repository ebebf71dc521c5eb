"""One connection of the sync client: a thread that reads, and callers that write themselves.

Everything that touches the channel holds `lock`; nothing that waits for another thread does. The thread sleeps in
`poll` until the socket has something, a deadline comes, or another thread rings the bell.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lattica.client.threads import HELP_AFTER, HandlerThreads
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

TRIM_SECONDS = 5.0
"""How often shared memory that nobody uses is looked for."""

ServeRequests = Callable[["Link", "list[tuple[Call, Method, bytes, Buffer]]"], None]


class Link(LocalChannel):
    """A connected socket to the daemon, with its thread. `serve` gets the inbound calls of a read, without the lock."""

    def __init__(
        self,
        path: Path,
        timeout: float,
        *,
        methods: Mapping[str, Method],
        pool: SegmentPool,
        threads: HandlerThreads,
        serve: ServeRequests,
        on_lost: Callable[[Link], None],
    ) -> None:
        """Connect and wait for the daemon's greeting. Raises `DaemonNotRunning`."""
        sock = new_socket()
        try:
            sock.settimeout(timeout)
            sock.connect(str(path))
            sock.setblocking(False)
        except OSError as error:
            sock.close()
            raise connect_error(path, error) from None
        super().__init__(sock, new_machine(pool), self._collect, clock=time.monotonic, pool=pool)
        self.lock = threading.RLock()  # a collected iterator cancels its call, whatever its thread is doing
        self.finished: list[Callable[[], None]] = []
        """What to run once the lock is free: code of the user that wants to know the end of a call."""
        self.capacity = threading.Condition(self.lock)
        """Callers wait here while the daemon takes no more calls or does not keep up."""
        self.waiting_callers = 0
        self.machine.session_call.owner = self
        self.on_blocked = self.ring
        self._bell_out, self._bell_in = socket.socketpair()
        self._bell_out.setblocking(False)
        self._bell_in.setblocking(False)
        self._methods = methods
        self._threads = threads
        self._serve = serve
        self._on_lost = on_lost
        self._requests: list[tuple[Call, Method, bytes, Buffer]] = []
        self._greeted = threading.Event()
        self.thread = threading.Thread(target=self._run, name="lattica-client", daemon=True)
        self.thread.start()
        if not self._greeted.wait(timeout) or self.closed:
            self.end("the daemon did not greet")
            raise no_daemon(path)

    # -- calls --------------------------------------------------------------------------------------------
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
        """Send a REQUEST; hold the lock. Waits while the daemon takes no more calls."""
        machine = self.machine
        if not machine.can_open() or self.congested():
            self._wait_for_capacity(deadline)
        if machine.lost or machine.going_away:
            raise session_over()
        now = 0.0 if deadline is None else time.monotonic()
        try:
            call = machine.open_call(
                method, head, tails, flags=flags, deadline=deadline, now=now, route=route, owner=owner
            )
        except LocalProtocolError as error:
            raise InvalidArgument(f"{method}: {error}") from error
        self.flush()
        return call

    def _wait_for_capacity(self, deadline: float | None) -> None:
        machine = self.machine
        self.waiting_callers += 1
        try:
            while not (machine.lost or machine.going_away or (machine.can_open() and not self.congested())):
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise DeadlineExceeded("the deadline passed before the daemon took the call")
                self.capacity.wait(left)
        finally:
            self.waiting_callers -= 1

    def stage(self, tails: Sequence[Buffer]) -> Sequence[Buffer]:
        """Copy long buffers into shared memory; do not hold the lock."""
        return stage(self._pool, tails, self.machine.limits.detach_over)

    def call_over(self) -> None:
        """A call of ours is over; hold the lock."""
        if self.waiting_callers:
            self.capacity.notify()

    def on_frame(self, kind: int, call: Call, head: bytes, tail: Buffer) -> None:
        """Events of the session itself."""
        if kind == HELLO:
            self._greeted.set()
        if kind in (HELLO, GOAWAY) and self.waiting_callers:
            self.capacity.notify_all()

    # -- the thread ---------------------------------------------------------------------------------------
    def ring(self) -> None:
        """Wake the thread: the socket is full, or there is an end."""
        with contextlib.suppress(OSError):
            self._bell_in.send(b"\0")

    def end(self, reason: str) -> None:
        """Close the connection, from any thread."""
        with self.lock:
            self._close(reason)
        self.ring()

    def _close(self, reason: str) -> None:
        if not self.closed:
            self.close(reason)
            if self.waiting_callers:
                self.capacity.notify_all()

    def abandon(self) -> None:
        """See `LocalChannel`."""
        super().abandon()
        self._bell_out.close()
        self._bell_in.close()

    def _run(self) -> None:
        with self.lock:
            self.flush()
        try:
            self._loop()
        finally:
            self._greeted.set()
            self._bell_out.close()
            self._bell_in.close()
            self._run_finished()
            self._on_lost(self)

    def _run_finished(self) -> None:
        while self.finished:
            self.finished.pop(0)()

    def _loop(self) -> None:
        poll = select.poll()
        fd, bell = self.sock.fileno(), self._bell_out.fileno()
        poll.register(bell, select.POLLIN)
        poll.register(fd, select.POLLIN)
        writing = False
        trim_at = time.monotonic() + TRIM_SECONDS
        help_at = 0.0
        while True:
            if self.wants_write != writing:
                writing = self.wants_write
                poll.modify(fd, select.POLLIN | select.POLLOUT if writing else select.POLLIN)
            ready = poll.poll(self._timeout())
            with self.lock:
                if self.closed:
                    return
                try:
                    for number, events in ready:
                        if number == bell:
                            self._bell_out.recv(4096)
                        elif events & select.POLLOUT:
                            self.on_writable()
                            if self.waiting_callers and not self.congested():
                                self.capacity.notify_all()
                        if number == fd and events & ~select.POLLOUT:
                            self.read()
                except ConnectionLost as error:
                    self._close(str(error))
                except RemoteProtocolError as error:
                    self._close(f"the daemon broke the protocol: {error}")
                now = time.monotonic()
                due = self.machine.next_timeout()
                if due is not None and due <= now and not self.closed:
                    self.expire()
                self.flush()  # answers that handler threads held back
                requests, self._requests = self._requests, []
                closed = self.closed
            self._run_finished()
            if requests:
                self._serve(self, requests)
                help_at = now + HELP_AFTER
            elif now >= help_at and self._threads.waiting():
                self._threads.help_out()
                help_at = now + HELP_AFTER
            if closed:
                return
            if now >= trim_at:
                trim_at = now + TRIM_SECONDS
                self._pool.trim(now)

    def _timeout(self) -> float:
        """Milliseconds the thread may sleep."""
        if self._threads.waiting():
            return HELP_AFTER * 1000
        due = self.machine.next_timeout()
        if due is None:
            return TRIM_SECONDS * 1000
        return max(0.0, min(due - time.monotonic(), TRIM_SECONDS)) * 1000

    def _collect(self, channel: Channel, call: Call, head: bytes, tail: Buffer) -> None:
        method = self._methods.get(call.method)
        if method is None:
            message = f"the worker offers no {call.method}"
            self.machine.fail(call, SERVICE_NOT_FOUND, "ServiceNotFound", message)
        else:
            self._requests.append((call, method, head, tail))

    def deadlines_changed(self) -> None:
        """The thread looks at the deadlines each time it goes to sleep; callers watch their own."""


class Waiter:
    """A thread that waits for the RESPONSE of one call."""

    __slots__ = ("_bell", "_link", "head", "kind", "tail")

    def __init__(self, link: Link) -> None:
        self._link = link
        self._bell = threading.Lock()
        self._bell.acquire()
        self.kind = 0
        self.head = b""
        self.tail: Buffer = b""

    def on_frame(self, kind: int, call: Call, head: bytes, tail: Buffer) -> None:
        self.kind, self.head, self.tail = kind, head, tail
        self._bell.release()
        self._link.call_over()

    def wait(self, seconds: float | None) -> bool:
        """False when the time is up."""
        if seconds is None:
            return self._bell.acquire()
        return self._bell.acquire(timeout=max(0.0, min(seconds, threading.TIMEOUT_MAX)))
