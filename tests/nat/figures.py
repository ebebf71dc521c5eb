"""The figures of NAT traversal, as a table: `make nat-figures` or `python tests/nat/figures.py`.

T0 is the simulation (20 ms one way, up to 15 ms between the two starts). T2 are real daemons behind kernel NATs with 40
ms round trip, straight and by way of the relays, which are halfway; where neither a TUN device nor netem is to be had
there is no delay, and the table says T1. Relays' forwarding and memory are in `make bench`.
"""

from __future__ import annotations

import argparse
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
from router_lab import Router, miniupnpd_missing  # noqa: E402
from run import in_namespaces, lab_problem  # noqa: E402
from spread_lab import GlobalLab  # noqa: E402
from stun_lab import LabObserver, discover_all  # noqa: E402
from test_boxes import BLOCKED, EXPECTED  # noqa: E402
from tun_core import Conditions, tun_problem  # noqa: E402
from tun_lab import TunLab  # noqa: E402

from lattica_protocols.nat.punch_plan import Technique  # noqa: E402

NATTED = '[relay]\nuse = "always"\n[discovery]\nmode = "client"\n'
PUBLIC = '[discovery]\nmode = "client"\n'
SETTLED_SECONDS = 15.0
"""Identify, discovery of the NAT, search for relays: what happens once is over then."""
ONE_WAY = 0.02
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


def make_lab(stack: ExitStack, seed: int = 1) -> tuple[Lab, str]:
    """With 40 ms round trip if that can be had, and what the table says of it."""
    if tun_problem() is None:
        lab = TunLab(Conditions(ONE_WAY), seed=seed)
        stack.callback(lab.close)
        return lab, "T2, 40 ms round trip"
    if has_netem():
        return Lab(delay_ms=1e3 * ONE_WAY), "T2, 40 ms round trip, 80 ms by relay (netem)"
    return Lab(), "T1, no delay (neither TUN nor netem)"


class LabFigures:
    """Real daemons, and three relays."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack = folder, stack
        self.lab, self.how = make_lab(stack)
        self.relays: list[LabDaemon] = []
        listen = ("--listen", "/ip4/0.0.0.0/tcp/443", "--listen", "/ip4/0.0.0.0/udp/4101/quic-v1")
        for i in range(3):
            known = self._bootstrap(i)
            host = self.lab.central_host() if isinstance(self.lab, TunLab) else self.lab.public_host()
            relay = LabDaemon(host, folder / f"relay{i}", "--relay", *known, listen=listen)
            stack.callback(relay.stop)
            self.relays.append(relay)

    def _bootstrap(self, count: int) -> list[str]:
        return [part for relay in self.relays[:count] for part in ("--bootstrap", relay.address())]

    def daemon(self, name: str, host: LabHost, settings: str = NATTED, relays: int = 3) -> LabDaemon:
        made = LabDaemon(host, self.folder / name, *self._bootstrap(relays), settings=settings)
        self.stack.callback(made.stop)
        return made

    def pairs(self) -> PairFigures:
        """Each pair once, from nothing to an answer and, where theory has one, to a direct path."""
        made = {
            (kind, i): self.daemon(
                f"{kind.replace('+', '-')}{i}",
                self.lab.host_behind(kind),
                PUBLIC if kind == "none" else NATTED,
            )
            for kind in sim.TYPES
            for i in range(2)
        }
        for (kind, _), one in made.items():
            if kind not in ("none", "full"):
                one.wait_reserved()
        found = PairFigures(self.how)
        for pair in sim.PAIRS:
            a, b = made[pair[0], 0], made[pair[1], 1]
            started = time.monotonic()
            a.json("peer", "connect", relayed_addr(b) or b.address("udp"))
            a.json("peer", "ping", b.peer_id, "--count", "1")
            found.first.append(time.monotonic() - started)
            if sim.expected(*pair) is Technique.SIMPLE:
                found.add_direct(pair, a, b)
            a.json("peer", "disconnect", b.peer_id)
        return found

    def _guessed(self, a: LabDaemon, b: LabDaemon, seconds: float) -> dict[str, Any] | None:
        """`a` connects with `b` over a relay: what they report once that is direct; `None`: it is not in time."""
        started = time.monotonic()
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
        passed = time.monotonic() - started
        assert max(first["seconds"], second["seconds"]) <= passed, f"in {passed:.2f} s: {first}, {second}"
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


class PairFigures:
    """What one run over all pairs gave."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.first: list[float] = []
        self.direct: list[bool] = []
        self.told: list[float] = []

    def add_direct(self, pair: tuple[str, str], a: LabDaemon, b: LabDaemon) -> None:
        try:  # a look costs the daemon some of the time that is measured, so there are few
            wait_until(lambda: a.paths(b) & {"tcp", "quic"}, DIRECT_SECONDS, poll=0.25)
        except AssertionError:
            self.direct.append(False)
            sys.stderr.write(f"not direct: {' x '.join(pair)}\n")
            return
        self.direct.append(True)
        for peer in a.json("nat")["peers"]:
            if peer["peer_id"] == b.peer_id and peer["result"]:
                self.told.append(peer["seconds"])
                if self.told[-1] > SLOW_SECONDS:
                    sys.stderr.write(f"slow: {' x '.join(pair)}: {peer}\n")


