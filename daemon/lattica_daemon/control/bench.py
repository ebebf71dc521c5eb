"""Measure what the path to a peer carries, against its `bench` service."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio

from lattica.errors import ConnectionLost, InvalidArgument
from lattica_daemon.control.arguments import read_peer
from lattica_daemon.measured import ITEM_BYTES, MAX_DOWNLOAD

if TYPE_CHECKING:
    from lattica_daemon.daemon import Daemon
    from lattica_protocols.peer_id import PeerId

SMALL_BYTES, SMALL_IN_FLIGHT = 128, 64
LARGE_BYTES, LARGE_IN_FLIGHT = 256 << 10, 16
MAX_SECONDS = 60.0


class BenchControl:
    """The one method of `lattica bench`."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def bench(self, peer: str, seconds: float = 2.0) -> dict[str, Any]:
        """Runs for about `seconds` per measurement; see `lattica bench --json`."""
        if not 0.1 <= seconds <= MAX_SECONDS:
            raise InvalidArgument(f"a measurement takes 0.1 to {MAX_SECONDS:g} seconds")
        target = read_peer(peer)
        node = self._daemon.node
        await node.rpc.call(target, "bench.echo", b"", timeout=20)  # connect, and see that it is served
        connection = node.host.connection(target)
        if connection is None:
            raise ConnectionLost(f"the connection with {target.short()} is gone")
        trips = sorted(await self._round_trips(target, seconds))
        return {
            "peer_id": str(target),
            "path": connection.path,
            "addr": str(connection.remote_addr),
            "rtt_ms_p50": round(trips[len(trips) // 2] * 1e3, 3),
            "rtt_ms_p99": round(trips[int(len(trips) * 0.99)] * 1e3, 3),
            "calls_per_second_128": round(await self._calls(target, SMALL_BYTES, SMALL_IN_FLIGHT, seconds)),
            "calls_per_second_256k": round(await self._calls(target, LARGE_BYTES, LARGE_IN_FLIGHT, seconds)),
            "upload_mb_s": round(await self._upload(target, seconds), 1),
            "download_mb_s": round(await self._download(target, seconds), 1),
        }

    async def _round_trips(self, peer: PeerId, seconds: float) -> list[float]:
        """Times of calls one after the other, in seconds."""
        call, data = self._daemon.node.rpc.call, bytes(SMALL_BYTES)
        times: list[float] = []
        end = trio.current_time() + seconds
        while not times or trio.current_time() < end:
            started = trio.current_time()
            await call(peer, "bench.echo", data)
            times.append(trio.current_time() - started)
        return times

    async def _calls(self, peer: PeerId, size: int, in_flight: int, seconds: float) -> float:
        """Calls/s with `in_flight` callers."""
        call, data = self._daemon.node.rpc.call, bytes(size)
        count = 0
        started = trio.current_time()

        async def caller() -> None:
            nonlocal count
            while trio.current_time() - started < seconds:
                await call(peer, "bench.echo", data)
                count += 1

        async with trio.open_nursery() as nursery:
            for _ in range(in_flight):
                nursery.start_soon(caller)
        return count / (trio.current_time() - started)

    async def _upload(self, peer: PeerId, seconds: float) -> float:
        """MB/s (10^6 bytes) in items of 1 MiB."""
        item = bytes(ITEM_BYTES)
        started = trio.current_time()
        async with self._daemon.node.rpc.open_call(peer, "bench.upload", receives=False) as call:
            while trio.current_time() - started < seconds:
                await call.send(item)
            total = await call.result()
        return float(total) / (trio.current_time() - started) / 1e6

    async def _download(self, peer: PeerId, seconds: float) -> float:
        """MB/s (10^6 bytes), broken off when the time is over."""
        total = 0
        started = trio.current_time()
        async with self._daemon.node.rpc.open_call(peer, "bench.download", MAX_DOWNLOAD, sends=False) as call:
            async for item in call:
                total += len(item)
                if trio.current_time() - started >= seconds:
                    break
        return total / (trio.current_time() - started) / 1e6
