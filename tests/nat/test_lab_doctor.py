"""`lattica nat` and `lattica doctor` of real daemons behind kernel NATs: each names what is really there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from lab_daemons import LabDaemon, wait_until
from nat_lab import Lab

KINDS = ("none", "fw", "full", "apdf", "symseq", "sym", "noudp", "tcp443", "apdf+apdfr")
NATTED = '[relay]\nuse = "always"\n[discovery]\nmode = "client"\n'
PUBLIC = '[discovery]\nmode = "client"\n'
CAUSES: dict[str, set[str]] = {
    "none": set(),
    "fw": {"reachable", "firewall"},
    "full": set(),
    "apdf": {"reachable"},
    "symseq": {"reachable", "nat"},
    "sym": {"reachable", "nat"},
    "noudp": {"reachable", "udp"},
    "tcp443": {"reachable", "udp"},
    "apdf+apdfr": {"reachable", "double-nat"},
}
"""The checks that say there is a problem."""
VERDICTS = {
    "none": ("none", "endpoint-independent", "public"),
    "fw": ("none", "address-and-port-dependent", "private"),
    "full": ("endpoint-independent", "endpoint-independent", "public"),
    "apdf": ("endpoint-independent", "address-and-port-dependent", "private"),
    "symseq": ("address-and-port-dependent", "address-and-port-dependent", "private"),
    "sym": ("address-and-port-dependent", "address-and-port-dependent", "private"),
    "noudp": ("unknown", "unknown", "private"),
    "tcp443": ("unknown", "unknown", "private"),
    "apdf+apdfr": ("endpoint-independent", "address-and-port-dependent", "private"),
}


@pytest.fixture(scope="module")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, LabDaemon]]:
    """By kind of box; three relays see them, on port 443, too."""
    folder, lab = tmp_path_factory.mktemp("doctor"), Lab()
    relays: list[LabDaemon] = []
    running: dict[str, LabDaemon] = {}
    listen = ("--listen", "/ip4/0.0.0.0/tcp/443", "--listen", "/ip4/0.0.0.0/udp/4101/quic-v1")
    try:
        for i in range(3):
            known = [part for relay in relays for part in ("--bootstrap", relay.address())]
            relays.append(LabDaemon(lab.public_host(2), folder / f"relay{i}", "--relay", *known, listen=listen))
        bootstrap = [part for relay in relays for part in ("--bootstrap", relay.address())]
        for kind in KINDS:
            settings = PUBLIC if kind == "none" else NATTED
            home = folder / kind.replace("+", "-")
            running[kind] = LabDaemon(lab.host_behind(kind), home, *bootstrap, settings=settings)
        for kind, daemon in running.items():
            if kind != "none":
                daemon.wait_reserved()
            wait_until(lambda d=daemon: len(d.json("nat")["observers"]) >= 3, 20.0, daemon.process.log)  # type: ignore[misc]
        yield running
    finally:
        for daemon in (*running.values(), *relays):
            daemon.stop()


def by_check(findings: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {finding["check"]: finding for finding in findings}


@pytest.mark.parametrize("kind", KINDS)
def test_the_verdict_of_nat(kind: str, daemons: dict[str, LabDaemon]) -> None:
    data = daemons[kind].json("nat", "--fresh")
    assert (data["mapping"], data["filtering"], data["reachability"]) == VERDICTS[kind], data
    blocked = kind in ("noudp", "tcp443")
    assert data["udp_blocked"] is blocked
    assert {entry["sees"] is None for entry in data["observers"]} == {blocked}
    assert bool(data["reservations"]) is (kind != "none")


@pytest.mark.parametrize("kind", KINDS)
def test_doctor_names_the_cause(kind: str, daemons: dict[str, LabDaemon]) -> None:
    found = by_check(daemons[kind].json("doctor"))
    problems = {name for name, finding in found.items() if finding["ok"] is False}
    problems.discard("container")  # of the machine that the lab runs on
    assert ("tcp-ports" in found) is (kind in ("noudp", "tcp443")), "the relays are at 443"
    assert problems == CAUSES[kind], found
    assert all(found[name]["fix"] and found[name]["detail"] for name in problems)
    assert all(found[name]["evidence"] for name in problems - {"reachable"})


@pytest.mark.parametrize(
    ("a", "b", "word"),
    [
        ("sym", "symseq", "neither side can know"),
        ("symseq", "sym", "symmetric NAT: we are and the peer is"),
        ("tcp443", "apdf", "UDP is blocked where we are"),
        ("apdf", "tcp443", "UDP is blocked where the peer is"),
    ],
)
def test_doctor_says_why_a_peer_is_relayed(a: str, b: str, word: str, daemons: dict[str, LabDaemon]) -> None:
    one, other = daemons[a], daemons[b]
    relayed = next(addr for addr in other.json("id")["addrs"] if "/tcp/443/" in addr and "/ip4/198.18." in addr)
    one.json("peer", "connect", f"{relayed}/p2p/{other.peer_id}")
    wait_until(lambda: _attempts(one, other) >= 1, 20.0, one.process.log)
    found = by_check(one.json("doctor", other.peer_id))
    assert found["path"]["detail"].startswith("relayed"), found
    assert word in found["cause"]["detail"], found
    assert found["cause"]["fix"]
    assert found["attempts"]["evidence"]
    one.json("peer", "disconnect", other.peer_id)


@pytest.mark.parametrize(
    ("a", "b", "technique", "word"),
    [("sym", "apdf", "birthday", "by trying many"), ("apdf", "symseq", "predict", "through a predicted port")],
)
def test_a_guessed_path_is_told(a: str, b: str, technique: str, word: str, daemons: dict[str, LabDaemon]) -> None:
    one, other = daemons[a], daemons[b]
    relayed = next(addr for addr in other.json("id")["addrs"] if "/tcp/443/" in addr and "/ip4/198.18." in addr)
    one.json("peer", "connect", f"{relayed}/p2p/{other.peer_id}")
    wait_until(lambda: one.paths(other) & {"quic"}, 30.0, one.process.log)
    wait_until(lambda: not any(guess["running"] for guess in _report(one, other)["guesses"]), 5.0, one.process.log)
    report = _report(one, other)
    assert report["technique"] == technique, report
    (guess,) = [guess for guess in report["guesses"] if guess["direct"]]
    assert guess["technique"] == technique
    assert guess["probes"] > 0
    attempts = by_check(one.json("doctor", other.peer_id))["attempts"]
    assert word in attempts["detail"]
    assert any("guessed ports" in line for line in attempts["evidence"])
    assert technique in one.process.cli("nat").stdout
    one.json("peer", "disconnect", other.peer_id)


def _report(one: LabDaemon, other: LabDaemon) -> dict[str, Any]:
    found: dict[str, Any] = next(peer for peer in one.json("nat")["peers"] if peer["peer_id"] == other.peer_id)
    return found


def _attempts(one: LabDaemon, other: LabDaemon) -> int:
    return sum(peer["attempts"] for peer in one.json("nat")["peers"] if peer["peer_id"] == other.peer_id)


def test_ports_that_are_counted_up_stay_known(daemons: dict[str, LabDaemon]) -> None:
    """Observers see old mappings of the main socket again; the verdict rests on new ones."""
    for _ in range(2):
        ports = daemons["symseq"].json("nat", "--fresh")["ports"]
        assert (ports["choice"], ports["step"]) == ("sequential", 1)


def test_the_time_a_mapping_lives_is_measured(daemons: dict[str, LabDaemon]) -> None:
    lifetime = daemons["apdf"].json("nat", "--lifetimes", "1,2")["lifetime"]
    assert lifetime == {"lives_for": 2.0, "dies_within": None}
    assert daemons["apdf"].json("nat", "--fresh")["lifetime"] == lifetime, "measured once, it stays known"


def test_people_can_read_it(daemons: dict[str, LabDaemon]) -> None:
    done = daemons["sym"].process.cli("doctor")
    assert done.returncode == 0
    assert "problem  nat: symmetric NAT" in done.stdout
    assert "->  forward" in done.stdout
    done = daemons["sym"].process.cli("nat")
    assert "mapping      address-and-port-dependent" in done.stdout
