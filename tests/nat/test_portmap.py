"""Daemons behind a real miniupnpd: each protocol alone and all together, a stranger comes in, nothing is left."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab_daemons import LabDaemon, wait_until
from router_lab import Router, miniupnpd_missing
from spread_lab import GlobalLab

MAPPED_SECONDS = 2.0
"""From the ready daemon until all ports are mapped."""
OBSERVERS = 3
CLIENT = '[discovery]\nmode = "client"\n'
QUIET = '[discovery]\nmode = "client"\n[listen]\nport_mapping = "off"\n'

pytestmark = pytest.mark.skipif(miniupnpd_missing() is not None, reason=str(miniupnpd_missing()))


class World:
    """Public daemons that observe, and two that nobody behind a NAT knows: each learns one address only."""

    def __init__(self, folder: Path) -> None:
        self.lab = GlobalLab()
        self.folder = folder
        self.observers: list[LabDaemon] = []
        for i in range(OBSERVERS):
            self.observers.append(LabDaemon(self.lab.public_host(), folder / f"observer{i}", *self.bootstrap))
        self.strangers = {
            path: LabDaemon(self.lab.public_host(), folder / f"stranger-{path}", settings=CLIENT)
            for path in ("tcp", "quic")
        }
        self._running: list[LabDaemon | Router] = [*self.observers, *self.strangers.values()]

    @property
    def bootstrap(self) -> list[str]:
        known = [addr for each in self.observers for addr in (each.address("udp"), each.address("tcp"))]
        return [part for addr in known for part in ("--bootstrap", addr)]

    def router(self, speaks: str = "all", **more: Any) -> Router:
        router = Router(self.lab.box("apdf"), self.folder, speaks, **more)
        self._running.append(router)
        return router

    def daemon(self, router: Router, name: str, settings: str = CLIENT) -> LabDaemon:
        daemon = LabDaemon(router.box.host(), self.folder / name, *self.bootstrap, settings=settings)
        self._running.append(daemon)
        return daemon

    def stop(self) -> None:
        for each in self._running:
            if isinstance(each, Router) or each.process.child is not None:
                each.stop()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("portmap"))
    try:
        yield made
    finally:
        made.stop()


def mapping(daemon: LabDaemon) -> dict[str, Any] | None:
    found: dict[str, Any] | None = daemon.json("nat")["port_mapping"]
    return found


def doctor(daemon: LabDaemon) -> dict[str, Any]:
    found: dict[str, Any] = next(f for f in daemon.json("doctor") if f["check"] == "port-mapping")
    return found


def both(daemon: LabDaemon) -> set[tuple[str, str]]:
    return {("tcp", f"{daemon.host.address}:4101"), ("udp", f"{daemon.host.address}:4101")}


def end(daemon: LabDaemon) -> None:
    daemon.process.signal(signal.SIGTERM)
    assert daemon.process.wait() == 0, daemon.process.log()
    daemon.process.child = None


@pytest.mark.parametrize("speaks", ["all", "pcp", "nat-pmp", "upnp"])
def test_ports_are_mapped_used_and_given_back(world: World, speaks: str) -> None:
    router = world.router(speaks)
    daemon = world.daemon(router, f"daemon-{speaks}")
    started = time.monotonic()
    wait_until(lambda: router.mapped() == both(daemon), 10.0, lambda: daemon.process.log() + router.log())
    found = mapping(daemon)
    assert found is not None
    assert found["protocol"] == ("pcp" if speaks == "all" else speaks)
    seconds = time.monotonic() - started
    print(f"{speaks}: mapped {found['seconds']} s after the first question, {seconds:.3f} s after ready")  # noqa: T201
    assert found["seconds"] < MAPPED_SECONDS
    assert {(p["transport"], p["external_ip"]) for p in found["ports"]} == {
        ("tcp", router.box.address),
        ("udp", router.box.address),
    }
    assert all(0 < port["expires_in"] <= 86400 for port in found["ports"])
    for port in found["ports"]:
        assert port["addr"] in daemon.json("status")["addrs"], "advertised"
        path = "tcp" if port["transport"] == "tcp" else "quic"
        stranger = world.strangers[path]
        assert stranger.json("peer", "connect", f"{port['addr']}/p2p/{daemon.peer_id}")["path"] == path
        stranger.json("peer", "ping", daemon.peer_id, "--count", "1")
    wait_until(lambda: daemon.json("status")["reachability"] == "public", 30.0, daemon.process.log)
    wait_until(lambda: doctor(daemon)["ok"], 30.0, lambda: str(doctor(daemon)) + daemon.process.log())
    end(daemon)
    assert not router.mapped(), router.ruleset()
    assert "4101" not in router.ruleset()
