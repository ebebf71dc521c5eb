"""`lattica blobs …`: the content store of this daemon."""

from __future__ import annotations

import typer

from lattica_cli.content import follow
from lattica_cli.context import State, counted, daemon, say, size, table
from lattica_cli.parameters import CID, parse_cid

blobs_app = typer.Typer(no_args_is_help=True, help="What this daemon stores.")


def register(app: typer.Typer) -> None:
    app.add_typer(blobs_app, name="blobs")


@blobs_app.command("list")
def list_blobs(ctx: typer.Context) -> None:
    """Everything in the store."""
    state = State.of(ctx)
    with daemon(state) as lat:
        data = lat.daemon("blobs_list")
    rows = [(b["cid"], size(b["bytes"]), b["complete"], b["pinned"], b["path"]) for b in data]
    columns = ("content id", "size", "complete", "pinned", "file")
    state.emit(data, lambda: table(columns, rows, empty="the store is empty"))


@blobs_app.command("pin")
def pin(ctx: typer.Context, cid: str = CID) -> None:
    """Keep CID when the store is collected."""
    _set(ctx, "blobs_pin", cid, "pinned")


@blobs_app.command("unpin")
def unpin(ctx: typer.Context, cid: str = CID) -> None:
    """Let CID go at the next collection."""
    _set(ctx, "blobs_unpin", cid, "unpinned")


@blobs_app.command("remove")
def remove(ctx: typer.Context, cid: str = CID) -> None:
    """Remove CID from the store at once, pinned or not."""
    _set(ctx, "blobs_remove", cid, "removed")


def _set(ctx: typer.Context, method: str, cid: str, word: str) -> None:
    state = State.of(ctx)
    wanted = str(parse_cid(cid))
    with daemon(state) as lat:
        data = lat.daemon(method, wanted)
    state.emit(data, lambda: say(f"{word} {data['cid']}"))


@blobs_app.command("verify")
def verify(ctx: typer.Context) -> None:
    """Read and hash every chunk. Damaged ones are dropped and count as missing. Exit code 1 if there was one."""
    state = State.of(ctx)
    with daemon(state) as lat:
        data = follow(lat.daemon_stream("blobs_verify"), "verify", quiet=state.json)

    def human() -> None:
        say(f"{counted(data['chunks'], 'chunk')} read, {data['corrupt']} damaged")
        for cid in data["damaged"]:
            say(f"damaged\t{cid}")

    state.emit(data, human)
    if data["corrupt"]:
        raise typer.Exit(1)


@blobs_app.command("gc")
def collect(ctx: typer.Context) -> None:
    """Remove what is neither pinned nor being fetched."""
    state = State.of(ctx)
    with daemon(state) as lat:
        data = lat.daemon("blobs_gc")
    state.emit(data, lambda: say(f"removed {counted(data['blobs'], 'blob')}, {size(data['bytes'])}"))
