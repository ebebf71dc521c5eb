"""What Noise and yamux run over: a duplex byte channel that takes and gives bytes without waiting.

`SocketChannel` is a connected TCP socket. `StreamChannel` is a stream of another connection (a relayed
circuit).
"""

from __future__ import annotations

import contextlib
import math
import socket
import sys
from abc import ABC, abstractmethod
from collections import deque
from typing import Final

import trio

from lattica.errors import ConnectionLost, LatticaError, PathLost
from lattica.interfaces import Stream

_CIRCUIT_HIGH_WATER: Final = 256 * 1024
"""Bytes of a circuit that wait at either side: to be sent, and to be decrypted."""
_LAST_ACK_AT: Final = 8 + 12 * 4
"""Of tcpi_last_ack_recv in linux/tcp.h: milliseconds since a segment with an acknowledgement came."""


class Channel(ABC):
    """One ordered, reliable byte channel. Errors are `OSError` or `lattica.errors.LatticaError`."""

    @abstractmethod
    def receive_now(self, buffer: memoryview) -> int | None:
        """Bytes that were put into `buffer`, 0 at the end of the channel, `None` when there are none yet."""

    @abstractmethod
    async def wait_receivable(self) -> None:
        """Until `receive_now` has something to say."""

    @abstractmethod
    def send_now(self, data: memoryview) -> int:
        """Bytes taken from the front of `data`, 0 when none fit now. `data` may be changed afterwards."""

    @abstractmethod
    async def wait_sendable(self) -> None:
        """Until `send_now` may take something."""

    def heard_at(self, now: float) -> float:
        """When the peer's system last acknowledged something, while more is on the way to it; `-inf` when nothing is,
        or our system does not tell. What we ask the peer then may still wait behind what is on the way."""
        return -math.inf

    @abstractmethod
    def close(self) -> None:
        """Give the channel up. What was sent still goes out as far as the system manages; safe to call
        twice."""


class SocketChannel(Channel):
    """A connected, non-blocking stream socket. Owns it."""

    __slots__ = ("_recv_into", "_send", "_socket")

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._recv_into = sock.recv_into
        self._send = sock.send

    def receive_now(self, buffer: memoryview) -> int | None:
        try:
            return self._recv_into(buffer)
        except BlockingIOError:
            return None

    async def wait_receivable(self) -> None:
        await trio.lowlevel.wait_readable(self._socket)

    def send_now(self, data: memoryview) -> int:
        try:
            return self._send(data)
        except BlockingIOError:
            return 0

    async def wait_sendable(self) -> None:
        await trio.lowlevel.wait_writable(self._socket)

    def heard_at(self, now: float) -> float:
        if sys.platform != "linux" or self._socket.fileno() == -1:
            return -math.inf
        import fcntl
        import termios

        try:
            if not int.from_bytes(fcntl.ioctl(self._socket, termios.TIOCOUTQ, bytes(4)), sys.byteorder):
                return -math.inf
            info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAST_ACK_AT + 4)
        except OSError:
            return -math.inf
        if len(info) < _LAST_ACK_AT + 4:
            return -math.inf
        return now - int.from_bytes(info[_LAST_ACK_AT:], sys.byteorder) / 1000

    def close(self) -> None:
        if self._socket.fileno() != -1:
            trio.lowlevel.notify_closing(self._socket)
            with contextlib.suppress(OSError):  # the peer is gone already
                self._socket.shutdown(socket.SHUT_WR)
            self._socket.close()


class StreamChannel(Channel):
    """A stream used as a channel: a circuit. Owns it, and is its sink.

    `nursery`: where the stream is ended in order, so that what was queued still goes out; without one it is reset.
    """

    def __init__(self, stream: Stream, nursery: trio.Nursery | None = None) -> None:
        self._stream = stream
        self._nursery = nursery
        self._received: deque[memoryview] = deque()
        self._size = 0
        self._paused = False
        self._ended = False
        self._closed = False
        self._error: Exception | None = None
        self._waiter: trio.lowlevel.Task | None = None
        stream.set_sink(self)

    # -- the stream's sink -----------------------------------------------------------------------------------
    def data_received(self, data: memoryview) -> None:
        self._received.append(memoryview(bytes(data)))
        self._size += len(data)
        if self._size >= _CIRCUIT_HIGH_WATER and not self._paused:
            self._paused = True
            self._stream.pause_sink()
        self._wake()

    def eof_received(self) -> None:
        self._ended = True
        self._wake()

    def stream_closed(self, error: Exception | None) -> None:
        self._ended = True
        self._error = error
        self._wake()

    def _wake(self) -> None:
        task, self._waiter = self._waiter, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    # -- the channel -----------------------------------------------------------------------------------------
    def receive_now(self, buffer: memoryview) -> int | None:
        filled, room = 0, len(buffer)
        while self._received and filled < room:
            head = self._received[0]
            size = min(len(head), room - filled)
            buffer[filled : filled + size] = head[:size]
            filled += size
            if size < len(head):
                self._received[0] = head[size:]
            else:
                self._received.popleft()
        self._size -= filled
        if self._paused and self._size < _CIRCUIT_HIGH_WATER // 2:
            self._paused = False
            self._stream.resume_sink()
        if filled or not room:
            return filled
        if self._error is not None:
            silent = isinstance(self._stream.connection.close_error, PathLost)
            raise (PathLost if silent else ConnectionLost)(str(self._error))
        return 0 if self._ended else None

    async def wait_receivable(self) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._received or self._ended or self._closed:
            return
        self._waiter = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._stop_waiting)

    def _stop_waiting(self, _: object) -> trio.lowlevel.Abort:
        self._waiter = None
        return trio.lowlevel.Abort.SUCCEEDED

    def send_now(self, data: memoryview) -> int:
        room = _CIRCUIT_HIGH_WATER - self._stream.queued_bytes()
        if room <= 0:
            return 0
        taken = data[:room]
        self._stream.write_through(taken)
        return len(taken)

    async def wait_sendable(self) -> None:
        await self._stream.drain()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._nursery is None or self._error is not None:
            self._stream.reset()
        else:
            self._nursery.start_soon(self._finish)
        self._wake()

    async def _finish(self) -> None:
        with contextlib.suppress(LatticaError):  # it ended by itself meanwhile
            await self._stream.aclose()
