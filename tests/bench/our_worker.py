"""A worker beside one of our daemons, or a caller: what a user of `lattica.connect()` runs. Driven by JSON lines."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import anyio
import numpy as np

import lattica


class Bench:
    """The service that is called."""

    async def echo(self, data: bytes) -> bytes:
        return data

    async def nbytes(self, array: np.ndarray) -> int:  # type: ignore[type-arg]
        return int(array.nbytes)


async def calls(lat: Any, peer: str, size: int, count: int, in_flight: int) -> dict[str, float]:
    """Calls per second of `size` bytes, `in_flight` at a time, through both daemons."""
    data = b"x" * size
    left = count

    async def worker() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await lat.call(peer, "work.echo", data, timeout=60)

    for _ in range(50):
        await lat.call(peer, "work.echo", data, timeout=60)
    started = time.perf_counter()
    async with anyio.create_task_group() as group:
        for _ in range(in_flight):
            group.start_soon(worker)
    return {"calls_per_second": count / (time.perf_counter() - started)}


async def tensor(lat: Any, peer: str, size: int, count: int) -> dict[str, float]:
    """Bytes per second of `count` calls one after the other, each with a tensor of `size` bytes."""
    array = np.ones(size // 4, dtype=np.float32)
    for _ in range(4):  # the segments of shared memory exist after that
        assert await lat.call(peer, "work.nbytes", array, timeout=60) == size
    started = time.perf_counter()
    for _ in range(count):
        await lat.call(peer, "work.nbytes", array, timeout=60)
    return {"bytes_per_second": size * count / (time.perf_counter() - started)}


async def main() -> None:
    settings = json.loads(sys.argv[1])
    async with lattica.aconnect(home=settings["home"]) as lat:
        if settings.get("serve"):
            await lat.serve("work", Bench())
        sys.stdout.write("{}\n")
        sys.stdout.flush()
        while line := await anyio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            command = json.loads(line)
            function = {"calls": calls, "tensor": tensor}[command["do"]]
            try:
                answer: dict[str, Any] = {"ok": await function(lat, *command["args"])}
            except lattica.LatticaError as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


anyio.run(main, backend="trio")
