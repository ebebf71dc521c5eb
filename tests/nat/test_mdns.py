"""Daemons in one LAN find each other without any bootstrap peer; those in another do not; garbage harms nobody."""

from __future__ import annotations

import random
import socket
from pathlib import Path

from lab_daemons import LabDaemon, wait_until
from nat_lab import Lab, LabHost
from netns import Netns

FOUND_SECONDS = 3.0


def peers(daemon: LabDaemon) -> set[str]:
    return {peer["peer_id"] for peer in daemon.json("peers")}


def test_neighbours_find_each_other(tmp_path: Path) -> None:
    lab = Lab()
    home, other = lab.box("apdf"), lab.box("apdf")
    daemons: list[LabDaemon] = []
    try:
        daemons.append(LabDaemon(home.host(), tmp_path / "a"))
        daemons.append(LabDaemon(other.host(), tmp_path / "elsewhere"))
        daemons.append(LabDaemon(home.host(), tmp_path / "off", "--no-mdns"))
        daemons.append(LabDaemon(home.host(), tmp_path / "b"))
        a, elsewhere, off, b = daemons
        seconds = wait_until(lambda: peers(a) == {b.peer_id}, FOUND_SECONDS, a.process.log)
        print(f"found {seconds:.2f} s after ready")  # noqa: T201
        assert peers(b) == {a.peer_id}
        garbage(a)
        daemons.append(LabDaemon(home.host(), tmp_path / "c"))
        wait_until(lambda: daemons[-1].peer_id in peers(a) & peers(b), FOUND_SECONDS, a.process.log)
        assert not peers(elsewhere)
        assert not peers(off)
    finally:
        for daemon in daemons:
            daemon.stop()


def test_without_a_network_it_waits_for_one(tmp_path: Path) -> None:
    """No interface at all, not even loopback; then one comes up with a neighbour behind it, and goes again."""
    lab = Lab()
    home = lab.box("apdf")
    alone = Netns("alone")
    alone.ip("link set lo down")
    daemons: list[LabDaemon] = []
    try:
        daemons.append(LabDaemon(LabHost(alone, ""), tmp_path / "alone"))
        daemons.append(LabDaemon(home.host(), tmp_path / "neighbour"))
        first, neighbour = daemons
        assert first.json("doctor")
        assert first.json("nat")["reachability"] in ("private", "unknown")
        first.host.address = home.plug(alone, "eth0")
        wait_until(lambda: peers(first) == {neighbour.peer_id}, FOUND_SECONDS + 7.0, first.process.log)
        alone.ip("link del eth0")
        wait_until(lambda: not peers(first), 90.0, first.process.log, poll=0.5)
        assert "error" not in first.process.log().lower().replace("error=", ""), first.process.log()
    finally:
        for daemon in daemons:
            daemon.stop()


def test_a_taken_port_switches_it_off(tmp_path: Path) -> None:
    """Another program has 5353 for itself."""
    host = Lab().public_host()
    with host.netns.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("", 5353))
        daemon = LabDaemon(host, tmp_path / "daemon")
        try:
            wait_until(lambda: "mdns_off" in daemon.process.log(), FOUND_SECONDS, daemon.process.log)
            assert daemon.json("status")["peer_id"] == daemon.peer_id
        finally:
            daemon.stop()


def garbage(near: LabDaemon) -> None:
    """Into the group, from a neighbour of `near`."""
    rng = random.Random(1)
    with near.host.netns.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
        for _ in range(500):
            head = bytes((0, 0, rng.choice((0, 0x84)), 0, 0, rng.randrange(3), 0, rng.randrange(3), 0, 0, 0, 1))
            sock.sendto(head + rng.randbytes(rng.randrange(200)), ("224.0.0.251", 5353))
