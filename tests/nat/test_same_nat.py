"""Two daemons behind the same NAT: in one LAN, and in two homes of one carrier whose NAT has a hairpin or has none."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from lab_daemons import LabDaemon, wait_until
from nat_lab import Lab

NATTED = '[relay]\nuse = "always"\n[discovery]\nmode = "client"\n'
RELAY_LISTEN = ("--listen", "/ip4/0.0.0.0/tcp/443", "--listen", "/ip4/0.0.0.0/udp/4101/quic-v1")
DIRECT_SECONDS = 15.0


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[LabDaemon, LabDaemon]]]:
    folder, lab, made = tmp_path_factory.mktemp("same"), Lab(), []
    relays: list[LabDaemon] = []
    try:
        for i in range(3):
            known = [part for relay in relays for part in ("--bootstrap", relay.address())]
            home = folder / f"relay{i}"
            relays.append(LabDaemon(lab.public_host(2), home, "--relay", *known, listen=RELAY_LISTEN))
        bootstrap = [part for relay in relays for part in ("--bootstrap", relay.address())]

        def pair(name: str, hosts: list[object]) -> tuple[LabDaemon, LabDaemon]:
            for i, host in enumerate(hosts):
                made.append(LabDaemon(host, folder / f"{name}{i}", *bootstrap, settings=NATTED))  # type: ignore[arg-type]
            return made[-2], made[-1]

        lan = {kind: lab.box(kind) for kind in ("apdf", "sym")}
        carriers = {kind: lab.box(kind, carrier=True) for kind in ("full", "apdf")}
        pairs = {f"lan-{kind}": pair(f"lan-{kind}", [box.host(), box.host()]) for kind, box in lan.items()}
        for kind, carrier in carriers.items():
            homes = [lab.box("apdf", carrier).host() for _ in range(2)]
            pairs[f"cgn-{kind}"] = pair(f"cgn-{kind}", [*homes])
        for daemon in made:
            daemon.wait_reserved()
        yield pairs
    finally:
        for daemon in (*made, *relays):
            daemon.stop()


def first_answer(a: LabDaemon, b: LabDaemon) -> float:
    """Seconds from nothing to an answer, over a relay at first."""
    relayed = next(x for x in b.json("id")["addrs"] if "/tcp/443/" in x and "/ip4/198.18." in x and "/p2p-circuit" in x)
    started = time.monotonic()
    a.json("peer", "connect", f"{relayed}/p2p/{b.peer_id}")
    a.json("peer", "ping", b.peer_id, "--count", "1")
    return time.monotonic() - started


@pytest.mark.parametrize("name", ["lan-apdf", "lan-sym", "cgn-full"])
def test_becomes_direct(name: str, running: dict[str, tuple[LabDaemon, LabDaemon]]) -> None:
    a, b = running[name]
    assert first_answer(a, b) < 1.0
    wait_until(lambda: a.paths(b) & {"tcp", "quic"}, DIRECT_SECONDS, lambda: a.process.log() + b.process.log())
    if name.startswith("lan"):
        addrs = [peer["addr"] for peer in a.json("peers") if peer["peer_id"] == b.peer_id and peer["path"] != "relay"]
        assert all(f"/ip4/{b.host.address}/" in addr for addr in addrs), "by the address in the LAN"


def test_a_carrier_without_hairpin_leaves_the_relay(running: dict[str, tuple[LabDaemon, LabDaemon]]) -> None:
    a, b = running["cgn-apdf"]
    assert first_answer(a, b) < 1.0
    wait_until(lambda: _attempts(a, b) >= 3, 30.0, lambda: str(a.json("nat")["peers"]) + str(b.json("nat")["peers"]))
    assert a.paths(b) == {"relay"}


def _attempts(a: LabDaemon, b: LabDaemon) -> int:
    return sum(peer["attempts"] for peer in a.json("nat")["peers"] if peer["peer_id"] == b.peer_id)
