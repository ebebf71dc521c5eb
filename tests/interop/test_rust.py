"""Against the Rust lattica wheel: QUIC, TCP + Noise + yamux, identify, ping, Kademlia values, in both directions."""

from __future__ import annotations

import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from rust_peer import RustPeer, running_rust_peer

import lattica
from lattica.identify import PROTOCOL_VERSION
from lattica.node import Node

pytestmark = pytest.mark.interop

RUST_KAD = "/lattica/1.0.0"
LISTEN = ["/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"]


@asynccontextmanager
async def node(protocol_version: str = RUST_KAD, **settings: Any) -> AsyncIterator[Node]:
    known = {"listen": LISTEN, "kad_protocol": RUST_KAD, "kad_mode": "server", "kad_accept_any": True} | settings
    config = lattica.NodeConfig(protocol_version=protocol_version, **known)
    async with lattica.open_node(config) as opened:
        yield opened


async def eventually(check: Callable[[], Any], seconds: float = 15.0) -> Any:
    """Ask the wheel until `check` holds; it has no events to wait for."""
    deadline = time.monotonic() + seconds
    while True:
        result = await trio.to_thread.run_sync(check)
        if result or time.monotonic() > deadline:
            return result
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("transport", ["tcp", "quic"])
def test_we_dial_rust(run, rust_python: Path, transport: str) -> None:
    async def main(rust: RustPeer) -> None:
        async with node() as ours:
            connection = await ours.host.connect(rust.peer_id, [getattr(rust, transport)])
            assert connection.path == transport
            info = await ours.wait_identified(rust.peer_id)
            assert RUST_KAD in info.protocols
            assert "rust-libp2p" in info.agent
            for _ in range(3):
                assert 0 < await ours.ping.ping(rust.peer_id) < 5
            assert str(ours.peer_id) in await eventually(lambda: rust.do("get_all_peers"))
            assert not connection.closed.is_set()

    with running_rust_peer(rust_python) as rust:
        run(main, rust)


def test_rust_stays_connected_with_our_default_settings(run, rust_python: Path) -> None:
    """It cuts peers whose identify names another protocol version, unless that contains `common`."""

    async def main(rust: RustPeer) -> None:
        async with node(PROTOCOL_VERSION) as ours:
            connection = await ours.host.connect(rust.peer_id, [rust.tcp])
            await ours.wait_identified(rust.peer_id)
            with trio.move_on_after(2):
                await connection.closed.wait()
            assert not connection.closed.is_set()
            assert 0 < await ours.ping.ping(rust.peer_id) < 5

    with running_rust_peer(rust_python, protocol="/another/1.0.0") as rust:
        run(main, rust)


def test_rust_reads_what_we_say_however_many_addresses_we_have(run, rust_python: Path) -> None:
    """It reads 4 KiB of identify, and asks nobody in the DHT who did not identify."""
    many = [f"/ip6/2001:db8::{i:x}/tcp/4101" for i in range(1, 121)]

    async def main(rust: RustPeer) -> None:
        async with node(announce=many) as ours:
            await ours.host.connect(rust.peer_id, [rust.tcp])
            await ours.wait_identified(rust.peer_id)
            assert str(ours.peer_id) in await eventually(lambda: rust.do("get_all_peers"))

    with running_rust_peer(rust_python) as rust:
        run(main, rust)


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_rust_dials_us(run, rust_python: Path, transport: str) -> None:
    async def main() -> None:
        async with node() as ours:
            (addr,) = [a for a in ours.host.listen_addrs() if f"/{transport}/" in str(a)]
            context = running_rust_peer(rust_python, bootstraps=[f"{addr}/p2p/{ours.peer_id}"])
            rust = await trio.to_thread.run_sync(context.__enter__)
            try:
                info = await ours.wait_identified(rust.peer_id)
                assert RUST_KAD in info.protocols
                connection = ours.host.connection(rust.peer_id)
                assert connection is not None
                assert connection.direction == "inbound"
                assert 0 < await ours.ping.ping(rust.peer_id) < 5
            finally:
                await trio.to_thread.run_sync(context.__exit__, None, None, None)

    run(main)


def test_kademlia_values_in_both_directions(run, rust_python: Path) -> None:
    """The wheel stores `bincode(value, expiry f64)`; what we read and write is those bytes."""

    async def main(rust: RustPeer) -> None:
        async with node() as ours:
            await ours.host.connect(rust.peer_id, [rust.tcp])
            await ours.wait_identified(rust.peer_id)
            await eventually(lambda: rust.do("get_all_peers"))
            assert await trio.to_thread.run_sync(rust.do, "store", "from-rust", "hello")
            raw = await ours.kad.get_record(b"from-rust")
            assert b"hello" in raw
            (expiry,) = struct.unpack("<d", raw[-8:])
            assert expiry > time.time()
            # What Rust wrote we write back under another key, and Rust reads it.
            await ours.kad.put_record(b"from-python", raw)
            assert await eventually(lambda: rust.do("get", "from-python")) == "hello"

    with running_rust_peer(rust_python) as rust:
        run(main, rust)


def test_we_relay_for_rust(run, rust_python: Path) -> None:
    async def main() -> None:
        async with node(relay_serve=True) as relay, node(listen=[], relay_use="never", punch=False) as ours:
            (addr,) = [a.with_peer(relay.peer_id) for a in relay.host.listen_addrs() if "/tcp/" in str(a)]
            context = running_rust_peer(rust_python, transports=["tcp"], relays=[str(addr)])
            rust = await trio.to_thread.run_sync(context.__enter__)
            try:
                while rust.peer_id not in relay.relay_server.table.reservations():
                    await trio.lowlevel.checkpoint()
                connection = await ours.host.connect(rust.peer_id, [addr.encapsulate("/p2p-circuit")])
                assert connection.path == "relay"
                assert RUST_KAD in (await ours.wait_identified(rust.peer_id)).protocols
                assert 0 < await ours.ping.ping(rust.peer_id) < 5
            finally:
                await trio.to_thread.run_sync(context.__exit__, None, None, None)

    run(main)
