"""QUIC over a path that loses, changes its address or its MTU, or dies."""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from quic_pair import Pair, echo, open_pair, target
from waiting import remains, until

from lattica.errors import ConnectionLost, PathLost
from lattica.transports import quic_connection
from lattica.transports.quic_engine import Address
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.paths.heartbeat import Pace

Run = Callable[..., Any]
PACE = Pace(probe=0.1, dead=0.3, keep_alive=0.2)


class Network:
    """A UDP middlebox between a client and `target`: loses, limits sizes, and changes its port like a NAT."""

    def __init__(self, target: Address) -> None:
        self.target = target
        self.rng = random.Random(3)
        self.loss = 0.0
        self.max_size = 100_000
        self.client: Address | None = None
        self.stolen: Any = None
        """A socket from which whatever the client sends reaches the server first."""
        self.front = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.other_front: Any = None
        """Where the server seems to be after its NAT changed its port; what is sent to the old one is lost."""
        self.scope: trio.CancelScope | None = None

    @property
    def addr(self) -> Multiaddr:
        return Multiaddr.quic(*self.front.getsockname())

    async def run(self, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        await self.front.bind(("127.0.0.1", 0))
        with self.front:
            task_status.started()
            while True:
                with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as back, trio.CancelScope() as self.scope:
                    await back.bind(("127.0.0.1", 0))

                    async def backwards(back: Any = back) -> None:
                        while True:
                            data = await back.recv(65536)
                            if self.client is not None and self.passes(data):
                                await (self.other_front or self.front).sendto(data, self.client)

                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(backwards)
                        while True:
                            data, self.client = await self.front.recvfrom(65536)
                            if self.other_front is not None:
                                continue
                            if self.stolen is not None:
                                await self.stolen.sendto(data, self.target)
                            if self.passes(data):
                                await back.sendto(data, self.target)

    def passes(self, data: bytes) -> bool:
        return len(data) <= self.max_size and self.rng.random() >= self.loss

    def rebind(self) -> None:
        assert self.scope is not None
        self.scope.cancel()


@asynccontextmanager
async def open_network() -> AsyncIterator[tuple[Pair, Network]]:
    async with open_pair() as pair:
        network = Network(target(pair.addr))
        await pair.nursery.start(network.run)
        yield pair, network


def test_peer_behind_a_nat_that_changes_its_port(run: Run) -> None:
    async def main() -> None:
        async with open_network() as (pair, network):
            ours, theirs = await pair.connect(network.addr)
            pair.nursery.start_soon(echo, theirs)
            stream = await ours.open_stream()
            stream.write(b"one")
            assert await stream.receive_exactly(3) == b"one"
            before = theirs.remote_addr
            network.rebind()
            await trio.testing.wait_all_tasks_blocked()
            stream.write(b"two")
            assert await stream.receive_exactly(3) == b"two"
            assert theirs.remote_addr != before

    run(main)


def test_who_copies_packets_does_not_get_the_connection(run: Run) -> None:
    """A copy that arrives before the original looks like a move; nobody answers the challenge there."""

    async def main() -> None:
        async with open_network() as (pair, network):
            ours, theirs = await pair.connect(network.addr)
            pair.nursery.start_soon(echo, theirs)
            stream = await ours.open_stream()
            stream.write(b"one")
            assert await stream.receive_exactly(3) == b"one"
            before = theirs.remote_addr
            with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as thief:
                await thief.bind(("127.0.0.1", 0))
                network.stolen = thief
                stream.write(b"two")
                await until(lambda: theirs.remote_addr != before)
                network.stolen = None
                assert await stream.receive_exactly(3) == b"two"
                for _ in range(20):
                    stream.write(b"again")
                    assert await stream.receive_exactly(5) == b"again"
                await until(lambda: theirs.remote_addr == before)
                taken = 0
                thief._sock.setblocking(False)
                while True:
                    try:
                        taken += len(thief._sock.recv(65536))
                    except BlockingIOError:
                        break
                assert taken <= 3 * 1500, "more than three times what came from there"
            assert not ours.closed.is_set()

    run(main)


def test_the_dialled_side_changes_its_port(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the dialler may move (RFC 9000 section 9): what comes from elsewhere is not the server's, and the silence of
    its address ends the connection, so that the session can go on over another (`tests/nat/test_moving.py`)."""
    monkeypatch.setattr(quic_connection, "PACE", PACE)

    async def main() -> None:
        async with open_network() as (pair, network):
            ours, theirs = await pair.connect(network.addr)
            stream = await ours.open_stream()
            stream.write(b"one")
            assert await (await theirs.accept_stream()).receive_exactly(3) == b"one"
            with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as elsewhere:
                await elsewhere.bind(("127.0.0.1", 0))
                network.other_front = elsewhere
                before, received = ours.remote_addr, ours.received_bytes
                push = await theirs.open_stream()
                push.write(b"from elsewhere")
                stream.write(b"two")
                await until(lambda: ours.received_bytes > received)  # it did come
                await ours.closed.wait()
                assert ours.remote_addr == before
            assert isinstance(ours.close_error, PathLost)
            await theirs.closed.wait()
            network.other_front = None
            again, _ = await pair.connect(network.addr)
            assert again.established

    run(main)


def test_lossy_path(run: Run) -> None:
    async def main() -> None:
        async with open_network() as (pair, network):
            network.loss = 0.05
            ours, theirs = await pair.connect(network.addr)
            pair.nursery.start_soon(echo, theirs)
            data = random.Random(5).randbytes(300_000)
            stream = await ours.open_stream()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, data)
                assert await stream.receive_exactly(len(data)) == data

    run(main)


def test_path_mtu_is_found(run: Run) -> None:
    async def main() -> None:
        async with open_network() as (pair, network):
            network.max_size = 1400
            ours, theirs = await pair.connect(network.addr)
            pair.nursery.start_soon(echo, theirs)
            await until(lambda: ours.engine.datagram_bytes == 1400 - 8)  # the largest of the table that fits
            direct, _ = await pair.connect()
            await until(lambda: direct.engine.datagram_bytes == 16384)

    run(main)


def test_black_hole(run: Run) -> None:
    """The path's MTU shrinks and nobody tells us."""

    async def main() -> None:
        async with open_network() as (pair, network):
            ours, theirs = await pair.connect(network.addr)
            pair.nursery.start_soon(echo, theirs)
            await until(lambda: ours.engine.datagram_bytes == theirs.engine.datagram_bytes == 16384)
            network.max_size = 1300
            data = random.Random(5).randbytes(100_000)
            stream = await ours.open_stream()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, data)
                assert await stream.receive_exactly(len(data)) == data
            assert ours.engine.datagram_bytes < 1300

    run(main)


def test_dead_path(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quic_connection, "PACE", PACE)

    async def main() -> None:
        async with open_network() as (pair, network):
            ours, theirs = await pair.connect(network.addr)
            await remains(lambda: not ours.closed.is_set() and not theirs.closed.is_set(), 2 * PACE.dead)  # idle
            network.loss = 1.0
            await ours.closed.wait()
            await theirs.closed.wait()
            assert isinstance(ours.close_error, ConnectionLost)

    run(main)
