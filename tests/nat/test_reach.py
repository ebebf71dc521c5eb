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


def reachability(world: World, kind: str, value: str) -> dict[str, Any]:
    """The status of a daemon behind `kind` once its reachability is known; it has to be `value`."""
    daemon = world.start(kind)
    try:
        wait_until(lambda: daemon.json("status")["reachability"] == value, 30.0, daemon.process.log)
        status: dict[str, Any] = daemon.json("status")
        status["outside"] = outside(daemon, status)
        return status
    finally:
        daemon.stop()


def test_observed_addresses_are_advertised(world: World) -> None:
    box = world.lab.box("full")
    daemon = world.start("full", box.host())
    try:
        at = f"/ip4/{box.address}/udp/4101/quic-v1"
        wait_until(lambda: at in outside(daemon, daemon.json("status")), 20.0, daemon.process.log)
        wait_until(lambda: daemon.json("status")["tried_addrs"].get(at) == "public", 20.0, daemon.process.log)
        assert daemon.json("status")["reachability"] == "public"
        assert outside(daemon, daemon.json("status")) <= {at, f"/ip4/{box.address}/tcp/4101"}
    finally:
        daemon.stop()


def test_a_public_host_is_public(world: World) -> None:
    status = reachability(world, "none", "public")
    assert len(status["outside"]) == 2


@pytest.mark.parametrize("kind", ["apdf", "sym", "fw"])
def test_who_cannot_be_reached_knows(world: World, kind: str) -> None:
    status = reachability(world, kind, "private")
    assert not status["outside"]
    assert "public" not in status["tried_addrs"].values()
