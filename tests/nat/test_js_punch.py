"""js-libp2p as the partner of a hole punch (DCUtR) in both roles, over a relay of ours and over a Go one (p2pd).

js dials from other ports than it listens on, so no NAT stands before it: what is shown is that each side takes the
other's messages, ours with their further fields, and that the dance ends in a direct connection. We are behind one.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from lab_daemons import LabDaemon
from spread_lab import GlobalLab
from waiting import until

from lattica.node import Node, NodeConfig, open_node
from lattica.punch import PunchReport
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId

sys.path.insert(0, str(Path(__file__).parents[1] / "interop"))

from install_peers import install_js_libp2p, install_p2pd
from js_peer import JsPeer, running_js_peer
from p2pd_peer import running_p2pd

pytestmark = pytest.mark.interop

LISTEN = ["/ip4/0.0.0.0/tcp/4101", "/ip4/0.0.0.0/udp/4101/quic-v1"]


class Lab:
    """Relays of ours, a js peer on a public host, and a host behind a box for us."""

    def __init__(self, folder: Path, stack: ExitStack, kind: str, relay_by: str) -> None:
        lab = GlobalLab()
        self.relays: list[str] = []
        for i in range(2):
            relay = LabDaemon(lab.public_host(), folder / f"relay{i}", "--relay")
            stack.callback(relay.stop)
            self.relays.append(relay.address("tcp"))
        self.relay = self.relays[0]
        if relay_by == "go":
            self.relay = _start_go_relay(lab, stack)
        js_host = lab.public_host()
        at = f"/ip4/{js_host.address}"
        public = [f"{at}/tcp/4001", f"{at}/udp/4001/quic-v1"]  # told by itself only when AutoNAT had said so
        listen = [*public, f"{self.relay}/p2p-circuit"]
        home = install_js_libp2p()
        with js_host.netns.entered():
            transports = ("tcp", "quic", "relay")
            running = running_js_peer(home, transports=transports, listen=listen, announce=public, dcutr=True)
            self.js: JsPeer = stack.enter_context(running)
        self.ours = lab.host_behind(kind)

    def relayed(self, peer: PeerId) -> Multiaddr:
        return Multiaddr.parse(f"{self.relay}/p2p-circuit/p2p/{peer}")


def _start_go_relay(lab: GlobalLab, stack: ExitStack) -> str:
    host = lab.public_host()
    at = f"/ip4/{host.address}/tcp/4001"
    with host.netns.entered():
        go = stack.enter_context(
            running_p2pd(install_p2pd(), "-relayService", "-forceReachabilityPublic", f"-hostAddrs={at}")
        )
    return f"{at}/p2p/{go.peer_id}"


@contextmanager
def js_lab(folder: Path, kind: str, relay_by: str) -> Iterator[Lab]:
    with ExitStack() as stack:
        yield Lab(folder, stack, kind, relay_by)


@asynccontextmanager
async def our_node(lab: Lab) -> AsyncIterator[Node]:
    """Ours, which leaves a relay by the punch alone: js's listening port could simply be dialled."""
    config = NodeConfig(
        listen=LISTEN, bootstrap=lab.relays, relay_use="always", relays=[lab.relay], mdns=False, port_mapping=False
    )
    async with open_node(config) as node:

        async def nothing(*_: object) -> None:
            pass

        node.punch._dial_known = nothing  # type: ignore[method-assign]
        await until(lambda: node.relay_client.reservations() and node.punch.candidates())
        yield node


async def until_direct(node: Node, peer: PeerId) -> PunchReport:
    await until(lambda: peer in node.punch.reports and node.punch.reports[peer].result)
    return node.punch.reports[peer]


@pytest.mark.parametrize("relay_by", ["us", "go"])
def test_js_initiates(run: Callable[..., Any], tmp_path: Path, relay_by: str) -> None:
    """We connected over the relay, so the dance is js's; it measures, we dial at its SYNC."""

    async def main() -> None:
        async with our_node(lab) as node:
            connection = await node.host.connect(None, [lab.relayed(lab.js.peer_id)])
            assert connection.path == "relay"
            report = await until_direct(node, lab.js.peer_id)
            assert report.attempts >= 1
            assert not [error for error in report.errors if error.startswith("exchange")]
            assert any("/4001" in addr for addr in report.tried), report
            assert report.result in ("tcp", "quic")
            assert 0 < await node.ping.ping(lab.js.peer_id) < 5

    with js_lab(tmp_path, "apdf", relay_by) as lab, lab.ours.netns.entered():
        run(main, seconds=40)


@pytest.mark.parametrize("relay_by", ["us", "go"])
def test_js_answers(run: Callable[..., Any], tmp_path: Path, relay_by: str) -> None:
    """js connected over the relay, so the dance is ours; js dials while we hold our NAT open."""

    async def main() -> None:
        async with our_node(lab) as node:
            await trio.to_thread.run_sync(lab.js.do, "dial", str(lab.relayed(node.peer_id)))
            report = await until_direct(node, lab.js.peer_id)
            assert report.attempts >= 1
            assert not [error for error in report.errors if error.startswith("exchange")]
            (direct,) = [c for c in node.host.connections(lab.js.peer_id) if c.path != "relay"]
            assert direct.direction == "inbound", "js dialled at our SYNC"
            assert 0 < await node.ping.ping(lab.js.peer_id) < 5

    with js_lab(tmp_path, "adf", relay_by) as lab, lab.ours.netns.entered():
        run(main, seconds=40)
