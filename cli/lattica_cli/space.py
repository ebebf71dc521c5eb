"""`lattica space …`: replicated state. SPACE is an id, or a name when only one space here has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from lattica_cli.context import State, counted, daemon, say, table
from lattica_cli.parameters import KEY, PEER, SPACE, parse_peer, seconds

space_app = typer.Typer(no_args_is_help=True, help="Replicated state: maps, lists, texts, counters, sets.")


def register(app: typer.Typer) -> None:
    app.add_typer(space_app, name="space")


@space_app.command("create")
def create(
    ctx: typer.Context,
    name: str = typer.Argument(metavar="NAME", help="For people; it need not be the only one of that name."),
    writer: list[str] = typer.Option([], "--writer", metavar="PEER", help="A peer that may write, too. Repeatable."),
    quorum: int = typer.Option(0, "--quorum", min=0, help="Signers that a checkpoint needs; 0: the owner alone."),
    signer: list[str] = typer.Option([], "--signer", metavar="PEER", help="One of the quorum. Repeatable."),
) -> None:
    """Make a space that this peer owns; prints its id."""
    state = State.of(ctx)
    if not name.strip():
        raise typer.BadParameter("the space needs a name, as in: lattica space create team.")
    writers = [str(parse_peer(text)) for text in writer]
    signers = [str(parse_peer(text)) for text in signer]
    with daemon(state) as lat:
        data = lat.create_space(name, writers=writers, quorum=quorum, signers=signers)
    state.emit(data, lambda: say(data["space"]))


@space_app.command("join")
def join(
    ctx: typer.Context,
    space: str = typer.Argument(metavar="ID", help="As `lattica space create` printed it."),
    peer: list[str] = typer.Option([], "--peer", metavar="PEER", help="A peer that has it. Repeatable."),
    timeout: float = seconds(30.0, help="To find a member and compare with it."),
) -> None:
    """Hold a replica of a space, found through the network."""
    state = State.of(ctx)
    peers = [str(parse_peer(text)) for text in peer]
    with daemon(state) as lat:
        data = lat.join_space(space, peers=peers, timeout=timeout)
    step = "in step with a member" if data["synced"] else "no member compared in time; it goes on by itself"
    state.emit(data, lambda: say(f"{data['name']}: {counted(data['operations'], 'operation')}, {step}"))


@space_app.command("leave")
def leave(ctx: typer.Context, space: str = SPACE) -> None:
    """Forget this peer's replica."""
    state = State.of(ctx)
    with daemon(state) as lat:
        data = lat.daemon("space_leave", space)
    state.emit(data, lambda: say(f"left {data['space']}"))


@space_app.command("list")
def list_spaces(ctx: typer.Context) -> None:
    """The spaces on this peer."""
    state = State.of(ctx)
    with daemon(state) as lat:
        data = lat.spaces()

    def human() -> None:
        rows = [
            (item["name"], item["operations"], item["writable"], len(item["neighbours"]), item["space"])
            for item in data
        ]
        columns = ("name", "operations", "writable", "neighbours", "space")
        table(columns, rows, empty="no spaces; make one: lattica space create NAME")

    state.emit(data, human)


@space_app.command("set")
def set_value(
    ctx: typer.Context,
    space: str = SPACE,
    key: str = KEY,
    value: str = typer.Argument(metavar="JSON", help="The value; a text needs quotes."),
) -> None:
    """Write KEY; every member sees it."""
    state = State.of(ctx)
    try:
        parsed = json.loads(value, parse_int=_int64)
    except ValueError as error:
        raise typer.BadParameter(f"{value[:80]!r} is not JSON ({error}); a text needs quotes: '\"text\"'.") from None
    except RecursionError:
        raise typer.BadParameter("the value is nested too deep.") from None
    with daemon(state) as lat:
        data = lat.daemon("space_set", space, key, parsed)
    state.emit(data, lambda: say(f"{key} = {json.dumps(parsed, ensure_ascii=False)}"))


def _int64(digits: str) -> int:
    number = int(digits)
    if not -(1 << 63) <= number < 1 << 63:
        raise typer.BadParameter(f"the number {digits[:24]} does not fit 64 bits.")
    return number


