"""A relay that stops is replaced at once, by one that has to be found, and connected peers hear of it."""

from __future__ import annotations

from typing import Any

import trio
from test_relay import TCP, addr_of, relay_node

from lattica.host import PeerIdentified
from lattica.node import Node, NodeConfig, open_node
from lattica.relay.client import RELAY_KEY
from lattica_protocols.multiaddr import Multiaddr


async def until_told(node: Node, about: Node, relay: Node) -> None:
    """Until `node` knows by identify that `about` is found at `relay`, and at no other."""
    events = node.host.subscribe()
    while True:
        relays = {addr.relay_id() for addr in node.host.peerstore.addrs(about.peer_id) if addr.is_circuit}
        if relay.peer_id in relays:
            return
        async for event in events:
            if isinstance(event, PeerIdentified) and event.peer == about.peer_id:
                break


async def provided(node: Node) -> None:
    """Until `node` finds a relay in the DHT."""
    with trio.fail_after(10):
        while not [peer async for peer, _ in node.kad.find_providers(RELAY_KEY, 1)]:
            await trio.lowlevel.checkpoint()


def test_a_relay_that_stops_is_replaced_at_once(run: Any) -> None:
    async def main() -> None:
        async with open_node(NodeConfig(listen=[TCP], kad_mode="server", relay_use="never", mdns=False)) as seed:
            known: dict[str, Any] = {"bootstrap": [addr_of(seed)], "mdns": False}
            async with trio.open_nursery() as nursery:
                first, stop = await nursery.start(_run_relay, known)
                await provided(seed)
                hidden = NodeConfig(listen=[], relay_use="always", kad_mode="client", **known)
                async with open_node(hidden) as node:
                    await until_told(seed, node, first)
                    # it is looked for a second one, in vain, and then more and more rarely
                    async with relay_node(kad_mode="server", **known) as second:
                        await second.wait_identified(seed.peer_id)
                        started = trio.current_time()
                        stop.set()
                        with trio.fail_after(20):
                            await until_told(seed, node, second)
                        # five seconds between two searches, and what a busy machine adds
                        assert trio.current_time() - started < 10
                        circuit = next(a for a in node.host.advertised_addrs() if a.is_circuit)
                        assert circuit.relay_id() == second.peer_id
                        assert await _reaches(seed, node, circuit) == "relay"

    run(main)


async def _run_relay(known: dict[str, Any], task_status: trio.TaskStatus[tuple[Node, trio.Event]]) -> None:
    stop = trio.Event()
    async with relay_node(kad_mode="server", **known) as relay:
        task_status.started((relay, stop))
        await stop.wait()


async def _reaches(_: Node, target: Node, circuit: Multiaddr) -> str:
    async with open_node(NodeConfig(listen=[], relay_use="never", mdns=False)) as stranger:
        connection = await stranger.host.connect(None, [circuit.with_peer(target.peer_id)])
        return connection.path
