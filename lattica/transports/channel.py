"""What Noise and yamux run over: a duplex byte channel that takes and gives bytes without waiting.

`SocketChannel` is a connected TCP socket. `StreamChannel` is a stream of another connection (a relayed
circuit).
"""

from __future__ import annotations

import contextlib
import socket
from abc import ABC, abstractmethod
from typing import Final

import trio

from lattica.interfaces import Stream

_CIRCUIT_HIGH_WATER: Final = 256 * 1024
"""Bytes we let a circuit's outer stream queue before we wait."""


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

    def close(self) -> None:
        if self._socket.fileno() != -1:
            trio.lowlevel.notify_closing(self._socket)
            with contextlib.suppress(OSError):  # the peer is gone already
                self._socket.shutdown(socket.SHUT_WR)
            self._socket.close()


class StreamChannel(Channel):
    """A stream used as a channel. Owns it."""

    __slots__ = ("_ended", "_received", "_stream")

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._received = memoryview(b"")
        self._ended = False

    def receive_now(self, buffer: memoryview) -> int | None:
        size = min(len(buffer), len(self._received))
        if size == 0:
            return 0 if self._ended else None
        buffer[:size] = self._received[:size]
        self._received = self._received[size:]
        return size

    async def wait_receivable(self) -> None:
        if not self._received and not self._ended:
            self._received = memoryview(await self._stream.receive_some(65536))
            self._ended = not self._received

    def send_now(self, data: memoryview) -> int:
        room = _CIRCUIT_HIGH_WATER - self._stream.queued_bytes()
        if room <= 0:
            return 0
        taken = bytes(data[:room])
        self._stream.write(taken)
        return len(taken)

    async def wait_sendable(self) -> None:
        await self._stream.drain()

    def close(self) -> None:
        self._stream.reset()
