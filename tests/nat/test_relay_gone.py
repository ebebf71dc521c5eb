"""A relay dies while nobody waits for it: whoever was reached there is soon reached at another one."""

from __future__ import annotations

import signal
from pathlib import Path

from lab_daemons import LabDaemon, wait_until
from spread_lab import SpreadLab

NOTICED_SECONDS = 6.5
"""TCP tells that the process died; the QUIC connection with it is asked for a sign of life then."""
FOUND_SECONDS = 8.0
"""Five between two searches, a search, a dial and the reservation."""


def relays_of(daemon: LabDaemon) -> set[str]:
    return {a.split("/p2p/")[1].partition("/")[0] for a in daemon.json("id")["addrs"] if "/p2p-circuit" in a}


def test_a_relay_that_is_killed_is_replaced(tmp_path: Path) -> None:
    lab = SpreadLab()
    seed = LabDaemon(lab.public_host(), tmp_path / "seed", "--no-relay")
    bootstrap = ("--bootstrap", seed.address("tcp"))
    relays = [LabDaemon(lab.public_host(), tmp_path / f"relay{i}", "--relay", *bootstrap) for i in range(2)]
    hidden = LabDaemon(lab.host_behind("apdf"), tmp_path / "hidden", *bootstrap)
    late = None
    try:
        hidden.wait_reserved(2)
        assert relays_of(hidden) == {relay.peer_id for relay in relays}
        late = LabDaemon(lab.public_host(), tmp_path / "late", "--relay", *bootstrap)
        relays[0].process.signal(signal.SIGKILL)
        left = {relays[1].peer_id, late.peer_id}
        wait_until(lambda: relays_of(hidden) == left, NOTICED_SECONDS + FOUND_SECONDS, hidden.process.log)
    finally:
        for each in (seed, *relays, hidden, *([late] if late else [])):
            each.stop()
