"""Who may connect is decided before anybody can: a blocked peer must not slip in while the daemon starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lattica.errors import ConnectError
from lattica.host import Host
from lattica.interfaces import Listener
from lattica.node import NodeConfig, open_node
from lattica_daemon.home import Home
from lattica_daemon.run import open_daemon
from lattica_daemon.settings import load
from lattica_protocols.keys import PrivateKey
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId

Run = Callable[..., Any]
LISTEN = "/ip4/127.0.0.1/tcp/0"
STRANGER = PeerId.from_public_key(PrivateKey.generate(b"s" * 32).public_key)


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Why a stranger was refused at the moment at which each address began to be listened on."""
    found: list[str | None] = []
    listen = Host.listen

    async def looked_at(host: Host, addr: Multiaddr) -> Listener:
        listener = await listen(host, addr)
        found.append(host.gate(STRANGER))
        return listener

    monkeypatch.setattr(Host, "listen", looked_at)
    return found


def test_the_rules_hold_before_the_daemon_listens(run: Run, tmp_path: Path, gates: list[str | None]) -> None:
    flags = {"listen.addrs": ("--listen", (LISTEN,)), "peers.default": ("", "block"), "discovery.mdns": ("", "off")}

    async def main() -> None:
        async with open_daemon(Home(tmp_path), load(None, environ={}, flags=flags)):
            assert gates
            assert set(gates) == {"not on the allow list here"}

    run(main)


def test_a_node_has_its_gate_before_it_listens(run: Run, gates: list[str | None]) -> None:
    async def main() -> None:
        config = NodeConfig(listen=[LISTEN], gate=lambda peer: "nobody may")
        async with open_node(config) as guarded, open_node(NodeConfig(listen=[])) as stranger:
            assert gates[0] == "nobody may"
            addr = guarded.host.listen_addrs()[0].with_peer(guarded.peer_id)
            try:
                connection = await stranger.host.connect(None, [addr])
            except ConnectError:
                pass
            else:
                await connection.closed.wait()
            assert not guarded.host.connections()

    run(main)
