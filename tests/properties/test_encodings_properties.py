"""Garbage gives RemoteProtocolError or success, and whatever was read is written back the same."""

from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import example, given
from hypothesis import strategies as st

from lattica_protocols import base_encoding, tls
from lattica_protocols.cid import Cid, decode_cid_untrusted
from lattica_protocols.envelope import SignedEnvelope
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.identify import Identify
from lattica_protocols.keys import PrivateKey, PublicKey
from lattica_protocols.multiaddr import PART_TABLE, Multiaddr, Part
from lattica_protocols.multihash import Multihash, decode_multihash_untrusted
from lattica_protocols.multistream import Initiator, Responder, encode_message
from lattica_protocols.peer_id import PeerId
from lattica_protocols.peer_record import PeerRecord, decode_addrs_untrusted
from lattica_protocols.varint import decode_uvarint_untrusted, encode_uvarint

NOW = 1_750_000_000.0
KEY = PrivateKey.generate(b"k" * 32)
PEER = PeerId.from_public_key(KEY.public_key)
ADDR = Multiaddr.parse(f"/ip4/1.2.3.4/udp/9/quic-v1/p2p/{PEER}")
RECORD = PeerRecord(PEER, 7, (ADDR,))
IDENTIFY = Identify(KEY.public_key, (ADDR,), ("/a", "/b"), ADDR, "x", "y", RECORD.seal(KEY))
CERTIFICATE = tls.make_certificate(
    KEY, ec.derive_private_key(12345, ec.SECP256R1()), serial=1, unix_now=NOW
).public_bytes(serialization.Encoding.DER)

# Each parser with something valid to start from, and how to write back what it returned (None: it is not kept).
PARSERS: dict[str, tuple[Callable[[bytes], Any], bytes, Callable[[Any], bytes] | None]] = {
    "uvarint": (decode_uvarint_untrusted, encode_uvarint(1 << 40), None),
    "public key": (PublicKey.from_protobuf_untrusted, KEY.public_key.to_protobuf(), PublicKey.to_protobuf),
    "multihash": (Multihash.from_bytes_untrusted, PEER.to_bytes(), Multihash.to_bytes),
    "multihash inside": (decode_multihash_untrusted, PEER.to_bytes(), None),
    "cid": (Cid.from_bytes_untrusted, Cid.v1(0x55, 0x12, bytes(32)).to_bytes(), Cid.to_bytes),
    "cid inside": (decode_cid_untrusted, Cid.v1(0x55, 0x12, bytes(32)).to_bytes(), None),
    "peer id": (PeerId.from_bytes_untrusted, PEER.to_bytes(), PeerId.to_bytes),
    "multiaddr": (Multiaddr.from_bytes_untrusted, ADDR.to_bytes(), Multiaddr.to_bytes),
    "addresses": (lambda data: decode_addrs_untrusted([data]), ADDR.to_bytes(), None),
    "envelope": (
        lambda data: SignedEnvelope.open_untrusted(data, "libp2p-peer-record", b"\x03\x01"),
        RECORD.seal(KEY),
        None,
    ),
    "peer record": (PeerRecord.open_untrusted, RECORD.seal(KEY), None),
    "identify": (Identify.decode_untrusted, IDENTIFY.encode(), Identify.encode),
    "certificate": (lambda data: tls.verify_certificate_untrusted(data, NOW), CERTIFICATE, None),
    "responder": (lambda data: Responder({"/a"}).receive_data(data), Initiator(["/b", "/a"]).poll_transmit(), None),
    "initiator": (lambda data: Initiator(["/b", "/a"]).receive_data(data), encode_message("/multistream/1.0.0"), None),
}


def check_one_line(error: Exception) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 1000


def check(name: str, data: bytes) -> None:
    parse, _, write = PARSERS[name]
    try:
        value = parse(data)
    except RemoteProtocolError as error:
        check_one_line(error)
        return
    if write is not None:
        assert parse(write(value)) == value


@pytest.mark.parametrize("name", PARSERS)
@given(data=st.binary(max_size=300))
def test_garbage(name: str, data: bytes) -> None:
    check(name, data)


