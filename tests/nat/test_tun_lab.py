"""T2's lab is what it says, by probes of its own, before a daemon is judged in it: delay, loss, rate, rebinding."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from nat_lab import LabHost
from stun_lab import LabObserver, discover_all
from test_boxes import EXPECTED
from tun_core import Conditions
from tun_lab import TunLab

RTT = 0.04
SEED = 7


class Plug:
    """A UDP socket in a host of the lab."""

    def __init__(self, host: LabHost) -> None:
        with host.netns.entered():
            self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind((host.address, 5000))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self.socket.settimeout(1.0)
        self.address = (host.address, 5000)

    def all_received(self) -> list[bytes]:
        """What comes until nothing came for a second."""
        found = []
        while True:
            try:
                found.append(self.socket.recv(2048))
            except TimeoutError:
                return found


class Made:
    """What a test makes, closed behind it."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def lab(self, conditions: Conditions, seed: int = SEED) -> TunLab:
        lab = TunLab(conditions, seed=seed)
        self._stack.callback(lab.close)
        return lab

    def plug(self, host: LabHost) -> Plug:
        plug = Plug(host)
        self._stack.enter_context(plug.socket)
        return plug

    def two(self, lab: TunLab) -> tuple[Plug, Plug]:
        return self.plug(lab.public_host()), self.plug(lab.public_host())


@pytest.fixture
def make() -> Iterator[Made]:
    with ExitStack() as stack:
        yield Made(stack)


def test_the_round_trip_is_what_was_asked_for(make: Made) -> None:
    a, b = make.two(make.lab(Conditions(RTT / 2)))
    times = []
    for _ in range(20):
        started = time.perf_counter()
        a.socket.sendto(b"ping", b.address)
        b.socket.sendto(b.socket.recv(10), a.address)
        a.socket.recv(10)
        times.append(time.perf_counter() - started)
    print(f"median {statistics.median(times) * 1e3:.1f} ms, slowest {max(times) * 1e3:.1f} ms")  # noqa: T201
    assert min(times) >= RTT
    assert statistics.median(times) < 1.25 * RTT


def test_losses_are_drawn_from_the_seed(make: Made) -> None:
    lost = []
    for seed in (SEED, SEED, SEED + 1):
        lab = make.lab(Conditions(0.001, loss=0.2), seed)
        a, b = make.two(lab)
        for number in range(500):
            a.socket.sendto(number.to_bytes(2, "big"), b.address)
        lost.append(set(range(500)) - {int.from_bytes(data, "big") for data in b.all_received()})
        assert lab.wire.counts()["lost"] == len(lost[-1])
        assert 60 < len(lost[-1]) < 140
    assert lost[0] == lost[1] != lost[2]


def test_a_rate_holds_packets_and_drops_what_is_too_much(make: Made) -> None:
    a, b = make.two(lab := make.lab(Conditions(rate=125_000)))  # 1 Mbit/s, its queue 25 kB
    started = time.perf_counter()
    for _ in range(40):
        a.socket.sendto(bytes(972), b.address)
    got, last = 0, started
    while True:
        try:
            got += len(b.socket.recv(2048)) + 28
            last = time.perf_counter()
        except TimeoutError:
            break
    print(f"{got / (last - started):.0f} B/s")  # noqa: T201
    assert 100_000 < got / (last - started) < 130_000
    assert 10 < lab.wire.counts()["full"] < 20


def test_a_short_lived_packet_dies_in_the_core(make: Made) -> None:
    lab = make.lab(Conditions())
    a, b = make.two(lab)
    for ttl in (1, 2):
        a.socket.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
        try:
            a.socket.sendto(bytes([ttl]), b.address)
        except OSError:
            assert ttl == 2, "told by ICMP that the first one died"
            a.socket.sendto(bytes([ttl]), b.address)
    assert b.all_received() == [bytes([2])]


@pytest.mark.parametrize(("kind", "new_address"), [("apdfr", False), ("apdf", True)])
def test_a_box_that_restarts_maps_anew(make: Made, kind: str, new_address: bool) -> None:
    lab = make.lab(Conditions(RTT / 2))
    server, box = make.plug(lab.public_host()), lab.box("apdf")
    inside = make.plug(box.host())
    places = []
    for _ in range(2):
        inside.socket.sendto(b"where", server.address)
        places.append(server.socket.recvfrom(10)[1])
        server.socket.sendto(b"there", places[-1])
        assert inside.socket.recv(10) == b"there"
        if len(places) == 1:
            box.rebind(kind=kind, new_address=new_address)
    assert places[0] != places[1]
    assert (places[0][0] != places[1][0]) is new_address


def test_boxes_are_the_same_over_this_core(make: Made) -> None:
    import trio

    lab = make.lab(Conditions(RTT / 2))
    observers = [LabObserver(lab) for _ in range(3)]
    kinds = [kind for kind in EXPECTED if kind != "apdf+full"]
    found = trio.run(discover_all, {kind: lab.host_behind(kind) for kind in kinds}, observers)
    verdicts = {k: (b.mapping, b.filtering, b.allocation.ports, b.hairpin) for k, b in found.items()}
    assert verdicts == {kind: EXPECTED[kind] for kind in kinds}
