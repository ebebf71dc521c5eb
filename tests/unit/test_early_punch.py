"""The head start of a punch: its messages, and when a dial can do without a punch."""

from dataclasses import replace

import pytest

from lattica_protocols.dcutr import PunchMessage
from lattica_protocols.early_punch import can_dial_early, decode_offer_untrusted, encode_offer
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.nat.behaviour import Filtering, Mapping, NatBehaviour

UDP = Multiaddr.parse("/ip4/1.2.3.4/udp/9/quic-v1")
FULL = NatBehaviour(mapping=Mapping.ENDPOINT_INDEPENDENT, filtering=Filtering.ENDPOINT_INDEPENDENT)
RESTRICTED = replace(FULL, filtering=Filtering.ADDRESS_DEPENDENT)
HOME = replace(FULL, filtering=Filtering.ADDRESS_AND_PORT_DEPENDENT)
FIREWALL = replace(HOME, mapping=Mapping.NONE)
SYMMETRIC = replace(HOME, mapping=Mapping.ADDRESS_AND_PORT_DEPENDENT)


def test_the_wire_is_that_of_the_page() -> None:
    assert encode_offer([UDP], None) == bytes.fromhex("0864 120b 0401020304910200 09cd03".replace(" ", ""))
    assert decode_offer_untrusted(encode_offer([UDP], None)).addrs == (UDP,)
    nat = decode_offer_untrusted(encode_offer([UDP], HOME)).nat
    assert nat is not None
    assert (nat.mapping, nat.filtering) == (HOME.mapping, HOME.filtering)


@pytest.mark.parametrize("data", [b"", b"\xff", PunchMessage(type=300).encode(), PunchMessage(addrs=(b"x",)).encode()])
def test_nothing_else_is_an_offer(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_offer_untrusted(data)


@pytest.mark.parametrize(
    ("dialler", "accepter", "can"),
    [
        (HOME, HOME, True),
        (HOME, FIREWALL, True),
        (FIREWALL, HOME, True),
        (SYMMETRIC, FULL, True),
        (SYMMETRIC, RESTRICTED, True),
        (SYMMETRIC, HOME, False),  # it would come from a port that B's NAT was not opened for
        (HOME, SYMMETRIC, False),  # nobody knows the port
        (FULL, SYMMETRIC, False),  # B has to begin
        (NatBehaviour(), HOME, True),
        (None, HOME, True),
        (HOME, None, True),
        (HOME, replace(FULL, udp_blocked=True), False),
        (replace(FULL, udp_blocked=True), FULL, False),
    ],
)
def test_only_where_a_packet_gets_through(
    dialler: NatBehaviour | None, accepter: NatBehaviour | None, can: bool
) -> None:
    assert can_dial_early(dialler, accepter) is can
