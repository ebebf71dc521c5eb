"""Messages and vouchers of circuit relay v2, by the bytes of its specification."""

import pytest

from lattica_protocols.envelope import SignedEnvelope
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.keys import PrivateKey
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId
from lattica_protocols.relay.messages import (
    HopMessage,
    HopType,
    Limit,
    RelayPeer,
    Reservation,
    Status,
    StopMessage,
    describe_status,
    hop_status,
    peer_untrusted,
    stop_status,
)
from lattica_protocols.relay.voucher import VOUCHER_DOMAIN, VOUCHER_TYPE, Voucher

RELAY = PrivateKey.generate(b"r" * 32)
OTHER = PrivateKey.generate(b"o" * 32)
RELAY_ID = PeerId.from_public_key(RELAY.public_key)
PEER_ID = PeerId.from_public_key(OTHER.public_key)
ADDR = Multiaddr.parse("/ip4/1.2.3.4/tcp/5")


def test_the_wire_is_that_of_the_specification() -> None:
    assert HopMessage(type=HopType.RESERVE).encode() == bytes.fromhex("0800")
    assert hop_status(Status.OK) == bytes.fromhex("0802 2864")
    assert stop_status(Status.CONNECTION_FAILED) == bytes.fromhex("0801 20cb01")
    connect = HopMessage(type=HopType.CONNECT, peer=RelayPeer(id=b"\x00\x01x", addrs=(ADDR.to_bytes(),)))
    assert connect.encode() == bytes.fromhex("0801 120f 0a03000178 1208 0401020304 060005")
    granted = HopMessage(
        type=HopType.STATUS, reservation=Reservation(expire=300, voucher=b"v"), limit=Limit(120, 131072), status=100
    )
    assert granted.encode() == bytes.fromhex("0802 1a06 08ac02 1a0176 2206 0878 10808008 2864")
    assert HopMessage.decode_untrusted(granted.encode()) == granted
    stop = StopMessage(type=0, peer=RelayPeer(id=b"abc"), limit=Limit(duration=1))
    assert stop.encode() == bytes.fromhex("0800 1205 0a03616263 1a02 0801")


def test_a_message_names_its_peer_or_is_refused() -> None:
    peer, addrs = peer_untrusted(RelayPeer(id=PEER_ID.to_bytes(), addrs=(ADDR.to_bytes(), b"\xff\xff", b"")))
    assert (peer, addrs) == (PEER_ID, (ADDR,))
    for bad in (None, RelayPeer(), RelayPeer(id=b""), RelayPeer(id=b"\x12\x20short")):
        with pytest.raises(RemoteProtocolError):
            peer_untrusted(bad)


def test_every_status_has_words() -> None:
    assert describe_status(204) == "the peer has no reservation at this relay"
    assert describe_status(999) == "status 999"
    assert describe_status(None) == "the answer has no status"
    assert all(describe_status(status) != f"status {status}" for status in Status if status is not Status.OK)


def test_a_voucher_comes_from_the_relay_it_names() -> None:
    sealed = Voucher(RELAY_ID, PEER_ID, 1_800_000_000).seal(RELAY)
    assert Voucher.open_untrusted(sealed) == Voucher(RELAY_ID, PEER_ID, 1_800_000_000)
    with pytest.raises(ValueError, match="signed by the relay"):
        Voucher(RELAY_ID, PEER_ID, 1).seal(OTHER)
    payload = SignedEnvelope.open_untrusted(sealed, VOUCHER_DOMAIN, VOUCHER_TYPE).payload
    forged = SignedEnvelope.seal(OTHER, VOUCHER_DOMAIN, VOUCHER_TYPE, payload).to_bytes()
    with pytest.raises(RemoteProtocolError, match="another peer"):
        Voucher.open_untrusted(forged)
    with pytest.raises(RemoteProtocolError):
        Voucher.open_untrusted(sealed[:-1])
