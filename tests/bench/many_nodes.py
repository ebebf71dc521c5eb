"""Many nodes in one process that know one peer, for measuring what they cost that peer. Driven by JSON lines."""

from __future__ import annotations

import json
import sys
from contextlib import AsyncExitStack

import trio

import lattica
from lattica_protocols.peer_id import PeerId


async def main() -> None:
    settings = json.loads(sys.argv[1])
    async with AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(
                lattica.open_node(
                    lattica.NodeConfig(listen=["/ip4/127.0.0.1/tcp/0"], bootstrap=[settings["bootstrap"]])
                )
            )
            for _ in range(settings["count"])
        ]
        target = PeerId.parse(settings["bootstrap"].rpartition("/")[2])
        for node in nodes:
            await node.wait_identified(target)
        sys.stdout.write("{}\n")
        sys.stdout.flush()
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            command = json.loads(line)
            assert command["do"] == "settle", command
            await trio.sleep(command["args"][0])  # the lookups of the start are over after that
            connected = sum(bool(node.host.connections(target)) for node in nodes)
            sys.stdout.write(json.dumps({"ok": connected}) + "\n")
            sys.stdout.flush()


trio.run(main)
