"""The figures of NAT traversal, as a table: `make nat-figures` or `python tests/nat/figures.py`.

T1 are real daemons behind kernel NATs, T0 is the simulation (20 ms one way, up to 15 ms between the two starts). With
netem T1 has 40 ms round trip, too; without, T1 has no delay and the table says so.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent / "sim"), str(HERE.parent / "runtime")]

import test_nat_punch as sim  # noqa: E402
from lab_daemons import LabDaemon, wait_until  # noqa: E402
from nat_lab import Lab, LabHost, has_netem  # noqa: E402
from run import INSIDE, lab_problem  # noqa: E402

from lattica_protocols.nat.punch_plan import Technique  # noqa: E402

NATTED = '[relay]\nuse = "always"\n[discovery]\nmode = "client"\n'
PUBLIC = '[discovery]\nmode = "client"\n'
EASY = ("none", "fw", "full", "adf", "apdf", "apdfr", "rej", "open")
BLOCKED = ("noudp", "tcp443")
DIRECT_SECONDS = 15.0
BIRTHDAY_SECONDS = 40.0
"""One attempt of 28 s, and what comes before and after."""
BIRTHDAY_PAIRS = 5
"""That take turns: no peer begins more than some attempts with another in a minute."""
SLOW_BIRTHDAY_SECONDS = 10.0
SLOW_SECONDS = 0.5
"""What is slower is shown with what was tried."""
Row = tuple[str, str, str, str]
"""What, figure, bar, how."""


def simulated() -> Iterator[Row]:
    """T0."""
    times, direct, pairs = [], 0, [pair for pair in sim.PAIRS if sim.expected(*pair) is Technique.SIMPLE]
    for seed, pair in enumerate(pairs):
        seconds = _simulate(seed, pair)
        direct += bool(seconds)
        times += seconds
    yield "simple pairs direct", f"{direct} of {len(pairs)}", "all", "T0"
    yield "punch, both starts to path", _spread(times), "150 / 500 ms", "T0, 40 ms round trip"
    pairs = [pair for pair in sim.PAIRS if sim.expected(*pair) is Technique.PREDICT]
    direct = sum(bool(_simulate(seed, pair)) for seed, pair in enumerate(pairs))
    yield "sequential NATs by prediction", f"{direct} of {len(pairs)}", "7 of 7", "T0, the punching machine"
    times, direct, rate = [], 0, 0.0
    for seed in range(30):
        seconds, probes = _birthday(seed)
        direct += bool(seconds)
        times += seconds
        rate = max(rate, probes / max(seconds) if seconds else 0.0)
    yield "random x port-restricted, birthday", f"{direct} of 30, median {_median(times):.1f} s", "95 %, 10 s", "T0"
    yield "   probes of both sides", f"{rate:.0f}/s at most", "200/s", "T0"


def _simulate(seed: int, pair: tuple[str, str]) -> tuple[float, ...]:
    return sim.run_pair(seed, *pair).seconds


def _birthday(seed: int) -> tuple[tuple[float, ...], int]:
    result = sim.run_pair(seed, "sym", "apdf")
    return result.seconds, result.probes


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "none"
    return f"median {_median(values) * 1e3:.0f} ms, 95 % {statistics.quantiles(values, n=20)[-1] * 1e3:.0f} ms"


class LabFigures:
    """T1."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack = folder, stack
        self.netem = has_netem()
        self.how = "T1, 40 ms round trip" if self.netem else "T1, no delay (netem is missing)"
        self.lab = Lab(delay_ms=20.0 if self.netem else 0.0)
        self.relays: list[LabDaemon] = []
        listen = ("--listen", "/ip4/0.0.0.0/tcp/443", "--listen", "/ip4/0.0.0.0/udp/4101/quic-v1")
        for i in range(3):
            known = self._bootstrap(i)
            relay = LabDaemon(self.lab.public_host(), folder / f"relay{i}", "--relay", *known, listen=listen)
            stack.callback(relay.stop)
            self.relays.append(relay)

    def _bootstrap(self, count: int) -> list[str]:
        return [part for relay in self.relays[:count] for part in ("--bootstrap", relay.address())]

    def daemon(self, name: str, host: LabHost, settings: str = NATTED, relays: int = 3) -> LabDaemon:
        made = LabDaemon(host, self.folder / name, *self._bootstrap(relays), settings=settings)
        self.stack.callback(made.stop)
        return made

    def pairs(self) -> Iterator[Row]:
        """Each pair once, from nothing to a direct path."""
        made = {
            (kind, i): self.daemon(
                f"{kind}{i}", self.lab.host_behind(kind), PUBLIC if kind == "none" else NATTED
            )
            for kind in (*EASY, *BLOCKED)
            for i in range(2)
        }
        for (kind, _), one in made.items():
            if kind not in ("none", "full"):
                one.wait_reserved()
        first, direct, told = [], 0, []
        wanted = list(itertools.combinations_with_replacement(EASY, 2))
        for pair in (*wanted, *itertools.product(EASY, BLOCKED), *itertools.combinations_with_replacement(BLOCKED, 2)):
            a, b = made[pair[0], 0], made[pair[1], 1]
            started = time.monotonic()
            a.json("peer", "connect", relayed_addr(b) or b.address("udp"))
            a.json("peer", "ping", b.peer_id, "--count", "1")
            first.append(time.monotonic() - started)
            if pair in wanted:
                try:
                    wait_until(lambda a=a, b=b: a.paths(b) & {"tcp", "quic"}, DIRECT_SECONDS)  # type: ignore[misc]
                    direct += 1
                except AssertionError:
                    sys.stderr.write(f"not direct: {' x '.join(pair)}\n")
                for peer in a.json("nat")["peers"]:
                    if peer["peer_id"] == b.peer_id and peer["result"]:
                        told.append(peer["seconds"])
                        if told[-1] > SLOW_SECONDS:
                            sys.stderr.write(f"slow: {' x '.join(pair)}: {peer}\n")
            a.json("peer", "disconnect", b.peer_id)
        yield "pairs direct", f"{direct} of {len(wanted)}", "all", self.how
        yield "relayed to direct", _spread(told), "150 / 500 ms", f"{self.how}, {len(told)} pairs"
        within = sum(seconds < 1.0 for seconds in first)
        figure = f"{within} of {len(first)}, slowest {max(first):.2f} s"
        yield "first answer within 1 s, any path", figure, "all", f"{self.how}, with commands"

    def _guessed(self, a: LabDaemon, b: LabDaemon, seconds: float) -> dict[str, Any] | None:
        """`a` connects with `b` over a relay: what they report once that is direct; `None`: it is not in time."""
        a.json("peer", "connect", relayed_addr(b) or b.address("udp"))

        def told() -> list[dict[str, Any]]:
            pairs = ((a, b), (b, a))
            found = [p for one, other in pairs for p in one.json("nat")["peers"] if p["peer_id"] == other.peer_id]
            done = [p for p in found if p["result"] and not any(guess["running"] for guess in p["guesses"])]
            return done if len(done) == 2 else []

        try:
            wait_until(told, seconds)
        except AssertionError:
            return None
        first, second = told()
        rates = [g["probes"] / g["seconds"] for peer in (first, second) for g in peer["guesses"] if g["direct"]]
        return {"seconds": max(first["seconds"], second["seconds"]), "rate": max(rates, default=0.0), "a": first}

    def _known(self, kinds: Iterable[str], count: int = 2) -> dict[tuple[str, int], LabDaemon]:
        """Daemons behind each kind of box, which know what their NATs do."""
        made = {
            (kind, i): self.daemon(f"{kind.replace('+', '-')}{i}", self.lab.host_behind(kind))
            for kind in kinds
            for i in range(count)
        }
        for one in made.values():
            one.wait_reserved()
            wait_until(lambda one=one: one.json("nat")["mapping"] != "unknown", 30.0, one.process.log)  # type: ignore[misc]
        return made

    def predicted(self) -> Iterator[Row]:
        """The pairs that prediction alone can make direct."""
        pairs = [pair for pair in sim.PAIRS if sim.expected(*pair) is Technique.PREDICT]
        made = self._known(dict.fromkeys(kind for pair in pairs for kind in pair))
        times = []
        for kind, other in pairs:
            a, b = made[kind, 0], made[other, 1]
            found = self._guessed(a, b, DIRECT_SECONDS)
            if found is None or found["a"]["technique"] != "predict":
                sys.stderr.write(f"not by prediction: {kind} x {other}: {found}\n")
            else:
                times.append(found["seconds"])
                if times[-1] > SLOW_SECONDS:
                    sys.stderr.write(f"slow: {kind} x {other}: {found}\n")
            a.json("peer", "disconnect", b.peer_id)
        figure = f"{len(times)} of {len(pairs)}, median {_median(times):.2f} s, slowest {max(times, default=0):.2f} s"
        yield "sequential NATs by prediction", figure, "7 of 7", self.how

    def birthday(self, runs: int) -> Iterator[Row]:
        """A random symmetric NAT and a port-restricted one, from the relayed connection to the direct one."""
        made = self._known(("sym", "apdf"), BIRTHDAY_PAIRS)
        times, rates = [], []
        for run in range(runs):
            a, b = (made[kind, run % BIRTHDAY_PAIRS] for kind in ("sym", "apdf")[:: 1 if run % 2 else -1])
            found = self._guessed(a, b, BIRTHDAY_SECONDS)
            if found is None:
                sys.stderr.write(f"run {run}: not direct: {a.json('nat')['peers']}\n")
            else:
                times.append(found["seconds"])
                rates.append(found["rate"])
                if times[-1] > SLOW_BIRTHDAY_SECONDS:
                    sys.stderr.write(f"slow: run {run}: {found}\n")
            a.json("peer", "disconnect", b.peer_id)
        figure = f"{len(times)} of {runs}, median {_median(times):.1f} s, slowest {max(times, default=0):.1f} s"
        yield "random x port-restricted, birthday", figure, "95 %, 10 s", self.how
        yield "   probes of one side", f"{max(rates, default=0):.0f}/s at most", "200/s", self.how

    def idle(self, seconds: float) -> Iterator[Row]:
        """Bytes on the wire of a host behind a NAT that does nothing but stay reachable."""
        host = self.lab.host_behind("apdf")
        one = self.daemon("idle", host, relays=1)
        one.wait_reserved()
        for i in range(8):
            other = self.daemon(f"idle-peer{i}", self.lab.public_host(), PUBLIC, relays=1)
            one.json("peer", "connect", other.address("tcp"))
        time.sleep(15.0)  # identify, discovery of the NAT, relay search: what happens once
        before = wire_bytes(host)
        time.sleep(seconds)
        figure = f"{(wire_bytes(host) - before) / seconds:.0f} B/s"
        yield "idle: one relay, 8 peers, on the wire", figure, "1000 B/s", f"T1, {seconds:g} s"


