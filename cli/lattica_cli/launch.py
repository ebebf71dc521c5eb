"""Start `latticad` as another program: in place of this process, or as a child that says when it is ready."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lattica.errors import ConfigError, LatticaError

READY_TIMEOUT = 30.0
"""Seconds for a child's ready line: a start takes well under 2, a machine under load some more."""


def command(arguments: Sequence[str]) -> list[str]:
    """The command line of a daemon that runs in this interpreter's environment."""
    return [sys.executable, "-m", "lattica_daemon", *arguments]


def replace_this_process(arguments: Sequence[str]) -> None:
    """Become the daemon: same process id, so signals of a service manager or a shell reach it. Does not return."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, command(arguments))


def run_to_end(arguments: Sequence[str]) -> str:
    """What the daemon program prints for a question about settings. Raises `ConfigError` with its one line."""
    done = subprocess.run(command(arguments), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ConfigError(done.stderr.strip().removeprefix("latticad: ") or f"latticad exited with {done.returncode}")
    return done.stdout


class ChildDaemon:
    """A daemon as a child process, with its log in a file beside its home."""

    def __init__(self, home: Path, arguments: Sequence[str]) -> None:
        self.home = home
        self.log_path = home.with_suffix(".log")
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                command(["--home", str(home), "--json", *arguments]),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self.peer_id = ""
        self.addrs: list[str] = []

    def wait_ready(self) -> None:
        """Read the ready line. Raises `LatticaError` with the last line of its log when it does not start."""
        import selectors

        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            line = self.process.stdout.readline() if selector.select(READY_TIMEOUT) else b""
        if not line:
            last = self.log_path.read_text("utf-8", "replace").strip().splitlines()[-1:]
            raise LatticaError(f"a daemon did not start: {last[0] if last else 'it said nothing'}")
        ready = json.loads(line)
        self.peer_id, self.addrs = ready["peer_id"], ready["addrs"]

    def stop(self, timeout: float = 10.0) -> int:
        """SIGTERM, then SIGKILL after `timeout` seconds; the exit code."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.process.kill()
        if self.process.stdout is not None:
            self.process.stdout.close()
        return self.process.wait()
