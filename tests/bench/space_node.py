"""Nodes with spaces in a process of its own, driven by JSON lines: what the benchmarks of replicated state run."""

from __future__ import annotations

import json
import statistics
import sys
import time
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import trio

import lattica
from lattica.node import Node
from lattica.replica import Space
from lattica_protocols.limits import REPLICA_FANOUT
from lattica_protocols.peer_id import PeerId

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "runtime"))
from waiting import until

TCP = ["/ip4/127.0.0.1/tcp/0"]
EDIT_PAUSE = 0.002
"""Seconds from one edit to the next: each is sent by itself, not in a batch."""
ROUND_PAUSE = 0.05
"""Seconds between measured edits, so that none meets what the one before caused."""


def fill(space: Space, count: int) -> dict[str, Any]:
    """`count` small map edits, each an operation, stored and visible: per second, and what they cost in bytes."""
    updates: list[int] = []
    doc = space.replica.doc
    subscription = doc.observe(lambda event: updates.append(len(event.update)))
    before = space.operations()
    started = time.perf_counter()
    for number in range(count):
        space[f"worker{number % 1000}"] = number
    seconds = time.perf_counter() - started
    doc.unobserve(subscription)
    assert space.operations() == before + count
    return {"per_second": count / seconds, "update_bytes": sum(updates) / count}


async def join(node: Node, space: str, address: str, root: str) -> float:
    """Seconds from asking for a space until its root is here."""
    from lattica_protocols.multiaddr import Multiaddr

    addr = Multiaddr.parse(address)
    peer = addr.peer_id()
    assert peer is not None
    await node.host.connect(peer, [addr])
    await node.wait_identified(peer)
    started = time.perf_counter()
    joined = await node.spaces.join(space, [peer])
    await until(lambda: joined.operations() and joined.root().hex() == root, 120.0, poll=0.005)
    return time.perf_counter() - started


async def wire_bytes(node: Node, space: Space, count: int) -> float:
    """Bytes sent to the one neighbour for each of `count` edits made one after the other."""

    def sent() -> int:
        return sum(connection.sent_bytes for connection in node.host.connections())

    last = 0

    def is_quiet() -> bool:
        nonlocal last
        previous, last = last, sent()
        return last == previous

    await until(is_quiet, poll=1.0)  # nothing was sent for a second: what was on its way has gone
    before = sent()
    for number in range(count):
        space[f"worker{number % 1000}"] = -number
        await trio.sleep(EDIT_PAUSE)
    return (sent() - before) / count


def shows(spaces: list[Space], value: int) -> bool:
    return all(space.get("value") == value for space in spaces)


async def visible_everywhere(count: int, rounds: int) -> dict[str, float]:
    """`count` nodes in this process: median seconds until an edit on one shows on all, and the longest round trip."""
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(lattica.open_node(lattica.NodeConfig(listen=TCP, kad_mode="server")))
        door = [f"{first.host.listen_addrs()[0]}/p2p/{first.peer_id}"]
        nodes = [first]
        for _ in range(count - 1):
            config = lattica.NodeConfig(listen=TCP, bootstrap=door, kad_mode="server")
            nodes.append(await stack.enter_async_context(lattica.open_node(config)))
        for node in nodes[1:]:
            await node.wait_identified(first.peer_id)
        made = await first.spaces.create("bench", [node.peer_id for node in nodes[1:]])
        spaces = [made]
        for node in nodes[1:]:
            spaces.append(await node.spaces.join(made.id))
        wanted = min(REPLICA_FANOUT, count - 1)
        await until(lambda: all(len(space.machine.neighbours()) >= wanted for space in spaces), 60.0)
        seconds = []
        for number in range(rounds):
            source = spaces[number % count]
            started = time.perf_counter()
            source["value"] = number
            await until(partial(shows, spaces, number), poll=0.0)
            seconds.append(time.perf_counter() - started)
            await trio.sleep(ROUND_PAUSE)
        trips = []
        for node in nodes:
            for peer in node.host.peers():
                trips += [await node.ping.ping(peer) for _ in range(3)]
        return {"median": statistics.median(seconds), "longest_trip": max(trips)}


async def obey(nodes: list[Node], name: str, args: list[Any]) -> Any:
    node = nodes[0]
    if name == "create":
        return (await node.spaces.create(args[0], [PeerId.parse(peer) for peer in args[1]])).id
    if name == "fill":
        return fill(node.spaces.get(args[0]), args[1])
    if name == "root":
        return node.spaces.get(args[0]).root().hex()
    if name == "checkpoint":
        return node.spaces.get(args[0]).checkpoint().hex()
    if name == "join":
        return await join(node, *args)
    if name == "leave":
        await node.spaces.leave(args[0])
        return True
    if name == "wire":
        return await wire_bytes(node, node.spaces.get(args[0]), args[1])
    if name == "disk":
        node.spaces.store.flush_log()
        return node.spaces.store.stored_bytes()
    if name == "everywhere":
        return await visible_everywhere(*args)
    raise ValueError(f"no command {name}")


async def main() -> None:
    settings = json.loads(sys.argv[1])
    async with AsyncExitStack() as stack:
        nodes = []
        if settings.get("home"):
            config = lattica.NodeConfig(listen=TCP, home=Path(settings["home"]), kad_mode="server")
            started = time.perf_counter()
            nodes.append(await stack.enter_async_context(lattica.open_node(config)))
            seconds = time.perf_counter() - started
            addr = f"{nodes[0].host.listen_addrs()[0]}/p2p/{nodes[0].peer_id}"
            hello = {"peer_id": str(nodes[0].peer_id), "addr": addr, "start_seconds": seconds}
        else:
            nodes = [None]  # type: ignore[list-item]
            hello = {}
        sys.stdout.write(json.dumps(hello) + "\n")
        sys.stdout.flush()
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            command = json.loads(line)
            try:
                answer = {"ok": await obey(nodes, command["do"], command["args"])}
            except (lattica.LatticaError, ValueError, OSError) as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    trio.run(main)
