"""A relay, or one end of circuits through one, for measuring what the relay costs. Driven by JSON lines.

`role`: `relay`; `sink` takes bare circuits and counts (the stop protocol answered by hand, nothing inside, so that the
relay and not the ends is measured); `source` sends through them; `peers` is many nodes with a reservation each.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import AsyncExitStack
from typing import Any

import trio

import lattica
from lattica.interfaces import Stream
from lattica.relay.requests import open_circuit, reserve
from lattica_protocols.limits import RELAY_MAX_MESSAGE_BYTES
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId
from lattica_protocols.relay.admission import RelayLimits
from lattica_protocols.relay.messages import STOP_PROTOCOL, Status, stop_status

CHUNK = bytes(256 * 1024)
LISTEN = ["/ip4/127.0.0.1/tcp/0"]


class Counting:
    """A sink that throws away, and answers with one byte for each `total`."""

    def __init__(self, stream: Stream, total: int) -> None:
        self.stream, self.total, self.received = stream, total, 0

    def data_received(self, data: memoryview) -> None:
        self.received += len(data)
        if self.received >= self.total:
            self.received -= self.total
            self.stream.write(b".")

    def eof_received(self) -> None:
        self.stream.reset()

    def stream_closed(self, error: Exception | None) -> None:
        pass


async def take_bare_circuits(host: Any, total: int) -> None:
    async def serve(stream: Stream) -> None:
        await stream.receive_frame(RELAY_MAX_MESSAGE_BYTES)
        await stream.send_frame(stop_status(Status.OK))
        stream.set_sink(Counting(stream, total))
        await stream.connection.closed.wait()

    host.handle(STOP_PROTOCOL, serve)


class Ends:
    """The commands of a process that is not the relay."""

    def __init__(self, nodes: list[Any], relay: Multiaddr, total: int) -> None:
        self.nodes, self.relay, self.total = nodes, relay, total
        self.streams: list[Stream] = []

    async def open(self, targets: list[str]) -> int:
        """A circuit from each node to the target at its place, over one and the same relay."""
        relay = self.relay.peer_id()
        for node, target in zip(self.nodes, targets, strict=False):
            via = await node.host.connect(relay, [self.relay])
            opened = await open_circuit(node.host, via, PeerId.parse(target))
            self.streams.append(opened.stream)
        return len(self.streams)

    async def push(self, rounds: int) -> float:
        """`rounds` times `total` bytes over every circuit at once; seconds until the sinks have all of it."""
        started = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for stream in self.streams:
                nursery.start_soon(self._push, stream, rounds)
        return time.perf_counter() - started

    async def _push(self, stream: Stream, rounds: int) -> None:
        for _ in range(rounds):
            left = self.total
            while left:
                size = min(left, len(CHUNK))
                await stream.send_all(memoryview(CHUNK)[:size])
                left -= size
            assert await stream.receive_exactly(1) == b"."

    async def stall(self, seconds: float) -> int:
        """Fill every circuit for a while, whether anybody takes it or not; bytes that were handed over."""
        sent = 0
        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:

                async def fill(stream: Stream) -> None:
                    nonlocal sent
                    while True:
                        await stream.send_all(CHUNK)
                        sent += len(CHUNK)

                for stream in self.streams:
                    nursery.start_soon(fill, stream)
        return sent


async def main() -> None:
    settings = json.loads(sys.argv[1])
    role = settings["role"]
    async with AsyncExitStack() as stack:

        async def node(**more: Any) -> Any:
            return await stack.enter_async_context(lattica.open_node(lattica.NodeConfig(relay_use="never", **more)))

        if role == "relay":
            relay = await node(listen=LISTEN, relay_serve=True, relay_limits=RelayLimits(circuits_per_source=512))
            say({"addr": f"{relay.host.listen_addrs()[0]}/p2p/{relay.peer_id}", "pid": os.getpid()})
            commands: Any = None
        else:
            addr = Multiaddr.parse(settings["relay"])
            nodes = [await node(listen=[]) for _ in range(settings.get("count", 1))]
            for one in nodes:
                via = await one.host.connect(addr.peer_id(), [addr])
                if role in ("sink", "peers"):
                    await reserve(one.host, via)
                if role == "sink":
                    await take_bare_circuits(one.host, settings["total"])
            say({"peer_ids": [str(one.peer_id) for one in nodes]})
            commands = Ends(nodes, addr, settings.get("total", 0))
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            command = json.loads(line)
            say({"ok": await getattr(commands, command["do"])(*command["args"])})


def say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


trio.run(main)
