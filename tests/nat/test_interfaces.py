"""Real interfaces that come and go, in a namespace: noticed at once with netlink, and by looking without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from lab_daemons import LabDaemon, wait_until
from nat_lab import GATEWAY
from netns import Netns
from spread_lab import SpreadLab

from lattica.reach.interfaces import POLL_SECONDS, SETTLE_SECONDS, InterfaceWatch

STEPS = (
    ("link add eth0 type veth peer name far0", False),
    ("addr add 198.18.77.1/24 dev eth0", False),  # of a link that is down
    ("link set eth0 up", False),  # without a carrier
    ("link set far0 up", True),
    ("addr add 2600:77::1/64 dev eth0 nodad", True),
    ("addr add fe80::77/64 dev eth0 nodad", False),  # nobody is told of link-local ones
    ("link set far0 down", True),
    ("link set far0 up", True),
    ("addr del 198.18.77.1/24 dev eth0", True),
    ("link del eth0", True),
)
"""What happens, and whether it changes where we can be reached."""


@pytest.mark.parametrize("use_netlink", [True, False])
def test_changes_are_noticed(run: Callable[..., Any], use_netlink: bool) -> None:
    netns = Netns(f"ifs{int(use_netlink)}")
    told, news = trio.open_memory_channel[float](100)
    longest = SETTLE_SECONDS + (1.0 if use_netlink else POLL_SECONDS)

    async def main() -> None:
        watch = InterfaceWatch(lambda: told.send_nowait(trio.current_time()), use_netlink=use_netlink)
        async with trio.open_nursery() as nursery:
            await nursery.start(watch.run)
            assert watch.uses_netlink == use_netlink
            for step, noticed in STEPS:
                started = trio.current_time()
                netns.ip(step)
                if noticed:
                    with trio.fail_after(longest + 0.5):
                        assert await news.receive() - started < longest, step
                else:
                    with trio.move_on_after(longest) as waited:
                        await news.receive()
                    assert waited.cancelled_caught, step
            nursery.cancel_scope.cancel()

    with netns.entered():  # the only task of this thread that matters runs inside
        run(main, seconds=60)


def test_a_daemon_that_moves(tmp_path: Path) -> None:
    """Its address goes and another comes: it tells others the new one, and has it tried."""
    lab = SpreadLab()
    observers: list[LabDaemon] = []
    daemons: list[LabDaemon] = []
    try:
        for i in range(3):
            known = [part for each in observers for part in ("--bootstrap", each.address("udp"))]
            observers.append(LabDaemon(lab.public_host(), tmp_path / f"observer{i}", *known))
        bootstrap = [part for each in observers for part in ("--bootstrap", each.address("udp"))]
        host = lab.public_host()
        link, old = lab.last_link, host.address
        daemon = LabDaemon(host, tmp_path / "moving", *bootstrap)
        daemons = [*observers, daemon]
        wait_until(lambda: daemon.json("status")["reachability"] == "public", 20.0, daemon.process.log)
        discoveries = daemon.process.log().count("nat_known")
        new = "198.18.200.1"
        lab.core.ip(f"route add {new}/32 dev {link}", f"route del {old}/32 dev {link}")
        host.netns.ip(
            f"addr add {new}/32 dev eth0",
            f"route replace {GATEWAY}/32 dev eth0 scope link src {new}",
            f"route replace default via {GATEWAY} dev eth0 src {new}",
            f"addr del {old}/32 dev eth0",
        )
        wait_until(lambda: outside(daemon) == {f"/ip4/{new}/tcp/4101", f"/ip4/{new}/udp/4101/quic-v1"}, 3.0)
        pushed = wait_until(lambda: all(knows(each, daemon, new) for each in observers), 20.0, daemon.process.log)
        assert pushed < 20
        wait_until(lambda: daemon.process.log().count("nat_known") > discoveries, 20.0, daemon.process.log)
        wait_until(lambda: public_at(daemon, new), 40.0, daemon.process.log)
    finally:
        for each in daemons:
            each.stop()


def outside(daemon: LabDaemon) -> set[str]:
    return {addr for addr in daemon.json("status")["addrs"] if "/198.18." in addr and "p2p-circuit" not in addr}


def knows(observer: LabDaemon, daemon: LabDaemon, address: str) -> bool:
    """Whether `observer` was told the new address by `daemon` itself."""
    found = observer.process.cli("--json", "peer", "find", daemon.peer_id)
    return found.returncode == 0 and f"/ip4/{address}/tcp/4101" in found.stdout  # it is unknown while it reconnects


def public_at(daemon: LabDaemon, address: str) -> bool:
    status = daemon.json("status")
    tried = {addr: verdict for addr, verdict in status["tried_addrs"].items() if f"/{address}/" in addr}
    return status["reachability"] == "public" and set(tried.values()) == {"public"}
