"""What a burst of long tensors took of two daemons is given back."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import trio
from waiting import until

import lattica
from lattica.local import memfd, received, segment, server
from lattica_daemon.home import Home
from lattica_daemon.run import open_daemon
from lattica_daemon.settings import load

LISTEN = "/ip4/127.0.0.1/tcp/0"

pytestmark = pytest.mark.skipif(not segment.AVAILABLE, reason="this system has no memfd")


def test_memory_of_tensors_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the sessions, which live on, nor the pools keep it."""
    for module in (memfd, received):
        monkeypatch.setattr(module, "IDLE_SECONDS", 0.1)
    monkeypatch.setattr(server, "TRIM_SECONDS", 0.05)
    flags: dict[str, tuple[str, object]] = {
        "listen.addrs": ("--listen", [LISTEN]),
        "discovery.mdns": ("--no-mdns", "off"),
    }
    settings = load(None, environ={}, flags=flags)

    async def main() -> None:
        with Home(tmp_path / "a") as home_a, Home(tmp_path / "b") as home_b:
            async with open_daemon(home_a, settings) as a, open_daemon(home_b, settings) as b:
                await use(str(tmp_path / "a"), str(tmp_path / "b"))
                gc.collect()
                await until(lambda: segment.live.value == 0, log=lambda: f"{segment.live.value} received tails kept")
                await until(lambda: segment.viewed.value == 0, log=lambda: f"{segment.viewed.value} tails are kept")
                for daemon in (a, b):
                    pool = daemon.forwarder.pool
                    await until(lambda pool=pool: pool._idle_bytes == 0 and not pool.received._kept)
                    assert daemon.node.rpc._sessions, "the session is still there"

    async def use(home_a: str, home_b: str) -> None:
        async with lattica.aconnect(home_a) as worker, lattica.aconnect(home_b) as caller:
            await worker.serve("expert", {"double": lambda x: x * 2})
            me = await worker.id()
            await caller.connect_peer(f"{me['addrs'][0]}/p2p/{me['peer_id']}")

            async def call() -> None:
                x = np.ones(4 << 20, np.uint8)
                assert (await caller.call(me["peer_id"], "expert.double", x, timeout=20)).sum() == 8 << 20

            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(call)

    before = segment.live.value, segment.viewed.value
    assert before == (0, 0), "a test before this one left something behind"
    trio.run(main)
