"""`lattica rpc …`: call a method of a peer from the shell."""

from __future__ import annotations

import json
from typing import Any

import typer

from lattica_cli.context import State, daemon, print_json, say
from lattica_cli.parameters import PEER, parse_peer, seconds

rpc_app = typer.Typer(no_args_is_help=True, help="Call methods of other peers.")


def register(app: typer.Typer) -> None:
    app.add_typer(rpc_app, name="rpc")


@rpc_app.command("call")
def call(
    ctx: typer.Context,
    peer: str = PEER,
    method: str = typer.Argument(metavar="SERVICE.METHOD", help="See `lattica rpc services PEER`."),
    arguments: list[str] = typer.Argument(None, metavar="JSON", help="Positional arguments, each as JSON."),
    timeout: float = seconds(30.0, help="For the call."),
) -> None:
    """Call a method of PEER with JSON arguments. Prints the result as JSON."""
    state = State.of(ctx)
    target = str(parse_peer(peer))
    if "." not in method:
        raise typer.BadParameter(f"{method!r} is not of the form SERVICE.METHOD.")
    values = [_value(text) for text in arguments or []]
    with daemon(state) as lat:
        result = lat.call(target, method, *values, timeout=timeout)
    state.emit({"result": result}, lambda: print_json(result))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not JSON; a text is written with quotes, '\"like this\"'.") from None


@rpc_app.command("services")
def services(ctx: typer.Context, peer: str = PEER, timeout: float = seconds(30.0, help="To ask.")) -> None:
    """What PEER offers."""
    state = State.of(ctx)
    target = str(parse_peer(peer))
    with daemon(state) as lat:
        data = lat.daemon("services", target, timeout=timeout)

    def human() -> None:
        for service in data:
            say(f"{service['name']}\t{', '.join(service['methods'])}")
        if not data:
            say("it offers no service")

    state.emit(data, human)
