"""How long connections are silent: by what is in between, as far as the node knows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
from waiting import until

from lattica.errors import ConnectionLost
from lattica.host import Host, open_host
from lattica.interfaces import Connection, Direction, Path
from lattica.reach import KeepAlives, keep_alive
from lattica.transports.quic import QuicTransport
from lattica.transports.tcp import TcpTransport
from lattica_protocols.keys import PrivateKey
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.nat.behaviour import Filtering, Mapping, NatBehaviour
from lattica_protocols.paths.keep_alive import CIRCUIT_SECONDS, DIALLER_SECONDS, MAPPING_SECONDS, RESTING_SECONDS
from lattica_protocols.peer_id import PeerId

Run = Callable[..., Any]
PUBLIC, PRIVATE, ELSEWHERE = "203.0.113.7", "192.168.1.2", "198.51.100.9"
TCP, QUIC = "/tcp/4101", "/udp/4101/quic-v1"


class Wire(Connection):
    """A connection of which only its addresses are of interest."""

    def __init__(self, path: Path, direction: Direction, remote: str, seen: str | None) -> None:
        self.path, self.direction = path, direction
        self.peer_id = PeerId.from_public_key(PrivateKey.generate(bytes([len(remote)]) * 32).public_key)
        self.local_addr, self.remote_addr = Multiaddr.parse("/ip4/0.0.0.0/udp/4101"), Multiaddr.parse(remote)
        self.observed_addr = None if seen is None else Multiaddr.parse(seen)
        self.opened_at, self.closed = 0.0, trio.Event()
        self.every = 0.0

    def keep_up(self, every: float) -> None:
        self.every = every

    async def open_stream(self) -> Any:
        raise AssertionError

    async def accept_stream(self) -> Any:
        await self.closed.wait()
        raise ConnectionLost("over")

    async def aclose(self) -> None:
        self.abort()
        await trio.lowlevel.checkpoint()

    def abort(self, error: Exception | None = None) -> None:
        self.closed.set()


@pytest.fixture(autouse=True)
def one_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    import ipaddress

    monkeypatch.setattr(keep_alive, "interface_ips", lambda: [ipaddress.ip_address(ip) for ip in (PUBLIC, PRIVATE)])
    monkeypatch.setattr(
        keep_alive,
        "interface_networks",
        lambda: [ipaddress.ip_network(text) for text in ("127.0.0.0/8", "192.168.1.0/24")],
    )


@pytest.mark.parametrize(
    ("path", "direction", "remote", "seen", "reached", "every"),
    [
        # nothing is known
        ("quic", "outbound", f"/ip4/{ELSEWHERE}{QUIC}", None, [], DIALLER_SECONDS),
        ("quic", "inbound", f"/ip4/{ELSEWHERE}{QUIC}", None, [], MAPPING_SECONDS),
        # a NAT: others see another address
        ("quic", "inbound", f"/ip4/{ELSEWHERE}{QUIC}", "/ip4/203.0.113.99/udp/4101/quic-v1", [QUIC], MAPPING_SECONDS),
        # no NAT, and a firewall as far as is known
        ("tcp", "inbound", f"/ip4/{ELSEWHERE}{TCP}", f"/ip4/{PUBLIC}{TCP}", [], MAPPING_SECONDS),
        ("tcp", "inbound", f"/ip4/{ELSEWHERE}{TCP}", f"/ip4/{PUBLIC}{TCP}", [QUIC], MAPPING_SECONDS),
        # strangers reach us there; but not at the port that TCP dialled from
        ("tcp", "inbound", f"/ip4/{ELSEWHERE}{TCP}", f"/ip4/{PUBLIC}{TCP}", [TCP], RESTING_SECONDS),
        ("quic", "outbound", f"/ip4/{ELSEWHERE}{QUIC}", f"/ip4/{PUBLIC}{QUIC}", [QUIC], RESTING_SECONDS),
        ("tcp", "outbound", f"/ip4/{ELSEWHERE}{TCP}", f"/ip4/{PUBLIC}/tcp/50000", [TCP], DIALLER_SECONDS),
        # somebody claims to see us at an address that is not ours
        ("tcp", "inbound", f"/ip4/{ELSEWHERE}{TCP}", f"/ip4/{ELSEWHERE}{TCP}", [TCP], MAPPING_SECONDS),
        # one network, one machine, and a relay
        ("tcp", "outbound", f"/ip4/192.168.1.77{TCP}", None, [], RESTING_SECONDS),
        ("tcp", "outbound", f"/ip4/127.0.0.1{TCP}", None, [], RESTING_SECONDS),
        ("relay", "outbound", f"/ip4/{ELSEWHERE}{TCP}/p2p-circuit", None, [], CIRCUIT_SECONDS),
    ],
)
def test_what_is_in_between(
    run: Run, path: Path, direction: Direction, remote: str, seen: str | None, reached: list[str], every: float
) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            host = Host(PrivateKey.generate(b"h" * 32), nursery)
            known = [Multiaddr.parse(f"/ip4/{PUBLIC}{each}") for each in reached]
            nursery.start_soon(KeepAlives(host, reached=lambda: known).run)
            await trio.testing.wait_all_tasks_blocked()
            wire = Wire(path, direction, remote, seen)
            assert host.adopt(wire)
            await trio.testing.wait_all_tasks_blocked()
            assert wire.every == every
            nursery.cancel_scope.cancel()

    run(main)


def test_a_verdict_counts_from_when_it_is_known(run: Run) -> None:
    """Also for connections from other ports: of a socket that nobody knew strangers' datagrams got in."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            host = Host(PrivateKey.generate(b"h" * 32), nursery)
            nat, reached = [NatBehaviour()], [Multiaddr.parse(f"/ip4/{ELSEWHERE}{TCP}")]
            service = KeepAlives(host, reached=lambda: reached, nat=lambda: nat[0])
            wire = Wire("tcp", "outbound", f"/ip4/{ELSEWHERE}{TCP}", f"/ip4/{PUBLIC}/tcp/50000")
            assert host.adopt(wire)
            for filtering, every in (
                (Filtering.UNKNOWN, DIALLER_SECONDS),
                (Filtering.ADDRESS_AND_PORT_DEPENDENT, DIALLER_SECONDS),
                (Filtering.ADDRESS_DEPENDENT, DIALLER_SECONDS),
                (Filtering.ENDPOINT_INDEPENDENT, RESTING_SECONDS),
            ):
                nat[0] = NatBehaviour(Mapping.NONE, filtering, mapped=(PUBLIC, 4101))
                service.update()
                assert wire.every == every
            reached.append(Multiaddr.parse(f"/ip4/{PUBLIC}{TCP}"))
            for filtering, every in (
                (Filtering.ADDRESS_AND_PORT_DEPENDENT, DIALLER_SECONDS),  # a firewall with a hole where we listen
                (Filtering.ADDRESS_DEPENDENT, RESTING_SECONDS),
            ):
                nat[0] = NatBehaviour(Mapping.NONE, filtering, mapped=(PUBLIC, 4101))
                service.update()
                assert wire.every == every
            nat[0] = NatBehaviour()  # the network changed
            service.update()
            assert wire.every == DIALLER_SECONDS
            nursery.cancel_scope.cancel()

    run(main)


