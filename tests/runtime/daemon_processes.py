"""Real daemons as processes, for tests: a home, a ready line, signals, a log."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from lattica_cli.main import main

LOOPBACK = ("--listen", "/ip4/127.0.0.1/tcp/0", "--listen", "/ip4/127.0.0.1/udp/0/quic-v1")
READY_TIMEOUT = 30.0


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("LATTICA_")}


class Process:
    """`latticad` on a home. `start` waits for its ready line."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.log_path = home.parent / f"{home.name}.log"
        self.child: subprocess.Popen[bytes] | None = None
        self.ready: dict[str, Any] = {}
        self.ready_seconds = 0.0

    def start(self, *arguments: str, listen: tuple[str, ...] = LOOPBACK) -> Process:
        command = [sys.executable, "-m", "lattica_daemon", "--home", str(self.home), "--json", *listen, *arguments]
        started = time.monotonic()
        with open(self.log_path, "ab") as log:
            self.child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=clean_environment())
        assert self.child.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.child.stdout, selectors.EVENT_READ)
            assert selector.select(READY_TIMEOUT), self.log()
            line = self.child.stdout.readline()
        assert line, self.log()
        self.ready = json.loads(line)
        self.ready_seconds = time.monotonic() - started
        return self

    @property
    def peer_id(self) -> str:
        return str(self.ready["peer_id"])

    @property
    def address(self) -> str:
        """The first address, with `/p2p`."""
        return f"{self.ready['addrs'][0]}/p2p/{self.peer_id}"

    @property
    def pid(self) -> int:
        assert self.child is not None
        return self.child.pid

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = 20.0) -> int:
        """The exit code."""
        assert self.child is not None
        code = self.child.wait(seconds)
        if self.child.stdout is not None:
            self.child.stdout.close()
        return code

    def stop(self) -> None:
        """End it whatever state it is in."""
        if self.child is not None:
            self.child.kill()
            self.wait()

    def log(self) -> str:
        return self.log_path.read_text("utf-8", "replace")

    def cli_process(self, *arguments: str, seconds: float = 60.0) -> subprocess.CompletedProcess[str]:
        """`lattica` against this daemon, as a process."""
        command = [sys.executable, "-m", "lattica_cli", "--home", str(self.home), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, env=clean_environment(), timeout=seconds, check=False
        )

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The same inside this process, which saves half a second of imports each time."""
        command = ["--home", str(self.home), *arguments]
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
            code = main(command)
        return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())

    def json(self, *arguments: str) -> Any:
        """What a command prints with `--json`."""
        done = self.cli("--json", *arguments)
        assert done.returncode == 0, f"{arguments}: {done.stderr}{self.log()}"
        assert done.stderr == ""
        return json.loads(done.stdout)
