"""Real daemons behind kernel NATs: every pair talks at once over some path, and directly where theory allows.

One relay on a public host, reached over TCP 443 by those that may nothing else; two daemons behind each kind of box.
Times are those of this lab, which has no delay: T0 has the figures at 40 ms.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab_daemons import LabDaemon, wait_until
from nat_lab import Lab

sys.path.insert(0, str(Path(__file__).parents[1] / "sim"))

from test_nat_punch import TYPES, expected

from lattica_protocols.nat.punch_plan import Technique

RELAYS = 3
"""Also the observers: fewer could not be sure."""
KINDS = [*TYPES, "symblk"]
PAIRS = list(itertools.combinations_with_replacement(KINDS, 2))
"""The 136 of theory's matrix, and a carrier's block of ports with each."""
NATTED = '[relay]\nuse = "always"\n[discovery]\nmode = "client"\n'
PUBLIC = '[discovery]\nmode = "client"\n'
"""Nobody meets anybody by way of the DHT: each pair is a first meeting, and a firewall counts as one from the start."""
FIRST_CALL_SECONDS = 1.0
DIRECT_SECONDS = {Technique.SIMPLE: 15.0, Technique.PREDICT: 15.0, Technique.BIRTHDAY: 35.0}
"""Three attempts of 4 s; nearly all need one. A birthday takes 3 s in the median, and 28 s at most."""


@pytest.fixture(scope="module")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, int], LabDaemon]]:
    """By kind of box and number."""
    folder = tmp_path_factory.mktemp("daemons")
    lab = Lab()
    listen: list[str] = []
    for addr in ("/ip4/0.0.0.0/tcp/443", "/ip4/0.0.0.0/udp/4101/quic-v1"):
        listen += ["--listen", addr]
    relays: list[LabDaemon] = []
    for i in range(RELAYS):
        known = [part for relay in relays for part in ("--bootstrap", relay.address())]
        relays.append(LabDaemon(lab.public_host(), folder / f"relay{i}", "--relay", *known, listen=tuple(listen)))
    bootstrap = [part for relay in relays for part in ("--bootstrap", relay.address())]
    hosts = {(kind, i): lab.host_behind(kind) for kind in KINDS for i in range(2)}
    running = {}
    for (kind, i), host in hosts.items():
        running[kind, i] = LabDaemon(
            host, folder / f"{kind.replace('+', '-')}{i}", *bootstrap, settings=PUBLIC if kind == "none" else NATTED
        )
    try:
        for (kind, _), daemon in running.items():
            if kind not in ("none", "full"):
                daemon.wait_reserved()
            if kind not in ("noudp", "tcp443"):  # else the first pairs would be punched without knowing what to do
                wait_until(lambda d=daemon: d.json("nat")["mapping"] != "unknown", 30.0, daemon.process.log)  # type: ignore[misc]
        relayed = {key: _relayed_addr(daemon) for key, daemon in running.items() if key[0] != "none"}
        for key, daemon in running.items():
            daemon.known_at = relayed.get(key) or daemon.address("udp")
        yield running
    finally:
        for daemon in (*running.values(), *relays):
            daemon.stop()


def _relayed_addr(daemon: LabDaemon) -> str:
    addrs = [a for a in daemon.json("id")["addrs"] if "/tcp/443/" in a and "/ip4/198.18." in a and "/p2p-circuit" in a]
    return f"{addrs[0]}/p2p/{daemon.peer_id}"


@pytest.fixture(scope="module")
def times() -> Iterator[dict[tuple[str, str], tuple[float, float | None]]]:
    """Seconds until the first answer and until the direct path; printed at the end."""
    found: dict[tuple[str, str], tuple[float, float | None]] = {}
    yield found
    print()  # noqa: T201
    first = sorted(seconds for seconds, _ in found.values())
    direct = sorted(seconds for _, seconds in found.values() if seconds is not None)
    if first:
        print(f"first answer: median {statistics.median(first):.3f} s, slowest {first[-1]:.3f} s, {len(first)} pairs")  # noqa: T201
    if direct:
        for technique in DIRECT_SECONDS:
            seconds = [s for pair, (_, s) in found.items() if s is not None and expected(*pair) is technique]
            if seconds:
                print(f"{technique.value}: {len(seconds)} pairs, median {statistics.median(seconds):.2f} s")  # noqa: T201
        late = " ".join(f"{' x '.join(pair)} {s:.1f}" for pair, (_, s) in found.items() if s is not None and s > 2)
        print(f"direct: median {statistics.median(direct):.3f} s, slowest {direct[-1]:.3f} s, {len(direct)} pairs")  # noqa: T201
        print(f"not at the first attempt: {late or 'none'}")  # noqa: T201


@pytest.mark.parametrize("pair", PAIRS, ids=" x ".join)
def test_pair(
    pair: tuple[str, str],
    daemons: dict[tuple[str, int], LabDaemon],
    times: dict[tuple[str, str], tuple[float, float | None]],
) -> None:
    a, b = daemons[pair[0], 0], daemons[pair[1], 1]
    started = time.monotonic()
    a.json("peer", "connect", b.known_at)
    a.json("peer", "ping", b.peer_id, "--count", "1")
    first = time.monotonic() - started
    direct = None
    technique = expected(*pair)
    if technique is not Technique.NONE:
        seconds = DIRECT_SECONDS[technique]
        wait_until(lambda: a.paths(b) & {"tcp", "quic"}, seconds, lambda: a.process.log() + b.process.log())
        direct = time.monotonic() - started
    times[pair] = (first, direct)
    a.json("peer", "disconnect", b.peer_id)
    assert first < FIRST_CALL_SECONDS
