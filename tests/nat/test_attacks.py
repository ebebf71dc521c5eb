"""Attacks with real daemons: what a peer can make others send to a third party, and what it can make a relay spend."""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from lab_daemons import LabDaemon, wait_until
from nat_lab import Lab, LabHost
from spread_lab import SpreadLab

from lattica.errors import DialError
from lattica.interfaces import Stream
from lattica.node import Node, NodeConfig, open_node
from lattica.relay.requests import open_circuit, reserve
from lattica_protocols import limits
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId

NATTED = '[relay]\nuse = "always"\n[discovery]\nmode = "client"\n'
ANNOUNCING = '[listen]\nannounce = {addrs}\n[relay]\nuse = "never"\n[discovery]\nmode = "client"\n'
RELAY_LISTEN = ("--listen", "/ip4/0.0.0.0/tcp/443", "--listen", "/ip4/0.0.0.0/udp/4101/quic-v1")
ROUNDS = 12
PACE = 0.5
"""Seconds that the attacker keeps a connection: long enough for the target to begin an attempt where it would."""
ETH_P_IP = 0x0800


class Sniffer:
    """Counts what arrives at a host."""

    def __init__(self, host: LabHost) -> None:
        self.host = host
        with host.netns.entered():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_IP))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self._socket.settimeout(2.0)

    def counts(self) -> tuple[Counter[str], int]:
        """Packets and bytes by sender until it was quiet for 2 s."""
        packets: Counter[str] = Counter()
        size = 0
        while True:
            try:
                data, (_, _, direction, _, _) = self._socket.recvfrom(65536)
            except TimeoutError:
                return packets, size
            if direction == socket.PACKET_HOST:
                packets[socket.inet_ntoa(data[12:16]) + (" udp" if data[9] == 17 else " tcp")] += 1
                size += len(data)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start_relays(lab: Lab, folder: Path, stack: ExitStack, count: int = 2) -> list[LabDaemon]:
    relays: list[LabDaemon] = []
    for i in range(count):
        known = [part for relay in relays for part in ("--bootstrap", relay.address())]
        relays.append(LabDaemon(lab.public_host(), folder / f"relay{i}", "--relay", *known, listen=RELAY_LISTEN))
        stack.callback(relays[-1].stop)
    return relays


def relayed(daemon: LabDaemon) -> str:
    addrs = [a for a in daemon.json("id")["addrs"] if "/tcp/443/" in a and "/ip4/198.18." in a and "/p2p-circuit" in a]
    return f"{addrs[0]}/p2p/{daemon.peer_id}"


def test_a_third_party_gets_next_to_nothing(stack: ExitStack, tmp_path: Path) -> None:
    """A peer names somebody else's addresses as its own, in identify and for hole punching, and connects again and
    again over a relay."""
    lab = Lab()
    relays = start_relays(lab, tmp_path, stack)
    bootstrap = [part for relay in relays for part in ("--bootstrap", relay.address())]
    target = LabDaemon(lab.host_behind("apdf"), tmp_path / "target", *bootstrap, settings=NATTED)
    stack.callback(target.stop)
    target.wait_reserved()
    victim = lab.public_host()
    at = f"/ip4/{victim.address}"
    addrs = [addr for i in range(16) for addr in (f"{at}/udp/{5000 + i}/quic-v1", f"{at}/tcp/{80 + i}")]
    settings = ANNOUNCING.format(addrs=json.dumps(addrs))
    attacker = LabDaemon(lab.host_behind("sym"), tmp_path / "attacker", settings=settings)
    stack.callback(attacker.stop)
    sniffer = Sniffer(victim)
    stack.callback(sniffer.close)
    started = time.monotonic()
    for _ in range(ROUNDS):
        attacker.json("peer", "connect", relayed(target))
        wait_until(lambda: target.paths(attacker), 10.0, target.process.log)
        time.sleep(PACE)
        attacker.json("peer", "disconnect", target.peer_id)
        wait_until(lambda: not target.paths(attacker), 10.0, target.process.log)
    packets, size = sniffer.counts()
    seconds = time.monotonic() - started
    spent = attacker.host.wire_bytes()[1]
    print(f"{ROUNDS} connections in {seconds:.1f} s for {spent} bytes: {dict(packets)}, {size} bytes")  # noqa: T201
    assert sum(packets.values()) <= limits.PUNCH_PER_IP_BURST + seconds * limits.PUNCH_PER_IP_PER_SECOND
    assert size < spent / 20, "no amplification worth the name"
    (claims,) = [f for f in target.json("doctor", attacker.peer_id) if f["check"] == "claims"]
    assert any(victim.address in line for line in claims["evidence"]), claims


