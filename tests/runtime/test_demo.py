"""`lattica demo`: the fields it promises, nothing left behind, and an exit code that tells the truth."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon_processes import clean_environment
from waiting import wait_until


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory with a path short enough for the sockets in it, as the usual temporary one."""
    with tempfile.TemporaryDirectory(prefix="demo-", dir="/tmp") as name:
        yield Path(name)


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**clean_environment(), "TMPDIR": str(folder)}
    command = [sys.executable, "-m", "lattica_cli", "demo", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def daemons_below(folder: Path) -> list[int]:
    """Process ids of daemons whose command line names the folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"lattica_daemon" in words and any(word.startswith(bytes(folder)) for word in words):
            found.append(int(file.parent.name))
    return found


def test_it_does_the_main_job_and_leaves_nothing(folder: Path) -> None:
    child = start(folder, "--json", "--megabytes", "8")
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    result = json.loads(out)
    assert result["ok"] is True
    assert result["sha256_equal"] is True
    assert result["cid"].startswith("b")
    assert result["bytes"] > 4 << 20
    assert result["fetch_seconds"] > 0
    assert result["rpc_calls_per_second"] > 0
    assert list(folder.iterdir()) == []


def test_a_file_of_ones_own_is_shared_and_stays(folder: Path) -> None:
    file = folder / "mine.bin"
    file.write_bytes(b"weights" * 1000)
    child = start(folder, "--file", str(file))
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    assert "sha256 of both files is equal" in out
    assert list(folder.iterdir()) == [file]
    assert file.read_bytes() == b"weights" * 1000


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_an_interrupted_demo_stops_its_daemons(folder: Path) -> None:
    child = start(folder, "--megabytes", "8")
    wait_until(lambda: len(daemons_below(folder)) >= 2 or child.poll() is not None, 60)
    assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=60)
    assert child.returncode not in (0, None)
    assert daemons_below(folder) == []
    assert list(folder.iterdir()) == []
