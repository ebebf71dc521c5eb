"""Observed addresses: who is alone, or in one address range with however many, moves nobody; independent ones do."""

from __future__ import annotations

import ipaddress

from hypothesis import given
from hypothesis import strategies as st

from lattica_protocols.limits import OBSERVED_MAX_ADDRS_PER_SOCKET, OBSERVED_MAX_OBSERVATIONS
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.nat.observed import CONFIRMED_AT, LINGER, Observation, ObservedAddrs
from lattica_protocols.nat.scope import IpAddress, is_local, voice_of

LISTEN = Multiaddr.parse("/ip4/0.0.0.0/udp/4101/quic-v1")
TCP = Multiaddr.parse("/ip4/0.0.0.0/tcp/4101")
TRUE = Multiaddr.parse("/ip4/198.18.9.9/udp/50000/quic-v1")
LIE = Multiaddr.parse("/ip4/203.0.113.66/udp/666/quic-v1")

ips = st.ip_addresses(v=4)
seen_addrs = st.builds(
    lambda ip, port, kind: Multiaddr.parse(f"/ip{ip.version}/{ip}/{kind.format(port)}"),
    st.ip_addresses(),
    st.integers(0, 65535),
    st.sampled_from(["tcp/{}", "udp/{}/quic-v1", "udp/{}", "tcp/{}/ws"]),
)


def said(number: int, observer: str | IpAddress, seen: Multiaddr = TRUE, outbound: bool = True) -> Observation:
    return Observation(number, ipaddress.ip_address(observer), outbound, LISTEN, seen)


def confirmed(machine: ObservedAddrs, now: float = 0.0) -> list[Multiaddr]:
    return [found.addr for found in machine.confirmed(now)]


@given(st.lists(st.tuples(st.integers(0, 255), st.booleans(), st.sampled_from([LIE, TRUE])), max_size=40), ips)
def test_one_range_moves_nobody(liars: list[tuple[int, bool, Multiaddr]], base: ipaddress.IPv4Address) -> None:
    machine = ObservedAddrs()
    for number, (host, outbound, seen) in enumerate(liars):
        machine.observe(said(number, ipaddress.IPv4Address(int(base) & ~255 | host), seen, outbound), 0.0)
    assert confirmed(machine) == []


@given(st.lists(ips, min_size=1, max_size=12, unique_by=voice_of), st.data())
def test_enough_independent_ones_do(observers: list[ipaddress.IPv4Address], data: st.DataObject) -> None:
    machine = ObservedAddrs()
    weight = 0
    for number, observer in enumerate(observers):
        outbound = data.draw(st.booleans())
        if machine.observe(said(number, observer, outbound=outbound), 0.0):
            weight += 2 if outbound else 1
    assert confirmed(machine) == ([TRUE] if weight >= CONFIRMED_AT else [])


@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.ip_addresses(), st.booleans(), st.sampled_from([LISTEN, TCP]), seen_addrs),
        max_size=60,
    )
)
def test_whatever_is_said(said_: list[tuple[int, IpAddress, bool, Multiaddr, Multiaddr]]) -> None:
    machine = ObservedAddrs()
    for now, (key, observer, outbound, listen, seen) in enumerate(said_):
        machine.observe(Observation(key, observer, outbound, listen, seen), now)
        if key % 3 == 0:
            machine.connection_gone(key, now)
    found = machine.confirmed(len(said_))
    for each in found:
        ip = each.addr.ip()
        assert ip is not None
        assert not ip.is_loopback
        assert not ip.is_multicast
        assert each.addr.names() == each.listen.names()
        assert each.weight >= CONFIRMED_AT
        assert each.voices >= 2
    for listen in (LISTEN, TCP):
        assert sum(each.listen == listen for each in found) <= OBSERVED_MAX_ADDRS_PER_SOCKET


def test_the_truth_survives_a_flood_from_one_range() -> None:
    machine = ObservedAddrs()
    for number in range(2):
        machine.observe(said(number, f"198.18.{number}.1"), 0.0)
    for number in range(2 * OBSERVED_MAX_OBSERVATIONS):
        machine.observe(said(1000 + number, f"203.0.113.{number % 256}", LIE, outbound=False), 1.0)
    assert confirmed(machine, 1.0) == [TRUE]


def test_a_later_word_of_the_same_range_replaces_the_earlier() -> None:
    machine = ObservedAddrs()
    moved = Multiaddr.parse("/ip4/198.18.9.9/udp/50001/quic-v1")
    for number in range(3):
        machine.observe(said(number, f"198.18.{number}.1"), 0.0)
    for number in range(2):
        machine.observe(said(10 + number, f"198.18.{number}.1", moved), 1.0)
    assert confirmed(machine, 1.0) == [moved]


def test_it_is_kept_for_a_while_after_the_connections_ended() -> None:
    machine = ObservedAddrs()
    for number in range(2):
        machine.observe(said(number, f"198.18.{number}.1"), 0.0)
        machine.connection_gone(number, 5.0, kept_as=("gone", number))
    assert machine.next_timeout() == 5.0 + LINGER
    assert confirmed(machine, 4.9 + LINGER) == [TRUE]
    assert confirmed(machine, 5.1 + LINGER) == []
    assert machine.next_timeout() is None


def test_who_is_on_the_internet_sees_no_local_address() -> None:
    machine = ObservedAddrs()
    local = Multiaddr.parse("/ip4/10.0.0.7/udp/4101/quic-v1")
    assert not machine.observe(said(1, "8.8.8.8", local), 0.0)
    assert machine.observe(said(1, "10.0.0.8", local), 0.0)
    assert is_local(ipaddress.ip_address("100.64.0.1"))
    assert not is_local(ipaddress.ip_address("198.18.0.1"))


def test_reset_forgets_everything() -> None:
    machine = ObservedAddrs()
    for number in range(2):
        machine.observe(said(number, f"198.18.{number}.1"), 0.0)
    machine.reset()
    assert confirmed(machine) == []
