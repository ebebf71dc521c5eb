"""The examples run as they are; the README shows the same files."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from daemon_processes import Process, clean_environment
from waiting import wait_until

import lattica

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_a_worker_calls_a_worker(tmp_path: Path) -> None:
    first, second = Process(tmp_path / "a"), Process(tmp_path / "b")
    server: subprocess.Popen[bytes] | None = None
    try:
        first.start()
        second.start("--bootstrap", first.address)
        server = subprocess.Popen(
            [sys.executable, str(EXAMPLES / "expert_server.py")],
            stdout=subprocess.PIPE,
            env={**clean_environment(), "LATTICA_HOME": str(first.home)},
        )
        assert server.stdout is not None
        assert server.stdout.readline().decode() == f"serving on {first.peer_id}\n"
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / "expert_client.py"), first.peer_id],
            capture_output=True,
            text=True,
            env={**clean_environment(), "LATTICA_HOME": str(second.home)},
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == ["forward gave float32 (8, 512)", "HELLO", "THERE"]
    finally:
        if server is not None:
            server.kill()
            server.wait()
            if server.stdout is not None:
                server.stdout.close()
        first.stop()
        second.stop()


def test_a_test_with_simulated_nats() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLES / "test_behind_nats.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "4 passed" in done.stdout, done.stdout


def test_a_roster_heals_when_a_worker_is_killed(tmp_path: Path) -> None:
    with ExitStack() as stack:
        daemons = [Process(tmp_path / f"d{number}") for number in range(3)]
        for daemon in daemons:
            stack.callback(daemon.stop)
        daemons[0].start()
        for daemon in daemons[1:]:
            daemon.start("--bootstrap", daemons[0].address)
        made = daemons[0].json("space", "create", "roster", *[f"--writer={each.peer_id}" for each in daemons[1:]])
        workers = {}
        for daemon in daemons:
            daemon.json("space", "join", made["space"])
            workers[daemon.peer_id] = _run_worker(stack, daemon, made["space"])
        with lattica.connect(daemons[0].home) as lat:
            roster = lat.space(made["space"])

            def serving() -> dict[str, str]:
                return dict(roster.map("stages").items())

            wait_until(lambda: set(serving()) == {"stage 0", "stage 1"} and len(set(serving().values())) == 2, 60)
            before = serving()
            spare = next(peer for peer in workers if peer not in before.values())
            workers[before["stage 1"]].kill()
            wait_until(lambda: serving() == {"stage 0": before["stage 0"], "stage 1": spare}, 60)
            alive = {member["peer_id"] for member in roster.members()}
            assert alive == {before["stage 0"], spare}
        with lattica.connect(daemons[2].home) as lat:
            wait_until(lambda: dict(lat.space("roster").map("stages").items())["stage 1"] == spare, 60)


def _run_worker(stack: ExitStack, daemon: Process, space: str) -> subprocess.Popen[bytes]:
    worker = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "roster_worker.py"), space, "2"],
        stdout=subprocess.DEVNULL,
        env={**clean_environment(), "LATTICA_HOME": str(daemon.home)},
    )
    stack.callback(worker.wait)
    stack.callback(worker.kill)
    return worker


def test_a_node_inside_a_program() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "embedded_node.py")], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "alice answered [0 2 4 6]" in done.stdout
    assert done.stdout.rstrip().endswith("equal")
