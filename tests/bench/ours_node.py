"""One of our nodes in a process of its own, driven by JSON lines: what the benchmarks run against the peers.

Handlers and calls are written as a user would write them: an `async def` method that returns its argument.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import trio

import lattica
from lattica.node import Node
from lattica_protocols.peer_id import PeerId


class Echo:
    """The service that is called."""

    async def echo(self, data: bytes) -> bytes:
        return data

    async def size(self, array: np.ndarray) -> int:  # type: ignore[type-arg]
        return int(array.nbytes)

    async def sink(self, chunks: Any) -> int:
        total = 0
        async for chunk in chunks:
            total += len(chunk)
        return total


async def calls(node: Node, peer: PeerId, size: int, count: int, in_flight: int) -> dict[str, Any]:
    """Calls per second of `size` bytes, `in_flight` at a time, and their latencies."""
    data = b"x" * size
    latencies: list[float] = []
    left = count

    async def worker() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            before = time.perf_counter()
            await node.rpc.call(peer, "echo.echo", data, timeout=60)
            latencies.append(time.perf_counter() - before)

    for _ in range(min(50, count)):
        await node.rpc.call(peer, "echo.echo", data, timeout=60)
    started = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(in_flight):
            nursery.start_soon(worker)
    seconds = time.perf_counter() - started
    latencies.sort()
    return {
        "calls_per_second": count / seconds,
        "median_seconds": latencies[len(latencies) // 2],
        "p99_seconds": latencies[len(latencies) * 99 // 100],
    }


async def stream(node: Node, peer: PeerId, size: int) -> dict[str, float]:
    """Push `size` bytes in 1 MiB messages of one client-streaming call."""
    chunk = bytes(1 << 20)
    started = time.perf_counter()
    async with node.rpc.open_call(peer, "echo.sink") as call:
        for _ in range(size >> 20):
            await call.send(chunk)
        await call.end()
        total = await call.result()
    assert total == size, total
    return {"bytes_per_second": size / (time.perf_counter() - started)}


async def latency_during(node: Node, peer: PeerId, cid: str, dest: str) -> dict[str, Any]:
    """99th percentile of sequential 128 B calls, idle and while a fetch from the same peer runs."""
    idle = await calls(node, peer, 128, 1000, 1)
    loaded: list[float] = []
    done = trio.Event()
    result: dict[str, Any] = {}

    async def fetching() -> None:
        result.update(await fetch(node, cid, dest))
        done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetching)
        data = b"x" * 128
        while not done.is_set():
            before = time.perf_counter()
            await node.rpc.call(peer, "echo.echo", data, timeout=60)
            loaded.append(time.perf_counter() - before)
    loaded.sort()
    return {
        "idle_p99_seconds": idle["p99_seconds"],
        "loaded_median_seconds": loaded[len(loaded) // 2],
        "loaded_p99_seconds": loaded[len(loaded) * 99 // 100],
        "loaded_calls": len(loaded),
        "fetch_bytes_per_second": result["bytes_per_second"],
    }


async def fetch(node: Node, cid: str, dest: str) -> dict[str, Any]:
    """Fetch a blob to `dest`, verified and on disk (the store fsyncs before it says done)."""
    started = time.perf_counter()
    result = await node.blobs.fetch(cid, Path(dest))
    seconds = time.perf_counter() - started
    return {"bytes_per_second": result.bytes / seconds, "seconds": seconds, "bytes": result.bytes}


async def obey(node: Node, name: str, args: list[Any]) -> Any:
    """One command of the driver."""
    if name == "calls":
        return await calls(node, PeerId.parse(args[0]), *args[1:])
    if name == "stream":
        return await stream(node, PeerId.parse(args[0]), args[1])
    if name == "share":
        shared = await node.blobs.share(Path(args[0]))
        return {"cid": str(shared.cid)}
    if name == "fetch":
        return await fetch(node, *args)
    if name == "forget":
        await node.blobs.remove(args[0])
        return True
    if name == "latency_during":
        return await latency_during(node, PeerId.parse(args[0]), *args[1:])
    if name == "connect":
        from lattica_protocols.multiaddr import Multiaddr

        addr = Multiaddr.parse(args[0])
        connection = await node.host.connect(addr.peer_id(), [addr])
        return connection.path
    raise ValueError(f"no command {name}")


async def main() -> None:
    settings = json.loads(sys.argv[1])
    config = lattica.NodeConfig(listen=settings["listen"], home=Path(settings["home"]))
    async with lattica.open_node(config) as node:
        node.rpc.serve("echo", Echo())
        addrs = [f"{addr}/p2p/{node.peer_id}" for addr in node.host.listen_addrs()]
        sys.stdout.write(json.dumps({"peer_id": str(node.peer_id), "addrs": addrs}) + "\n")
        sys.stdout.flush()
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            command = json.loads(line)
            try:
                answer = {"ok": await obey(node, command["do"], command["args"])}
            except (lattica.LatticaError, ValueError, OSError) as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


trio.run(main)
