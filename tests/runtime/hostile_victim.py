"""A node in a process of its own that hostile peers are let loose on. Prints its addresses, then obeys JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import trio

import lattica


class Victim:
    """Services with every kind of weak spot that a service can have."""

    hanging = 0

    async def echo(self, data: Any) -> Any:
        return data

    async def fail(self, kind: str) -> None:
        raise {
            "value": ValueError("no\nsecond line"),
            "recursion": RecursionError("deep"),
            "stop": StopAsyncIteration(),
            "lattica": lattica.ConnectionLost("inside a handler"),
            "long": RuntimeError("x" * 1_000_000),
            "exit": SystemExit(3),
        }[kind]

    async def big(self, size: int) -> bytes:
        return bytes(size)

    async def flood(self) -> AsyncIterator[bytes]:
        while True:
            yield bytes(1 << 20)

    async def hang(self) -> None:
        self.hanging += 1
        try:
            await trio.sleep_forever()
        finally:
            self.hanging -= 1

    def unsendable(self) -> object:
        return object()


async def main() -> None:
    settings = json.loads(sys.argv[1])
    config = lattica.NodeConfig(listen=settings["listen"], home=Path(settings["home"]))
    async with lattica.open_node(config) as node:
        victim = Victim()
        node.rpc.serve("victim", victim)
        shared = await node.blobs.share(Path(settings["share"]))
        hello = {
            "peer_id": str(node.peer_id),
            "addrs": [f"{addr}/p2p/{node.peer_id}" for addr in node.host.listen_addrs()],
            "cid": str(shared.cid),
        }
        sys.stdout.write(json.dumps(hello) + "\n")
        sys.stdout.flush()
        while await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            state = {
                "connections": len(node.host.connections()),
                "tasks": trio.lowlevel.current_statistics().tasks_living,
                "hanging": victim.hanging,
                "handler_bugs": node.host.counters["handler_bugs"],
            }
            sys.stdout.write(json.dumps({"ok": state}) + "\n")
            sys.stdout.flush()


trio.run(main)
