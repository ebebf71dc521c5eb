"""A, R and B over loopback: B is reached through R alone, with everything that works over a direct connection."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

import lattica
from lattica.errors import ConnectError
from lattica.node import Node, NodeConfig, open_node
from lattica_protocols.multiaddr import Multiaddr

TCP, QUIC = "/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"


class Expert:
    async def double(self, x: int) -> int:
        return 2 * x

    async def count(self, n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i


@asynccontextmanager
async def relay_node(listen: str = TCP, **settings: Any) -> AsyncIterator[Node]:
    async with open_node(NodeConfig(listen=[listen], relay_serve=True, relay_use="never", **settings)) as relay:
        yield relay


def addr_of(node: Node) -> str:
    return f"{node.host.listen_addrs()[0]}/p2p/{node.peer_id}"


@asynccontextmanager
async def hidden_node(relay: Node, **settings: Any) -> AsyncIterator[Node]:
    """A peer that listens nowhere, and has a reservation at `relay`."""
    async with open_node(NodeConfig(listen=[], relay_use="always", relays=[addr_of(relay)], **settings)) as node:
        while not node.relay_client.reservations():
            await trio.lowlevel.checkpoint()
        yield node


def circuit_to(node: Node) -> Multiaddr:
    (addr,) = node.host.advertised_addrs()
    return addr.with_peer(node.peer_id)


@asynccontextmanager
async def trio_of_nodes(tmp_path: Path, listen: str = TCP, **settings: Any) -> AsyncIterator[tuple[Node, Node, Node]]:
    """A dialled B through R, which is all that A knows of B."""
    async with relay_node(listen, **settings) as relay, hidden_node(relay, home=tmp_path / "b") as b:
        async with open_node(NodeConfig(home=tmp_path / "a", listen=[], relay_use="never")) as a:
            connection = await a.host.connect(None, [circuit_to(b)])
            assert connection.path == "relay"
            await a.wait_identified(b.peer_id)
            await b.wait_identified(a.peer_id)
            yield a, relay, b


@pytest.mark.parametrize("listen", [TCP, QUIC])
def test_calls_and_content_over_a_relay(run, tmp_path: Path, listen: str) -> None:
    async def main() -> None:
        async with trio_of_nodes(tmp_path, listen) as (a, relay, b):
            b.rpc.serve("expert", Expert())
            assert await a.rpc.call(b.peer_id, "expert.double", 21, timeout=5) == 42
            assert [i async for i in a.rpc.stream(b.peer_id, "expert.count", 1000)] == list(range(1000))
            source = tmp_path / "model.bin"
            source.write_bytes(os.urandom(5_000_000))
            shared = await b.blobs.share(source)
            await a.blobs.fetch(shared.cid, tmp_path / "copy.bin", sources=[b.peer_id])
            digests = [hashlib.sha256(p.read_bytes()).digest() for p in (source, tmp_path / "copy.bin")]
            assert digests[0] == digests[1]
            assert relay.relay_server.circuits.carried_bytes > 5_000_000
            (inbound,) = b.host.connections(a.peer_id)
            assert (inbound.path, inbound.direction) == ("relay", "inbound")
            assert str(inbound.remote_addr).endswith(f"/p2p/{relay.peer_id}/p2p-circuit")
            assert b.circuits.facts(inbound).seen_at == (relay.host.connections(a.peer_id)[0].remote_addr,)

    run(main)


def test_the_circuit_ends_with_the_connection(run, tmp_path: Path) -> None:
    async def main() -> None:
        async with trio_of_nodes(tmp_path) as (a, relay, b):
            (inbound,) = b.host.connections(a.peer_id)
            assert len(relay.relay_server.table.circuits) == 1
            await a.host.disconnect(b.peer_id)
            await inbound.closed.wait()
            assert inbound.close_error is None
            while relay.relay_server.table.circuits:
                await trio.lowlevel.checkpoint()
            assert len(relay.relay_server.circuits) == 0
            assert relay.relay_server.circuits.held == 0

    run(main)


def test_refusals_are_named(run, tmp_path: Path) -> None:
    async def main() -> None:
        async with trio_of_nodes(tmp_path) as (a, relay, b):
            nobody = lattica.NodeConfig(listen=[], relay_use="never")
            async with open_node(nobody) as c:
                addr = Multiaddr.parse(addr_of(relay)).encapsulate("/p2p-circuit")
                with pytest.raises(ConnectError, match="no reservation at this relay"):
                    await a.host.connect(c.peer_id, [addr])
                with pytest.raises(ConnectError, match="three different"):
                    await c.host.connect(relay.peer_id, [addr])
                plain = Multiaddr.parse(f"{relay.host.listen_addrs()[0]}/p2p/{a.peer_id}/p2p-circuit")
                with pytest.raises(ConnectError, match="no connection with the relay"):
                    await c.host.connect(b.peer_id, [plain])

    run(main)


def test_a_lost_relay_is_replaced_and_addresses_follow(run, tmp_path: Path) -> None:
    async def main() -> None:
        async with relay_node() as second:
            async with relay_node() as first:
                async with hidden_node(first) as b:
                    await b.host.connect(None, [Multiaddr.parse(addr_of(second))])
                    while set(b.relay_client.reservations()) != {first.peer_id, second.peer_id}:
                        await trio.lowlevel.checkpoint()
                    assert len(b.host.advertised_addrs()) == 2
                    await first.host.aclose()
                    while set(b.relay_client.reservations()) != {second.peer_id}:
                        await trio.lowlevel.checkpoint()
                    (left,) = b.host.advertised_addrs()
                    assert left.relay_id() == second.peer_id
                    async with open_node(NodeConfig(listen=[], relay_use="never")) as a:
                        connection = await a.host.connect(None, [circuit_to(b)])
                        assert connection.path == "relay"

    run(main)


def test_relays_are_found_in_the_dht(run, tmp_path: Path) -> None:
    async def main() -> None:
        async with open_node(NodeConfig(listen=[TCP], kad_mode="server", relay_use="never")) as bootstrap:
            known = [addr_of(bootstrap)]
            async with relay_node(bootstrap=known, kad_mode="server") as relay:
                await relay.wait_identified(bootstrap.peer_id)
                while not await relay.kad.announce(lattica.relay.client.RELAY_KEY):
                    await trio.lowlevel.checkpoint()
                config = NodeConfig(listen=[], relay_use="never", bootstrap=known)
                async with open_node(config) as b, trio.open_nursery() as nursery:
                    await b.wait_identified(bootstrap.peer_id)
                    while not b.kad.info()["peers"]:
                        await trio.lowlevel.checkpoint()
                    nursery.start_soon(b.relay_client.run)
                    b.relay_client.want(1)
                    while relay.peer_id not in b.relay_client.reservations():
                        await trio.lowlevel.checkpoint()
                    nursery.cancel_scope.cancel()

    run(main)


def test_no_circuit_from_a_relay_that_was_not_asked(run) -> None:
    async def main() -> None:
        async with relay_node() as relay, hidden_node(relay) as b:
            b.circuits.relays.clear()
            async with open_node(NodeConfig(listen=[], relay_use="never")) as a:
                with pytest.raises(ConnectError, match="cannot reach the peer"):
                    await a.host.connect(None, [circuit_to(b)])

    run(main)


def test_nothing_goes_over_two_relays(run, tmp_path: Path) -> None:
    async def main() -> None:
        async with trio_of_nodes(tmp_path) as (a, _, b):
            # B volunteers, and A sees B over R only
            b.relay_server.start()
            from lattica.relay.requests import open_circuit, reserve

            (via,) = a.host.connections(b.peer_id)
            with pytest.raises(ConnectError, match="does not permit"):
                await reserve(a.host, via)
            with pytest.raises(ConnectError, match="does not permit"):
                await open_circuit(a.host, via, a.peer_id)

    run(main)
