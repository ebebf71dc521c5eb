"""What every command shares: the global options, the connection to the daemon, and output."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from lattica.client import Client


@dataclass(frozen=True)
class State:
    """The global options. `home` is None for the default directory."""

    home: str | None
    json: bool

    @staticmethod
    def of(ctx: typer.Context) -> State:
        state = ctx.find_root().obj
        assert isinstance(state, State)
        return state

    def emit(self, data: object, human: Callable[[], None]) -> None:
        """Print `data` as one JSON value, or call `human` to print it for people."""
        if self.json:
            print_json(data)
        else:
            human()


@contextmanager
def daemon(state: State) -> Iterator[Client]:
    """A connection to the daemon of the home. Raises `DaemonNotRunning` (exit code 3), also when it dies meanwhile."""
    import lattica

    with lattica.connect(home=state.home) as connection:
        try:
            yield connection
        except lattica.ConnectionLost as error:
            if connection.connected:  # what was lost is a connection to some peer
                raise
            raise lattica.DaemonNotRunning(
                "the daemon went away before it was done; start it again with 'lattica up', then repeat the command"
            ) from error


def say(text: str = "") -> None:
    """A line on standard output."""
    typer.echo(text)


def warn(text: str) -> None:
    """A line on standard error."""
    typer.echo(f"lattica: {text}", err=True)


def print_json(data: object) -> None:
    """One JSON value on one line, flushed: a reader at the other end of a pipe may wait for it."""
    text = json.dumps(data, ensure_ascii=False, default=_plain)
    try:
        sys.stdout.write(text + "\n")
    except UnicodeEncodeError:  # a terminal without UTF-8, or a file name that is none
        sys.stdout.write(json.dumps(data, default=_plain) + "\n")
    sys.stdout.flush()


def _plain(value: Any) -> object:
    """What JSON lacks and a method may return: arrays as nested lists, bytes as text in base64."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, bytes | bytearray | memoryview):
        import base64

        return base64.b64encode(value).decode("ascii")
    return str(value)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, empty: str) -> None:
    """Rows under headings: a rich table on a terminal, tab-separated lines in a pipe."""
    if not rows:
        say(empty)
    elif sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        shown = Table(box=None, header_style="bold", pad_edge=False)
        for column in columns:
            shown.add_column(column, overflow="fold")
        for row in rows:
            shown.add_row(*(_cell(value) for value in row))
        Console().print(shown)
    else:
        say("\t".join(columns))
        for row in rows:
            say("\t".join(_cell(value) for value in row))


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.1f}"
    return str(value)


def counted(n: int, noun: str) -> str:
    """`1 peer`, `2 peers`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def size(n: float) -> str:
    """Bytes for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def rate(n: float, seconds: float) -> str:
    """MB/s, as in the tables of the README (10^6 bytes)."""
    return f"{n / max(seconds, 1e-9) / 1e6:.0f} MB/s"