@space_app.command("get")
def get(
    ctx: typer.Context, space: str = SPACE, key: str = typer.Argument("", metavar="KEY", help="Left out: all of them.")
) -> None:
    """Read KEY, or all keys."""
    state = State.of(ctx)
    with daemon(state) as lat:
        data = lat.daemon("space_get", space, key)
    state.emit(data, lambda: say(_shown(data["value"])))


@space_app.command("delete")
def delete(ctx: typer.Context, space: str = SPACE, key: str = KEY) -> None:
    """Delete KEY."""
    state = State.of(ctx)
    with daemon(state) as lat:
        data = lat.daemon("space_delete", space, key)
    state.emit(data, lambda: say(f"deleted {key}"))


@space_app.command("show")
def show(ctx: typer.Context, space: str = SPACE) -> None:
    """Everything in it: maps, lists, texts, counters and sets."""
    state = State.of(ctx)
    with daemon(state) as lat:
        data = lat.daemon("space_read", space)
    state.emit(data, lambda: say(_shown(data)))


@space_app.command("watch")
def watch(ctx: typer.Context, space: str = SPACE) -> None:
    """Print changes as they come. One JSON value a line, until interrupted."""
    state = State.of(ctx)
    with daemon(state) as lat:
        for change in lat.daemon_stream("space_watch", space):
            say(_shown(change))


@space_app.command("add-writer")
def add_writer(ctx: typer.Context, space: str = SPACE, peer: str = PEER) -> None:
    """Let PEER write. Only the owner may."""
    _change_members(ctx, "space_add_writer", space, peer)


@space_app.command("remove-writer")
def remove_writer(ctx: typer.Context, space: str = SPACE, peer: str = PEER) -> None:
    """Let PEER write no more. Only the owner may."""
    _change_members(ctx, "space_remove_writer", space, peer)


@space_app.command("hand-over")
def hand_over(ctx: typer.Context, space: str = SPACE, peer: str = PEER) -> None:
    """Make PEER the owner; this peer stays a writer."""
    _change_members(ctx, "space_hand_over", space, peer)


def _change_members(ctx: typer.Context, method: str, space: str, peer: str) -> None:
    state = State.of(ctx)
    who = str(parse_peer(peer))
    with daemon(state) as lat:
        data = lat.daemon(method, space, who)
    state.emit(data, lambda: say(f"{counted(len(data['writers']), 'writer')}: {' '.join(data['writers'])}"))


@space_app.command("members")
def members(ctx: typer.Context, space: str = SPACE) -> None:
    """Who announced itself in the last 30 seconds."""
    state = State.of(ctx)
    with daemon(state) as lat:
        data = lat.daemon("space_members", space)

    def human() -> None:
        rows = [(item["peer_id"], item["seconds_ago"], json.dumps(item["info"])) for item in data]
        table(("peer", "seconds ago", "info"), rows, empty="nobody announced itself")

    state.emit(data, human)


@space_app.command("log")
def log(
    ctx: typer.Context,
    space: str = SPACE,
    limit: int = typer.Option(100, "--limit", min=1, max=100_000, help="How many."),
) -> None:
    """The newest operations, oldest first. Only those since the last checkpoint are there."""
    state = State.of(ctx)
    with daemon(state) as lat:
        data = lat.daemon("space_log", space, limit)

    def human() -> None:
        import datetime

        rows = [
            (
                datetime.datetime.fromtimestamp(item["time"]).isoformat(" "),
                item["author"][-8:],
                item["seq"],
                item["kind"],
                item["bytes"],
                item["operation"],
            )
            for item in data
        ]
        table(("time", "author", "seq", "kind", "bytes", "operation"), rows, empty="no operations")

    state.emit(data, human)


@space_app.command("root")
def root(ctx: typer.Context, space: str = SPACE) -> None:
    """A hash of the state. Equal on two peers exactly when their state is; 32 bytes."""
    state = State.of(ctx)
    with daemon(state) as lat:
        data = lat.daemon("space_root", space)
    state.emit(data, lambda: say(f"{data['root']}  {counted(data['operations'], 'operation')}"))


