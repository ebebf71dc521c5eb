"""The boxes of the simulated internet do what their names say, packet by packet."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from lattica.testing.internet import SimHost, SimulatedInternet
from lattica.testing.nat_boxes import BOXES, Box, Packet
from lattica_protocols.stun import SocketAddr

INSIDE, PEER, STRANGER = ("10.0.0.2", 5000), ("203.0.113.5", 7000), ("203.0.113.6", 7000)
WAN = "198.51.100.1"


def box(name: str, **changes: object) -> Box:
    return Box(replace(BOXES[name], **changes), WAN, random.Random(1))  # type: ignore[arg-type]


def out(box: Box, to: SocketAddr, now: float, source: SocketAddr = INSIDE) -> SocketAddr | None:
    packet = box.outbound(Packet(source, to, b"x"), now)
    return packet and packet.source


def gets_in(box: Box, source: SocketAddr, to: SocketAddr, now: float) -> bool:
    packet = box.inbound(Packet(source, to, b"x"), now)
    assert packet is None or packet.to == INSIDE
    return packet is not None


@pytest.mark.parametrize("name", ["apdf", "apdfr", "full", "sym", "symseq"])
def test_a_mapping_expires(name: str) -> None:
    nat = box(name, lifetime=30.0)
    public = out(nat, PEER, 0.0)
    assert public is not None
    assert gets_in(nat, PEER, public, 29.0)
    assert gets_in(nat, PEER, public, 58.0), "a packet in either direction keeps it"
    assert not gets_in(nat, PEER, public, 89.0)
    again = out(nat, PEER, 90.0)
    assert (again == public) == (name in ("apdf", "full")), "kept ports stay the same"


def test_the_poisoned_box() -> None:
    """A stray packet before our own makes ours leave from another port, for 30 s, and so do all flows that follow."""
    nat = box("open")
    assert out(nat, STRANGER, 0.0) == (WAN, 5000)
    assert not gets_in(nat, PEER, (WAN, 5000), 0.1)
    moved = out(nat, PEER, 0.2)
    assert moved is not None
    assert moved[1] != 5000
    assert out(nat, STRANGER, 0.3) == (WAN, 5000), "older flows keep theirs"
    assert out(nat, (PEER[0], PEER[1] + 1), 0.3) == moved
    assert not gets_in(nat, PEER, (WAN, 5000), 0.3)
    assert gets_in(nat, PEER, moved, 0.3)
    assert out(nat, PEER, 1.0) == moved, "the flow stays there"
    clean = box("apdf")
    assert not gets_in(clean, PEER, (WAN, 5000), 0.1)
    assert out(clean, PEER, 0.2) == (WAN, 5000)
    late = box("open")
    assert not gets_in(late, PEER, (WAN, 5000), 0.0)
    assert out(late, PEER, 31.0) == (WAN, 5000)


def test_two_hosts_with_the_same_port() -> None:
    nat = box("apdf")
    assert out(nat, PEER, 0.0) == (WAN, 5000)
    second = out(nat, PEER, 0.0, ("10.0.0.3", 5000))
    assert second is not None
    assert second[1] != 5000


def test_blocks_and_sequences() -> None:
    nat = box("symblk")
    ports = [out(nat, (PEER[0], 1000 + i), 0.0) for i in range(100)]
    assert all(port is not None and 30000 <= port[1] <= 32047 for port in ports)
    assert len(set(ports)) == 100
    nat = box("symseq")
    assert [out(nat, (PEER[0], 1000 + i), 0.0) for i in range(3)] == [(WAN, 20000), (WAN, 20001), (WAN, 20002)]


def test_what_the_web_only_box_lets_out() -> None:
    nat = box("tcp443")
    assert out(nat, PEER, 0.0) is None
    assert nat.outbound(Packet(INSIDE, (PEER[0], 4101), b"", protocol="tcp"), 0.0) is None
    sent = nat.outbound(Packet(INSIDE, (PEER[0], 443), b"", protocol="tcp"), 0.0)
    assert sent is not None
    answer = nat.inbound(Packet((PEER[0], 443), sent.source, b"", protocol="tcp"), 0.0)
    assert answer is not None
    assert answer.to == INSIDE


def test_rejected_packets_are_counted() -> None:
    nat = box("rej")
    assert not gets_in(nat, PEER, (WAN, 5000), 0.0)
    assert nat.rejected == 1


# -- ways through the network -----------------------------------------------------------------------------------------
def listening(host: SimHost) -> tuple[SocketAddr, list[tuple[bytes, SocketAddr]]]:
    got: list[tuple[bytes, SocketAddr]] = []
    return host.bind(lambda data, source: got.append((data, source))), got


def test_delay_and_arrival_time() -> None:
    """The receiver's box decides when the packet arrives: an opener sent in time lets in what was sent before it."""
    net = SimulatedInternet(1)
    a = net.host("a", net.box("apdf"), delay=0.05)
    b = net.host("b", net.box("apdf"), delay=0.05)
    socket_a, got_a = listening(a)
    socket_b, got_b = listening(b)
    public_a, public_b = (("198.51.0.1", socket_a[1]), ("198.51.0.2", socket_b[1]))
    a.send(socket_a, public_b, b"early")
    net.run(0.05)
    b.send(socket_b, public_a, b"opens")
    net.run(0.049)
    assert not got_b
    net.run(0.002)
    assert got_b == [(b"early", public_a)]
    net.run(0.1)
    assert got_a == [(b"opens", public_b)]


def test_hosts_in_one_network_see_each_other_directly() -> None:
    net = SimulatedInternet(1)
    home = net.box("sym")
    a, b = net.host("a", home), net.host("b", home)
    socket_a, _ = listening(a)
    socket_b, got = listening(b)
    a.send(socket_a, socket_b, b"hello")
    net.run(0.01)
    assert got == [(b"hello", socket_a)]


@pytest.mark.parametrize("hairpin", [True, False])
def test_two_homes_behind_one_carrier(hairpin: bool) -> None:
    net = SimulatedInternet(1)
    carrier = net.box(replace(BOXES["full"], hairpin=hairpin))
    a, b = (net.host(name, net.box("full", behind=carrier)) for name in "ab")
    socket_b, got = listening(b)
    socket_a, _ = listening(a)
    server = net.host("server")
    server_socket, seen = listening(server)
    b.send(socket_b, server_socket, b"")
    net.run(0.1)
    public_b = seen[0][1]
    assert public_b[0] == carrier.address
    a.send(socket_a, public_b, b"hello")
    net.run(0.1)
    assert bool(got) == hairpin


def test_a_low_ttl_dies_outside_of_our_boxes() -> None:
    for ttl, boxes, arrives in ((2, 1, False), (4, 1, False), (3, 2, False), (64, 2, True)):
        net = SimulatedInternet(1, core_hops=3)
        gateway = net.box("apdf")
        for _ in range(boxes - 1):
            gateway = net.box("apdf", behind=gateway)
        a = net.host("a", gateway)
        socket, got = listening(net.host("b"))
        local, _ = listening(a)
        a.send(local, socket, b"x", ttl)
        net.run(1.0)
        assert bool(got) == arrives
        assert gateway.box.inbound(Packet(socket, (gateway.address, local[1]), b""), net.now) is not None, "opened"


def test_loss() -> None:
    net = SimulatedInternet(5, loss=0.2)
    socket, got = listening(net.host("b"))
    a = net.host("a")
    local, _ = listening(a)
    for _ in range(1000):
        a.send(local, socket, b"x")
    net.run(1.0)
    assert 750 < len(got) < 850
