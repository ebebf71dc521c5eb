"""go-libp2p (p2pd) asks our AutoNAT v1 server by itself, and believes it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from lab_daemons import stays, wait_until
from spread_lab import GlobalLab

from lattica.node import Node, NodeConfig, open_node
from lattica_protocols.peer_id import PeerId

sys.path.insert(0, str(Path(__file__).parents[1] / "interop"))

from install_peers import install_p2pd
from p2pd_peer import running_p2pd

pytestmark = pytest.mark.interop


FIREWALL = """table inet f { chain i { type filter hook input priority 0; policy drop;
    iif lo accept; ct state established,related accept; }; }"""

CONVINCED_SECONDS = 5.0
"""Within which it would have taken a place at a relay."""


@asynccontextmanager
async def four_servers(ip: str) -> AsyncIterator[list[Node]]:
    """Go's AutoRelay asks nobody for three minutes unless it knows four relays."""
    async with AsyncExitStack() as stack:
        nodes = []
        for port in range(4101, 4105):
            listen = [f"/ip4/{ip}/tcp/{port}"]  # without mDNS: they would ask each other, too
            config = NodeConfig(listen=listen, relay_serve=True, relay_use="never", punch=False, mdns=False)
            nodes.append(await stack.enter_async_context(open_node(config)))
        yield nodes


def outcomes(nodes: list[Node]) -> Counter[tuple[int, str]]:
    servers = [node.dial_server for node in nodes if node.dial_server is not None]
    return sum((server.served for server in servers), Counter())


def holds_reservation(nodes: list[Node], peer: PeerId) -> bool:
    return any(peer in node.relay_server.table.reservations() for node in nodes)


@pytest.mark.parametrize("firewall", [True, False])
def test_go_believes_what_we_found(run: Callable[..., Any], firewall: bool) -> None:
    """It asks us by itself. Being told that it cannot be reached, it takes a place at a relay; else it does not."""
    lab = GlobalLab()
    ours, theirs = lab.public_host(), lab.public_host()
    if firewall:
        theirs.netns.nft(FIREWALL)

    async def main() -> None:
        async with four_servers(ours.address) as nodes:
            addrs = nodes[0].host.listen_addrs()
            relays = [node.host.listen_addrs()[0].with_peer(node.peer_id) for node in nodes]

            def drive() -> None:
                options = ["-dhtClient", "-autoRelay", f"-trustedRelays={','.join(map(str, relays))}"]
                options.append(f"-hostAddrs=/ip4/{theirs.address}/tcp/4001")
                with theirs.netns.entered(), running_p2pd(install_p2pd(), *options) as go:
                    go.connect(nodes[0].peer_id, addrs)
                    wait_until(lambda: outcomes(nodes), 60.0)
                    if firewall:
                        wait_until(lambda: holds_reservation(nodes, go.peer_id), 20.0)
                    else:
                        stays(lambda: not holds_reservation(nodes, go.peer_id), CONVINCED_SECONDS)

            await trio.to_thread.run_sync(drive)
            assert set(outcomes(nodes)) == {(1, "DIAL_ERROR" if firewall else "OK")}

    with ours.netns.entered():
        run(main, seconds=90)
