"""`lattica demo`: the main job on this machine, from nothing.

Three daemons as child processes in a temporary directory, on loopback and free ports: one everybody finds the others
through, and two peers. A safetensors file is shared on one peer, found and fetched by the other, and compared; a worker
of one peer is called with a tensor through the other; a replicated value is written on one and read on the other.
Everything is stopped and removed at the end, whatever happened.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import typer

from lattica.errors import LatticaError
from lattica_cli.context import State, rate, say, size
from lattica_cli.launch import ChildDaemon

LISTEN = ("--listen", "/ip4/127.0.0.1/tcp/0", "--listen", "/ip4/127.0.0.1/udp/0/quic-v1")
CALLS_IN_FLIGHT = 64
CALL_SECONDS = 2.0
CONNECT_TIMEOUT = 20.0
LONGEST_FOLDER = 60
"""Bytes: 103 less `/lattica-xxxxxxxx/bootstrap/lattica.sock`."""


def register(app: typer.Typer) -> None:
    app.command("demo")(demo)


def demo(
    ctx: typer.Context,
    file: str = typer.Option("", "--file", metavar="FILE", help="Share this file instead of a random one."),
    megabytes: int = typer.Option(128, "--megabytes", min=1, max=65536, help="Size of the random file, MiB."),
) -> None:
    """See it work on this machine. Two peers and a bootstrap daemon find each other, exchange a model and call each
    other."""
    state = State.of(ctx)
    if file and not Path(file).is_file():
        raise typer.BadParameter(f"there is no file {file}.")
    signal.signal(signal.SIGTERM, _interrupt)
    folder = Path(tempfile.mkdtemp(prefix="lattica-", dir=_folder_for_sockets()))
    report = Report(tell=(lambda text: None) if state.json else say)
    result = report.result
    try:
        with ExitStack() as stack:
            _run(stack, folder, Path(file).absolute() if file else None, megabytes, report)
    except LatticaError as error:
        result["error"] = str(error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if result["ok"]:
        state.emit(result, lambda: say("all of it matched; nothing was left behind"))
        return
    state.emit(result, lambda: typer.echo(f"lattica: the demo failed: {result.get('error')}", err=True))
    raise typer.Exit(1)


def _folder_for_sockets() -> str:
    """The usual temporary directory, or /tmp where that one is too deep: a Unix socket's path has about 100 bytes."""
    usual = tempfile.gettempdir()
    return usual if len(os.fsencode(usual)) <= LONGEST_FOLDER else "/tmp"


@dataclass
class Report:
    """What came out so far, for `--json`, and where the story goes."""

    tell: Callable[[str], None]
    result: dict[str, Any] = field(default_factory=lambda: {"ok": False})


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run(stack: ExitStack, folder: Path, file: Path | None, megabytes: int, report: Report) -> None:
    import lattica

    alice, bob = _start_daemons(stack, folder, report)
    if file is None:
        file = folder / "model.safetensors"
        from lattica_cli.safetensors_file import write_random_model

        write_random_model(file, megabytes, secrets.randbits(64))
        report.tell(f"made {file.name}, {size(file.stat().st_size)} of random bf16 and f32 weights")
    a = stack.enter_context(lattica.connect(home=alice.home))
    b = stack.enter_context(lattica.connect(home=bob.home))
    for lat in (a, b):
        _wait_for_network(lat)
    _exchange(a, b, file, folder / "fetched.safetensors", report)
    _call(stack, alice, bob, b, report)
    _replicate(a, b, alice, bob, report)
    result = report.result
    result["ok"] = bool(result["sha256_equal"] and result["rpc_result_equal"] and result["space_equal"])
    if not result["ok"]:
        result["error"] = "what arrived is not what was sent"


def _start_daemons(stack: ExitStack, folder: Path, report: Report) -> tuple[ChildDaemon, ChildDaemon]:
    started = time.monotonic()

    def start(name: str, *arguments: str) -> ChildDaemon:
        child = ChildDaemon(folder / name, [*LISTEN, *arguments])
        stack.callback(child.stop)
        return child

    bootstrap = start("bootstrap")
    bootstrap.wait_ready()
    door = f"{bootstrap.addrs[0]}/p2p/{bootstrap.peer_id}"
    peers = [start(name, "--bootstrap", door) for name in ("alice", "bob")]
    for child in peers:
        child.wait_ready()
    tell, result = report.tell, report.result
    result["daemons_seconds"] = round(time.monotonic() - started, 3)
    tell(f"started three daemons in {result['daemons_seconds']:.2f} s:")
    for name, child in zip(("bootstrap", "alice", "bob"), (bootstrap, *peers), strict=True):
        tell(f"  {name:<9} {child.peer_id}  {' '.join(child.addrs)}")
    return peers[0], peers[1]


def _wait_for_network(lat: Any) -> None:
    """Until the peer knows others to ask: the ready line does not wait for the bootstrap."""
    deadline = time.monotonic() + CONNECT_TIMEOUT
    while not lat.daemon("dht_info")["peers"]:
        if time.monotonic() > deadline:
            raise LatticaError(f"a peer found no other within {CONNECT_TIMEOUT:g} s")
        time.sleep(0.02)


