"""Progress of a transfer: a bar with rate, sources and time left on a terminal, a line now and then in a pipe."""

from __future__ import annotations

import sys
import time
from typing import Any

from lattica_cli.context import counted, size, warn

PIPE_INTERVAL = 5.0
"""Seconds between two lines in a pipe: a log of a long fetch stays readable."""


class Progress:
    """Shows events of the form `{state, bytes, total, sources}` on standard error. Nothing when `quiet`."""

    def __init__(self, title: str, *, quiet: bool) -> None:
        self._title = title
        self._quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._last_line = time.monotonic()
        self._started = time.monotonic()
        self._first_bytes: int | None = None

    def __enter__(self) -> Progress:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(self._title, total=None, note="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, event: dict[str, Any]) -> None:
        """Show one event."""
        if self._quiet:
            return
        note = event["state"]
        if event.get("sources") is not None:
            note += f", {counted(event['sources'], 'source')}"
        done, total = event.get("bytes", 0), event.get("total")
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, note=note)
            return
        now = time.monotonic()
        if self._first_bytes is None:
            self._first_bytes = done
        if now - self._last_line >= PIPE_INTERVAL:
            self._last_line = now
            speed = (done - self._first_bytes) / max(now - self._started, 1e-9)
            of = f" of {size(total)}" if total else ""
            left = f", {(total - done) / speed:.0f} s left" if total and speed > 0 else ""
            warn(f"{self._title}: {size(done)}{of}, {speed / 1e6:.0f} MB/s, {note}{left}")
