"""Connections inside one process: the interfaces of `lattica.interfaces` over a queue with latency.

A link delivers what its sides send in order, `latency` seconds later, from a task of its own, so that sinks are
never called from inside the peer's `write`. Each stream direction has a window of 256 KiB: a receiver that does
not read stops its sender, as on the real transports.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import trio

from lattica.errors import ConnectionLost, DialError, StreamReset, WrongPeer
from lattica.host import Host, open_host
from lattica.interfaces import (
    Buffer,
    Connection,
    Direction,
    Listener,
    OnConnection,
    Stream,
    StreamSink,
    Transport,
)
from lattica_protocols.errors import ProtocolError
from lattica_protocols.keys import PrivateKey
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId

WINDOW = 256 * 1024
_Delivery = Callable[[], None]


class _Link:
    """Delivers calls in order, each `latency` seconds after it was put in."""

    def __init__(self, latency: float) -> None:
        self.latency = latency
        self.send, self._receive = trio.open_memory_channel[tuple[float, _Delivery]](float("inf"))
        self.cut = False

    def put(self, delivery: _Delivery) -> None:
        if not self.cut:
            self.send.send_nowait((trio.current_time() + self.latency, delivery))

    async def run(self) -> None:
        async for due, delivery in self._receive:
            await trio.sleep_until(due)
            if not self.cut:
                delivery()


class MemoryStream(Stream):
    """One end of an in-memory stream."""

    def __init__(self, connection: MemoryConnection, number: int) -> None:
        self.connection: MemoryConnection = connection
        self.protocol = None
        self.number = number
        self._inbox: deque[bytes] = deque()
        self._sink: StreamSink | None = None
        self._paused = False
        self._eof = False
        self._eof_told = False
        self._write_closed = False
        self._error: Exception | None = None
        self._ended = False
        self._unacked = 0  # bytes sent that the peer has not consumed
        self._changed = trio.Event()

    # -- sending ------------------------------------------------------------------------------------------
    def write(self, *buffers: Buffer) -> None:
        self._check_writable()
        data = b"".join(bytes(b) for b in buffers)
        if not data:
            return
        self._unacked += len(data)
        self.connection.sent_bytes += len(data)
        self.connection.transmit(lambda other: other.deliver_data(self.number, data))

    def _check_writable(self) -> None:
        if self._error is not None:
            raise self._error
        if self._write_closed:
            raise StreamReset("our direction of the stream is already closed")

    def queued_bytes(self) -> int:
        return max(0, self._unacked - WINDOW)

    async def drain(self, below: int | None = None) -> None:
        await trio.lowlevel.checkpoint()
        while self._unacked > (WINDOW if below is None else max(0, below - 1)) and self._error is None:
            await self._changed.wait()
        if self._error is not None:
            raise self._error

    async def send_all(self, data: Buffer) -> None:
        self.write(data)
        await self.drain()

    async def close_write(self) -> None:
        await trio.lowlevel.checkpoint()
        if self._error is not None:
            raise self._error
        if not self._write_closed:
            self._write_closed = True
            self.connection.transmit(lambda other: other.deliver_eof(self.number))
            self._maybe_ended()

    # -- receiving ----------------------------------------------------------------------------------------
    async def _wait_readable(self) -> None:
        await trio.lowlevel.checkpoint()
        while not self._inbox and not self._eof:
            if self._error is not None:
                raise self._error
            await self._changed.wait()
        if self._error is not None and not self._inbox:
            raise self._error

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        await self._wait_readable()
        if not self._inbox:
            return b""
        data = self._inbox.popleft()
        if len(data) > max_bytes:
            self._inbox.appendleft(data[max_bytes:])
            data = data[:max_bytes]
        self._consumed(len(data))
        return data

    async def receive_into(self, buffer: Buffer) -> int:
        view = memoryview(buffer)
        data = await self.receive_some(len(view))
        view[: len(data)] = data
        return len(data)

    def push_back(self, data: bytes) -> None:
        if data:
            self._inbox.appendleft(data)

    def _consumed(self, n: int) -> None:
        self.connection.transmit(lambda other: other.deliver_ack(self.number, n))

    def set_sink(self, sink: StreamSink) -> None:
        self._sink = sink
        self._flush_to_sink()

    def _flush_to_sink(self) -> None:
        sink = self._sink
        if sink is None:
            return
        try:
            while self._inbox and not self._paused and self._sink is sink:
                data = self._inbox.popleft()
                self._consumed(len(data))
                sink.data_received(memoryview(data))
            if self._eof and not self._inbox and not self._eof_told:
                self._eof_told = True
                sink.eof_received()
        except ProtocolError:
            self.reset()
        self._maybe_ended()

    def pause_sink(self) -> None:
        self._paused = True

    def resume_sink(self) -> None:
        self._paused = False
        self._flush_to_sink()

    # -- ending -------------------------------------------------------------------------------------------
    def reset(self) -> None:
        if self._error is None and not self._ended:
            self.connection.transmit(lambda other: other.deliver_reset(self.number))
            self.fail(StreamReset("the stream was reset by us"))

    async def aclose(self) -> None:
        if self._error is None:
            await self.close_write()
            self._inbox.clear()

    def fail(self, error: Exception) -> None:
        if self._error is None and not self._ended:
            self._error = error
            self._end(error)

    def _maybe_ended(self) -> None:
        if self._eof and self._write_closed and not self._inbox and self._error is None and not self._ended:
            self._end(None)

    def _end(self, error: Exception | None) -> None:
        self._ended = True
        self.connection.forget(self.number)
        if self._sink is not None:
            self._sink.stream_closed(error)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # -- from the link ------------------------------------------------------------------------------------
    def deliver(self, data: bytes) -> None:
        self._inbox.append(data)
        self.connection.received_bytes += len(data)
        self._flush_to_sink()
        self._wake()

    def deliver_eof(self) -> None:
        self._eof = True
        self._flush_to_sink()
        self._maybe_ended()
        self._wake()

    def deliver_ack(self, n: int) -> None:
        self._unacked -= n
        self._wake()


class MemoryConnection(Connection):
    """One end of an in-memory connection."""

    def __init__(self, peer_id: PeerId, local: Multiaddr, remote: Multiaddr, direction: Direction, link: _Link) -> None:
        self.peer_id = peer_id
        self.local_addr = local
        self.remote_addr = remote
        self.direction = direction
        self.path = "memory"
        self.opened_at = trio.current_time()
        self.closed = trio.Event()
        self.link = link
        self.other: MemoryConnection | None = None
        self._streams: dict[int, MemoryStream] = {}
        self._numbers = itertools.count(1 if direction == "outbound" else 2, 2)
        self._accept_send, self._accept_receive = trio.open_memory_channel[MemoryStream](float("inf"))

    def transmit(self, delivery: Callable[[MemoryConnection], None]) -> None:
        other = self.other
        assert other is not None
        if not self.closed.is_set():
            self.link.put(lambda: delivery(other))

    def forget(self, number: int) -> None:
        self._streams.pop(number, None)

    def _open_inbound(self, number: int) -> None:
        if not self.closed.is_set():
            stream = self._streams[number] = MemoryStream(self, number)
            self._accept_send.send_nowait(stream)

    def deliver_data(self, number: int, data: bytes) -> None:
        if number in self._streams:
            self._streams[number].deliver(data)

    def deliver_eof(self, number: int) -> None:
        if number in self._streams:
            self._streams[number].deliver_eof()

    def deliver_reset(self, number: int) -> None:
        if number in self._streams:
            self._streams[number].fail(StreamReset("the peer reset the stream"))

    def deliver_ack(self, number: int, n: int) -> None:
        if number in self._streams:
            self._streams[number].deliver_ack(n)

    async def open_stream(self) -> Stream:
        await trio.lowlevel.checkpoint()
        if self.closed.is_set():
            raise ConnectionLost("the connection is closed")
        number = next(self._numbers)
        stream = self._streams[number] = MemoryStream(self, number)
        self.transmit(lambda other: other._open_inbound(number))
        return stream

    async def accept_stream(self) -> Stream:
        try:
            return await self._accept_receive.receive()
        except trio.EndOfChannel:
            raise ConnectionLost("the connection is closed") from None

    def stream_count(self) -> int:
        return len(self._streams)

    def cut(self) -> None:
        """Nothing arrives any more, in either direction, and neither end is told."""
        assert self.other is not None
        self.link.cut = self.other.link.cut = True

    async def aclose(self) -> None:
        self.abort()
        await trio.lowlevel.checkpoint()

    def abort(self, error: Exception | None = None) -> None:
        if self.closed.is_set():
            return
        self.transmit(lambda other: other._lost(ConnectionLost("the peer closed the connection")))
        self._lost(error)

    def _lost(self, error: Exception | None) -> None:
        if self.closed.is_set():
            return
        self.close_error = error
        self.closed.set()
        self._accept_send.close()
        for stream in list(self._streams.values()):
            stream.fail(error if isinstance(error, ConnectionLost) else ConnectionLost("the connection is closed"))


class _MemoryListener(Listener):
    def __init__(self, network: MemoryNetwork, addr: Multiaddr) -> None:
        self.addrs = [addr]
        self._network = network

    async def aclose(self) -> None:
        self._network.listeners.pop(str(self.addrs[0]), None)
        await trio.lowlevel.checkpoint()


class MemoryTransport(Transport):
    """Dials and listens on `/memory/N` within one `MemoryNetwork`."""

    def __init__(self, network: MemoryNetwork, key: PrivateKey, nursery: trio.Nursery) -> None:
        self._network = network
        self._peer_id = PeerId.from_public_key(key.public_key)
        self._nursery = nursery

    def can_dial(self, addr: Multiaddr) -> bool:
        return addr.value("memory") is not None and not addr.is_circuit

    can_listen = can_dial

    async def dial(self, addr: Multiaddr, expected: PeerId | None) -> Connection:
        addr = addr.without_peer()
        await trio.sleep(2 * self._network.latency)
        found = self._network.listeners.get(str(addr))
        if found is None:
            raise DialError(f"nobody listens on {addr}")
        peer_id, on_connection, nursery = found
        if expected is not None and peer_id != expected:
            raise WrongPeer(f"{peer_id} answered at {addr}, not {expected}")
        ours, theirs = self._network.connect(self._peer_id, peer_id, addr)
        self._nursery.start_soon(ours.link.run)
        nursery.start_soon(theirs.link.run)
        nursery.start_soon(on_connection, theirs)
        return ours

    async def listen(self, addr: Multiaddr, on_connection: OnConnection) -> Listener:
        await trio.lowlevel.checkpoint()
        addr = addr.without_peer()
        if addr.value("memory") == "0":
            addr = self._network.new_addr()
        if str(addr) in self._network.listeners:
            raise DialError(f"{addr} is already in use")
        self._network.listeners[str(addr)] = (self._peer_id, on_connection, self._nursery)
        return _MemoryListener(self._network, addr)


class MemoryNetwork:
    """Hosts that reach each other by `/memory/N`, `latency` seconds one way."""

    def __init__(self, latency: float = 0.0) -> None:
        self.latency = latency
        self.listeners: dict[str, tuple[PeerId, OnConnection, trio.Nursery]] = {}
        self._numbers = itertools.count(1)

    def new_addr(self) -> Multiaddr:
        return Multiaddr.parse(f"/memory/{next(self._numbers)}")

    def transport(self, key: PrivateKey, nursery: trio.Nursery) -> MemoryTransport:
        """A transport for the host that owns `key`."""
        return MemoryTransport(self, key, nursery)

    def connect(self, dialler: PeerId, listener: PeerId, addr: Multiaddr) -> tuple[MemoryConnection, MemoryConnection]:
        """Both ends of a new connection, without tasks: run `link.run` of each."""
        ours_addr = self.new_addr()
        ours = MemoryConnection(listener, ours_addr, addr, "outbound", _Link(self.latency))
        theirs = MemoryConnection(dialler, addr, ours_addr, "inbound", _Link(self.latency))
        ours.other, theirs.other = theirs, ours
        return ours, theirs


def memory_pair(nursery: trio.Nursery, latency: float = 0.0) -> tuple[MemoryConnection, MemoryConnection]:
    """Two ends of one connection between two made-up peers, running in `nursery`."""
    network = MemoryNetwork(latency)
    ids = [PeerId.from_public_key(PrivateKey.generate(bytes([n]) * 32).public_key) for n in (1, 2)]
    ours, theirs = network.connect(ids[0], ids[1], network.new_addr())
    nursery.start_soon(ours.link.run)
    nursery.start_soon(theirs.link.run)
    return ours, theirs


@asynccontextmanager
async def open_memory_host(
    network: MemoryNetwork, seed: int, *, listen: Sequence[str] = ("/memory/0",)
) -> AsyncIterator[Host]:
    """A host on `network` whose key is made from `seed`; no services are started on it."""
    key = PrivateKey.generate(seed.to_bytes(32, "big"))
    async with open_host(
        key,
        lambda host: [network.transport(key, host.nursery)],
        listen=[Multiaddr.parse(a) for a in listen],
    ) as host:
        yield host
