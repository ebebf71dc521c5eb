"""STUN on the QUIC socket, between nodes on loopback addresses of their own."""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import trio

from lattica.errors import ConnectError
from lattica.nat.udp_port import UdpPort
from lattica.node import Node, NodeConfig, open_node
from lattica_protocols.limits import STUN_REQUEST_BURST
from lattica_protocols.nat.behaviour import Filtering, Mapping, Ports
from lattica_protocols.nat.discovery import Observer
from lattica_protocols.stun import (
    Attribute,
    MessageType,
    StunMessage,
    decode_message_untrusted,
    encode_change_request,
    encode_message,
)

Run = Callable[..., Any]


@asynccontextmanager
async def nodes(count: int, *transports: str) -> AsyncIterator[list[Node]]:
    """Nodes on 127.0.0.1, 127.0.0.2, …"""
    async with AsyncExitStack() as stack:
        opened = []
        for i in range(1, count + 1):
            listen = [f"/ip4/127.0.0.{i}/udp/0/quic-v1"]
            listen += [f"/ip4/127.0.0.{i}/tcp/0"] if "tcp" in transports else []
            opened.append(await stack.enter_async_context(open_node(NodeConfig(listen=listen))))
        yield opened


def udp_addr(node: Node) -> tuple[str, int]:
    target = next(t for addr in node.host.listen_addrs() if (t := addr.host_port()) is not None and t[0] == "udp")
    return target[1], target[2]


async def connect(a: Node, b: Node, kind: str) -> None:
    addrs = [addr for addr in b.host.listen_addrs() if (t := addr.host_port()) is not None and t[0] == kind]
    await a.host.connect(b.peer_id, addrs)
    await a.wait_identified(b.peer_id)


def test_peers_tell_each_other_how_they_look(run: Run) -> None:
    async def main() -> None:
        async with nodes(4) as (asking, *peers):
            for peer in peers:
                await connect(asking, peer, "udp")
            known = await asking.discover_nat()
            assert asking.nat is not None
            assert asking.nat.behaviour.mapping is Mapping.NONE
            assert known.mapping is Mapping.NONE
            assert known.mapped == udp_addr(asking)
            assert known.filtering is Filtering.ADDRESS_DEPENDENT, "loopback hosts have no second address to ask from"
            assert known.allocation.ports is Ports.PRESERVED
            assert not known.udp_blocked
            assert known.certain
            meanwhile: list[Filtering] = []
            nat, observers = asking.nat, await asking.nat_watch.observers() if asking.nat_watch else []
            await nat.discover(observers, on_known=lambda _: meanwhile.append(nat.behaviour.filtering))
            assert set(meanwhile) == {Filtering.ADDRESS_DEPENDENT}, "what is looked at again is not forgotten meanwhile"
            for peer in peers:
                assert peer.nat is not None
                assert peer.nat.server.answered >= 2

    run(main)


def test_over_tcp_the_advertised_udp_port_of_the_same_address_is_asked(run: Run) -> None:
    async def main() -> None:
        async with nodes(4, "tcp") as (asking, *peers):
            for peer in peers:
                await connect(asking, peer, "tcp")
            known = await asking.discover_nat()
            assert known.mapping is Mapping.NONE, known.evidence

    run(main)


def test_nobody_to_ask(run: Run) -> None:
    async def main() -> None:
        async with nodes(1) as (alone,):
            with pytest.raises(ConnectError):
                await alone.discover_nat()

    run(main)


def test_silence_means_blocked(run: Run) -> None:
    async def main() -> None:
        async with nodes(1) as (asking,):
            assert asking.nat is not None
            known = await asking.nat.discover([Observer((f"127.0.0.{i}", 9)) for i in range(5, 8)])
            assert known.udp_blocked
            assert known.certain
            assert known.mapping is Mapping.UNKNOWN
            few = await asking.nat.discover([Observer(("127.0.0.5", 9))])
            assert few.udp_blocked
            assert not few.certain

    run(main)


def test_a_binding_lives(run: Run) -> None:
    async def main() -> None:
        async with nodes(2) as (asking, peer):
            await connect(asking, peer, "udp")
            known = await asking.discover_nat(lifetimes=(0.2,))
            assert known.lives_for == 0.2

    run(main)


def test_the_daemons_socket_answers_strangers_within_limits(run: Run) -> None:
    async def main() -> None:
        async with nodes(1) as (node,):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
                stranger.bind(("127.0.0.1", 0))
                stranger.setblocking(False)
                rng = random.Random(1)
                request = encode_message(StunMessage(MessageType.REQUEST, rng.randbytes(12)))
                for _ in range(200):
                    stranger.sendto(b"\x01\x01" + rng.randbytes(18), udp_addr(node))  # noise is not answered
                stranger.sendto(request, udp_addr(node))
                await trio.lowlevel.wait_readable(stranger)
                answer = decode_message_untrusted(stranger.recv(2048))
                assert answer.mapped_untrusted == stranger.getsockname()
                assert answer.transaction_id == request[8:20]
                change = ((Attribute.CHANGE_REQUEST, encode_change_request(ip=False, port=True)),)
                stranger.sendto(encode_message(StunMessage(MessageType.REQUEST, bytes(12), change)), udp_addr(node))
                await trio.lowlevel.wait_readable(stranger)
                _, source = stranger.recvfrom(2048)
                assert source[0] == udp_addr(node)[0]
                assert source[1] != udp_addr(node)[1]
                for _ in range(3 * STUN_REQUEST_BURST):
                    stranger.sendto(request, udp_addr(node))
                assert node.nat is not None
                with trio.fail_after(5):
                    while node.nat.server.refused < STUN_REQUEST_BURST:
                        await trio.lowlevel.checkpoint()
                assert node.nat.server.answered < 2 * STUN_REQUEST_BURST

    run(main)


def test_a_low_ttl_goes_out(run: Run) -> None:
    """The system takes the option; what it does is tested behind real NATs."""

    async def main() -> None:
        async with nodes(1) as (node,), trio.open_nursery() as nursery:
            got: list[bytes] = []
            arrived = trio.Event()

            def on_datagram(data: bytes, addr: object) -> None:
                got.append(data)
                arrived.set()

            port = UdpPort(socket.AF_INET, "127.0.0.1", 0, on_datagram)
            nursery.start_soon(port.run)
            assert node.nat is not None
            endpoint = node.nat._transport.endpoints[0]
            endpoint.send_short_lived(b"low", port.address, 2)
            await arrived.wait()
            assert got == [b"low"]
            port.send(b"back", udp_addr(node), ttl=1)
            nursery.cancel_scope.cancel()

    run(main)


def test_without_a_nat_nothing_is_opened(run: Run) -> None:
    """The datagram would come to the partner's box, which has no NAT of ours before it."""

    async def main() -> None:
        async with nodes(4) as (asking, *peers):
            assert asking.nat_watch is not None
            assert asking.nat_watch.opening_hops() == 2, "nothing is known yet"
            for peer in peers:
                await connect(asking, peer, "udp")
            known = await asking.discover_nat()
            assert known.mapping is Mapping.NONE
            assert asking.nat_watch.opening_hops() == asking.nat_watch.early_hops() == 0
            firewall = replace(known, filtering=Filtering.ADDRESS_AND_PORT_DEPENDENT)
            assert asking.nat is not None
            asking.nat.behaviour = firewall  # has no other port to give, but drops a partner who dials before the punch
            assert (asking.nat_watch.opening_hops(), asking.nat_watch.early_hops()) == (0, 2)

    run(main)
