"""The benchmark: ours and the peers in one run on one machine, alternating, medians and ratios.

    python tests/bench/run.py [--quick] [--only NAME …] [--json FILE]

Every figure is taken `ROUNDS` times; ours and the peer it is compared with take turns, so that a machine that slows
down slows both. A ratio is the ratio of the medians. The 64-in-flight and sequential calls, the streams and the
fetch are encrypted and authenticated on our side and on the Rust side; grpc is not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "interop"))

from driven import Driven, driven  # noqa: E402
from install_peers import install_rust_lattica  # noqa: E402
from rust_peer import RustPeer, running_rust_peer  # noqa: E402

MIB = 1 << 20
TCP, QUIC = ["/ip4/127.0.0.1/tcp/0"], ["/ip4/127.0.0.1/udp/0/quic-v1"]


@dataclass
class Figure:
    """One row: our values, what they are compared with, and which way is better."""

    name: str
    unit: str
    against: str
    bar: float
    aim: float
    lower_is_better: bool = False
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        ours, theirs = statistics.median(self.ours), statistics.median(self.theirs)
        ratio = ours / theirs
        met = (lambda bound: ratio <= bound) if self.lower_is_better else (lambda bound: ratio >= bound)
        verdict = "aim" if met(self.aim) else "bar" if met(self.bar) else "below"
        return {
            "figure": self.name,
            "unit": self.unit,
            "ours": ours,
            "against": self.against,
            "theirs": theirs,
            "ratio": ratio,
            "bar": self.bar,
            "aim": self.aim,
            "verdict": verdict,
            "samples": {"ours": self.ours, "theirs": self.theirs},
        }


class Bench:
    """The processes that are measured, started when a figure first needs them."""

    def __init__(self, stack: ExitStack, folder: Path, quick: bool) -> None:
        self.stack = stack
        self.folder = folder
        self.rounds = 1 if quick else 3
        self.scale = 4 if quick else 1
        self._made: dict[str, Any] = {}

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    # -- ours ---------------------------------------------------------------------------------------------
    def node(self, name: str, listen: list[str]) -> Driven:
        settings = {"listen": listen, "home": str(self.folder / name)}
        return self.once(
            f"node {name}",
            lambda: self.stack.enter_context(
                driven(sys.executable, HERE / "ours_node.py", settings, log=self.folder / f"{name}.log")
            ),
        )

    def pair(self, transport: str) -> tuple[Driven, str]:
        """A calling node, and the peer id of the one it is connected with over `transport` only."""
        listen = TCP if transport == "tcp" else QUIC
        server = self.node(f"{transport}-server", listen)
        client = self.node(f"{transport}-client", listen)
        path = self.once(f"connected {transport}", lambda: client.do("connect", server.hello["addrs"][0]))
        assert path == transport, path
        return client, server.hello["peer_id"]

    # -- peers --------------------------------------------------------------------------------------------
    def rust_pair(self, transport: str) -> tuple[RustPeer, str]:
        python = self.once("rust", install_rust_lattica)

        def make() -> tuple[RustPeer, str]:
            server = self.stack.enter_context(running_rust_peer(python, transports=[transport]))
            addr = f"{server.tcp if transport == 'tcp' else server.quic}/p2p/{server.peer_id}"
            client = self.stack.enter_context(running_rust_peer(python, transports=[transport], bootstraps=[addr]))
            for _ in range(1000):
                if str(server.peer_id) in client.do("get_all_peers"):
                    return client, str(server.peer_id)
            raise RuntimeError("the Rust peers did not connect")

        return self.once(f"rust {transport}", make)

    def grpc(self) -> Driven:
        def make() -> Driven:
            script = HERE / "grpc_peer.py"
            log = self.folder / "grpc.log"
            server = self.stack.enter_context(driven(sys.executable, script, {"role": "server"}, log=log))
            settings = {"role": "client", "port": server.hello["port"]}
            return self.stack.enter_context(driven(sys.executable, script, settings, log=log))

        return self.once("grpc", make)

    def ceiling(self, total: int, encrypted: bool) -> float:
        """Bytes per second of trio over TCP, with or without ChaCha20-Poly1305."""
        settings = {"role": "receive", "bytes": total, "encrypted": encrypted}
        with driven(sys.executable, HERE / "ceilings.py", settings) as receiver:
            sender = settings | {"role": "send", "port": receiver.hello["port"]}
            done = subprocess.run(
                [sys.executable, str(HERE / "ceilings.py"), json.dumps(sender)],
                capture_output=True, text=True, check=True, timeout=120,
            )  # fmt: skip
        return float(json.loads(done.stdout)["bytes_per_second"])


# -- the figures --------------------------------------------------------------------------------------------
def rpc_calls(bench: Bench, transport: str) -> Iterator[Figure]:
    """128 B calls at 64 in flight and one after the other."""
    bar, aim = (5, 10) if transport == "tcp" else (1.5, 3)
    name = f"RPC 128 B, 64 in flight, {transport.upper()}"
    busy = Figure(name, "calls/s", f"Rust wheel, {transport.upper()}", bar, aim)
    sequential = Figure("RPC 128 B sequential, median", "us", "Rust wheel, TCP", 0.5, 0.3, lower_is_better=True)
    ours, peer = bench.pair(transport)
    rust, rust_peer = bench.rust_pair(transport)
    for _ in range(bench.rounds):
        busy.ours.append(ours.do("calls", peer, 128, 40_000 // bench.scale, 64)["calls_per_second"])
        busy.theirs.append(rust.do("calls", rust_peer, 128, 8_000 // bench.scale, 64)["calls_per_second"])
        if transport == "tcp":
            sequential.ours.append(ours.do("calls", peer, 128, 3_000, 1)["median_seconds"] * 1e6)
            sequential.theirs.append(rust.do("calls", rust_peer, 128, 1_500, 1)["median_seconds"] * 1e6)
    yield busy
    if transport == "tcp":
        yield sequential


def rpc_large(bench: Bench) -> Iterator[Figure]:
    """256 KiB calls, echoed: MB/s of the request direction, as the wheel is counted, too."""
    figure = Figure("RPC 256 KiB, 16 in flight, TCP", "MB/s", "Rust wheel, TCP", 2.5, 4)
    ours, peer = bench.pair("tcp")
    rust, rust_peer = bench.rust_pair("tcp")
    size = 256 * 1024
    for _ in range(bench.rounds):
        figure.ours.append(ours.do("calls", peer, size, 4_000 // bench.scale, 16)["calls_per_second"] * size / 1e6)
        figure.theirs.append(
            rust.do("calls", rust_peer, size, 1_000 // bench.scale, 16)["calls_per_second"] * size / 1e6
        )
    yield figure


def grpc_calls(bench: Bench) -> Iterator[Figure]:
    """For orientation: grpc.aio, without encryption."""
    busy = Figure("RPC 128 B, 64 in flight, TCP", "calls/s", "grpc.aio, no TLS", 1, 5)
    streaming = Figure("streaming 256 MiB in 1 MiB messages, TCP", "MB/s", "grpc.aio, no TLS", 0.5, 1)
    ours, peer = bench.pair("tcp")
    grpc = bench.grpc()
    for _ in range(bench.rounds):
        busy.ours.append(ours.do("calls", peer, 128, 40_000 // bench.scale, 64)["calls_per_second"])
        busy.theirs.append(grpc.do("calls", 128, 8_000 // bench.scale, 64)["calls_per_second"])
        streaming.ours.append(ours.do("stream", peer, 256 * MIB)["bytes_per_second"] / 1e6)
        streaming.theirs.append(grpc.do("stream", 256 * MIB)["bytes_per_second"] / 1e6)
    yield busy
    yield streaming


def quic_stream(bench: Bench) -> Iterator[Figure]:
    """Streaming over QUIC."""
    figure = Figure("streaming 64 MiB, QUIC", "MB/s", "Rust wheel, QUIC", 0.4, 1)
    ours, peer = bench.pair("quic")
    rust, rust_peer = bench.rust_pair("quic")
    for _ in range(bench.rounds):
        figure.ours.append(ours.do("stream", peer, 64 * MIB // bench.scale)["bytes_per_second"] / 1e6)
        figure.theirs.append(rust.do("stream", rust_peer, 64 * MIB // bench.scale)["bytes_per_second"] / 1e6)
    yield figure


def blob_fetch(bench: Bench) -> Iterator[Figure]:
    """1 GiB from one source, verified and on disk, against the wheel's streaming and the AEAD ceiling."""
    against_rust = Figure("fetch 1 GiB blob, TCP, verified, on disk", "MB/s", "Rust wheel streaming, TCP", 6, 10)
    against_ceiling = Figure("the same", "MB/s", "TCP + ChaCha20-Poly1305", 0.35, 0.6)
    size = 1024 * MIB // bench.scale
    source = make_file(bench.folder / "blob.bin", size)
    bench.pair("tcp")
    server, client = bench.node("tcp-server", TCP), bench.node("tcp-client", TCP)
    rust, rust_peer = bench.rust_pair("tcp")
    cid = server.do("share", str(source))["cid"]
    for _ in range(bench.rounds):
        dest = bench.folder / "fetched.bin"
        rate = client.do("fetch", cid, str(dest))["bytes_per_second"] / 1e6
        client.do("forget", cid)
        dest.unlink()
        against_rust.ours.append(rate)
        against_ceiling.ours.append(rate)
        against_rust.theirs.append(rust.do("stream", rust_peer, 256 * MIB // bench.scale)["bytes_per_second"] / 1e6)
        against_ceiling.theirs.append(bench.ceiling(size, encrypted=True) / 1e6)
    yield against_rust
    yield against_ceiling


def latency_under_load(bench: Bench) -> Iterator[Figure]:
    """99th percentile of 128 B calls while a blob fetch saturates the same peer, against idle."""
    figure = Figure("p99 of 128 B calls during a fetch", "ms", "the same, idle", 10, 3, lower_is_better=True)
    bench.pair("tcp")
    server, client = bench.node("tcp-server", TCP), bench.node("tcp-client", TCP)
    for round_number in range(bench.rounds):
        source = make_file(bench.folder / f"load{round_number}.bin", 1024 * MIB // bench.scale)
        cid = server.do("share", str(source))["cid"]
        dest = bench.folder / "loaded.bin"
        result = client.do("latency_during", server.hello["peer_id"], cid, str(dest))
        client.do("forget", cid)
        dest.unlink()
        figure.ours.append(result["loaded_p99_seconds"] * 1e3)
        figure.theirs.append(result["idle_p99_seconds"] * 1e3)
    yield figure


SCENARIOS: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    "tcp-calls": lambda bench: rpc_calls(bench, "tcp"),
    "quic-calls": lambda bench: rpc_calls(bench, "quic"),
    "tcp-large": rpc_large,
    "grpc": grpc_calls,
    "quic-stream": quic_stream,
    "fetch": blob_fetch,
    "latency": latency_under_load,
}


def make_file(path: Path, size: int) -> Path:
    """`size` random bytes: nothing that could be compressed, deduplicated or sparse."""
    with path.open("wb") as file:
        block = os.urandom(16 * MIB)
        for number in range(size // len(block)):
            file.write(number.to_bytes(8, "big") + block[8:])
    return path


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| figure | ours | against | theirs | ratio | bar | aim | |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['figure']} | {row['ours']:,.0f} {row['unit']} | {row['against']} | {row['theirs']:,.0f} "
            f"{row['unit']} | {row['ratio']:.2f} | {row['bar']} | {row['aim']} | {row['verdict']} |"
            if row["ours"] >= 10
            else f"| {row['figure']} | {row['ours']:.2f} {row['unit']} | {row['against']} | {row['theirs']:.2f} "
            f"{row['unit']} | {row['ratio']:.2f} | {row['bar']} | {row['aim']} | {row['verdict']} |"
        )
    return "\n".join(lines)


@contextmanager
def bench_folder() -> Iterator[Path]:
    """A folder on a real disk, beside the checkout, removed afterwards."""
    base = HERE.parents[1] / ".bench"
    base.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=base) as folder:
        yield Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round, a quarter of the work")
    parser.add_argument("--only", nargs="*", choices=sorted(SCENARIOS), help="these scenarios only")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with bench_folder() as folder, ExitStack() as stack:
        bench = Bench(stack, folder, options.quick)
        for name in options.only or SCENARIOS:
            for figure in SCENARIOS[name](bench):
                rows.append(figure.row())
                print(f"{name}: {rows[-1]['figure']}: ratio {rows[-1]['ratio']:.2f}", file=sys.stderr, flush=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {date.today()}"
    print(f"{machine}\n\n{table(rows)}")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
