"""Against go-libp2p: QUIC, TCP + Noise + yamux, identify, ping, Kademlia, in both directions."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from p2pd_peer import (
    FIND_PROVIDERS,
    GET_VALUE,
    PROVIDE,
    PUT_VALUE,
    DhtRequest,
    P2pd,
    closest_to,
    running_p2pd,
)

import lattica
from lattica.interfaces import Stream
from lattica.node import Node
from lattica_protocols.cid import Cid
from lattica_protocols.keys import PrivateKey
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId

pytestmark = pytest.mark.interop

GO_KAD = "/ipfs/kad/1.0.0"
LISTEN = ["/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"]


@asynccontextmanager
async def node(**settings: object) -> AsyncIterator[Node]:
    config = lattica.NodeConfig(listen=LISTEN, kad_protocol=GO_KAD, kad_mode="server", **settings)  # type: ignore[arg-type]
    async with lattica.open_node(config) as opened:
        yield opened


def address(addrs: list[Multiaddr], transport: str) -> Multiaddr:
    """The one of `addrs` that uses `transport`."""
    for addr in addrs:
        target = addr.host_port()
        if target is not None and target[0] == transport and not addr.is_circuit:
            return addr
    raise AssertionError(f"no {transport} address among {addrs}")


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_we_dial_go(run, p2pd_binary: Path, transport: str) -> None:
    async def main(go: P2pd) -> None:
        async with node() as ours:
            connection = await ours.host.connect(go.peer_id, [address(go.addrs, transport)])
            assert connection.path == ("tcp" if transport == "tcp" else "quic")
            info = await ours.wait_identified(go.peer_id)
            assert "/ipfs/ping/1.0.0" in info.protocols
            for _ in range(3):
                assert 0 < await ours.ping.ping(go.peer_id) < 5

    with running_p2pd(p2pd_binary, "-dhtServer") as go:
        run(main, go)


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_go_dials_us_and_streams(run, p2pd_binary: Path, transport: str) -> None:
    async def echo(stream: Stream) -> None:
        while data := await stream.receive_some():
            await stream.send_all(data)
        await stream.aclose()

    async def main(go: P2pd) -> None:
        async with node() as ours:
            ours.host.handle("/echo/1", echo)
            addr = address(ours.host.listen_addrs(), transport)
            await trio.to_thread.run_sync(go.connect, ours.peer_id, [addr])
            assert ours.peer_id in await trio.to_thread.run_sync(go.peers)
            stream = await trio.to_thread.run_sync(go.open_stream, ours.peer_id, "/echo/1")
            payload = bytes(range(256)) * 4096  # 1 MiB: several windows of the muxer's default
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, stream.send, payload)
                assert await trio.to_thread.run_sync(stream.read_exactly, len(payload)) == payload
            await trio.to_thread.run_sync(stream.close)

    with running_p2pd(p2pd_binary, "-dhtServer") as go:
        run(main, go)


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_we_open_a_stream_that_go_serves(run, p2pd_binary: Path, tmp_path: Path, transport: str) -> None:
    def serve(listener: socket.socket) -> bytes:
        """Takes one stream: the daemon's uvarint-framed StreamInfo, then the stream's bytes."""
        accepted, _ = listener.accept()
        with accepted, accepted.makefile("rb") as file:
            file.read(file.read(1)[0])
            data = file.read(5)
            accepted.sendall(data[::-1])
            file.read()  # ending first would make the daemon reset the stream, and QUIC drops data in flight then
            return data

    async def main(go: P2pd) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "s"))
            listener.listen()
            listener.settimeout(20)
            await trio.to_thread.run_sync(go.serve, "/reverse/1", tmp_path / "s")
            async with node() as ours, trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, serve, listener)
                await ours.host.connect(go.peer_id, [address(go.addrs, transport)])
                stream = await ours.host.open_stream(go.peer_id, "/reverse/1")
                await stream.send_all(b"abcde")
                assert await stream.receive_exactly(5) == b"edcba"
                await stream.close_write()

    with running_p2pd(p2pd_binary) as go:
        run(main, go)


def test_kademlia_in_both_directions(run, p2pd_binary: Path) -> None:
    digest = bytes(range(32))
    cid = Cid.v1(0x55, 0x12, digest)

    async def main(one: P2pd, two: P2pd) -> None:
        async with node() as ours:
            # Go learns who we are by identify, so it has to be connected to us.
            await ours.host.connect(one.peer_id, [address(one.addrs, "tcp")])
            await ours.host.connect(two.peer_id, [address(two.addrs, "udp")])
            await ours.wait_identified(one.peer_id)
            await ours.wait_identified(two.peer_id)
            while ours.kad.info()["peers"] < 2:  # the table follows the same events as we do
                await trio.lowlevel.checkpoint()
            assert {one.peer_id, two.peer_id} <= {found.peer for found in await ours.kad.closest_peers(digest)}
            # FIND_NODE asked by Go, once it has checked that we answer and put us into its table
            found = await trio.to_thread.run_sync(closest_to, one, ours.peer_id)
            assert any(answer.value == ours.peer_id.to_bytes() for answer in found)
            # Go provides, we find
            await trio.to_thread.run_sync(one.dht, DhtRequest(type=PROVIDE, cid=cid.to_bytes()))
            providers = {peer async for peer, _ in ours.kad.find_providers(cid.multihash.to_bytes(), 1)}
            assert one.peer_id in providers
            # We provide, Go finds
            other = Cid.v1(0x55, 0x12, digest[::-1])
            await ours.kad.provide(other.multihash.to_bytes())
            answers = await trio.to_thread.run_sync(
                two.dht, DhtRequest(type=FIND_PROVIDERS, cid=other.to_bytes(), count=1, timeout=10)
            )
            assert [a.peer.id for a in answers if a.peer] == [ours.peer_id.to_bytes()]

    with running_p2pd(p2pd_binary, "-dhtServer") as one, running_p2pd(p2pd_binary, "-dhtServer") as two:
        run(main, one, two)


def test_values_in_both_directions(run, p2pd_binary: Path) -> None:
    """A network of two: each has nobody but the other in its table, and stores public keys there."""
    ours_of = PrivateKey.generate(b"1" * 32)
    theirs_of = PrivateKey.generate(b"2" * 32)

    def record(key: PrivateKey) -> tuple[bytes, bytes]:
        return b"/pk/" + PeerId.from_public_key(key.public_key).to_bytes(), key.public_key.to_protobuf()

    async def main(go: P2pd) -> None:
        async with node() as ours:
            await ours.host.connect(go.peer_id, [address(go.addrs, "tcp")])
            while ours.kad.info()["peers"] < 1:
                await trio.lowlevel.checkpoint()
            key, value = record(ours_of)
            assert await ours.kad.put_record(key, value) == 1
            (found,) = await trio.to_thread.run_sync(go.dht, DhtRequest(type=GET_VALUE, key=key, timeout=10))
            assert found.value == value
            await trio.to_thread.run_sync(closest_to, go, ours.peer_id)  # until it has us in its table
            key, value = record(theirs_of)
            await trio.to_thread.run_sync(go.dht, DhtRequest(type=PUT_VALUE, key=key, value=value, timeout=10))
            assert ours.kad.server.values.get(key, ours.kad.clock()) == value

    with running_p2pd(p2pd_binary, "-dhtServer") as go:
        run(main, go)
