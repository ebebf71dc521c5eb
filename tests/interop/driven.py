"""A process that obeys JSON lines: `{"do": name, "args": […]}` in, `{"ok": …}` or `{"error": …}` out."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class DrivenError(Exception):
    """The process said that the command failed; the text is its own."""


class Driven:
    """A running process. What it printed first, before any command, is `hello`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.hello = self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # libraries print, too
                return dict(json.loads(line))
        raise DrivenError(f"the process ended with {self.process.wait()}")

    def start(self, name: str, *args: Any) -> None:
        """Send a command; `finish` reads its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": name, "args": args}) + "\n")
        self.process.stdin.flush()

    def finish(self) -> Any:
        answer = self._read()
        if "error" in answer:
            raise DrivenError(answer["error"])
        return answer["ok"]

    def do(self, name: str, *args: Any) -> Any:
        """Run a command and return its answer. Raises `DrivenError`."""
        self.start(name, *args)
        return self.finish()


@contextmanager
def driven(python: Path | str, script: Path, settings: Any = None, *, log: Path | None = None) -> Iterator[Driven]:
    """Run `script` with `settings` as its JSON argument, until the block ends."""
    with open(log or "/dev/null", "a") as errors:
        process = subprocess.Popen(
            [str(python), str(script), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            yield Driven(process)
        finally:
            process.kill()
            process.communicate(timeout=10)
