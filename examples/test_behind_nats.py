"""A test of your own protocol behind NATs. No sockets, no real time; a run replays from its seed.

    pytest examples/test_behind_nats.py

The protocol is a machine: datagrams and time in, datagrams and events out. Here two peers punch a hole: each sends to
where it believes the other to be until it hears something.
"""

from __future__ import annotations

import pytest

from lattica.testing import Datagram, SimHost, SimObserver, SimulatedInternet


class Caller:
    """Sends every 50 ms to `partner`, and answers to where something came from."""

    def __init__(self, partner: tuple[str, int], now: float) -> None:
        self.partner = partner
        self.due: float | None = now
        self.ends = now + 2.0
        self.out: list[Datagram] = []
        self.events: list[object] = []

    def receive_datagram(self, socket: int, data: bytes, source: tuple[str, int], now: float) -> None:
        self.partner = source
        if not self.events and data == b"answer":
            self.events.append(source)
        if data == b"hello":
            self.out.append(Datagram(socket, source, b"answer"))

    def handle_timer(self, now: float) -> None:
        if self.due is not None and now >= self.due:
            self.out.append(Datagram(0, self.partner, b"hello"))
            self.due = now + 0.05 if now < self.ends else None

    def next_timeout(self) -> float | None:
        return self.due

    def poll_transmit(self) -> list[Datagram]:
        out, self.out = self.out, []
        return out

    def next_event(self) -> object | None:
        return self.events.pop(0) if self.events else None


def public_address(host: SimHost, local: tuple[str, int], observer: SimObserver) -> tuple[str, int]:
    """Where the observer sees a socket: what peers would tell each other through a third."""
    host.send(local, observer.observer.addr, b"anything")
    host.net.run(1.0)
    return observer.seen[-1]


@pytest.mark.parametrize(
    ("first", "second", "direct"),
    [
        ("apdf", "apdf", True),  # two usual home routers
        ("full", "sym", True),  # a symmetric NAT reaches whom everybody reaches …
        ("apdf", "sym", False),  # … and not who lets in only those it sent to
    ],
)
def test_a_hole_is_punched(first: str, second: str, direct: bool) -> None:
    net = SimulatedInternet(seed=7, loss=0.2)
    observer = SimObserver(net, "observer")
    hosts = [net.host(name, behind=net.box(kind), delay=0.01) for name, kind in (("a", first), ("b", second))]
    sockets = [host.bind(lambda data, source: None) for host in hosts]
    seen = [public_address(host, local, observer) for host, local in zip(hosts, sockets, strict=True)]
    running = []
    for host, local, partner in zip(hosts, sockets, reversed(seen), strict=True):
        host.close(local)
        running.append(host.attach(Caller(partner, net.now), local=local))
    net.run(3.0)
    assert [bool(each.events) for each in running] == [direct, direct]


def test_a_mapping_expires_without_traffic() -> None:
    net = SimulatedInternet(seed=7)
    server = net.host("server")
    home = net.host("home", behind=net.box("apdf"))
    arrived: list[bytes] = []
    local = home.bind(lambda data, source: arrived.append(data))
    at = server.bind(lambda data, source: callers.append(source))
    callers: list[tuple[str, int]] = []
    home.send(local, at, b"hello")
    net.run(1.0)
    for pause in (25.0, 150.0):  # a home router keeps a silent mapping for half a minute to some minutes
        net.run(pause)
        server.send(at, callers[-1], b"still there?")
        net.run(1.0)
    assert arrived == [b"still there?"]
