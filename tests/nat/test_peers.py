"""Two daemons behind kernel NATs that have nobody but a Go relay (p2pd): it carries them, and they get direct.

As a partner for punching p2pd cannot be had: DCUtR is not among the protocols that it lists.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from lab_daemons import LabDaemon, wait_until
from nat_lab import Lab, LabHost

sys.path.insert(0, str(Path(__file__).parents[1] / "interop"))

from install_peers import install_p2pd
from p2pd_peer import running_p2pd

pytestmark = pytest.mark.interop

NATTED = '[relay]\nuse = "always"\nrelays = {relays}\n[discovery]\nmode = "client"\n'
DIRECT_SECONDS = 20.0


def natted(host: LabHost, home: Path, relays: list[str]) -> LabDaemon:
    return LabDaemon(host, home, settings=NATTED.format(relays=json.dumps(relays)))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("kind", ["apdf", "sym"])
def test_a_go_relay_brings_two_daemons_together(stack: ExitStack, tmp_path: Path, kind: str) -> None:
    """It tells each where it sees the other, and both get direct; where that cannot be, it goes on carrying them."""
    lab = Lab()
    public = lab.public_host()
    options = ["-relayService=1", "-forceReachabilityPublic"]
    options.append(f"-hostAddrs=/ip4/{public.address}/tcp/4001,/ip4/{public.address}/udp/4001/quic-v1")
    with public.netns.entered():
        go = stack.enter_context(running_p2pd(install_p2pd(), *options))
    relay = f"/ip4/{public.address}/tcp/4001/p2p/{go.peer_id}"
    daemons = []
    for i in range(2):
        daemons.append(natted(lab.host_behind(kind), tmp_path / f"daemon{i}", [relay]))
        stack.callback(daemons[-1].stop)
    a, b = daemons
    b.wait_reserved()
    a.wait_reserved()
    a.json("peer", "connect", f"{relay}/p2p-circuit/p2p/{b.peer_id}")
    a.json("peer", "ping", b.peer_id, "--count", "1")
    if kind == "sym":
        assert a.paths(b) == {"relay"}
    else:
        wait_until(lambda: a.paths(b) & {"tcp", "quic"}, DIRECT_SECONDS, lambda: a.process.log() + b.process.log())
        a.json("peer", "ping", b.peer_id, "--count", "1")
