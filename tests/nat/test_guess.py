"""What `test_daemons` does not look at in punches with guessed ports: port blocks, the data meanwhile, the sockets."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from lab_daemons import LabDaemon, stays, wait_until
from nat_lab import GATEWAY, Lab, LabHost

from lattica_protocols.nat import punch

NATTED = '[relay]\nuse = "always"\n[discovery]\nmode = "client"\n'
RELAY_LISTEN = ("--listen", "/ip4/0.0.0.0/tcp/443", "--listen", "/ip4/0.0.0.0/udp/4101/quic-v1")
EASY = ("apdf", "rej", "open")
DIRECT_SECONDS = 35.0
SOCKETS_CLOSED_SECONDS = 30.0
FOLLOWED_SECONDS = 3.0
"""Within which a birthday would have begun, to go on for 28 s."""


@pytest.fixture(scope="module")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, LabDaemon]]:
    """By kind of box; `sym-2` is a second of one kind."""
    with running_lab(tmp_path_factory.mktemp("guess"), ("symblk", "sym", "sym-2", *EASY)) as running:
        yield running


@contextmanager
def running_lab(folder: Path, names: Sequence[str], *arguments: str) -> Iterator[dict[str, LabDaemon]]:
    """A daemon behind each kind of box that is named, when they know their NATs."""
    lab = Lab()
    relays: list[LabDaemon] = []
    running: dict[str, LabDaemon] = {}
    try:
        for i in range(3):
            known = [part for relay in relays for part in ("--bootstrap", relay.address())]
            relays.append(LabDaemon(lab.public_host(), folder / f"relay{i}", "--relay", *known, listen=RELAY_LISTEN))
        bootstrap = [part for relay in relays for part in ("--bootstrap", relay.address())]
        for name in names:
            host = lab.host_behind(name.partition("-")[0])
            running[name] = LabDaemon(host, folder / name, *bootstrap, *arguments, settings=NATTED)
        for daemon in running.values():
            daemon.wait_reserved()
            wait_until(lambda d=daemon: d.json("nat")["mapping"] != "unknown", 30.0, daemon.process.log)  # type: ignore[misc]
        yield running
    finally:
        for daemon in (*running.values(), *relays):
            daemon.stop()


def connect(one: LabDaemon, other: LabDaemon) -> None:
    """Over a relay."""
    addrs = [a for a in other.json("id")["addrs"] if "/ip4/198.18." in a and "/p2p-circuit" in a]
    one.json("peer", "connect", f"{addrs[0]}/p2p/{other.peer_id}")


def report(one: LabDaemon, other: LabDaemon) -> dict[str, Any]:
    found: dict[str, Any] = next(peer for peer in one.json("nat")["peers"] if peer["peer_id"] == other.peer_id)
    return found


def udp_sockets(host: LabHost) -> int:
    return len(host.netns.run(["cat", "/proc/net/udp"]).stdout.splitlines()) - 1


@pytest.mark.parametrize("easy", EASY)
def test_a_port_block_is_learnt(easy: str, daemons: dict[str, LabDaemon]) -> None:
    one, other = daemons["symblk"], daemons[easy]
    connect(one, other)
    wait_until(lambda: "quic" in one.paths(other), DIRECT_SECONDS, lambda: one.process.log() + other.process.log())
    wait_until(lambda: not any(guess["running"] for guess in report(other, one)["guesses"]), 5.0)
    (guess,) = [guess for guess in report(other, one)["guesses"] if guess["direct"]]
    assert guess["technique"] == "birthday"
    assert guess["probes"] < 400, "2,048 ports, and not 64,512"
    one.json("peer", "disconnect", other.peer_id)


def test_data_flows_meanwhile_and_the_sockets_are_closed(daemons: dict[str, LabDaemon]) -> None:
    hard, easy = daemons["sym"], daemons["apdf"]
    before = udp_sockets(hard.host)
    connect(hard, easy)
    started, pings, most = time.monotonic(), 0, 0
    while "quic" not in hard.paths(easy):
        assert time.monotonic() - started < DIRECT_SECONDS, hard.process.log() + easy.process.log()
        hard.json("peer", "ping", easy.peer_id, "--count", "1")
        pings += 1
        most = max(most, udp_sockets(hard.host))
    hard.json("peer", "ping", easy.peer_id, "--count", "3")
    wait_until(lambda: udp_sockets(hard.host) <= before + 1, SOCKETS_CLOSED_SECONDS, hard.process.log)
    assert time.monotonic() - started < SOCKETS_CLOSED_SECONDS
    guess = report(hard, easy)["guesses"][-1]
    assert guess["opened_sockets"]
    assert most > before or guess["probes"] < 20
    for one, other in ((hard, easy), (easy, hard)):
        guess = report(one, other)["guesses"][-1]
        assert guess["probes"] <= 100 * guess["seconds"] + 20, "paced"
    assert pings
    hard.json("peer", "disconnect", easy.peer_id)


def test_a_pair_without_a_chance_makes_quick_attempts_and_says_why(daemons: dict[str, LabDaemon]) -> None:
    """Both take their ports at random, and several observers say so to each."""
    one, other = daemons["sym"], daemons["sym-2"]
    for each in (one, other):
        wait_until(lambda each=each: each.json("nat")["certain"], 30.0, each.process.log)  # type: ignore[misc]
    before = udp_sockets(one.host)
    started = time.monotonic()
    connect(one, other)

    def tried() -> list[dict[str, Any]]:
        guesses = [report(each, partner)["guesses"] for each, partner in ((one, other), (other, one))]
        return guesses if all(g and not g[-1]["running"] for g in guesses) else []

    wait_until(tried, 30.0, lambda: one.process.log() + other.process.log())
    stays(tried, FOLLOWED_SECONDS)
    for guess in (guess for guesses in tried() for guess in guesses):
        assert guess["technique"] == "simple"
        assert guess["seconds"] < 3
        assert guess["probes"] < 100
    assert udp_sockets(one.host) <= before + 1
    assert one.paths(other) == {"relay"}
    why = report(one, other)["why"]
    assert "both are certain" in why, why
    assert "symmetric NAT: we are and the peer is" in why, why
    (cause,) = [found for found in one.json("doctor", other.peer_id) if found["check"] == "cause"]
    assert cause["detail"] == why
    assert "UPnP" in cause["fix"]
    assert time.monotonic() - started < 40
    one.json("peer", "disconnect", other.peer_id)


@pytest.mark.parametrize("hard", ["sym", "apdf+sym"])
def test_an_unlucky_search_does_not_poison_the_box_of_a_neighbour(
    hard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are at one router. When nothing has been met for a while the sockets are opened again: not one hop further,
    to the partner's box, which would then give its user's socket another port."""
    ports = punch._search_order

    def unlucky(low: int, high: int, rng: random.Random) -> list[int]:
        return [*range(1, 701), *ports(low, high, rng)]  # 7 s at ports that no such NAT gives

    monkeypatch.setattr(punch, "_search_order", unlucky)
    monkeypatch.setattr(punch, "REOPEN_AFTER", 3.0)  # all are open again after 6 s
    with running_lab(tmp_path, ("open", hard), "--log-level", "debug") as running:
        one, other = running["open"], running[hard]
        last = r"100\.64\.\d+\.1" if "+" in hard else r"10\.\d+\.0\.1"  # of its own boxes; the core's follows
        known = re.compile(last + re.escape(f' {GATEWAY}"'))
        wait_until(lambda: known.search(other.process.log()), 30.0, other.process.log)
        connect(one, other)
        wait_until(lambda: "quic" in one.paths(other), DIRECT_SECONDS, lambda: one.process.log() + other.process.log())
        wait_until(lambda: not report(one, other)["guesses"][-1]["running"], 5.0)
        (guess,) = report(one, other)["guesses"]
        assert (guess["technique"], guess["direct"]) == ("birthday", True)
        assert guess["probes"] > 700
