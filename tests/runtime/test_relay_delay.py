"""A relay that delivers what it carries, only late: `lattica doctor PEER` names it, and no other."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from natted_nodes import circuit_to
from test_relay import TCP, addr_of, relay_node

from lattica.node import Node, NodeConfig, open_node
from lattica.relay.splice import Half
from lattica_daemon.doctor import examine_peer, relay_delay
from lattica_daemon.doctor.facts import Finding
from lattica_daemon.doctor.relay_delay import RelayTrips, RelayTripsForPeers, check_relay_delay, seconds_untrusted
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.peer_id import PeerId

LATE = 0.7


@pytest.mark.parametrize(
    ("trips", "named"),
    [
        (None, False),
        (RelayTrips("R", 2.0, 0.05, 0.1), True),
        (RelayTrips("R", 0.16, 0.05, 0.1), False),
        (RelayTrips("R", 2.9, 0.05, 2.8), False),  # the peer's line is full
        (RelayTrips("R", 2.9, 2.8, 0.05), False),  # ours is, or the relay's is
        (RelayTrips("R", 2.0, 0.05, 0.1, carried=1 << 20), False),  # a fetch runs through the circuit
        (RelayTrips("R", 2.0, 0.05, None), False),  # the peer does not measure
        (RelayTrips("R", None, 0.05, 0.1), False),
        (RelayTrips("R", 2.0, None, 0.1), False),
    ],
)
def test_what_is_held_against_a_relay(trips: RelayTrips | None, named: bool) -> None:
    found = check_relay_delay(trips)
    assert (found is not None) is named
    if found is not None:
        assert found.ok is False
        assert "the relay R holds back" in found.detail
        assert "1.9 s" in found.detail or "1.8 s" in found.detail
        assert found.fix
        assert len(found.evidence) == 3


@pytest.mark.parametrize("value", ["1", -1, math.nan, math.inf, True, [], 3600])
def test_what_a_peer_says_is_checked(value: object) -> None:
    with pytest.raises(RemoteProtocolError):
        seconds_untrusted(value)


@asynccontextmanager
async def pair_at(relay: Node) -> AsyncIterator[tuple[Node, Node]]:
    """`a` is connected with `b` over the relay; both tell each other of their way to it."""
    known: dict[str, Any] = {"listen": [], "relay_use": "always", "punch": False, "mdns": False}
    known["relays"] = [addr_of(relay)]
    async with open_node(NodeConfig(**known)) as a, open_node(NodeConfig(**known)) as b:
        for node in (a, b):
            while not node.relay_client.reservations():
                await trio.lowlevel.checkpoint()
            told = RelayTripsForPeers(node)

            async def relay_trip(relay: str, told: RelayTripsForPeers = told) -> float | None:
                return await told.trip(PeerId.parse(relay))

            node.rpc.serve("lattica", {"relay_trip": relay_trip})
        await a.host.connect(None, [circuit_to(b)])
        yield a, b


async def delays(a: Node, b: Node) -> list[Finding]:
    return [found for found in await examine_peer(a, b.peer_id) if found.check == "relay-delay"]


def hold_back(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every circuit's bytes leave the relay `LATE` seconds after they came, in order."""
    queues: dict[Half, trio.MemorySendChannel[tuple[float, bytes]]] = {}

    async def carry(half: Half, queue: trio.MemoryReceiveChannel[tuple[float, bytes]]) -> None:
        async for due, data in queue:
            await trio.sleep_until(due)
            half._writing.write_through(memoryview(data))

    def receive(half: Half, data: memoryview) -> None:
        if half not in queues:
            queues[half], queue = trio.open_memory_channel[tuple[float, bytes]](math.inf)
            nursery.start_soon(carry, half, queue)
        queues[half].send_nowait((trio.current_time() + LATE, bytes(data)))

    monkeypatch.setattr(Half, "data_received", receive)


def test_a_relay_that_is_late_is_named(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with relay_node(TCP) as relay, pair_at(relay) as (a, b), trio.open_nursery() as nursery:
            assert await delays(a, b) == []
            monkeypatch.setattr(relay_delay, "AGAIN_SECONDS", 0.0)
            hold_back(nursery, monkeypatch)
            for one, other in ((a, b), (b, a)):
                (told,) = await delays(one, other)
                assert told.ok is False
                assert str(relay.peer_id) in told.detail
                assert "1.4 s" in told.detail or "1.5 s" in told.detail
            nursery.cancel_scope.cancel()

    run(main)


def test_strangers_do_not_have_us_ping_others(run: Any) -> None:
    async def main() -> None:
        async with relay_node(TCP) as relay, pair_at(relay) as (a, b):
            told = RelayTripsForPeers(a)
            assert await told.trip(b.peer_id) is None
            first = await told.trip(relay.peer_id)
            assert first is not None
            assert await told.trip(relay.peer_id) == first, "not measured again"

    run(main)
