"""`lattica up`: the daemon in the foreground."""

from __future__ import annotations

from pathlib import Path

import typer

from lattica_cli.context import State


def register(app: typer.Typer) -> None:
    app.command("up")(up)


def up(
    ctx: typer.Context,
    listen: list[str] = typer.Option(
        [], "--listen", metavar="ADDR", help="Listen here, not at the default. Repeatable."
    ),
    bootstrap: list[str] = typer.Option([], "--bootstrap", metavar="ADDR", help="Find others through it. Repeatable."),
    config: str = typer.Option("", "--config", metavar="FILE", help="Settings file (default: HOME/config.toml)."),
    relay: bool | None = typer.Option(None, "--relay/--no-relay", help="Carry other peers' connections."),
    mdns: bool | None = typer.Option(None, "--mdns/--no-mdns", help="Find peers on the local network."),
    network: str = typer.Option("", "--network", metavar="NAME", help="Private networks are not part of this version."),
    log_level: str = typer.Option("", "--log-level", metavar="LEVEL", help="debug, info, warning or error."),
) -> None:
    """Run the daemon in the foreground. SIGTERM or Ctrl-C drains and ends it."""
    from lattica_cli import launch

    state = State.of(ctx)
    if network:
        raise typer.BadParameter("private networks are not part of this version.")
    arguments: list[str] = []
    if state.home is not None:
        arguments += ["--home", state.home]
    if state.json:
        arguments.append("--json")
    if config:
        arguments += ["--config", str(Path(config).absolute())]
    if relay is not None:
        arguments.append("--relay" if relay else "--no-relay")
    if mdns is not None:
        arguments.append("--mdns" if mdns else "--no-mdns")
    if log_level:
        arguments += ["--log-level", log_level]
    for name, values in (("--listen", listen), ("--bootstrap", bootstrap)):
        for value in values:
            arguments += [name, value]
    launch.replace_this_process(arguments)