def _exchange(a: Any, b: Any, file: Path, copy: Path, report: Report) -> None:
    """Share `file` on `a`, find it from `b`, fetch it there, compare."""
    tell, result = report.tell, report.result
    shared = _last(a.daemon_stream("share", str(file)))
    cid = shared["cid"]
    seconds = shared["seconds"]
    result |= {"cid": cid, "bytes": shared["bytes"], "share_seconds": round(seconds, 3)}
    tell(f"alice shared it in {seconds:.2f} s ({rate(shared['bytes'], seconds)}) as {cid}")

    started = time.monotonic()
    providers = b.daemon("providers", cid, timeout=CONNECT_TIMEOUT)
    result["find_seconds"] = round(time.monotonic() - started, 3)
    result["providers"] = [p["peer_id"] for p in providers]
    tell(f"bob found {len(providers)} provider through the DHT in {result['find_seconds'] * 1e3:.0f} ms")

    fetched = _last(b.daemon_stream("fetch", cid, str(copy), [], None))
    result |= {"fetch_seconds": round(fetched["seconds"], 3), "fetched_bytes": fetched["fetched_bytes"]}
    result["sources"] = fetched["sources"]
    tell(
        f"bob fetched {size(fetched['bytes'])} in {fetched['seconds']:.2f} s "
        f"({rate(fetched['bytes'], fetched['seconds'])}), verified and on disk"
    )
    result["sha256_equal"] = _sha256(file) == _sha256(copy)
    tell(f"sha256 of both files {'is equal' if result['sha256_equal'] else 'DIFFERS'}")


def _call(stack: ExitStack, alice: ChildDaemon, bob: ChildDaemon, b: Any, report: Report) -> None:
    """Serve a method by a worker on alice, call it through bob: once with a tensor, then as often as it goes."""
    tell, result = report.tell, report.result
    import numpy as np

    worker = subprocess.Popen(
        [sys.executable, "-m", "lattica_cli.demo_expert", str(alice.home)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    stack.callback(_stop_worker, worker)
    assert worker.stdout is not None
    if worker.stdout.readline() != b"serving\n":
        raise LatticaError("the worker on alice did not start")
    x = np.arange(2**20, dtype=np.float32).reshape(1024, 1024)
    started = time.monotonic()
    y = b.call(alice.peer_id, "expert.forward", x, timeout=30)
    seconds = time.monotonic() - started
    result["rpc_result_equal"] = bool(np.array_equal(y, x * 2 + 1))
    result["rpc_tensor_seconds"] = round(seconds, 4)
    tell(f"bob called expert.forward on alice with a {x.nbytes / 2**20:.0f} MiB tensor: {seconds * 1e3:.1f} ms")
    calls, seconds = _measure_calls(bob.home, alice.peer_id)
    result["rpc_calls_per_second"] = round(calls / seconds)
    tell(f"{calls / seconds:.0f} calls/s of 128 bytes, {CALLS_IN_FLIGHT} in flight, through both daemons to the worker")


def _replicate(a: Any, b: Any, alice: ChildDaemon, bob: ChildDaemon, report: Report) -> None:
    """Write a replicated value on alice, read it on bob; compare the roots of both after bob wrote, too."""
    tell, result = report.tell, report.result
    space = a.create_space("demo", writers=[bob.peer_id])["space"]
    here, there = a.space(space), b.space(space)
    written = {"model": result["cid"], "by": alice.peer_id}
    here["current"] = written
    started = time.monotonic()
    b.join_space(space, timeout=CONNECT_TIMEOUT)
    result["space"] = space
    result["space_join_seconds"] = round(time.monotonic() - started, 3)
    read = there["current"]
    there.counter("reads").increment()
    deadline = time.monotonic() + CONNECT_TIMEOUT
    while (roots := [side.root()["root"] for side in (here, there)])[0] != roots[1] and time.monotonic() < deadline:
        time.sleep(0.01)
    result["space_root"] = roots[0]
    result["space_equal"] = bool(read == written and roots[0] == roots[1] and here.counter("reads").value() == 1)
    tell(
        f"alice wrote to a space, bob joined it in {result['space_join_seconds'] * 1e3:.0f} ms and read the value; the "
        f"roots {'are equal' if result['space_equal'] else 'DIFFER'}: {roots[0][:16]}…"
    )


def _measure_calls(home: Path, peer: str) -> tuple[int, float]:
    """Calls answered and the seconds they took, with a fixed number in flight."""
    import anyio
    import numpy as np

    import lattica

    x = np.ones(32, dtype=np.float32)
    count = 0

    async def caller(lat: Any, until: float) -> None:
        nonlocal count
        while time.monotonic() < until:
            await lat.call(peer, "expert.forward", x, timeout=30)
            count += 1

    async def run() -> float:
        async with lattica.aconnect(home=home) as lat:
            await lat.call(peer, "expert.forward", x, timeout=30)
            started = time.monotonic()
            async with anyio.create_task_group() as group:
                for _ in range(CALLS_IN_FLIGHT):
                    group.start_soon(caller, lat, started + CALL_SECONDS)
            return time.monotonic() - started

    seconds = anyio.run(run, backend="trio")
    return count, seconds


def _stop_worker(worker: subprocess.Popen[bytes]) -> None:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.close()
    try:
        worker.wait(5)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
    worker.stdout.close()


def _last(events: Any) -> dict[str, Any]:
    return list(events)[-1]  # type: ignore[no-any-return]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
