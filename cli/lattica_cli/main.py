"""Entry point: the command tree, the global options, and the one place where errors become exit codes.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no daemon reachable, 4 timed out.

Modules of commands import nothing heavy at their top: `lattica --help` has to come up in under 0.3 s, and importing
numpy or the client alone would take most of that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from lattica_cli import bench, blobs, config, content, demo, dht, nat, peer, rpc, space, status, up
from lattica_cli.context import State

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NO_DAEMON = 3
EXIT_TIMED_OUT = 4
EXIT_INTERRUPTED = 130

USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
"""click's UsageError: newer versions of typer bring their own click, older ones use the package."""

app = typer.Typer(
    name="lattica",
    help="Peer-to-peer networking for decentralized AI. Try `lattica demo`, then `lattica up`.",
    no_args_is_help=True,
    rich_markup_mode=None,  # importing rich for help would double the start-up time
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (demo, up, status, peer, content, blobs, dht, rpc, space, nat, bench, config):
    module.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        from lattica._version import __version__

        typer.echo(f"lattica {__version__}")
        raise typer.Exit


@app.callback()
def options(
    ctx: typer.Context,
    home: str = typer.Option(
        "", "--home", metavar="DIR", help="State directory of the daemon (LATTICA_HOME; default: XDG state)."
    ),
    json: bool = typer.Option(False, "--json", help="Print one JSON value on standard output and nothing else."),
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Options of every command. They may also stand after it."""
    ctx.obj = State(home=home or None, json=json)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code. Errors are one line on standard error."""
    if sys.stdout is None:  # closed by whoever started us: nobody wants to read
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as the process
    arguments = hoist_global_options(list(sys.argv[1:] if argv is None else argv))
    try:
        code = app(arguments, prog_name="lattica", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except typer.Abort:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except USAGE_ERROR as error:
        return _usage(error)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of a pipe left. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:  # `exit_code` tells what a user can mend from our bugs, which go on as they are
        code = exit_code(error)
        if code is None:
            raise
        return _fail(_message(error), code)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def exit_code(error: Exception) -> int | None:
    """The exit code for an error a user can do something about, None for a bug of ours."""
    from lattica.errors import DaemonNotRunning, LatticaError, RemoteError

    if isinstance(error, DaemonNotRunning):
        return EXIT_NO_DAEMON
    if isinstance(error, TimeoutError):  # DeadlineExceeded is one
        return EXIT_TIMED_OUT
    if isinstance(error, RemoteError) and error.kind in ("DeadlineExceeded", "TooSlowError", "TimeoutError"):
        return EXIT_TIMED_OUT
    if isinstance(error, LatticaError | OSError):
        return EXIT_FAILED
    return None


def hoist_global_options(arguments: list[str]) -> list[str]:
    """Move `--json` and `--home DIR` before the command, so they may stand anywhere before a `--`."""
    front: list[str] = []
    rest: list[str] = []
    index = 0
    while index < len(arguments):
        argument = arguments[index]
        if argument == "--":
            rest += arguments[index:]
            break
        if argument == "--json" or argument.startswith("--home="):
            front.append(argument)
        elif argument == "--home" and index + 1 < len(arguments):
            front += arguments[index : index + 2]
            index += 1
        else:
            rest.append(argument)
        index += 1
    return front + rest


def _usage(error: BaseException) -> int:
    message = getattr(error, "format_message", lambda: str(error))()
    if type(error).__name__ == "NoArgsIsHelpError":  # the message is the whole help
        typer.echo(message, err=True)
        return EXIT_USAGE
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "lattica"
    return _fail(f"{message.splitlines()[0]} See `{command} --help`.", EXIT_USAGE)


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split())
    print(f"lattica: {line}", file=sys.stderr)  # noqa: T201
    return code
