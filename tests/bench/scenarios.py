"""The scenarios: what is measured, and against what."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator

from driven import driven
from measured import HERE, MIB, TCP, Bench, Figure, cpu_seconds, make_file, peak_resident, resident
from relay_scenarios import RELAY_SCENARIOS
from space_scenarios import SPACE_SCENARIOS

import lattica


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
    """1 GiB from one source, verified and on disk, against the wheel's streaming and the ceilings of two AEADs: that of
    libp2p, and the one that two of ours agree on where it is fast."""
    against_rust = Figure("fetch 1 GiB blob, TCP, verified, on disk", "MB/s", "Rust wheel streaming, TCP", 6, 10)
    against_ceilings = {
        cipher: Figure("fetch 1 GiB blob, TCP, verified, on disk", "MB/s", f"TCP + {cipher}", *bounds)
        for cipher, *bounds in (("ChaCha20-Poly1305", 0.35, 0.6), ("AES-256-GCM", None, None))
    }
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
        against_rust.theirs.append(rust.do("stream", rust_peer, 256 * MIB // bench.scale)["bytes_per_second"] / 1e6)
        for cipher, figure in against_ceilings.items():
            figure.ours.append(rate)
            figure.theirs.append(bench.ceiling(size, cipher) / 1e6)
    yield against_rust
    yield from against_ceilings.values()


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


def daemon_calls(bench: Bench) -> Iterator[Figure]:
    """Worker to worker through both daemons, four processes, against the wheel inside two."""
    figure = Figure("worker to worker through both daemons, 128 B, 64 in flight", "calls/s", "Rust wheel, TCP", 2, 4)
    caller, peer = bench.workers()
    rust, rust_peer = bench.rust_pair("tcp")
    for _ in range(bench.rounds):
        figure.ours.append(caller.do("calls", peer, 128, 20_000 // bench.scale, 64)["calls_per_second"])
        figure.theirs.append(rust.do("calls", rust_peer, 128, 8_000 // bench.scale, 64)["calls_per_second"])
    yield figure


def daemon_tensor(bench: Bench) -> Iterator[Figure]:
    """A 64 MiB tensor worker to worker, answered with a number."""
    figure = Figure("64 MiB tensor worker to worker, both daemons", "MB/s", "Rust wheel streaming, TCP", 4, 8)
    caller, peer = bench.workers()
    rust, rust_peer = bench.rust_pair("tcp")
    for _ in range(bench.rounds):
        figure.ours.append(caller.do("tensor", peer, 64 * MIB, 32 // bench.scale)["bytes_per_second"] / 1e6)
        figure.theirs.append(rust.do("stream", rust_peer, 256 * MIB // bench.scale)["bytes_per_second"] / 1e6)
    yield figure


def memory(bench: Bench) -> Iterator[Figure]:
    """Resident memory of a daemon: idle, and the most it takes more while it shares and fetches 4 GiB."""
    idle = Figure("resident memory, idle daemon", "MiB", "", 80 * 1e6 / MIB, 60 * 1e6 / MIB, lower_is_better=True)
    bars = {"bar": 64 * 1e6 / MIB, "aim": 32 * 1e6 / MIB, "lower_is_better": True}
    sharing = Figure("growth while it shares 4 GiB and serves it", "MiB", "", **bars)
    fetching = Figure("growth while it fetches 4 GiB", "MiB", "", **bars)
    source_daemon = bench.daemon("memory-source")
    fetcher = bench.daemon("memory-fetcher", "--bootstrap", f"{source_daemon.addrs[0]}/p2p/{source_daemon.peer_id}")
    source, dest = bench.folder / "memory.bin", bench.folder / "memory-copy.bin"
    make_file(source, 4096 * MIB // bench.scale)
    with (
        lattica.connect(home=source_daemon.home) as near,
        lattica.connect(home=fetcher.home) as far,
        peak_resident(source_daemon.process.pid) as source_peak,
        peak_resident(fetcher.process.pid) as fetcher_peak,
    ):
        before = [resident(daemon.process.pid) for daemon in (source_daemon, fetcher)]
        idle.ours.extend(before)
        cid = list(near.daemon_stream("share", str(source)))[-1]["cid"]
        for _ in far.daemon_stream("fetch", cid, str(dest), [], None):
            pass
        sharing.ours.append(source_peak() - before[0])
        fetching.ours.append(fetcher_peak() - before[1])
    source.unlink()
    dest.unlink()
    yield from (idle, sharing, fetching)


def idle_cpu(bench: Bench) -> Iterator[Figure]:
    """CPU of a daemon with 20 peers and nothing to do."""
    figure = Figure("CPU of an idle daemon with 20 peers", "%", "", 1, 0.3, lower_is_better=True)
    daemon = bench.daemon("idle")
    settings = {"count": 20, "bootstrap": f"{daemon.addrs[0]}/p2p/{daemon.peer_id}"}
    seconds = 60 // bench.scale
    with driven(sys.executable, HERE / "many_nodes.py", settings, log=bench.folder / "many.log") as peers:
        peers.do("settle", 20)
        for _ in range(bench.rounds):
            before = cpu_seconds(daemon.process.pid)
            time.sleep(seconds)  # what is measured is this time of doing nothing
            figure.ours.append((cpu_seconds(daemon.process.pid) - before) / seconds * 100)
    yield figure


SCENARIOS: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    "tcp-calls": lambda bench: rpc_calls(bench, "tcp"),
    "quic-calls": lambda bench: rpc_calls(bench, "quic"),
    "tcp-large": rpc_large,
    "grpc": grpc_calls,
    "quic-stream": quic_stream,
    "fetch": blob_fetch,
    "latency": latency_under_load,
    "daemon-calls": daemon_calls,
    "daemon-tensor": daemon_tensor,
    "memory": memory,
    "idle": idle_cpu,
    **RELAY_SCENARIOS,
    **SPACE_SCENARIOS,
}
