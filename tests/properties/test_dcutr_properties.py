"""Whatever a partner says: an exchange that ends, or RemoteProtocolError; and never more targets than allowed."""

from __future__ import annotations

import ipaddress

from hypothesis import given
from hypothesis import strategies as st

from lattica_protocols import limits
from lattica_protocols.dcutr import PunchExchange, PunchMessage, choose_targets, probe_token_untrusted
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.multiaddr import Multiaddr

ips = st.ip_addresses()
addrs = st.builds(
    lambda ip, port, kind: Multiaddr.parse(f"/ip{ip.version}/{ip}/{kind.format(port)}"),
    ips,
    st.integers(1, 65535),
    st.sampled_from(["tcp/{}", "udp/{}/quic-v1", "udp/{}", "tcp/{}/ws"]),
)
messages = st.builds(
    PunchMessage,
    type=st.none() | st.sampled_from([100, 300, 0]) | st.integers(-(2**31), 2**31 - 1),
    addrs=st.lists(st.binary(max_size=30) | addrs.map(Multiaddr.to_bytes), max_size=8).map(tuple),
    token=st.none() | st.binary(max_size=20),
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
