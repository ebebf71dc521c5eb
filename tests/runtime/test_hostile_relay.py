"""Relays that alter, repeat, drop or hold what they carry: the encryption from end to end notices, no call is lost,
runs twice or gets a wrong answer, and `lattica doctor` names the relay."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from test_relay import addr_of, relay_node
from waiting import until

from lattica.node import Node, NodeConfig, open_node
from lattica.relay.splice import Half
from lattica_daemon.doctor.facts import gather_facts
from lattica_daemon.doctor.machine import check_relayed_paths
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.paths.heartbeat import Pace

PACE = Pace(probe=0.3, dead=0.8, keep_alive=2.5)
HONEST_BYTES = 3000
"""Carried as they are in each direction of each circuit: handshakes succeed."""
CALLS = 60


class Meddler:
    """What a hostile relay does with the bytes of its circuits."""

    def __init__(self, relay: Node, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.how = how
        self.done = 0
        self._relay = relay
        self._carried: Counter[Half] = Counter()
        self._real = Half.data_received
        monkeypatch.setattr(Half, "data_received", lambda half, data: self._carry(half, data))

    def _carry(self, half: Half, data: memoryview) -> None:
        self._carried[half] += len(data)
        if half._splice.ledger is not self._relay.relay_server.circuits or self._carried[half] < HONEST_BYTES:
            self._real(half, data)
            return
        self.done += 1
        if self.how == "alter":
            data[-1] ^= 1
            self._real(half, data)
        elif self.how == "repeat":
            self._real(half, data)
            self._real(half, data)
        elif self.how == "drop one":
            self._carried[half] = -1 << 40  # the rest is carried
        else:
            assert self.how == "hold"


class Service:
    def __init__(self) -> None:
        self.asked: Counter[int] = Counter()

    async def double(self, number: int, ballast: bytes) -> list[Any]:
        self.asked[number] += 1
        return [2 * number, ballast]


@asynccontextmanager
async def through(bad: Node, good: Node, home: Path) -> AsyncIterator[tuple[Node, Node]]:
    """`a` reaches `b` over both relays, and is connected with it over the bad one."""
    relays = [addr_of(bad), addr_of(good)]
    config = NodeConfig(home=home / "b", listen=[], relay_use="always", relays=relays, punch=False)
    async with open_node(config) as b, open_node(NodeConfig(home=home / "a", listen=[], punch=False)) as a:
        await until(lambda: len(b.relay_client.reservations()) == 2)
        for node in (a, b):
            node.circuits._upgrader._pace = PACE
        circuits = [Multiaddr.parse(f"{relay}/p2p-circuit/p2p/{b.peer_id}") for relay in relays]
        await a.host.connect(None, circuits[:1])
        await a.wait_identified(b.peer_id)
        yield a, b


@pytest.mark.parametrize("how", ["alter", "repeat", "drop one", "hold"])
def test_a_relay_that_meddles(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    async def main() -> None:
        async with relay_node() as bad, relay_node() as good, through(bad, good, tmp_path) as (a, b):
            service = Service()
            b.rpc.serve("service", service)
            meddler = Meddler(bad, how, monkeypatch)
            for i in range(CALLS):
                ballast = bytes([i]) * 200
                assert await a.rpc.call(b.peer_id, "service.double", i, ballast, timeout=20) == [2 * i, ballast]
            assert meddler.done
            assert service.asked == dict.fromkeys(range(CALLS), 1)
            findings = [check_relayed_paths(await gather_facts(node, fresh=False)) for node in (a, b)]
            (told, *_) = [finding for finding in findings if finding is not None]
            assert told.ok is False
            assert str(bad.peer_id) in told.detail
            assert str(good.peer_id) not in told.detail
            assert ("fell silent" if how == "hold" else "did not arrive as it was sent") in told.detail
            assert told.fix
            assert told.evidence

    run(main)
