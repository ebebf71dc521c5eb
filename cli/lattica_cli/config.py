"""`lattica config …`: settings in force and where each came from."""

from __future__ import annotations

import json

import typer

from lattica.errors import DaemonNotRunning
from lattica_cli.context import State, daemon, say, table

config_app = typer.Typer(no_args_is_help=True, help="Settings: show, check, write a file to start from.")


def register(app: typer.Typer) -> None:
    app.add_typer(config_app, name="config")


def _ask(state: State, *arguments: str) -> dict[str, object]:
    """Ask the daemon program itself: it alone knows the settings."""
    from lattica_cli import launch

    home = ["--home", state.home] if state.home is not None else []
    answer: dict[str, object] = json.loads(launch.run_to_end([*home, "--json", *arguments]))
    return answer


@config_app.command("show")
def show(ctx: typer.Context) -> None:
    """Settings of the running daemon, or what one would start with here."""
    state = State.of(ctx)
    try:
        with daemon(state) as lat:
            data = lat.daemon("config")
    except DaemonNotRunning:
        data = _ask(state, "--show-config")

    def human() -> None:
        if not data["running"]:
            say("no daemon runs here; it would start with")
        rows = [(key, _shown(s["value"]), s["source"]) for key, s in data["settings"].items()]
        table(("setting", "value", "from"), rows, empty="")

    state.emit(data, human)


def _shown(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "(none)"
    return str(value) if value != "" else "(empty)"


@config_app.command("check")
def check(ctx: typer.Context, file: str = typer.Argument(metavar="FILE", help="A settings file.")) -> None:
    """Say whether a settings file is right."""
    state = State.of(ctx)
    data = _ask(state, "--check-config", file)
    state.emit(data, lambda: say(f"{file}: right, {data['settings']} settings"))


@config_app.command("init")
def init(ctx: typer.Context) -> None:
    """Write config.toml with every setting, explained, into the home. An existing file is left alone."""
    state = State.of(ctx)
    data = _ask(state, "--init-config")
    state.emit(data, lambda: say(f"wrote {data['path']}"))
