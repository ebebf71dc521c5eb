"""`lattica nat` and `lattica doctor`: what stands in front of this machine, and why connections are as they are."""

from __future__ import annotations

from typing import Any

import typer

from lattica_cli.context import State, daemon, say, table
from lattica_cli.parameters import parse_peer, seconds

_MARKS = {True: "ok     ", False: "problem", None: "unknown"}


def register(app: typer.Typer) -> None:
    app.command("nat")(nat)
    app.command("doctor")(doctor)


def nat(
    ctx: typer.Context,
    fresh: bool = typer.Option(False, "--fresh", help="Ask the observers again now (2 s)."),
    lifetimes: str = typer.Option(
        "", metavar="S,S,…", help="Measure how long a mapping lives without traffic, e.g. 10,30,60,120; takes as long."
    ),
) -> None:
    """What the NATs in front of this machine do. Also: what was tried with relayed peers."""
    state = State.of(ctx)
    silences = _seconds(lifetimes)
    with daemon(state) as lat:
        data = lat.daemon("nat", fresh, silences or None, timeout=30.0 + max(silences, default=0.0))

    def human() -> None:
        for name, text in _verdict(data):
            say(f"{name:<12} {text}")
        if data["observers"]:
            say()
            seen = [(entry["observer"], entry["sees"] or "no answer") for entry in data["observers"]]
            table(("observer", "sees us at"), seen, empty="")
        if data["peers"]:
            say()
            rows = [
                (p["peer_id"], p["path"] or "-", p["attempts"], p["result"] or "relayed", p["technique"], _tried(p))
                for p in data["peers"]
            ]
            table(("peer", "path", "attempts", "result", "by", "tried"), rows, empty="")
            for p in data["peers"]:
                if p["why"]:
                    say(f"{p['peer_id']} is relayed: {p['why']}")

    state.emit(data, human)


def doctor(
    ctx: typer.Context,
    peer: str = typer.Argument("", metavar="PEER", help="Look at the path to this peer."),
    timeout: float = seconds(40.0, help="To examine."),
) -> None:
    """Why connections are as they are, in words, and what to change."""
    state = State.of(ctx)
    target = str(parse_peer(peer)) if peer else None
    with daemon(state) as lat:
        data = lat.daemon("doctor", target, timeout=timeout)

    def human() -> None:
        for finding in data:
            say(f"{_MARKS[finding['ok']]}  {finding['check']}: {finding['detail']}")
            for line in finding["evidence"]:
                say(f"             {line}")
            if finding["fix"]:
                say(f"         ->  {finding['fix']}")

    state.emit(data, human)


def _verdict(data: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and texts, one line each."""
    ports, lifetime = data["ports"], data["lifetime"]
    choice = ports["choice"]
    if choice == "sequential":
        choice += f", steps of {ports['step']}, the last was {ports['last']}"
    elif choice == "block":
        choice += f" {ports['low']} to {ports['high']}"
    lines = [
        ("reachable", f"{data['reachability']}: {data['reachability_detail']}"),
        ("mapping", "not known: UDP is blocked" if data["udp_blocked"] else _mapping(data)),
        ("filtering", data["filtering"]),
        ("ports", choice),
        ("hairpin", {True: "yes", False: "no", None: "not known"}[data["hairpin"]]),
        ("lifetime", _lifetime(lifetime["lives_for"], lifetime["dies_within"])),
        ("public", ", ".join(data["public_addrs"]) or "no address"),
        ("port mapping", _port_mapping(data)),
        ("relays", ", ".join(data["reservations"]) or "none"),
    ]
    return lines + [("because", line) for line in data["evidence"]]


def _mapping(data: dict[str, Any]) -> str:
    doubt = "" if data["certain"] or data["mapping"] == "unknown" else " (fewer than three observers say so)"
    return f"{data['mapping']}{doubt}"


def _port_mapping(data: dict[str, Any]) -> str:
    mapping = data["port_mapping"]
    if mapping is None:
        return f"none: {data['port_mapping_detail']}" if data["port_mapping_detail"] else "none is needed"
    ports = [
        f"{port['transport']} {port['port']} at {port['external_ip']}:{port['external_port']} ({port['verdict']})"
        for port in mapping["ports"]
    ]
    return f"{', '.join(ports)}, by {mapping['protocol']}"


def _lifetime(lives: float | None, dies: float | None) -> str:
    if lives is None:
        return "not measured: see --lifetimes"
    return f"at least {lives:g} s without traffic" + ("" if dies is None else f", less than {dies:g} s")


def _tried(peer: dict[str, Any]) -> str:
    guesses = [guess["text"] for guess in peer["guesses"]]
    return ", ".join([*peer["tried"], *guesses, *(f"failed: {error}" for error in peer["errors"])]) or "-"


def _seconds(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of seconds like 10,30,60.") from None