def relayed_addr(daemon: LabDaemon) -> str | None:
    """An address of it at a relay's TCP 443."""
    for addr in daemon.json("id")["addrs"]:
        if "/tcp/443/" in addr and "/ip4/198.18." in addr and "/p2p-circuit" in addr:
            return f"{addr}/p2p/{daemon.peer_id}"
    return None


def wire_bytes(host: LabHost) -> int:
    """Sent and received on its interface, headers included."""
    lines = host.netns.run(["cat", "/proc/net/dev"]).stdout.splitlines()
    fields = next(line for line in lines if line.strip().startswith("eth0:")).split(":")[1].split()
    return int(fields[0]) + int(fields[8])


def show(row: Row) -> None:
    sys.stdout.write(f"| {row[0]:<38} | {row[1]:<36} | {row[2]:<12} | {row[3]} |\n")
    sys.stdout.flush()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--idle-seconds", type=float, default=120.0)
    parser.add_argument("--birthday-runs", type=int, default=30)
    parser.add_argument("--only", choices=("t0", "pairs", "predicted", "birthday", "idle"))
    options = parser.parse_args(arguments)
    if os.environ.get("LATTICA_NAT_LAB") != "1":
        problem = lab_problem()
        if problem is not None:
            sys.stderr.write(f"no kernel lab: {problem}\n")
            return 1
        inside = [sys.executable, str(Path(__file__)), *arguments]
        command = ["unshare", "-Urnm", "--fork", "--kill-child", "sh", "-c", INSIDE, "sh", *inside]
        return subprocess.run(command, cwd=ROOT, env={**os.environ, "LATTICA_NAT_LAB": "1"}, check=False).returncode
    random.seed(1)
    show(("what", "figure", "bar", "how"))
    show(("---", "---", "---", "---"))
    if options.only in (None, "t0"):
        for row in simulated():
            show(row)
    figures: dict[str, Callable[[LabFigures], Iterator[Row]]] = {
        "pairs": LabFigures.pairs,
        "predicted": LabFigures.predicted,
        "birthday": lambda lab: lab.birthday(options.birthday_runs),
        "idle": lambda lab: lab.idle(options.idle_seconds),
    }
    for only, rows in figures.items():
        if options.only in (None, only):
            with TemporaryDirectory() as folder, ExitStack() as stack:
                for row in rows(LabFigures(Path(folder), stack)):
                    show(row)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
