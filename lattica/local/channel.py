"""One end of a local socket: RPC frames as bytes, long tails as file descriptors beside them (SCM_RIGHTS).

Like every channel it waits for nothing. Whoever owns it waits until the socket can be read, calls `read`, and calls
`on_writable` when the socket can be written while `wants_write` is true.

The n-th file descriptor of a sender carries the tail with the id n. It leaves with the frame that names it or later.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from lattica.errors import ConnectionLost
from lattica.local.memfd import LentSegments, SegmentPool
from lattica.local.segment import AVAILABLE
from lattica.rpc.channel import Channel, RequestHandler, Turn
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import LOCAL_FD_OVER, LOCAL_MAX_FDS, LOCAL_MAX_OUTPUT
from lattica_protocols.rpc.connection import RpcConnection, RpcLimits
from lattica_protocols.rpc.frames import Buffer

READ_BYTES: Final = 256 << 10
"""One read: about 1,500 small calls."""
SOCKET_BUFFER: Final = 1 << 20
HIGH_WATER: Final = 1 << 20
"""Unsent bytes above which callers and handlers wait before they add more."""
_MAX_IOV: Final = 512
_FD_SPACE: Final = socket.CMSG_SPACE(LOCAL_MAX_FDS * 4)
_READ_FLAGS: Final = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_SEND_FLAGS: Final = getattr(socket, "MSG_NOSIGNAL", 0)

LOCAL_LIMITS: Final = RpcLimits(detach_over=None)
"""Tails stay in the socket until the other side has said that it takes file descriptors."""
FEATURES: Final = frozenset({"fd"}) if AVAILABLE else frozenset()


class LocalChannel(Channel):
    """A connected, non-blocking Unix socket and its machine."""

    def __init__(
        self,
        sock: socket.socket,
        machine: RpcConnection,
        on_request: RequestHandler,
        *,
        clock: Callable[[], float],
        pool: SegmentPool,
        turn: Turn | None = None,
    ) -> None:
        super().__init__(machine, on_request, turn)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)
        self.sock = sock
        self.wants_write = False
        """The socket was full: call `on_writable` when it can be written."""
        self.on_blocked: Callable[[], None] = lambda: None
        """Called when `wants_write` becomes true."""
        self.closed = False
        self._clock = clock
        self._pool = pool
        self._lent = LentSegments()
        self._queue: deque[memoryview] = deque()
        self._queued_bytes = 0
        self._fds: deque[int] = deque()
        self._next_tail_id = 0
        self._buffer = bytearray(READ_BYTES)
        self._view = memoryview(self._buffer)
        _channels.add(self)

    def now(self) -> float:
        """The clock given to the constructor."""
        return self._clock()

    # -- reading ------------------------------------------------------------------------------------------
    def read(self) -> None:
        """Take what is in the socket and hand out the events. Call it when the socket is readable; may find nothing.

        Raises `ConnectionLost` at the end of the connection, `RemoteProtocolError` when the other side broke a rule.
        The caller ends the channel with `close` after either.
        """
        try:
            got, ancillary, flags, _ = self.sock.recvmsg_into([self._buffer], _FD_SPACE, _READ_FLAGS)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            raise ConnectionLost(f"the local connection was lost: {error.strerror}") from None
        fds = _received_fds(ancillary) if ancillary else ()
        try:
            if flags & socket.MSG_CTRUNC:
                raise RemoteProtocolError("more file descriptors came than one message may have")
            if not got:
                raise ConnectionLost("the other side closed the local connection")
            self.machine.receive_data(self._view[:got], self.now())
            for fd in fds:
                self._receive_fd_untrusted(fd)
        finally:
            for fd in fds:
                os.close(fd)
        self.dispatch()
        if self.machine.outbox.detach_over is None and self.machine.peer is not None:
            self._agree()

    def _agree(self) -> None:
        peer = self.machine.peer
        over = LOCAL_FD_OVER if peer is not None and "fd" in peer.features and AVAILABLE else 1 << 62
        self.machine.outbox.detach_over = over

    def _receive_fd_untrusted(self, fd: int) -> None:
        tail_id = self._next_tail_id
        self._next_tail_id = (tail_id + 1) & 0xFFFFFFFF
        self.machine.receive_tail(tail_id, self._pool.received.map_untrusted(fd, self))

    # -- writing ------------------------------------------------------------------------------------------
    def write_output(self) -> None:
        """Send what the machine has to say, as far as the socket takes it."""
        if self.closed:
            return
        machine = self.machine
        output = machine.poll_transmit()
        if output:
            for tail_id, length, buffers in machine.poll_detached():
                self._write_detached(tail_id, length, buffers)
            if not self._queue and not self._fds and len(output) == 1:
                self._send_one(output[0])
                return
            self._write(output)
            if not self.wants_write:
                self._send_queue()

    def on_writable(self) -> None:
        """The socket takes more."""
        self.wants_write = False
        if not self.closed:
            self._send_queue()

    def _write(self, buffers: Sequence[Buffer]) -> None:
        for buffer in buffers:
            if len(buffer):
                self._queue.append(memoryview(buffer))
                self._queued_bytes += len(buffer)
        if self._queued_bytes > LOCAL_MAX_OUTPUT:
            self.hang_up()

    def _write_detached(self, tail_id: int, length: int, buffers: Sequence[Buffer]) -> None:
        self._lent.collect()
        try:
            segment = self._pool.store(buffers, length)
        except OSError:  # no memory, or no file descriptor: the frame that names the tail is already on its way
            self.hang_up()
            return
        self._fds.append(os.dup(segment.fd))  # its own, as the segment may be forgotten before the socket takes it
        self._lent.add(segment)

    def _send_one(self, data: Buffer) -> None:
        """The usual case: one buffer, nothing before it."""
        try:
            sent = self.sock.send(data, _SEND_FLAGS)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            return  # the reader finds out, with what was still readable before
        if sent < len(data):
            self._write([memoryview(data)[sent:]])
            self._block()

    def _send_queue(self) -> None:
        queue, fds = self._queue, self._fds
        while queue:
            batch = [queue[i] for i in range(min(len(queue), _MAX_IOV))]
            ancillary = []
            now_fds = [fds[i] for i in range(min(len(fds), LOCAL_MAX_FDS))]
            if now_fds:
                ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", now_fds)))
                if len(fds) > LOCAL_MAX_FDS:
                    batch = [queue[0][:1]]  # every message with file descriptors needs a byte of its own
            try:
                sent = self.sock.sendmsg(batch, ancillary, _SEND_FLAGS)
            except (BlockingIOError, InterruptedError):
                self._block()
                return
            except OSError as error:
                if error.errno == errno.ETOOMANYREFS:  # the receiver has not taken what is on the way
                    self._block()
                return
            for fd in now_fds:
                os.close(fd)
                fds.popleft()
            self._sent(sent)

    def _sent(self, sent: int) -> None:
        self._queued_bytes -= sent
        queue = self._queue
        while sent:
            first = queue[0]
            if sent < len(first):
                queue[0] = first[sent:]
                return
            sent -= len(first)
            queue.popleft()

    def _block(self) -> None:
        if not self.wants_write:
            self.wants_write = True
            self.on_blocked()

    def hang_up(self) -> None:
        """End the connection from a place that cannot: the reader finds an end."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def queued_bytes(self) -> int:
        """Bytes that the socket has not taken yet."""
        return self._queued_bytes

    def congested(self) -> bool:
        """The other side reads slower than we write."""
        if self.machine.outbox.unsent > HIGH_WATER:
            self.write_output()  # what a turn gathers would not be counted before its end
        return self._queued_bytes > HIGH_WATER

    # -- ending -------------------------------------------------------------------------------------------
    def close(self, reason: str) -> None:
        """Close the socket; every call on it ends. Safe to call twice."""
        if self.closed:
            return
        self._close_descriptors()
        self._pool.received.sender_gone(self)
        self.lost(reason)

    def abandon(self) -> None:
        """In the child of a fork: while it has the socket, too, the other side does not see the end of its parent."""
        self._close_descriptors()
        self._pool.received.abandon()

    def _close_descriptors(self) -> None:
        self.closed = True
        self.sock.close()
        self._queue.clear()
        self._queued_bytes = 0
        while self._fds:
            os.close(self._fds.popleft())
        self._lent.close()


_channels: weakref.WeakSet[LocalChannel] = weakref.WeakSet()


def _in_child() -> None:
    for channel in list(_channels):
        channel.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def _received_fds(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)
