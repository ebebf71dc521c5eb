"""Whatever a partner says: an exchange that ends, or RemoteProtocolError; and never more targets than allowed."""

from __future__ import annotations

import ipaddress
import random

from hypothesis import given
from hypothesis import strategies as st

from lattica_protocols import limits
from lattica_protocols.dcutr import PunchExchange, PunchMessage, choose_targets, probe_token_untrusted
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.nat.behaviour import NatBehaviour
from lattica_protocols.nat.guess import GuessExchange, GuessMessage
from lattica_protocols.nat.punch import Puncher, most_probes
from lattica_protocols.nat.punch_plan import BIRTHDAY_SOCKETS, Side
from lattica_protocols.nat.report import NatReport

ips = st.ip_addresses()
addrs = st.builds(
    lambda ip, port, kind: Multiaddr.parse(f"/ip{ip.version}/{ip}/{kind.format(port)}"),
    ips,
    st.integers(1, 65535),
    st.sampled_from(["tcp/{}", "udp/{}/quic-v1", "udp/{}", "tcp/{}/ws"]),
)
numbers = st.none() | st.integers(0, 70000) | st.integers(0, 2**64 - 1)
reports = st.builds(
    NatReport,
    mapping=st.none() | st.integers(-1, 6),
    filtering=st.none() | st.integers(-1, 5),
    ports=st.none() | st.integers(-1, 6),
    low=numbers,
    high=numbers,
    step=st.none() | st.integers(-(2**63), 2**63 - 1),
    last=numbers,
    udp_blocked=st.none() | st.booleans(),
    certain=st.none() | st.booleans(),
)
messages = st.builds(
    PunchMessage,
    type=st.none() | st.sampled_from([100, 300, 0]) | st.integers(-(2**31), 2**31 - 1),
    addrs=st.lists(st.binary(max_size=30) | addrs.map(Multiaddr.to_bytes), max_size=8).map(tuple),
    token=st.none() | st.binary(max_size=20),
    nat=st.none() | reports,
    guess=st.none() | st.integers(-(2**31), 2**31 - 1),
)
guesses = st.builds(
    GuessMessage,
    type=st.none() | st.integers(0, 4),
    key=st.none() | st.binary(max_size=20) | st.binary(min_size=16, max_size=16),
    nat=st.none() | reports,
    addrs=st.lists(st.binary(max_size=30) | addrs.map(Multiaddr.to_bytes), max_size=6).map(tuple),
    took=st.none() | st.integers(0, 2**64 - 1),
    technique=st.none() | st.integers(-1, 5),
    opens=st.none() | st.booleans(),
)


@given(st.booleans(), st.lists(st.binary(max_size=80) | messages.map(PunchMessage.encode), max_size=5))
def test_an_exchange_ends_or_is_refused(initiator: bool, received: list[bytes]) -> None:
    exchange = PunchExchange(initiator=initiator, addrs=[], token=bytes(16), now=0.0)
    sent = 0
    try:
        for number, data in enumerate(received):
            while exchange.poll_transmit() is not None:
                sent += 1
            exchange.receive_untrusted(data, number * 0.01)
    except RemoteProtocolError:
        pass
    while exchange.poll_transmit() is not None:
        sent += 1
    assert sent <= 2
    assert exchange.punch_at is None or exchange.partner is not None


@given(st.lists(addrs, max_size=60), st.sets(ips, max_size=4), st.booleans())
def test_what_is_sent_to_strangers_is_bounded(claimed: list[Multiaddr], proven: set[object], same_nat: bool) -> None:
    known = {ip for ip in proven if isinstance(ip, ipaddress.IPv4Address | ipaddress.IPv6Address)}
    targets = choose_targets(claimed, proven=known, own_networks=[], own_public=known if same_nat else [])
    strangers = [target for target in targets if not target.proven]
    assert len(strangers) <= limits.PUNCH_MAX_UNPROVEN
    assert len(targets) <= limits.PUNCH_MAX_TARGETS + limits.PUNCH_MAX_UNPROVEN
    assert sum(target.probes for target in strangers) <= 8
    assert len({target.addr for target in targets}) == len(targets)


@given(st.binary(max_size=100))
def test_a_datagram_is_a_probe_or_not(data: bytes) -> None:
    token = probe_token_untrusted(data)
    assert token is None or len(token) == 16


@given(st.booleans(), st.lists(st.binary(max_size=80) | guesses.map(GuessMessage.encode), max_size=4), st.sets(ips))
def test_whatever_is_agreed_on_goes_to_proven_addresses_and_is_bounded(
    initiator: bool, received: list[bytes], proven: set[object]
) -> None:
    known = {str(ip) for ip in proven} | {"203.0.113.7"}
    own = Side(NatBehaviour(), (("198.51.100.1", 4101),))
    exchange = GuessExchange(initiator=initiator)
    if initiator:
        exchange.offer(own, bytes(16), 0.0)
    try:
        for number, data in enumerate(received):
            exchange.receive_untrusted(data, number * 0.01)
            if not initiator and number == 0:
                exchange.offer(own, bytes(16), 0.0)
    except RemoteProtocolError:
        return
    if exchange.technique is None or exchange.partner is None:
        return
    assert len(exchange.key) == 32
    plan = exchange.plan(known, opener_ttl=2, opener_wait=0.1)
    towards = {addr[0] for addr in plan.targets} | ({plan.search_ip} - {None})
    towards |= {plan.open_towards[0]} if plan.open_towards else set()
    assert towards <= known
    assert plan.open_sockets <= BIRTHDAY_SOCKETS
    assert most_probes(plan) <= limits.NAT_MAX_PROBES
    machine = Puncher(plan, exchange.key, controlling=initiator, rng=random.Random(1), now=0.0)
    assert all(0 < datagram.to[1] <= 65535 for datagram in machine.poll_transmit())


@given(reports)
def test_a_report_is_fit_for_use(report: NatReport) -> None:
    known = NatReport.decode_untrusted(report.encode()).behaviour()
    allocation = known.allocation
    assert 0 < allocation.low < allocation.high <= 65535
    assert abs(allocation.step) <= limits.NAT_MAX_STEP
    assert all(0 < port <= 65535 for port in allocation.next_ports(8))
    assert NatReport.of(known).behaviour() == known
