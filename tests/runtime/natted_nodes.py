"""Nodes that others reach over a relay only, as a NAT would have it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio
import trio.lowlevel
import trio.testing
from test_relay import addr_of, relay_node

from lattica.host import PeerConnected
from lattica.interfaces import Connection
from lattica.node import Node, NodeConfig, open_node
from lattica_protocols.multiaddr import Multiaddr


@asynccontextmanager
async def natted_node(relay: Node, listen: list[str], *, tells: bool = False, **settings: Any) -> AsyncIterator[Node]:
    """A node with a reservation that tells nobody where it listens (as a NAT hides it), unless it `tells`."""
    config = NodeConfig(listen=listen, relay_use="always", relays=[addr_of(relay)], punch=False, **settings)
    async with open_node(config) as node:
        real = node.host.advertised_addrs
        if not tells:
            node.host.advertised_addrs = lambda: [addr for addr in real() if addr.is_circuit]  # type: ignore[method-assign]
        while not node.relay_client.reservations():
            await trio.lowlevel.checkpoint()
        await node.wait_identified(relay.peer_id)
        await relay.wait_identified(node.peer_id)
        yield node


@dataclass
class NattedPair:
    """Two nodes that reach each other over the relay only. They neither punch nor are connected yet."""

    relay: Node
    a: Node
    b: Node
    nursery: trio.Nursery

    async def start_punching(self, *nodes: Node) -> None:
        """These nodes, or both, punch from now on."""
        for node in nodes or (self.a, self.b):
            self.nursery.start_soon(node.punch.run)
        await trio.testing.wait_all_tasks_blocked()

    async def connect(self) -> Connection:
        """A's end of a new connection over the relay."""
        connection = await self.a.host.connect(None, [circuit_to(self.b)])
        assert connection.path == "relay"
        return connection


@asynccontextmanager
async def natted_pair(listen: str, *, homes: Path | None = None) -> AsyncIterator[NattedPair]:
    """All three listen at `listen`. `homes`: a folder for the homes of A and B, which keep nothing otherwise."""
    home_a, home_b = (None, None) if homes is None else (homes / "a", homes / "b")
    async with (
        relay_node(listen) as relay,
        natted_node(relay, [listen], home=home_a) as a,
        natted_node(relay, [listen], home=home_b) as b,
        trio.open_nursery() as nursery,
    ):
        yield NattedPair(relay, a, b, nursery)
        nursery.cancel_scope.cancel()


def circuit_to(node: Node) -> Multiaddr:
    return next(addr for addr in node.host.advertised_addrs() if addr.is_circuit).with_peer(node.peer_id)


async def until_direct(node: Node, other: Node) -> str:
    events = node.host.subscribe()
    for connection in node.host.connections(other.peer_id):
        if connection.path != "relay":
            return connection.path
    async for event in events:
        if isinstance(event, PeerConnected) and event.peer == other.peer_id and event.connection.path != "relay":
            return event.connection.path
    raise AssertionError("the host is gone")
