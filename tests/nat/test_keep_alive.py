"""What daemons send that have nothing to say: between public peers nothing, behind a NAT enough for its mapping."""

from __future__ import annotations

import time
from pathlib import Path

from lab_daemons import LabDaemon, wait_until
from spread_lab import SpreadLab

CLIENT = '[discovery]\nmode = "client"\n'
SETTLED_SECONDS = 30.0
"""Verdicts on NATs and on who reaches us are asked for until then."""
SILENT_SECONDS = 27.0
"""The time that is measured: longer than a NAT's mapping may be left alone."""


def sent(daemon: LabDaemon, other: LabDaemon) -> int:
    """Bytes on all their connections, both ways."""
    peers = [peer for peer in daemon.json("peers") if peer["peer_id"] == other.peer_id]
    assert peers, daemon.process.log()
    return sum(peer["sent_bytes"] + peer["received_bytes"] for peer in peers)


def test_an_idle_connection_costs_what_its_mapping_needs(tmp_path: Path) -> None:
    lab = SpreadLab()
    public: list[LabDaemon] = []
    for i in range(4):
        known = [part for each in public for part in ("--bootstrap", each.address("tcp"))]
        public.append(LabDaemon(lab.public_host(), tmp_path / f"public{i}", *known, settings=CLIENT))
    bootstrap = [part for each in public for part in ("--bootstrap", each.address("udp"))]
    hidden = LabDaemon(lab.host_behind("apdf"), tmp_path / "hidden", *bootstrap, settings=CLIENT)
    try:
        started = time.monotonic()
        for each in public:
            wait_until(lambda each=each: each.json("status")["reachability"] == "public", 30.0)  # type: ignore[misc]
        wait_until(lambda: hidden.json("nat")["filtering"] == "address-and-port-dependent", 40.0)
        time.sleep(max(0.0, SETTLED_SECONDS - (time.monotonic() - started)))
        pairs = [(a, b) for i, a in enumerate(public) for b in public[:i]]
        between = [sent(a, b) for a, b in pairs]
        behind = [sent(hidden, each) for each in public]
        time.sleep(SILENT_SECONDS)
        quiet = [sent(a, b) - before for (a, b), before in zip(pairs, between, strict=True)]
        kept = [sent(hidden, each) - before for each, before in zip(public, behind, strict=True)]
        assert not any(quiet), quiet
        assert all(kept), kept
    finally:
        for each in (*public, hidden):
            each.stop()
