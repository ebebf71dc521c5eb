"""A box is replaced by one of another kind under an idle direct connection. Whoever wants something notices, and comes
by the relay; the other side still takes the direct path for good, and must not leave the relay for it."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

from lab_daemons import LabDaemon, wait_until
from nat_lab import Lab
from test_paths import NATTED

LOOKED_EVERY = 0.5
"""Seconds between two looks at the paths."""
NOTICED_SECONDS = 30.0
"""QUIC and TCP one after the other, 6.5 s each, and what the relay's own connections take."""
WATCHED_SECONDS = 25.0
"""Relayed connections are left after 10 s beside a direct one; that one's keep-alive comes later."""


def test_the_relay_is_not_left_for_a_path_that_is_dead(tmp_path: Path) -> None:
    lab = Lab()
    with ExitStack() as stack:
        known: list[str] = []
        for i in range(2):
            relay = LabDaemon(lab.public_host(), tmp_path / f"relay{i}", "--relay", *known)
            stack.callback(relay.stop)
            known += ["--bootstrap", relay.address()]
        box = lab.box("apdf")
        a = LabDaemon(box.host(), tmp_path / "a", *known, settings=NATTED)
        stack.callback(a.stop)
        b = LabDaemon(lab.host_behind("apdfr"), tmp_path / "b", *known, settings=NATTED)
        stack.callback(b.stop)
        for daemon in (a, b):
            daemon.wait_reserved()
        relayed = next(addr for addr in b.json("id")["addrs"] if "/ip4/198.18." in addr and "/p2p-circuit" in addr)

        def logs() -> str:
            return a.process.log() + b.process.log()

        a.json("peer", "connect", f"{relayed}/p2p/{b.peer_id}")
        wait_until(lambda: a.paths(b) & {"quic", "tcp"} and "relay" not in a.paths(b) | b.paths(a), 30.0, logs)
        box.rebind(kind="sym")

        def is_answered() -> bool:
            return a.process.cli("peer", "ping", b.peer_id, "--count", "1").returncode == 0

        wait_until(is_answered, NOTICED_SECONDS, logs)
        answered = time.monotonic()
        while time.monotonic() - answered < WATCHED_SECONDS:
            assert a.paths(b), f"no path is left after {time.monotonic() - answered:.1f} s\n{logs()}"
            time.sleep(LOOKED_EVERY)
        assert is_answered()
