"""Against js-libp2p: TCP + Noise + yamux, QUIC, identify, ping, streams, Kademlia, relays, in both directions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.lowlevel
from js_peer import JsPeer, running_js_peer

import lattica
from lattica.interfaces import Stream
from lattica.node import Node
from lattica_protocols.cid import Cid
from lattica_protocols.multiaddr import Multiaddr

pytestmark = pytest.mark.interop

KAD = "/ipfs/kad/1.0.0"
LISTEN = ["/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"]
TRANSPORTS = ["tcp", "quic"]


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.aclose()


@asynccontextmanager
async def node(**settings: object) -> AsyncIterator[Node]:
    settings = {"listen": LISTEN, "relay_use": "never", "punch": False} | settings
    config = lattica.NodeConfig(kad_protocol=KAD, kad_mode="server", **settings)  # type: ignore[arg-type]
    async with lattica.open_node(config) as opened:
        opened.host.handle("/echo/1", echo)
        yield opened


def our_addr(ours: Node, transport: str) -> Multiaddr:
    kind = "tcp" if transport == "tcp" else "udp"
    (addr,) = [a for a in ours.host.listen_addrs() if (found := a.host_port()) and found[0] == kind]
    return addr.with_peer(ours.peer_id)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_we_dial_js(run, js_home: Path, transport: str) -> None:
    async def main(js: JsPeer) -> None:
        async with node() as ours:
            connection = await ours.host.connect(js.peer_id, js.addrs)
            assert connection.path == transport
            info = await ours.wait_identified(js.peer_id)
            assert "/echo/1" in info.protocols
            assert info.agent.startswith("js-libp2p/")
            for _ in range(3):
                assert 0 < await ours.ping.ping(js.peer_id) < 5
            stream = await ours.host.open_stream(js.peer_id, "/echo/1")
            payload = bytes(range(256)) * 4096  # 1 MiB: four of yamux's first windows
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, payload)
                assert await stream.receive_exactly(len(payload)) == payload

    with running_js_peer(js_home, transports=[transport]) as js:
        run(main, js)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_js_dials_us(run, js_home: Path, transport: str) -> None:
    async def main(js: JsPeer) -> None:
        async with node() as ours:
            addr = str(our_addr(ours, transport))
            dialled = await trio.to_thread.run_sync(js.do, "dial", addr)
            assert dialled["addr"] == addr
            assert dialled["muxer"] == ("/yamux/1.0.0" if transport == "tcp" else "quic")
            await ours.wait_identified(js.peer_id)
            connection = ours.host.connection(js.peer_id)
            assert connection is not None
            assert connection.path == transport
            assert connection.direction == "inbound"
            assert await trio.to_thread.run_sync(js.do, "echo", addr, 100, 20_000) == 2_000_000
            assert await trio.to_thread.run_sync(js.do, "ping", addr) < 5000
            known = await trio.to_thread.run_sync(js.do, "known", str(ours.peer_id))
            assert KAD in known["protocols"]
            assert known["agent"].startswith("lattica")

    with running_js_peer(js_home, transports=[transport]) as js:
        run(main, js)


def test_kademlia_in_both_directions(run, js_home: Path) -> None:
    """Two js peers and we; what one provides the others find, through us or from us."""
    first, second = (Cid.v1(0x55, 0x12, bytes([i]) * 32) for i in (1, 2))

    async def main(one: JsPeer, two: JsPeer) -> None:
        async with node() as ours:
            for js in (one, two):
                await ours.host.connect(js.peer_id, js.addrs)
                await ours.wait_identified(js.peer_id)
            while ours.kad.info()["peers"] < 2:
                await trio.lowlevel.checkpoint()
            addrs = await trio.to_thread.run_sync(one.do, "find_peer", str(two.peer_id))
            assert {str(addr) for addr in two.addrs} & set(addrs)
            assert one.peer_id in {found.peer for found in await ours.kad.closest_peers(one.peer_id.to_bytes())}
            await trio.to_thread.run_sync(one.do, "provide", str(first))
            assert [one.peer_id] == [peer async for peer, _ in ours.kad.find_providers(first.multihash.to_bytes(), 1)]
            await ours.kad.provide(second.multihash.to_bytes())
            assert str(ours.peer_id) == await trio.to_thread.run_sync(two.do, "find_provider", str(second))

    with running_js_peer(js_home) as one, running_js_peer(js_home) as two:
        run(main, one, two, seconds=60)


def test_a_js_relay_carries_our_calls(run, js_home: Path) -> None:
    async def main(js: JsPeer) -> None:
        relay = js.addrs[0].with_peer(js.peer_id)
        async with node(listen=[], relay_use="always", relays=[str(relay)]) as b, node(listen=[]) as a:
            while not b.relay_client.reservations():
                await trio.lowlevel.checkpoint()
            b.rpc.serve("math", {"double": lambda x: 2 * x})
            connection = await a.host.connect(b.peer_id, [relay.encapsulate("/p2p-circuit")])
            assert connection.path == "relay"
            assert await a.rpc.call(b.peer_id, "math.double", 21) == 42

    with running_js_peer(js_home, transports=["tcp"], relay=True) as js:
        run(main, js)


def test_we_relay_for_two_js_peers(run, js_home: Path) -> None:
    async def main() -> None:
        async with node(relay_serve=True) as relay, node(listen=[]) as ours:
            addr = str(our_addr(relay, "tcp"))

            def drive() -> None:
                circuit = f"{addr}/p2p-circuit"
                with (
                    running_js_peer(js_home, transports=["tcp", "relay"], listen=[circuit]) as hidden,
                    running_js_peer(js_home, transports=["tcp", "relay"], listen=[]) as other,
                ):
                    there = f"{circuit}/p2p/{hidden.peer_id}"
                    assert there in hidden.do("addrs")
                    assert other.do("echo", there, 10, 5_000) == 50_000
                    trio.from_thread.run(reach, hidden)

            async def reach(hidden: JsPeer) -> None:
                """And we reach it there as well."""
                circuit = our_addr(relay, "tcp").encapsulate("/p2p-circuit")
                connection = await ours.host.connect(hidden.peer_id, [circuit])
                assert connection.path == "relay"
                assert "/echo/1" in (await ours.wait_identified(hidden.peer_id)).protocols
                assert 0 < await ours.ping.ping(hidden.peer_id) < 5

            await trio.to_thread.run_sync(drive)
            assert relay.relay_server.circuits.carried_bytes > 100_000

    run(main, seconds=60)
