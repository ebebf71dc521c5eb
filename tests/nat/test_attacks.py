"""Attacks with real daemons: what a peer can make others send to a third party, and what it can make a relay spend."""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from lab_daemons import LabDaemon, wait_until
from nat_lab import Lab, LabHost

from lattica_protocols import limits

NATTED = '[relay]\nuse = "always"\n[discovery]\nmode = "client"\n'
ANNOUNCING = '[listen]\nannounce = {addrs}\n[relay]\nuse = "never"\n[discovery]\nmode = "client"\n'
RELAY_LISTEN = ("--listen", "/ip4/0.0.0.0/tcp/443", "--listen", "/ip4/0.0.0.0/udp/4101/quic-v1")
ROUNDS = 12
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
    addrs = [f"/ip4/{victim.address}/{rest}" for i in range(16) for rest in (f"udp/{5000 + i}/quic-v1", f"tcp/{80 + i}")]
    settings = ANNOUNCING.format(addrs=json.dumps(addrs))
    attacker = LabDaemon(lab.host_behind("sym"), tmp_path / "attacker", settings=settings)
    stack.callback(attacker.stop)
    sniffer = Sniffer(victim)
    stack.callback(sniffer.close)
    started = time.monotonic()
    for _ in range(ROUNDS):
        attacker.json("peer", "connect", relayed(target))
        wait_until(lambda: target.paths(attacker), 10.0, target.process.log)
        time.sleep(0.5)
        attacker.json("peer", "disconnect", target.peer_id)
        wait_until(lambda: not target.paths(attacker), 10.0, target.process.log)
    packets, size = sniffer.counts()
    seconds = time.monotonic() - started
    spent = attacker.host.wire_bytes()[1]
    print(f"{ROUNDS} connections in {seconds:.1f} s for {spent} bytes: {dict(packets)}, {size} bytes")  # noqa: T201
    assert sum(packets.values()) <= limits.PUNCH_PER_IP_BURST + seconds * limits.PUNCH_PER_IP_PER_SECOND
    assert size < spent / 20, "no amplification worth the name"
