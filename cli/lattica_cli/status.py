"""`lattica status` and `lattica id`: this daemon on one screen."""

from __future__ import annotations

import typer

from lattica_cli.context import State, counted, daemon, say, size


def register(app: typer.Typer) -> None:
    app.command("status")(status)
    app.command("id")(identity)


def identity(ctx: typer.Context) -> None:
    """This peer's id and addresses."""
    state = State.of(ctx)
    with daemon(state) as lat:
        data = lat.daemon("id")

    def human() -> None:
        say(data["peer_id"])
        for addr in data["addrs"]:
            say(f"  {addr}/p2p/{data['peer_id']}")

    state.emit(data, human)


def status(ctx: typer.Context) -> None:
    """This daemon on one screen. Identity, uptime, reachability, connections by path, traffic and store."""
    state = State.of(ctx)
    with daemon(state) as lat:
        data = lat.daemon("status")

    def human() -> None:
        paths = ", ".join(f"{n} {path}" for path, n in data["connections_by_path"].items() if n) or "none"
        store = data["store"]
        lines = [
            ("peer id", data["peer_id"]),
            ("addresses", "\n             ".join(data["addrs"]) or "none: nobody can connect to this daemon"),
            ("version", f"{data['version']}, process {data['pid']}, home {data['home']}"),
            ("uptime", _duration(data["uptime_seconds"])),
            ("reachable", data["reachability"]),
            ("connections", f"{data['connections']} with {counted(data['peers'], 'peer')} ({paths})"),
            ("traffic", f"{size(data['sent_bytes'])} sent, {size(data['received_bytes'])} received"),
            ("store", f"{counted(store['blobs'], 'blob')}, {size(store['bytes'])}"),
            ("lookups", f"{counted(data['dht']['peers'], 'peer')} in the routing table"),
            ("services", ", ".join(data["services"]) or "none"),
        ]
        lines += [("damaged", text) for text in (store["damaged"], data["spaces"]["damaged"]) if text]
        for name, text in lines:
            say(f"{name:<12} {text}")

    state.emit(data, human)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    shown = [f"{n} {unit}" for n, unit in parts if n][:2]
    return " ".join(shown) or "0 s"
