"""One of two connections with a relay has died, and nobody has noticed: a circuit is asked for over the other soon."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from test_dead_paths import Proxy
from test_relay import QUIC, TCP, addr_of

from lattica.node import NodeConfig, open_node
from lattica.relay.requests import SECOND_SECONDS
from lattica_protocols.multiaddr import Multiaddr


@pytest.mark.parametrize("whose", ["asks", "target"])
def test_a_dead_connection_with_the_relay_does_not_hold_up_a_circuit(run: Any, whose: str) -> None:
    async def main() -> None:
        serving = NodeConfig(listen=[TCP, QUIC], relay_serve=True, relay_use="never", mdns=False)
        async with open_node(serving) as relay, trio.open_nursery() as nursery:
            tcp = next(addr for addr in relay.host.listen_addrs() if addr.has("tcp"))
            target = tcp.host_port()
            assert target is not None
            proxy = Proxy(target[2])
            await nursery.start(proxy.run)
            by_proxy = f"/ip4/127.0.0.1/tcp/{proxy.port}/p2p/{relay.peer_id}"
            known: dict[str, Any] = {"listen": [QUIC], "relay_use": "always", "punch": False, "mdns": False}

            def relays(name: str) -> list[str]:
                return [by_proxy if name == whose else addr_of(relay)]

            async with (
                open_node(NodeConfig(**known, relays=relays("asks"))) as a,
                open_node(NodeConfig(**known, relays=relays("target"))) as b,
            ):
                for node in (a, b):
                    while {c.path for c in node.host.connections(relay.peer_id)} != {"tcp", "quic"}:
                        await trio.lowlevel.checkpoint()
                circuit = tcp.with_peer(relay.peer_id).encapsulate("/p2p-circuit").with_peer(b.peer_id)
                proxy.cut = True
                started = trio.current_time()
                made = await a.host.dial(b.peer_id, [Multiaddr.parse(str(circuit))])
                assert made.path == "relay"
                assert trio.current_time() - started < 2 * SECOND_SECONDS + 1.5
                await a.ping.ping(b.peer_id, connection=made)
            nursery.cancel_scope.cancel()

    run(main)
