"""What a relay costs: forwarding on one core against socat, and memory with many reservations and busy circuits.

    python tests/bench/relay_scenarios.py [--quick]

Or as scenarios of `run.py`. The relay and socat are each kept on one core, and what is compared is the bytes they
carry per second of their CPU time: the two ends of the encrypted path need as much as the relay, and would otherwise
share its core. socat is taken plain (it moves 8 KiB at a time) and, for orientation, with 64 KiB.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measured import HERE, MIB, Bench, Figure, cpu_seconds, peak_resident

from driven import Driven, driven  # isort: skip  # found through `measured`

RESERVATIONS, BUSY = 500, 100
POLL_SECONDS = 0.01


def _peer(bench: Bench, **settings: object) -> Driven:
    log = bench.folder / "relay-peers.log"
    return bench.stack.enter_context(driven(sys.executable, HERE / "relay_peer.py", settings, log=log))


def _circuits(bench: Bench, count: int, total: int) -> tuple[int, Driven]:
    """A relay's process id, and a source with `count` open circuits through it."""
    relay = _peer(bench, role="relay")
    sink = _peer(bench, role="sink", relay=relay.hello["addr"], total=total, count=count)
    source = _peer(bench, role="source", relay=relay.hello["addr"], total=total, count=count)
    assert source.do("open", sink.hello["peer_ids"]) == count
    return relay.hello["pid"], source


def relay_forwarding(bench: Bench) -> Iterator[Figure]:
    """One circuit, one direction."""
    plain = Figure("relay forwarding, one core", "MB/s", "socat", 0.4, 0.7)
    large = Figure("relay forwarding, one core", "MB/s", "socat -b 65536", 0.15, 0.3)
    total = 512 * MIB // bench.scale
    pid, source = _circuits(bench, 1, total)
    os.sched_setaffinity(pid, {0})
    source.do("push", 1)
    for _ in range(bench.rounds):
        before = cpu_seconds(pid)
        source.do("push", 2)
        carried = 2 * total / (cpu_seconds(pid) - before) / 1e6
        for figure, options in ((plain, []), (large, ["-b", "65536"])):
            figure.ours.append(carried)
            figure.theirs.append(2 * total / _socat(2 * total, *options) / 1e6)
    yield plain
    yield large


def _socat(total: int, *options: str) -> float:
    """CPU seconds of socat for `total` bytes."""
    program = shutil.which("socat")
    if program is None:
        raise SystemExit("socat is not installed: apt-get install socat")
    with socket.create_server(("127.0.0.1", 0)) as target, socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
        probe.close()
        command = [
            program, *options, f"TCP-LISTEN:{port},bind=127.0.0.1", f"TCP:127.0.0.1:{target.getsockname()[1]}",
        ]  # fmt: skip
        process = subprocess.Popen(command)
        try:
            os.sched_setaffinity(process.pid, {0})
            near = _connect(port)
            far, _ = target.accept()

            def send() -> None:
                block = bytes(256 * 1024)
                for _ in range(total // len(block)):
                    near.sendall(block)

            sender = threading.Thread(target=send)
            buffer = bytearray(256 * 1024)
            before, received = cpu_seconds(process.pid), 0
            sender.start()
            while received < total:
                received += far.recv_into(buffer)
            used = cpu_seconds(process.pid) - before
            sender.join()
            near.close()
            far.close()
            return used
        finally:
            process.kill()
            process.wait()


def _connect(port: int) -> socket.socket:
    for _ in range(1000):
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            time.sleep(POLL_SECONDS)
    raise RuntimeError("socat did not start")


def relay_memory(bench: Bench) -> Iterator[Figure]:
    """500 peers with a reservation and 100 circuits, all busy, then all stalled: the most that was resident."""
    busy, stalled = (
        Figure(f"relay, {RESERVATIONS} reservations, {BUSY} {what} circuits", "MB", "", 150, 80, lower_is_better=True)
        for what in ("busy", "stalled")
    )
    total = 16 * MIB // bench.scale
    relay = _peer(bench, role="relay")
    _peer(bench, role="peers", relay=relay.hello["addr"], count=RESERVATIONS - BUSY)
    sink = _peer(bench, role="sink", relay=relay.hello["addr"], total=total, count=BUSY)
    source = _peer(bench, role="source", relay=relay.hello["addr"], total=total, count=BUSY)
    assert source.do("open", sink.hello["peer_ids"]) == BUSY
    with peak_resident(relay.hello["pid"]) as peak:
        for _ in range(bench.rounds):
            source.do("push", 1)
        busy.ours.append(peak() * MIB / 1e6)
        sink.process.send_signal(signal.SIGSTOP)  # nobody takes anything any more: all that may be held is held
        source.do("stall", 3.0)
        stalled.ours.append(peak() * MIB / 1e6)
    sink.process.send_signal(signal.SIGCONT)
    yield busy
    yield stalled


RELAY_SCENARIOS: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    "relay-forwarding": relay_forwarding,
    "relay-memory": relay_memory,
}


def main() -> None:
    with TemporaryDirectory() as folder:
        for scenario in RELAY_SCENARIOS.values():
            with ExitStack() as stack:
                for figure in scenario(Bench(stack, Path(folder), "--quick" in sys.argv)):
                    row = figure.row()
                    against = (
                        f", {figure.against} {row['theirs']:.0f}, ratio {row['ratio']:.2f}" if figure.against else ""
                    )
                    print(
                        f"{figure.name}: {row['ours']:.0f} {figure.unit}{against} "
                        f"(bar {figure.bar}, aim {figure.aim}: {row['verdict']})"
                    )


if __name__ == "__main__":
    main()
