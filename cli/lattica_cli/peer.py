"""`lattica peers` and `lattica peer …`: who is connected, and who may."""

from __future__ import annotations

import typer

from lattica_cli.context import State, counted, daemon, say, size, table, warn
from lattica_cli.parameters import PEER, parse_peer, parse_target, seconds

peer_app = typer.Typer(no_args_is_help=True, help="Connect, find, ping and admit single peers.")


def register(app: typer.Typer) -> None:
    app.command("peers")(peers)
    app.add_typer(peer_app, name="peer")


def peers(ctx: typer.Context) -> None:
    """Connected peers."""
    state = State.of(ctx)
    with daemon(state) as lat:
        data = lat.daemon("peers")

    def human() -> None:
        rows = [
            (
                p["peer_id"],
                p["path"],
                p["addr"],
                p["rtt_ms"],
                p["direction"],
                size(p["sent_bytes"]),
                size(p["received_bytes"]),
                p["agent"] or None,
            )
            for p in data
        ]
        columns = ("peer", "path", "address", "rtt ms", "direction", "sent", "received", "agent")
        table(columns, rows, empty="no peer is connected")

    state.emit(data, human)


@peer_app.command("connect")
def connect(
    ctx: typer.Context,
    addr: str = typer.Argument(
        metavar="ADDR", help="Such as /ip4/192.0.2.1/tcp/4101/p2p/12D3Koo…; a bare peer id is looked up first."
    ),
    timeout: float = seconds(20.0, help="To try."),
) -> None:
    """Connect to the peer at ADDR."""
    state = State.of(ctx)
    target = parse_target(addr)
    with daemon(state) as lat:
        data = lat.daemon("connect", target, timeout=timeout)
    state.emit(data, lambda: say(f"connected to {data['peer_id']} over {data['path']} at {data['addr']}"))


@peer_app.command("disconnect")
def disconnect(ctx: typer.Context, peer: str = PEER) -> None:
    """Close all connections with PEER."""
    state = State.of(ctx)
    target = str(parse_peer(peer))
    with daemon(state) as lat:
        data = lat.daemon("disconnect", target)
    state.emit(data, lambda: say(f"closed {counted(data['closed'], 'connection')}"))


@peer_app.command("find")
def find(ctx: typer.Context, peer: str = PEER, timeout: float = seconds(30.0, help="To search.")) -> None:
    """Where PEER is, from the network."""
    state = State.of(ctx)
    target = str(parse_peer(peer))
    with daemon(state) as lat:
        data = lat.daemon("find_peer", target, timeout=timeout)
    state.emit(data, lambda: say("\n".join(f"{addr}/p2p/{data['peer_id']}" for addr in data["addrs"])))


@peer_app.command("ping")
def ping(
    ctx: typer.Context,
    peer: str = PEER,
    count: int = typer.Option(4, "--count", "-c", min=1, max=1000, help="How many."),
    timeout: float = seconds(10.0, help="For each answer."),
) -> None:
    """Round-trip times to PEER over the path in use."""
    state = State.of(ctx)
    times: list[float] = []
    path = ""
    target = str(parse_peer(peer))
    with daemon(state) as lat:
        for answer in lat.daemon_stream("ping", target, count, timeout):
            times.append(answer["rtt_ms"])
            path = answer["path"]
            if not state.json:
                say(f"{answer['rtt_ms']:.2f} ms over {path}")
    if state.json:
        state.emit({"peer_id": target, "path": path, "rtt_ms": times}, lambda: None)


@peer_app.command("allow")
def allow(ctx: typer.Context, peer: str = PEER) -> None:
    """Let PEER connect, whatever the default is."""
    _set_rule(ctx, peer, "allow")


@peer_app.command("block")
def block(ctx: typer.Context, peer: str = PEER) -> None:
    """Refuse PEER and close its connections."""
    _set_rule(ctx, peer, "block")


@peer_app.command("clear-rule")
def clear_rule(ctx: typer.Context, peer: str = PEER) -> None:
    """Take the rule for PEER away: the default decides again."""
    _set_rule(ctx, peer, "")


def _set_rule(ctx: typer.Context, peer: str, verdict: str) -> None:
    state = State.of(ctx)
    target = str(parse_peer(peer))
    with daemon(state) as lat:
        data = lat.daemon("set_rule", target, verdict)
    if data["closed"] and not state.json:
        warn(f"closed {counted(data['closed'], 'connection')}")
    state.emit(data, lambda: say(f"{peer}: {verdict or 'no rule'}"))


@peer_app.command("list-rules")
def list_rules(ctx: typer.Context) -> None:
    """The allow and block lists."""
    state = State.of(ctx)
    with daemon(state) as lat:
        data = lat.daemon("rules")

    def human() -> None:
        say(f"everybody else: {data['default']}")
        for verdict in ("allow", "block"):
            for peer in data[verdict]:
                say(f"{verdict}\t{peer}")

    state.emit(data, human)
