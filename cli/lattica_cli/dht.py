"""`lattica dht …`: small signed values in the network, and the routing table."""

from __future__ import annotations

import typer

from lattica_cli.context import State, counted, daemon, say
from lattica_cli.parameters import KEY, seconds

MAX_TTL = 30 * 24 * 3600.0
"""Seconds: other peers refuse records that live longer."""

dht_app = typer.Typer(no_args_is_help=True, help="Small signed values; the routing table.")


def register(app: typer.Typer) -> None:
    app.add_typer(dht_app, name="dht")


@dht_app.command("put")
def put(
    ctx: typer.Context,
    key: str = KEY,
    value: str = typer.Argument(metavar="VALUE", help="Any text."),
    ttl: float = seconds(0.0, most=MAX_TTL, zero_means="48 h, renewed by the daemon", help="How long it is valid."),
    timeout: float = seconds(30.0, help="To store it."),
) -> None:
    """Store VALUE under KEY, signed by this peer. Others read it as PEER/KEY, this peer as KEY."""
    state = State.of(ctx)
    with daemon(state) as lat:
        data = lat.daemon("dht_put", key, value, ttl or None, timeout=timeout)
    state.emit(data, lambda: say(f"{data['key']}: stored on {counted(data['stored_on'], 'peer')}"))


@dht_app.command("get")
def get(
    ctx: typer.Context,
    key: str = typer.Argument(metavar="[PEER/]KEY", help="Of that peer, or this peer's own."),
    timeout: float = seconds(30.0, help="To search."),
) -> None:
    """The newest valid value under KEY."""
    state = State.of(ctx)
    with daemon(state) as lat:
        data = lat.daemon("dht_get", key, timeout=timeout)
    state.emit(data, lambda: say(data["value"]))


@dht_app.command("info")
def info(ctx: typer.Context) -> None:
    """The routing table."""
    state = State.of(ctx)
    with daemon(state) as lat:
        data = lat.daemon("dht_info")

    def human() -> None:
        known = f"{counted(data['peers'], 'peer')} in {counted(len(data['buckets']), 'bucket')}"
        say(f"{known}, {data['mode']} mode, {data['protocol']}")
        for bucket in data["buckets"]:
            say(f"  {bucket['prefix_bits']:>3} bits in common\t{counted(bucket['peers'], 'peer')}")

    state.emit(data, human)
