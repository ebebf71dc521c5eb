"""Two QUIC transports on loopback, connected when a test wants it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import trio
import trio.testing

from lattica.errors import ConnectionLost
from lattica.transports.quic import QuicListener, QuicTransport
from lattica.transports.quic_connection import QuicLink
from lattica.transports.quic_stream import QuicStream
from lattica_protocols.keys import PrivateKey
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId

SERVER_KEY = PrivateKey.generate(b"s" * 32)
CLIENT_KEY = PrivateKey.generate(b"c" * 32)
SERVER_ID = PeerId.from_public_key(SERVER_KEY.public_key)
CLIENT_ID = PeerId.from_public_key(CLIENT_KEY.public_key)
LOOPBACK = "/ip4/127.0.0.1/udp/0/quic-v1"


@dataclass
class Pair:
    nursery: trio.Nursery
    server: QuicTransport
    client: QuicTransport
    listener: QuicListener
    inbound: trio.MemoryReceiveChannel[QuicLink]

    @property
    def addr(self) -> Multiaddr:
        return self.listener.addrs[0]

    async def connect(self, addr: Multiaddr | None = None) -> tuple[QuicLink, QuicLink]:
        """(the client's end, the server's end)"""
        ours = await self.client.dial(addr or self.addr, SERVER_ID)
        return ours, await self.inbound.receive()

    async def streams(self) -> tuple[QuicStream, QuicStream]:
        ours, theirs = await self.connect()
        stream = await ours.open_stream()
        stream.write(b"!")
        other = await theirs.accept_stream()
        assert await other.receive_exactly(1) == b"!"
        return stream, other


@asynccontextmanager
async def open_pair(listen: str = LOOPBACK) -> AsyncIterator[Pair]:
    send, receive = trio.open_memory_channel[QuicLink](1000)

    async def on_connection(connection: Any) -> None:
        await send.send(connection)

    async with trio.open_nursery() as nursery:
        server, client = QuicTransport(nursery, SERVER_KEY), QuicTransport(nursery, CLIENT_KEY)
        listener = await server.listen(Multiaddr.parse(listen), on_connection)
        yield Pair(nursery, server, client, listener, receive)
        nursery.cancel_scope.cancel()


async def echo(connection: QuicLink) -> None:
    async def one(stream: QuicStream) -> None:
        while data := await stream.receive_some():
            await stream.send_all(data)
        await stream.close_write()

    async with trio.open_nursery() as nursery:
        while True:
            try:
                nursery.start_soon(one, await connection.accept_stream())
            except ConnectionLost:
                return


async def read_all(stream: QuicStream) -> bytes:
    parts = []
    while data := await stream.receive_some():
        parts.append(data)
    return b"".join(parts)


async def ignore(connection: Any) -> None:
    """Accept a connection and leave it alone."""


def target(addr: Multiaddr) -> tuple[str, int]:
    found = addr.host_port()
    assert found is not None
    return found[1], found[2]
