"""`lattica share`, `get` and `providers`: files by their content id."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from lattica_cli.context import State, counted, daemon, rate, say, size, table, warn
from lattica_cli.parameters import CID, parse_cid, parse_path, parse_peer, seconds
from lattica_cli.progress import Progress


def register(app: typer.Typer) -> None:
    app.command("share")(share)
    app.command("get")(get)
    app.command("providers")(providers)


def share(
    ctx: typer.Context,
    paths: list[str] = typer.Argument(metavar="PATH", help="Files or folders."),
) -> None:
    """Share files or folders; prints their content ids. They are added to the store and announced."""
    state = State.of(ctx)
    found = [Path(path) for path in paths]
    for path in found:
        if not path.exists():
            raise typer.BadParameter(f"there is no file {path}.")
    sent = [parse_path(str(path)) for path in found]
    results = []
    with daemon(state) as lat:
        for path, absolute in zip(found, sent, strict=True):
            done = follow(lat.daemon_stream("share", absolute), f"share {path.name}", quiet=state.json)
            results.append({"path": str(path), **done})
            if not state.json:
                say(done["cid"])
                if not done.get("announced", 1):
                    warn("nobody was told yet: no other peer is known; it is announced once one is")
    if state.json:
        state.emit(results[0] if len(results) == 1 else results, lambda: None)


def get(
    ctx: typer.Context,
    cid: str = CID,
    output: str = typer.Option(..., "--output", "-o", metavar="PATH", help="Where to write it."),
    peer: list[str] = typer.Option([], "--from", metavar="PEER", help="Ask these peers, besides those found."),
    timeout: float = seconds(0.0, zero_means="no limit", help="For the whole fetch."),
) -> None:
    """Fetch CID from whoever has it. A fetch that was broken off goes on where it stopped."""
    state = State.of(ctx)
    wanted = str(parse_cid(cid))
    target = Path(output).absolute()
    sources, path = [str(parse_peer(text)) for text in peer], parse_path(output)
    if not target.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {target.parent}.")
    with daemon(state) as lat:
        events = lat.daemon_stream("fetch", wanted, path, sources, timeout or None)
        done = follow(events, f"get {target.name}", quiet=state.json)

    def human() -> None:
        speed = rate(done["fetched_bytes"], done["seconds"])
        kept = f", {size(done['reused_bytes'])} were here already" if done["reused_bytes"] else ""
        took = f"{size(done['bytes'])} in {done['seconds']:.2f} s ({speed})"
        say(f"{output}: {took} from {counted(done['sources'], 'peer')}{kept}")

    state.emit(done, human)


def providers(ctx: typer.Context, cid: str = CID, timeout: float = seconds(30.0, help="To search.")) -> None:
    """Who has CID, from the network."""
    state = State.of(ctx)
    wanted = str(parse_cid(cid))
    with daemon(state) as lat:
        data = lat.daemon("providers", wanted, timeout=timeout)
    rows = [(p["peer_id"], " ".join(p["addrs"])) for p in data]
    state.emit(data, lambda: table(("peer", "addresses"), rows, empty="nobody is known to have it"))


def follow(events: Iterable[dict[str, Any]], title: str, *, quiet: bool) -> dict[str, Any]:
    """Show progress events until the last one, which has `state == "done"`, and return it without that field."""
    done: dict[str, Any] = {}
    with Progress(title, quiet=quiet) as progress:
        for event in events:
            if event["state"] == "done":
                done = {key: value for key, value in event.items() if key != "state"}
            else:
                progress.update(event)
    return done
