"""Two whole nodes over real sockets: find, fetch, call."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import trio

import lattica
import lattica.node
from lattica.host import PeerConnected, open_host
from lattica.node import Node, NodeConfig, open_node
from lattica.transports.tcp import TcpTransport
from lattica_protocols.keys import PrivateKey
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId

TCP, QUIC = "/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"


class Expert:
    async def forward(self, x: np.ndarray) -> np.ndarray:
        return x * 2

    async def generate(self, n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i


@asynccontextmanager
async def two_nodes(tmp_path: Path, listen: str) -> AsyncIterator[tuple[Node, Node]]:
    """The second knows only the first's address, as its bootstrap peer."""
    async with open_node(NodeConfig(home=tmp_path / "one", listen=[listen], kad_mode="server")) as one:
        addr = f"{one.host.listen_addrs()[0]}/p2p/{one.peer_id}"
        config = NodeConfig(home=tmp_path / "two", listen=[listen], bootstrap=[addr], kad_mode="server")
        async with open_node(config) as two:
            await two.wait_identified(one.peer_id)
            await one.wait_identified(two.peer_id)
            yield one, two


@pytest.mark.parametrize("listen", [TCP, QUIC])
def test_a_file_is_found_by_its_cid_and_fetched(run, tmp_path: Path, listen: str) -> None:
    async def main() -> None:
        async with two_nodes(tmp_path, listen) as (one, two):
            source = tmp_path / "model.bin"
            source.write_bytes(os.urandom(5_000_000))
            shared = await one.blobs.share(source)
            result = await two.blobs.fetch(shared.cid, tmp_path / "copy.bin")
            assert result.bytes == 5_000_000
            digests = [hashlib.sha256(p.read_bytes()).digest() for p in (source, tmp_path / "copy.bin")]
            assert digests[0] == digests[1]

    run(main)


@pytest.mark.parametrize("listen", [TCP, QUIC])
def test_calls_with_tensors_and_streams(run, tmp_path: Path, listen: str) -> None:
    async def main() -> None:
        async with two_nodes(tmp_path, listen) as (one, two):
            one.rpc.serve("expert", Expert())
            x = np.arange(100_000, dtype=np.float32).reshape(100, 1000)
            assert np.array_equal(await two.rpc.call(one.peer_id, "expert.forward", x, timeout=10), x * 2)
            assert [i async for i in two.rpc.stream(one.peer_id, "expert.generate", 50)] == list(range(50))
            with pytest.raises(lattica.ServiceNotFound):
                await two.rpc.call(one.peer_id, "nobody.home", timeout=10)

    run(main)


@pytest.mark.parametrize("stale", [False, True], ids=["no address known", "a stale address known"])
def test_a_peer_is_called_by_its_id_alone(run, stale: bool) -> None:
    async def main() -> None:
        async with open_node(NodeConfig(listen=[TCP], kad_mode="server")) as door:
            addr = f"{door.host.listen_addrs()[0]}/p2p/{door.peer_id}"
            async with (
                open_node(NodeConfig(listen=[TCP], kad_mode="client", bootstrap=[addr])) as worker,
                open_node(NodeConfig(listen=[TCP], kad_mode="client", bootstrap=[addr])) as caller,
            ):
                await door.wait_identified(worker.peer_id)
                await caller.wait_identified(door.peer_id)
                assert not caller.host.peerstore.addrs(worker.peer_id)
                if stale:
                    gone = Multiaddr.parse("/ip4/127.0.0.1/tcp/1")
                    caller.host.peerstore.add_addrs(worker.peer_id, [gone], 3600)
                worker.rpc.serve("expert", Expert())
                x = np.ones(4, dtype=np.float32)
                assert np.array_equal(await caller.rpc.call(worker.peer_id, "expert.forward", x, timeout=10), x * 2)

    run(main)


def test_a_signed_value_written_here_is_read_there(run, tmp_path: Path) -> None:
    async def main() -> None:
        async with two_nodes(tmp_path, TCP) as (one, two):
            await one.kad.put_value("greeting", b"hello")
            found = await two.kad.get_value("greeting", one.peer_id)
            assert found.value == b"hello"

    run(main)


def test_identity_survives_and_bad_addresses_are_named(run, tmp_path: Path) -> None:
    async def main() -> None:
        ids = []
        for _ in range(2):
            async with open_node(NodeConfig(home=tmp_path / "home", listen=[TCP])) as node:
                ids.append(node.peer_id)
        assert ids[0] == ids[1]
        with pytest.raises(lattica.ConfigError, match=r"/ip4/1\.2\.3/tcp/1"):
            async with open_node(NodeConfig(listen=["/ip4/1.2.3/tcp/1"])):
                pass
        with pytest.raises(lattica.ConfigError, match="PEER_ID"):
            async with open_node(NodeConfig(listen=[TCP], bootstrap=["/ip4/1.2.3.4/tcp/1"])):
                pass

    run(main)


def test_connecting_says_what_is_wrong(run, tmp_path: Path) -> None:
    async def main() -> None:
        async with two_nodes(tmp_path, TCP) as (one, two):
            stranger = PeerId.from_public_key(PrivateKey.generate(bytes(32)).public_key)
            with pytest.raises(lattica.WrongPeer, match=str(one.peer_id)):
                await two.host.connect(stranger, one.host.listen_addrs())
            sink = await trio.open_tcp_listeners(0, host="127.0.0.1")
            port = sink[0].socket.getsockname()[1]
            await sink[0].aclose()
            with pytest.raises(lattica.ConnectError, match=str(port)):
                await two.host.connect(
                    PeerId.from_public_key(PrivateKey.generate(bytes([1]) * 32).public_key),
                    [Multiaddr.parse(f"/ip4/127.0.0.1/tcp/{port}")],
                )

    run(main)


def test_a_bootstrap_peer_that_is_lost_before_it_says_who_it_is_is_tried_again(run, monkeypatch) -> None:
    monkeypatch.setattr(lattica.node, "IDENTIFY_TIMEOUT", 0.1)

    async def main() -> None:
        key = PrivateKey.generate(bytes(32))
        async with open_host(
            key, lambda host: [TcpTransport(key, host.nursery)], listen=[Multiaddr.parse(TCP)]
        ) as mute:
            events = mute.subscribe()
            addr = f"{mute.listen_addrs()[0]}/p2p/{mute.peer_id}"
            async with open_node(NodeConfig(listen=[], bootstrap=[addr])) as node:
                for _ in range(2):
                    async for event in events:
                        if isinstance(event, PeerConnected):
                            event.connection.abort()
                            break
                assert node.host.peerstore.info(mute.peer_id) is None

    run(main)


def test_waiting_for_a_peer_leaves_nothing_behind(run, tmp_path: Path) -> None:
    async def main() -> None:
        async with two_nodes(tmp_path, TCP) as (one, two):
            one.host.addrs_changed()
            before = len(one.host._subscribers)
            for _ in range(3):
                await one.wait_identified(two.peer_id)
            one.host.addrs_changed()
            assert len(one.host._subscribers) == before

    run(main)
