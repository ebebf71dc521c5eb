"""Two nodes with a TCP transport over loopback, for the tests of the transport and of its streams."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from lattica.interfaces import Connection, Stream
from lattica.transports.muxed import MuxedConnection
from lattica.transports.tcp import TcpTransport
from lattica_protocols.keys import PrivateKey
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId

LOOPBACK = Multiaddr.parse("/ip4/127.0.0.1/tcp/0")
ALICE = PrivateKey.generate(b"a" * 32)
BOB = PrivateKey.generate(b"b" * 32)
ALICE_ID = PeerId.from_public_key(ALICE.public_key)
BOB_ID = PeerId.from_public_key(BOB.public_key)


class Node:
    """A transport, and a queue of what dialled it."""

    def __init__(self, key: PrivateKey, nursery: trio.Nursery, **options: Any) -> None:
        self.transport = TcpTransport(key, nursery, **options)
        self._send, self.inbound = trio.open_memory_channel[Connection](100)
        self.addr = LOOPBACK

    async def listen(self, addr: Multiaddr = LOOPBACK) -> None:
        self.listener = await self.transport.listen(addr, self._on_connection)
        self.addr = self.listener.addrs[0]

    async def _on_connection(self, connection: Connection) -> None:
        await self._send.send(connection)


class Pair:
    """Alice dialled Bob."""

    def __init__(self, alice: Node, bob: Node, outbound: MuxedConnection, inbound: MuxedConnection) -> None:
        self.alice, self.bob = alice, bob
        self.outbound, self.inbound = outbound, inbound

    async def streams(self) -> tuple[Stream, Stream]:
        ours = await self.outbound.open_stream()
        return ours, await self.inbound.accept_stream()


@asynccontextmanager
async def two_nodes(**options: Any) -> AsyncIterator[tuple[Node, Node]]:
    async with trio.open_nursery() as nursery:
        alice, bob = Node(ALICE, nursery, **options), Node(BOB, nursery, **options)
        await bob.listen()
        yield alice, bob
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def connected(**options: Any) -> AsyncIterator[Pair]:
    async with two_nodes(**options) as (alice, bob):
        outbound = await alice.transport.dial(bob.addr, BOB_ID)
        inbound = await bob.inbound.receive()
        assert isinstance(inbound, MuxedConnection)
        yield Pair(alice, bob, outbound, inbound)


async def send_forever(stream: Stream) -> None:
    while True:
        await stream.send_all(bytes(100_000))


class Recorder:
    """A sink that keeps everything and can be waited for."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.log: list[Any] = []
        self.closed = trio.Event()
        self.changed = trio.Event()

    def data_received(self, data: memoryview) -> None:
        self.data += data
        self._wake()

    def eof_received(self) -> None:
        self.log.append("eof")
        self._wake()

    def stream_closed(self, error: Exception | None) -> None:
        self.log.append(error)
        self.closed.set()

    def _wake(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    async def wait_for(self, size: int) -> None:
        while len(self.data) < size:
            await self.changed.wait()
