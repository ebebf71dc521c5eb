"""Signed envelopes (libp2p RFC 2) and the peer records in them (RFC 3)."""

import pytest

from lattica_protocols.envelope import SignedEnvelope
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.keys import PrivateKey
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId
from lattica_protocols.peer_record import PEER_RECORD_DOMAIN, PEER_RECORD_TYPE, PeerRecord, decode_addrs_untrusted

KEY = PrivateKey.generate(b"1" * 32)
OTHER = PrivateKey.generate(b"2" * 32)
PEER = PeerId.from_public_key(KEY.public_key)
ADDR = Multiaddr.parse("/ip4/1.2.3.4/tcp/5")


def test_envelope_layout_and_signed_bytes() -> None:
    envelope = SignedEnvelope.seal(KEY, "domain", b"\x03\x02", b"payload")
    assert KEY.public_key.verify(b"\x06domain" + b"\x02\x03\x02" + b"\x07payload", envelope.signature)
    data = envelope.to_bytes()
    key = KEY.public_key.to_protobuf()
    assert data.startswith(b"\x0a\x24" + key + b"\x12\x02\x03\x02" + b"\x1a\x07payload" + b"\x2a\x40")
    opened = SignedEnvelope.open_untrusted(data, "domain", b"\x03\x02")
    assert opened == envelope
    assert opened.signer == PEER


def test_envelope_refused() -> None:
    data = SignedEnvelope.seal(KEY, "domain", b"type", b"payload").to_bytes()
    for changed, domain, payload_type, reason in [
        (data, "other", b"type", "wrong signature"),
        (data, "domain", b"other", "of type 74797065, not"),
        (data.replace(b"payload", b"payloan"), "domain", b"type", "wrong signature"),
        (data[:-1], "domain", b"type", "cut off"),
        (b"", "domain", b"type", "without its field"),
        (bytes(20000), "domain", b"type", "over 16384"),
    ]:
        with pytest.raises(RemoteProtocolError, match=reason):
            SignedEnvelope.open_untrusted(changed, domain, payload_type)


def test_record_round_trip() -> None:
    record = PeerRecord(PEER, 1 << 40, (ADDR, ADDR.with_peer(PEER)))
    assert PeerRecord.open_untrusted(record.seal(KEY)) == record


def test_record_is_signed_by_its_subject() -> None:
    record = PeerRecord(PEER, 1, (ADDR,))
    with pytest.raises(ValueError, match="by the peer it is about"):
        record.seal(OTHER)
    payload = SignedEnvelope.open_untrusted(record.seal(KEY), PEER_RECORD_DOMAIN, PEER_RECORD_TYPE).payload
    forged = SignedEnvelope.seal(OTHER, PEER_RECORD_DOMAIN, PEER_RECORD_TYPE, payload).to_bytes()
    with pytest.raises(RemoteProtocolError, match="signed by another peer"):
        PeerRecord.open_untrusted(forged)


def test_record_under_the_names_of_the_rfc() -> None:
    record = PeerRecord(PEER, 1, (ADDR,))
    payload = SignedEnvelope.open_untrusted(record.seal(KEY), PEER_RECORD_DOMAIN, PEER_RECORD_TYPE).payload
    rust = SignedEnvelope.seal(KEY, "libp2p-routing-state", b"/libp2p/routing-state-record", payload)
    assert PeerRecord.open_untrusted(rust.to_bytes()) == record


def test_unreadable_addresses_are_skipped() -> None:
    unknown = bytes.fromhex("ff01") + b"x"
    assert decode_addrs_untrusted([b"", unknown, ADDR.to_bytes(), bytes(2000), ADDR.to_bytes()]) == (ADDR,)
