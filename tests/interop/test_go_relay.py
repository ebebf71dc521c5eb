"""Circuit relay v2 with go-libp2p: it relays for us, and we relay for it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.lowlevel
from p2pd_peer import P2pd, running_p2pd
from waiting import until

import lattica
from lattica.interfaces import Stream
from lattica.node import Node
from lattica.relay.requests import reserve
from lattica_protocols.multiaddr import Multiaddr

pytestmark = pytest.mark.interop

TCP, QUIC = "/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"


@asynccontextmanager
async def node(**settings: object) -> AsyncIterator[Node]:
    settings = {"listen": [], "relay_use": "never", "punch": False} | settings
    async with lattica.open_node(lattica.NodeConfig(**settings)) as opened:  # type: ignore[arg-type]
        yield opened


def address(addrs: list[Multiaddr], transport: str) -> Multiaddr:
    for addr in addrs:
        target = addr.host_port()
        if target is not None and target[0] == transport and not addr.is_circuit:
            return addr.without_peer()
    raise AssertionError(f"no {transport} address among {addrs}")


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.aclose()


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_a_go_relay_carries_our_calls(run, p2pd_binary: Path, transport: str) -> None:
    async def main(go: P2pd) -> None:
        relay = address(go.addrs, transport).with_peer(go.peer_id)
        async with node(relay_use="always", relays=[str(relay)]) as b, node() as a:
            while not b.relay_client.reservations():
                await trio.lowlevel.checkpoint()
            (circuit,) = [x for x in b.host.advertised_addrs() if address([relay], transport) == _relay_part(x)]
            connection = await a.host.connect(b.peer_id, [circuit])
            assert connection.path == "relay"
            b.rpc.serve("math", {"double": lambda x: 2 * x})
            assert await a.rpc.call(b.peer_id, "math.double", 21) == 42
            b.host.handle("/echo/1", echo)
            stream = await a.host.open_stream(b.peer_id, "/echo/1")
            payload = bytes(range(256)) * 256  # Go ends a circuit after 128 KiB each way
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, payload)
                assert await stream.receive_exactly(len(payload)) == payload

    with running_p2pd(p2pd_binary, "-relayService=1", "-forceReachabilityPublic") as go:
        run(main, go)


def _relay_part(circuit: Multiaddr) -> Multiaddr:
    before = circuit.before_circuit()
    assert before is not None
    return before.without_peer()


def test_a_go_relay_gives_a_voucher_and_a_limit(run, p2pd_binary: Path) -> None:
    async def main(go: P2pd) -> None:
        async with node() as ours:
            via = await ours.host.connect(go.peer_id, [address(go.addrs, "tcp")])
            granted = await reserve(ours.host, via)
            assert 3000 < granted.seconds <= 3601
            assert granted.limit is not None
            # go-libp2p starts a second relay service when it believes to be public; either may answer
            assert (granted.limit.duration, granted.limit.data) in ((1800, 4294967296), (120, 131072))

    with running_p2pd(p2pd_binary, "-relayService=1", "-forceReachabilityPublic") as go:
        run(main, go)


@asynccontextmanager
async def four_relays() -> AsyncIterator[list[Node]]:
    """Go asks nobody for three minutes unless it knows four."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(node(listen=[TCP], relay_serve=True)) for _ in range(4)]


def addr_of(relay: Node) -> Multiaddr:
    return relay.host.listen_addrs()[0].with_peer(relay.peer_id)


async def chosen_relay(relays: list[Node], peer: P2pd) -> Node:
    """Where the Go peer has a reservation; it tells nobody, but the relay knows."""

    def holders() -> list[Node]:
        return [relay for relay in relays if peer.peer_id in relay.relay_server.table.reservations()]

    await until(holders)
    return holders()[0]


def hidden_go(binary: Path, relays: list[Multiaddr]) -> AbstractContextManager[P2pd]:
    trusted = ",".join(map(str, relays))
    return running_p2pd(binary, "-dhtClient", "-autoRelay", "-forceReachabilityPrivate", f"-trustedRelays={trusted}")


def test_we_relay_for_two_go_peers(run, p2pd_binary: Path) -> None:
    async def main() -> None:
        async with four_relays() as relays:
            addrs = [addr_of(relay) for relay in relays]

            def drive() -> Node:
                with hidden_go(p2pd_binary, addrs) as hidden, running_p2pd(p2pd_binary) as other:
                    relay: Node = trio.from_thread.run(chosen_relay, relays, hidden)
                    other.connect(hidden.peer_id, [addrs[relays.index(relay)].encapsulate("/p2p-circuit")])
                    assert hidden.peer_id in other.peers()
                    assert other.peer_id in hidden.peers()
                    return relay

            relay = await trio.to_thread.run_sync(drive)
            assert relay.relay_server.circuits.carried_bytes > 1000
            assert not relay.relay_server.table.refused

    run(main, seconds=60)


def test_we_reach_a_go_peer_behind_our_relay(run, p2pd_binary: Path) -> None:
    async def main() -> None:
        async with four_relays() as relays, node() as ours:
            manager = hidden_go(p2pd_binary, [addr_of(relay) for relay in relays])
            hidden = await trio.to_thread.run_sync(manager.__enter__)
            try:
                relay = await chosen_relay(relays, hidden)
                circuit = addr_of(relay).encapsulate("/p2p-circuit")
                connection = await ours.host.connect(hidden.peer_id, [circuit])
                assert connection.path == "relay"
                info = await ours.wait_identified(hidden.peer_id)
                assert "/ipfs/ping/1.0.0" in info.protocols
                assert 0 < await ours.ping.ping(hidden.peer_id) < 5
            finally:
                await trio.to_thread.run_sync(manager.__exit__, None, None, None)

    run(main, seconds=60)
