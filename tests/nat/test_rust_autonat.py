"""rust-libp2p (the Rust lattica wheel) has our AutoNAT v2 server try its addresses, and takes our dial-back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from lab_daemons import wait_until
from spread_lab import GlobalLab

from lattica.node import NodeConfig, open_node

sys.path.insert(0, str(Path(__file__).parents[1] / "interop"))

from install_peers import install_rust_lattica
from rust_peer import running_rust_peer

pytestmark = pytest.mark.interop


def test_rust_asks_and_hears_our_dial_back(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """`OK` means that it answered on the stream of the dial-back: it knew the nonce."""
    monkeypatch.delenv("PYTHONPATH", raising=False)  # there, `lattica` is the Rust package
    lab = GlobalLab()
    ours, theirs = lab.public_host(), lab.public_host()
    config = NodeConfig(listen=[f"/ip4/{ours.address}/tcp/4101"], relay_use="never", punch=False)

    async def main() -> None:
        async with open_node(config) as node:
            server = node.dial_server
            assert server is not None
            bootstrap = f"{node.host.listen_addrs()[0]}/p2p/{node.peer_id}"

            def drive() -> None:
                python = install_rust_lattica()
                with theirs.netns.entered():
                    with running_rust_peer(python, bootstraps=[bootstrap], autonat=True, ip=theirs.address):
                        wait_until(lambda: server.served, 60.0)

            await trio.to_thread.run_sync(drive)
            assert set(server.served) == {(2, "OK")}

    with ours.netns.entered():
        run(main, seconds=90)
