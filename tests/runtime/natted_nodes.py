"""Nodes that others reach over a relay only, as a NAT would have it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio
import trio.lowlevel
from test_relay import addr_of

from lattica.host import PeerConnected
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
