"""What daemons behind kernel NATs say about their own reachability, with observers in ranges of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab_daemons import LabDaemon, wait_until
from nat_lab import LabHost
from spread_lab import SpreadLab

OBSERVERS = 3
CLIENT = '[discovery]\nmode = "client"\n'


class World:
    """Public daemons that observe, and one daemon for each kind of box."""

    def __init__(self, folder: Path) -> None:
        self.lab = SpreadLab()
        self.folder = folder
        self.observers: list[LabDaemon] = []
        for i in range(OBSERVERS):
            self.observers.append(LabDaemon(self.lab.public_host(), folder / f"observer{i}", *self.bootstrap))

    @property
    def bootstrap(self) -> list[str]:
        known = [addr for each in self.observers for addr in (each.address("udp"), each.address("tcp"))]
        return [part for addr in known for part in ("--bootstrap", addr)]

    def start(self, kind: str, host: LabHost | None = None) -> LabDaemon:
        host = host or self.lab.host_behind(kind)
        return LabDaemon(host, self.folder / kind.replace("+", "-"), *self.bootstrap, settings=CLIENT)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("reach"))
    try:
        yield made
    finally:
        for daemon in made.observers:
            daemon.stop()


def outside(daemon: LabDaemon, status: dict[str, Any]) -> set[str]:
    """The advertised public addresses, without relays'."""
    return {a for a in status["addrs"] if "/198.18." in a and "p2p-circuit" not in a}


def test_observed_addresses_are_advertised(world: World) -> None:
    box = world.lab.box("apdf")
    daemon = world.start("apdf", box.host())
    try:
        expected = {f"/ip4/{box.address}/udp/4101/quic-v1"}
        wait_until(lambda: expected & outside(daemon, daemon.json("status")), 20.0, daemon.process.log)
        assert all(f"/{box.address}/" in addr for addr in outside(daemon, daemon.json("status")))
    finally:
        daemon.stop()