async def silence(connection: Connection) -> int:
    """Until nothing has come or gone for a second, after the round trip was measured; bytes received so far."""
    last = (-1, -1)

    def nothing_new() -> bool:
        nonlocal last
        before, last = last, (connection.received_bytes, connection.sent_bytes)
        return last == before

    await until(nothing_new, 5.0, poll=1.0)
    return last[0]


@pytest.mark.parametrize("listen", ["/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"], ids=["tcp", "quic"])
def test_a_connection_is_kept_up_as_often_as_it_is_told(run: Run, listen: str) -> None:
    async def main() -> None:
        keys = [PrivateKey.generate(seed * 32) for seed in (b"a", b"b")]

        def transports(host: Host) -> list[Any]:
            return [TcpTransport(host.key, host.nursery), QuicTransport(host.nursery, host.key)]

        async with (
            open_host(keys[0], transports) as a,
            open_host(keys[1], transports, listen=[Multiaddr.parse(listen)]) as b,
        ):
            ours = await a.connect(b.peer_id, b.listen_addrs())
            while not (theirs := b.connections(a.peer_id)):
                await trio.lowlevel.checkpoint()
            theirs[0].keep_up(RESTING_SECONDS)
            ours.keep_up(RESTING_SECONDS)
            silent_at = await silence(ours)
            theirs[0].keep_up(0.1)  # from now on it cannot afford silence, and that counts at once
            with trio.fail_after(5.0):
                while ours.received_bytes == silent_at:
                    await trio.lowlevel.checkpoint()
            assert not ours.closed.is_set()

    run(main)