@pytest.mark.parametrize("name", PARSERS)
@given(data=st.data())
def test_damage(name: str, data: st.DataObject) -> None:
    valid = bytearray(PARSERS[name][1])
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(valid) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "set"])):
            case "flip":
                valid[position] ^= 1 << data.draw(st.integers(0, 7))
            case "set":
                valid[position] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
            case "insert":
                valid[position:position] = data.draw(st.binary(min_size=1, max_size=4))
            case _:
                del valid[max(1, position) :]
    check(name, bytes(valid))


@pytest.mark.parametrize("name", PARSERS)
def test_the_valid_starting_points_are_valid(name: str) -> None:
    PARSERS[name][0](PARSERS[name][1])


@given(st.integers(0, (1 << 63) - 1), st.binary(max_size=4))
def test_uvarint_round_trip(value: int, rest: bytes) -> None:
    encoded = encode_uvarint(value)
    assert decode_uvarint_untrusted(encoded + rest) == (value, len(encoded))


@given(st.binary(max_size=200))
@example(b"\0\0")
def test_text_bases_round_trip(data: bytes) -> None:
    assert base_encoding.decode_base58(base_encoding.encode_base58(data)) == data
    for base in "zbuf":
        assert base_encoding.decode_multibase(base_encoding.encode_multibase(data, base)) == data


@given(st.text(max_size=60))
def test_typed_text_gives_a_value_or_one_line(text: str) -> None:
    parsers: list[Callable[[str], Any]] = [PeerId.parse, Cid.parse, Multiaddr.parse]
    for parse in parsers:
        try:
            value = parse(text)
        except ValueError as error:
            check_one_line(error)
        else:
            assert parse(str(value)) == value


def _values(name: str) -> st.SearchStrategy[str]:
    numbers = {"tcp": 16, "udp": 16, "memory": 64}
    if name in numbers:
        return st.integers(0, (1 << numbers[name]) - 1).map(str)
    if name in ("ip4", "ip6"):
        return st.ip_addresses(v=4 if name == "ip4" else 6).map(str)
    if name == "p2p":
        return st.binary(min_size=32, max_size=32).map(lambda seed: str(PeerId(Multihash(0x12, seed))))
    if name == "certhash":
        return st.binary(max_size=64).map(lambda data: base_encoding.encode_multibase(Multihash(0, data).to_bytes()))
    return st.text("abcdefghijklmnopqrstuvwxyz0123456789-.ä", min_size=1, max_size=20)


def _part_text(part: Part) -> st.SearchStrategy[str]:
    return st.just(f"/{part.name}") if part.size == 0 else _values(part.name).map(f"/{part.name}/".__add__)


_PARTS = st.sampled_from([part for part in PART_TABLE if not part.is_path]).flatmap(_part_text)


@given(st.lists(_PARTS, min_size=1, max_size=12))
def test_multiaddr_round_trip(parts: list[str]) -> None:
    addr = Multiaddr.parse("".join(parts))
    assert Multiaddr.from_bytes_untrusted(addr.to_bytes()) == addr
    assert Multiaddr.parse(str(addr)) == addr
    assert len(addr.protocols()) == len(parts)
    assert addr.with_peer(PEER).peer_id() == PEER


@given(
    proposed=st.lists(st.sampled_from(["/a", "/b", "/c", "/d"]), min_size=1),
    supported=st.sets(st.sampled_from(["/a", "/b", "/c"])),
    data=st.data(),
)
def test_multistream_agrees_however_it_is_cut(proposed: list[str], supported: set[str], data: st.DataObject) -> None:
    initiator, responder = Initiator(proposed[:20]), Responder(supported)
    expected = next((name for name in proposed[:20] if name in supported), None)
    while not (initiator.confirmed or initiator.failed):
        for sender, receiver in ((initiator, responder), (responder, initiator)):
            out = sender.poll_transmit()
            while out:
                size = data.draw(st.integers(1, len(out)))
                receiver.receive_data(out[:size])
                out = out[size:]
    assert initiator.selected == responder.selected == expected
