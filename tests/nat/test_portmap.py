"""Daemons behind a real miniupnpd: each protocol alone and all together, a stranger comes in, nothing is left."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab_daemons import LabDaemon, wait_until
from router_lab import DENY, Router, miniupnpd_missing
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


def test_a_router_that_was_restarted_maps_again(world: World) -> None:
    """It forgets everything and says so; the daemon does not wait for the next renewal."""
    router = world.router()
    daemon = world.daemon(router, "restarted")
    wait_until(lambda: router.mapped() == both(daemon), 10.0, daemon.process.log)
    router.restart()
    seconds = wait_until(lambda: router.mapped() == both(daemon), 75.0, lambda: daemon.process.log() + router.log())
    print(f"mapped again {seconds:.1f} s after the router's restart")  # noqa: T201
    end(daemon)
    assert not router.mapped()


def test_a_router_that_refuses_is_named(world: World) -> None:
    router = world.router("upnp", rules=DENY)  # asked by PCP, this miniupnpd tries 65,535 ports before it refuses
    daemon = world.daemon(router, "refused")
    wait_until(lambda: doctor(daemon)["ok"] is False, 15.0, lambda: str(doctor(daemon)) + router.log())
    found = doctor(daemon)
    assert "the router maps no port" in found["detail"]
    assert mapping(daemon) is None
    end(daemon)


def test_behind_two_nats_the_second_is_named(world: World) -> None:
    """miniupnpd knows that its own address is a carrier's, and refuses."""
    carrier = world.lab.box("apdf")
    router = Router(world.lab.box("apdf", carrier), world.folder)
    daemon = world.daemon(router, "double")
    try:
        wait_until(lambda: doctor(daemon)["ok"] is False, 15.0, lambda: str(doctor(daemon)) + router.log())
        assert "another NAT" in doctor(daemon)["detail"]
        assert "another NAT" in daemon.json("nat")["port_mapping_detail"]
    finally:
        router.stop()
    end(daemon)


def test_switched_off_nothing_is_asked(world: World) -> None:
    router = world.router()
    daemon = world.daemon(router, "off", settings=QUIET)
    wait_until(lambda: daemon.json("peers"), 10.0, daemon.process.log)
    assert "off in the settings" in daemon.json("nat")["port_mapping_detail"]
    assert not router.mapped()
    assert daemon.host.address not in router.log(), "not even asked"
    end(daemon)


def test_another_network_another_router(world: World) -> None:
    """The computer is carried from one home to the other."""
    old, new = world.router(), world.router()
    daemon = world.daemon(old, "carried")
    wait_until(lambda: old.mapped() == both(daemon), 10.0, daemon.process.log)
    daemon.host.netns.ip("link del eth0")
    daemon.host.address = new.box.plug(daemon.host.netns, "eth0")
    seconds = wait_until(lambda: new.mapped() == both(daemon), 10.0, lambda: daemon.process.log() + new.log())
    print(f"mapped {seconds:.1f} s after the move")  # noqa: T201
    end(daemon)
    assert not new.mapped()