def all_pairs(runs: int) -> Iterator[Row]:
    """Several times, each with daemons that have not met."""
    made = []
    for _ in range(runs):
        with TemporaryDirectory() as folder, ExitStack() as stack:
            made.append(LabFigures(Path(folder), stack).pairs())
    how = made[0].how
    counts = ", ".join(f"{sum(run.direct)} of {len(run.direct)}" for run in made)
    yield "simple pairs direct, by run", counts, "all", how
    told = [seconds for run in made for seconds in run.told]
    yield "relayed to direct", _spread(told), "150 / 500 ms", f"{how}, {len(told)} times"
    first = [seconds for run in made for seconds in run.first]
    within = sum(seconds < 1.0 for seconds in first)
    figure = f"{within} of {len(first)}, slowest {max(first):.2f} s"
    yield "first answer within 1 s, any path", figure, "all", f"{how}, with commands"


def guessed(rows: Callable[[LabFigures], Iterator[Row]]) -> Iterator[Row]:
    """Rows of pairs whose ports have to be guessed, in a lab of their own."""
    with TemporaryDirectory() as folder, ExitStack() as stack:
        yield from rows(LabFigures(Path(folder), stack))


def classified() -> Iterator[Row]:
    """What our discovery says of each box of the lab, from three observers."""
    import trio

    with ExitStack() as stack:
        lab, how = make_lab(stack)
        observers = [LabObserver(lab) for _ in range(3)]
        found = trio.run(discover_all, {kind: lab.host_behind(kind) for kind in (*EXPECTED, *BLOCKED)}, observers)
    right = sum((found[kind].mapping, found[kind].filtering) == EXPECTED[kind][:2] for kind in EXPECTED)
    right += sum(found[kind].udp_blocked for kind in BLOCKED)
    yield "boxes classified right", f"{right} of {len(found)}", "all", how


def mapped(runs: int) -> Iterator[Row]:
    """From the ready line of a daemon until a real router leads its ports to it."""
    missing = miniupnpd_missing()
    if missing is not None:
        yield "port mapping from start", "not measured", "2 s", missing
        return
    times = []
    with TemporaryDirectory() as name, ExitStack() as stack:
        folder, lab = Path(name), GlobalLab()
        for i in range(runs):
            router = Router(lab.box("apdf"), folder)
            stack.callback(router.stop)
            started = time.monotonic()
            daemon = LabDaemon(router.box.host(), folder / f"mapped{i}")
            stack.callback(daemon.stop)
            wait_until(lambda r=router: len(r.mapped()) == 2, 10.0, daemon.process.log)  # type: ignore[misc]
            times.append(time.monotonic() - started)
    figure = f"median {_median(times):.2f} s, slowest {max(times):.2f} s"
    yield "port mapping from the start of a daemon", figure, "2 s", f"T1, miniupnpd, TCP and UDP, {runs} runs"


def idle(seconds: float) -> Iterator[Row]:
    """Bytes on the wire of a host behind a NAT that does nothing but stay reachable."""
    with TemporaryDirectory() as folder, ExitStack() as stack:
        figures = LabFigures(Path(folder), stack)
        host = figures.lab.host_behind("apdf")
        one = figures.daemon("idle", host, relays=1)
        one.wait_reserved()
        for i in range(8):
            other = figures.daemon(f"idle-peer{i}", figures.lab.public_host(), PUBLIC, relays=1)
            one.json("peer", "connect", other.address("tcp"))
        time.sleep(SETTLED_SECONDS)
        before = sum(host.wire_bytes())
        time.sleep(seconds)
        figure = f"{(sum(host.wire_bytes()) - before) / seconds:.0f} B/s"
    yield "idle: one relay, 8 peers, on the wire", figure, "1000 B/s", f"{figures.how[:2]}, {seconds:g} s"


def relayed_addr(daemon: LabDaemon) -> str | None:
    """An address of it at a relay's TCP 443."""
    for addr in daemon.json("id")["addrs"]:
        if "/tcp/443/" in addr and "/ip4/198.18." in addr and "/p2p-circuit" in addr:
            return f"{addr}/p2p/{daemon.peer_id}"
    return None


def show(row: Row) -> None:
    sys.stdout.write(f"| {row[0]:<38} | {row[1]:<36} | {row[2]:<12} | {row[3]} |\n")
    sys.stdout.flush()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--idle-seconds", type=float, default=120.0)
    parser.add_argument("--birthday-runs", type=int, default=30)
    parser.add_argument("--only", choices=("t0", "boxes", "pairs", "predicted", "birthday", "mapped", "idle"))
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args(arguments)
    if os.environ.get("LATTICA_NAT_LAB") != "1":
        problem = lab_problem()
        if problem is not None:
            sys.stderr.write(f"no kernel lab: {problem}\n")
            return 1
        command = in_namespaces([sys.executable, str(Path(__file__)), *arguments])
        return subprocess.run(command, cwd=ROOT, env={**os.environ, "LATTICA_NAT_LAB": "1"}, check=False).returncode
    random.seed(1)
    show(("what", "figure", "bar", "how"))
    show(("---", "---", "---", "---"))
    tables = {
        "t0": simulated,
        "boxes": classified,
        "pairs": lambda: all_pairs(options.runs),
        "predicted": lambda: guessed(LabFigures.predicted),
        "birthday": lambda: guessed(lambda lab: lab.birthday(options.birthday_runs)),
        "mapped": lambda: mapped(options.runs),
        "idle": lambda: idle(options.idle_seconds),
    }
    for name, rows in tables.items():
        if options.only in (None, name):
            for row in rows():
                show(row)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
