"""Relays that are at their limits refuse reservations: the daemon says so, and has a place once there is one."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio
from lab_daemons import LabDaemon, wait_until
from nat_lab import Lab, LabHost
from spread_lab import GlobalLab
from test_attacks import RELAY_LISTEN, flood
from test_liars import check

from lattica_protocols import limits
from lattica_protocols.multiaddr import Multiaddr

sys.path.insert(0, str(Path(__file__).parents[1] / "interop"))

from install_peers import install_p2pd
from p2pd_peer import running_p2pd

NATTED = '[relay]\nuse = "always"\nrelays = ["{relay}"]\n[discovery]\nmode = "client"\nmdns = "off"\n'
AGAIN_SECONDS = 45.0
"""A relay that refused is asked again after 5, 10 and 20 s, a quarter more at the most."""
GO_PER_IP = 8
GO_RELAY = ("-relayService=1", "-forceReachabilityPublic")
REFUSED = "the relay has no place for us"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


class Crowd:
    """Many identities of one host that ask `relay` for places: a process, since daemons are forked off ours."""

    def __init__(self, host: LabHost, relay: str, count: int) -> None:
        self._pipe, theirs = socket.socketpair()
        self._pid = os.fork()
        if self._pid == 0:
            code = 1
            try:
                with host.netns.entered():
                    trio.run(self._ask, Multiaddr.parse(relay), count, theirs)
                code = 0
            finally:
                os._exit(code)
        theirs.close()
        with self._pipe.makefile() as lines:
            self.outcomes = json.loads(lines.readline())

    @staticmethod
    async def _ask(relay: Multiaddr, count: int, pipe: socket.socket) -> None:
        async with flood(relay, count) as made:
            await made.connect()
            await made.reserve_all()
            pipe.sendall(json.dumps(made.outcomes).encode() + b"\n")
            await trio.to_thread.run_sync(pipe.recv, 1)

    def leave(self) -> None:
        if self._pid:
            self._pipe.sendall(b"x")  # closing it would not do: daemons forked since have it, too
            self._pipe.close()
            pid, self._pid = self._pid, 0
            assert os.waitpid(pid, 0)[1] == 0


def refused(host: LabHost, home: Path, relay: str, leave: Callable[[], None] | None = None) -> None:
    """A daemon at `host` says that `relay` is full, and gets a place when the crowd can `leave`."""
    daemon = LabDaemon(host, home, settings=NATTED.format(relay=relay))
    relay_id = relay.rpartition("/")[2]
    try:
        wait_until(lambda: "reservation_failed" in daemon.process.log(), 20.0, daemon.process.log)
        found = check(daemon, "relays")
        assert found["ok"] is False
        assert "no relay gave us a place" in found["detail"]
        assert found["fix"]
        (told,) = [line for line in found["evidence"] if line.startswith(f"{relay_id}: ")]
        assert REFUSED in told
        assert daemon.json("nat")["reservations"] == {}
        assert not any("/p2p-circuit" in addr for addr in daemon.json("id")["addrs"])
        if leave is None:
            return
        leave()
        wait_until(lambda: daemon.json("nat")["reservations"], AGAIN_SECONDS, daemon.process.log)
        found = check(daemon, "relays")
        assert found["ok"] is True
        assert not any("no place" in line for line in found["evidence"])
    finally:
        daemon.stop()


def test_one_of_ours_that_is_full_for_a_range(stack: ExitStack, tmp_path: Path) -> None:
    lab = Lab()
    relay = LabDaemon(lab.public_host(), tmp_path / "relay", "--relay", "--no-mdns", listen=RELAY_LISTEN)
    stack.callback(relay.stop)
    places = limits.RELAY_MAX_RESERVATIONS_PER_RANGE
    crowd = Crowd(lab.public_host(), relay.address("tcp"), places + 2)
    stack.callback(crowd.leave)
    assert crowd.outcomes == {"granted": places, REFUSED: 2}
    refused(lab.host_behind("apdf"), tmp_path / "refused", relay.address("tcp"), crowd.leave)


@pytest.mark.interop
def test_a_go_relay_that_is_full_for_an_address(stack: ExitStack, tmp_path: Path) -> None:
    """Others behind our NAT were there before; Go counts them for half an hour after they left."""
    lab = GlobalLab()
    box, public = lab.box("apdf"), lab.public_host()
    listen = [f"/ip4/{public.address}/tcp/4001"]
    with public.netns.entered():
        go = stack.enter_context(running_p2pd(install_p2pd(), *GO_RELAY, listen=listen))
    relay = f"{listen[0]}/p2p/{go.peer_id}"
    crowd = Crowd(box.host(), relay, GO_PER_IP + 2)
    stack.callback(crowd.leave)
    assert crowd.outcomes == {"granted": GO_PER_IP, REFUSED: 2}
    refused(box.host(), tmp_path / "refused", relay)