@space_app.command("verify")
def verify(ctx: typer.Context, space: str = SPACE) -> None:
    """Check every operation again. Signatures, rights, links and contents; exit code 1 when something is wrong."""
    state = State.of(ctx)
    with daemon(state) as lat:
        data = lat.daemon("space_verify", space)

    def human() -> None:
        say(f"{counted(data['operations'], 'operation')} checked, root {data['root']}")
        for item in data["refused"]:
            say(f"  {item['operation']}: {item['reason']}")
        if not data["document_equal"]:
            say("  the document is not the one that the operations make")

    state.emit(data, human)
    if not data["ok"]:
        raise typer.Exit(1)


@space_app.command("checkpoint")
def checkpoint(ctx: typer.Context, space: str = SPACE) -> None:
    """Replace the history by a signed state. On all members. The owner may; where there are signers, one of them
    proposes it and the others sign."""
    state = State.of(ctx)
    with daemon(state) as lat:
        data = lat.daemon("space_checkpoint", space)
    waits = "" if data["complete"] else ", proposed to the other signers"
    state.emit(
        data, lambda: say(f"checkpoint {data['checkpoint']} of {counted(data['operations'], 'operation')}{waits}")
    )


@space_app.command("prove")
def prove(
    ctx: typer.Context,
    space: str = SPACE,
    operation: str = typer.Argument(metavar="OPERATION", help="Its id, as `lattica space log` prints it."),
    output: str = typer.Option(..., "-o", "--output", metavar="FILE", help="Where the proof goes."),
) -> None:
    """Write a proof that an operation is part of the state. It is for `lattica space verify-proof`."""
    state = State.of(ctx)
    with daemon(state) as lat:
        data = lat.daemon("space_prove", space, operation)
    proof: bytes = data.pop("proof")
    Path(output).write_bytes(proof)
    data |= {"bytes": len(proof), "path": output}
    state.emit(data, lambda: say(f"{output}: {len(proof)} bytes, for the root {data['root']}"))


@space_app.command("verify-proof")
def verify_proof(
    ctx: typer.Context,
    file: str = typer.Argument(metavar="FILE", help="As `lattica space prove` wrote it."),
    root_hex: str = typer.Option("", "--root", metavar="HEX", help="The root that the operation has to be part of."),
) -> None:
    """Check a proof, without a daemon. Prints who wrote what, under which root; exit code 1 when it proves nothing."""
    from lattica.errors import InvalidRecord, StorageError
    from lattica_protocols.errors import RemoteProtocolError
    from lattica_protocols.replica.genesis import space_text
    from lattica_protocols.replica.proof import Proven, changes_of, verify_proof_untrusted

    state = State.of(ctx)
    try:
        proven: Proven = verify_proof_untrusted(Path(file).read_bytes())
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error.strerror}") from None
    except RemoteProtocolError as error:
        raise InvalidRecord(f"{file} proves nothing: {error}") from None
    if root_hex and proven.root.hex() != root_hex.lower():
        raise InvalidRecord(f"{file} is for the root {proven.root.hex()}, not {root_hex}")
    from lattica_protocols.keys import PublicKey
    from lattica_protocols.peer_id import PeerId

    op = proven.operation
    data: dict[str, Any] = {
        "ok": True,
        "space": space_text(proven.genesis.id),
        "name": proven.genesis.name,
        "author": str(PeerId.from_public_key(PublicKey.ed25519(op.author))),
        "operation": op.id.hex(),
        "time": op.time,
        "root": proven.root.hex(),
        "writes": changes_of(op),
    }

    def human() -> None:
        say(f"{data['author']} wrote operation {data['operation']}")
        say(f"in the space {data['name']} ({data['space']})")
        say(f"contents: {_shown(data['writes'])}")
        say(f"part of the state with root {data['root']}" + ("" if root_hex else " (compare it with one you trust)"))

    state.emit(data, human)


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=lambda other: f"{len(other)} bytes")
