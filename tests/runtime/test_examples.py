"""The examples run as they are; the README shows the same files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from daemon_processes import Process, clean_environment

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


def test_a_node_inside_a_program() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "embedded_node.py")], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "alice answered [0 2 4 6]" in done.stdout
    assert done.stdout.rstrip().endswith("equal")
