"""A relay falls silent without a word, stopped or cut off, while nobody uses it: whoever was reached there is soon
reached at another one, and whoever knows it as the way to somebody does not wait for it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from lab_daemons import LabDaemon, wait_until
from spread_lab import SpreadLab
from test_relay_gone import FOUND_SECONDS, relays_of

from lattica.relay.client import ANSWER_SECONDS, LOOK_SECONDS

NOTICED_SECONDS = LOOK_SECONDS + 2 * ANSWER_SECONDS
QUIET_BYTES = 1000
"""What signs of life of both connections come to between two looks, and no message."""
NATTED = '[relay]\nuse = "always"\n[discovery]\nmode = "client"\n'


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def freeze(_: SpreadLab, relay: LabDaemon) -> Callable[[], None]:
    """Its kernel goes on to acknowledge what TCP brings."""
    relay.process.signal(signal.SIGSTOP)
    return lambda: relay.process.signal(signal.SIGCONT)


def cut_off(lab: SpreadLab, relay: LabDaemon) -> Callable[[], None]:
    ip = relay.host.address
    drops = f"ip saddr {ip} drop\nip daddr {ip} drop\n"
    lab.core.nft(f"table ip cut {{ chain forward {{ type filter hook forward priority 0;\n{drops}}}\n}}\n")
    return lambda: lab.core.nft("delete table ip cut\n")


@pytest.mark.parametrize("fall_silent", [freeze, cut_off])
def test_a_relay_that_falls_silent_is_replaced(
    stack: ExitStack, tmp_path: Path, fall_silent: Callable[[SpreadLab, LabDaemon], Callable[[], None]]
) -> None:
    lab = SpreadLab()
    seed, relays, hidden = start(lab, tmp_path, stack)
    bootstrap = ("--bootstrap", seed.address("tcp"))
    asks = LabDaemon(lab.host_behind("sym"), tmp_path / "asks", *bootstrap, settings=NATTED)
    stack.callback(asks.stop)
    asks.wait_reserved(2)
    known = [f"{addr}/p2p/{hidden.peer_id}" for addr in hidden.json("id")["addrs"] if "/p2p-circuit" in addr]
    late = LabDaemon(lab.public_host(), tmp_path / "late", "--relay", *bootstrap)
    stack.callback(late.stop)
    stack.callback(fall_silent(lab, relays[0]))
    started = time.monotonic()
    for addr in known:
        asked_at = time.monotonic()
        asks.json("peer", "connect", addr)
        asks.json("peer", "ping", hidden.peer_id, "--count", "1")
        assert time.monotonic() - asked_at < 2.0
        asks.json("peer", "disconnect", hidden.peer_id)
    wait_until(lambda: late.peer_id in relays_of(hidden), NOTICED_SECONDS + FOUND_SECONDS, hidden.process.log)
    print(f"replaced after {time.monotonic() - started:.1f} s")  # noqa: T201
    left = {relays[1].peer_id, late.peer_id}
    wait_until(lambda: relays_of(hidden) == left, 10.0, hidden.process.log)


def test_a_relay_that_was_only_slow_is_kept(stack: ExitStack, tmp_path: Path) -> None:
    lab = SpreadLab()
    _, relays, hidden = start(lab, tmp_path, stack)

    both = {relay.peer_id for relay in relays}
    rest(hidden, relays[0])
    come_back = stack.callback(freeze(lab, relays[0]))
    wait_until(lambda: "relay_silent" in hidden.process.log(), NOTICED_SECONDS + 2.0, hidden.process.log)
    come_back()
    wait_until(lambda: "relay_answers" in hidden.process.log(), NOTICED_SECONDS + 2.0, hidden.process.log)
    assert relays_of(hidden) == both
    assert "reservation_lost" not in hidden.process.log()


def rest(daemon: LabDaemon, relay: LabDaemon) -> None:
    """Until nothing goes between them but signs of life: a path on which something is awaited dies after 6.5 s."""

    def carried() -> int:
        peers = daemon.json("peers")
        return sum(p["sent_bytes"] + p["received_bytes"] for p in peers if p["peer_id"] == relay.peer_id)

    wait_until(lambda: "reachability" in daemon.process.log(), 30.0, daemon.process.log)
    before = -QUIET_BYTES
    while carried() - before >= QUIET_BYTES:  # bounded by the tier
        before = carried()
        time.sleep(LOOK_SECONDS)


def start(lab: SpreadLab, folder: Path, stack: ExitStack) -> tuple[LabDaemon, list[LabDaemon], LabDaemon]:
    """Somebody who knows all, two relays, and who is reached there."""
    seed = LabDaemon(lab.public_host(), folder / "seed", "--no-relay")
    stack.callback(seed.stop)
    bootstrap = ("--bootstrap", seed.address("tcp"))
    relays = []
    for i in range(2):
        relays.append(LabDaemon(lab.public_host(), folder / f"relay{i}", "--relay", *bootstrap))
        stack.callback(relays[-1].stop)
    hidden = LabDaemon(lab.host_behind("sym"), folder / "hidden", *bootstrap, settings=NATTED)
    stack.callback(hidden.stop)
    hidden.wait_reserved(2)
    return seed, relays, hidden