# -- on a relay -------------------------------------------------------------------------------------------------------
FLOODERS = 100


def resident_mib(daemon: LabDaemon) -> float:
    text = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) / 1024


class Flood:
    """Many identities on one host of the lab, all connected with one relay."""

    def __init__(self, relay: Multiaddr, nodes: list[Node]) -> None:
        self.relay = relay
        self.nodes = nodes
        self.outcomes: Counter[str] = Counter()
        self.streams: list[Stream] = []

    async def connect(self) -> None:
        """One after the other: a relay lets few handshakes of one address run at a time."""
        for node in self.nodes:
            await node.host.connect(self.relay.peer_id(), [self.relay])

    async def reserve_all(self) -> None:
        async with trio.open_nursery() as nursery:
            for node in self.nodes:
                nursery.start_soon(self._reserve, node)

    async def _reserve(self, node: Node) -> None:
        via = await node.host.connect(self.relay.peer_id(), [self.relay])
        try:
            await reserve(node.host, via)
        except DialError as error:
            self.outcomes[str(error).rpartition(": ")[2]] += 1
        else:
            self.outcomes["granted"] += 1

    async def connect_all(self, target: PeerId, each: int) -> None:
        """Circuits that are opened and then left alone: nobody speaks, nobody reads."""
        async with trio.open_nursery() as nursery:
            for node in self.nodes:
                for _ in range(each):
                    nursery.start_soon(self._connect, node, target)

    async def _connect(self, node: Node, target: PeerId) -> None:
        via = await node.host.connect(self.relay.peer_id(), [self.relay])
        try:
            opened = await open_circuit(node.host, via, target)
        except DialError as error:
            self.outcomes[str(error).rpartition(": ")[2]] += 1
        else:
            self.outcomes["open"] += 1
            self.streams.append(opened.stream)


@asynccontextmanager
async def flood(relay: Multiaddr, count: int) -> AsyncIterator[Flood]:
    async with AsyncExitStack() as stack:
        config = NodeConfig(listen=[], relay_use="never", punch=False, mdns=False, port_mapping=False)
        yield Flood(relay, [await stack.enter_async_context(open_node(config)) for _ in range(count)])


def meets(a: LabDaemon, b: LabDaemon) -> float:
    """Seconds until an honest pair has an answer over the relay."""
    started = time.monotonic()
    a.json("peer", "connect", relayed(b))
    a.json("peer", "ping", b.peer_id, "--count", "1")
    seconds = time.monotonic() - started
    a.json("peer", "disconnect", b.peer_id)
    return seconds


def test_floods_of_reservations_and_circuits(stack: ExitStack, tmp_path: Path, run: Callable[..., Any]) -> None:
    """A hundred identities of one host take what an address range gets and no more, and an honest pair has its way,
    also to a peer at which as many circuits as it takes stand open and silent."""
    lab = SpreadLab()
    (relay,) = start_relays(lab, tmp_path, stack, 1)
    bootstrap = ("--bootstrap", relay.address())
    honest = []
    for i in range(2):
        honest.append(LabDaemon(lab.host_behind("sym"), tmp_path / f"honest{i}", *bootstrap, settings=NATTED))
        stack.callback(honest[-1].stop)
        honest[-1].wait_reserved()
    meets(*honest)
    before = resident_mib(relay)
    attacker = lab.public_host()

    reserved: Counter[str] = Counter()
    opened: Counter[str] = Counter()
    seconds: list[float] = []

    async def main() -> None:
        async with flood(Multiaddr.parse(relay.address("tcp")), FLOODERS) as made:
            await made.connect()
            await made.reserve_all()
            reserved.update(made.outcomes)
            seconds.append(await trio.to_thread.run_sync(meets, *honest))
            made.outcomes.clear()
            await made.connect_all(PeerId.parse(honest[1].peer_id), 4)
            opened.update(made.outcomes)
            seconds.append(await trio.to_thread.run_sync(meets, *honest))

    with attacker.netns.entered():
        run(main, seconds=90)
    grown = resident_mib(relay) - before
    print(f"{dict(reserved)}, {dict(opened)}; an honest pair {seconds}; {before:.0f} MiB and {grown:.0f}")  # noqa: T201
    assert sum(reserved.values()) == FLOODERS
    assert reserved["granted"] == limits.RELAY_MAX_RESERVATIONS_PER_RANGE
    assert sum(opened.values()) == 4 * FLOODERS
    assert opened["open"], "else nothing was attacked"
    assert max(seconds) < 2.0
    assert grown < 40
