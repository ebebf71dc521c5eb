"""Keys, signatures and peer ids, by the vectors of libp2p's specification."""

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.keys import KeyType, PrivateKey, PublicKey
from lattica_protocols.peer_id import PeerId

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "identity.json").read_text())
DER, SPKI = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo


@pytest.mark.parametrize("name", ["rsa", "ed25519", "secp256k1", "ecdsa"])
def test_public_key_vectors(name: str) -> None:
    encoded = bytes.fromhex(VECTORS["public_keys"][name])
    key = PublicKey.from_protobuf_untrusted(encoded)
    assert key.type is KeyType[name.upper()]
    assert key.to_protobuf() == encoded
    assert key == PublicKey.from_protobuf_untrusted(encoded)
    assert hash(key) == hash(PublicKey.from_protobuf_untrusted(encoded))
    for signature in (b"", bytes(64), bytes(70), b"\x30\x06\x02\x01\x01\x02\x01\x01", bytes(512), bytes(5000)):
        assert not key.verify(b"data", signature)


def test_private_key_vector() -> None:
    encoded = bytes.fromhex(VECTORS["ed25519_private_key"])
    key = PrivateKey.from_protobuf(encoded)
    assert key.to_protobuf() == encoded
    assert key.public_key.to_protobuf().hex() == VECTORS["public_keys"]["ed25519"]
    old_form = bytes.fromhex("08011260") + encoded[4:] + encoded[-32:]
    assert PrivateKey.from_protobuf(old_form).seed == key.seed


def test_ed25519_signatures() -> None:
    # RFC 8032, section 7.1, test 3
    key = PrivateKey.generate(bytes.fromhex("c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7"))
    signature = bytes.fromhex(
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
        "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a"
    )
    assert key.sign(b"\xaf\x82") == signature
    assert key.public_key.verify(b"\xaf\x82", signature)
    assert not key.public_key.verify(b"\xaf\x83", signature)
    assert not key.public_key.verify(b"\xaf\x82", signature[:-1])


def test_rsa_signatures() -> None:
    private = rsa.generate_private_key(65537, 2048)
    key = _foreign(KeyType.RSA, private.public_key().public_bytes(DER, SPKI))
    signature = private.sign(b"data", padding.PKCS1v15(), hashes.SHA256())
    assert key.verify(b"data", signature)
    assert not key.verify(b"date", signature)


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1(), ec.SECP256K1()])
def test_elliptic_curve_signatures(curve: ec.EllipticCurve) -> None:
    private = ec.generate_private_key(curve)
    public = private.public_key()
    if isinstance(curve, ec.SECP256K1):
        point = public.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint)
        key = _foreign(KeyType.SECP256K1, point)
    else:
        key = _foreign(KeyType.ECDSA, public.public_bytes(DER, SPKI))
    signature = private.sign(b"data", ec.ECDSA(hashes.SHA256()))
    assert key.verify(b"data", signature)
    assert not key.verify(b"date", signature)


def test_refused_public_keys() -> None:
    small = rsa.generate_private_key(65537, 1024).public_key().public_bytes(DER, SPKI)
    on_k1 = ec.generate_private_key(ec.SECP256K1()).public_key().public_bytes(DER, SPKI)
    on_224 = ec.generate_private_key(ec.SECP224R1()).public_key().public_bytes(DER, SPKI)
    on_256 = ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(DER, SPKI)
    huge = rsa.RSAPublicNumbers((1 << 31) + 1, (1 << 2047) + 1).public_key().public_bytes(DER, SPKI)
    for key_type, data, reason in [
        (KeyType.RSA, small, "1024 bits"),
        (KeyType.RSA, huge, "huge exponent"),
        (KeyType.RSA, on_256, "no RSA key"),
        (KeyType.RSA, b"", "malformed RSA"),
        (KeyType.ECDSA, on_k1, "secp256k1"),
        (KeyType.ECDSA, on_224, "secp224r1"),
        (KeyType.ECDSA, small, "no ECDSA key"),
        (KeyType.SECP256K1, bytes(33), "malformed SECP256K1"),
        (KeyType.SECP256K1, b"\x04" + bytes(64), "65 bytes"),
        (KeyType.ED25519, bytes(31), "31 bytes"),
    ]:
        with pytest.raises(RemoteProtocolError, match=reason):
            _foreign(key_type, data)
    for encoded, reason in [
        (b"", "field type"),
        (b"\x08\x01", "field data"),
        (b"\x08\x07\x12\x00", "unknown key type 7"),
        (bytes(3000), "over 2048"),
    ]:
        with pytest.raises(RemoteProtocolError, match=reason):
            PublicKey.from_protobuf_untrusted(encoded)


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"", "without its field type"),
        (b"\x08\x00\x12\x00", "key type 0"),
        (b"\x08\x01\x12\x00", "64 bytes, not 0"),
        (b"\x08\x01\x12\x40" + bytes(64), "does not fit"),
        (b"\x08\x01\x12\x60" + bytes(64) + b"\x01" * 32, "64 bytes, not 96"),
    ],
)
def test_damaged_private_keys(encoded: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        PrivateKey.from_protobuf(encoded)


def test_private_key_does_not_leak() -> None:
    key = PrivateKey.generate(b"s" * 32)
    assert key.seed.hex() not in repr(key)
    with pytest.raises(TypeError):
        key.__reduce_ex__(4)  # the way into a pickle, a copy, another process
    with pytest.raises(ValueError, match="32 bytes"):
        PrivateKey.generate(b"short")


def test_peer_id_forms() -> None:
    key = PublicKey.from_protobuf_untrusted(bytes.fromhex(VECTORS["public_keys"]["ed25519"]))
    peer = PeerId.from_public_key(key)
    assert str(peer) == "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"
    assert peer.to_bytes() == b"\x00\x24" + key.to_protobuf()
    assert peer.to_cid_text().startswith("bafzaa")
    assert peer.short() == "Umo7R3pq"
    assert PeerId.parse(str(peer)) == PeerId.parse(peer.to_cid_text()) == PeerId.from_bytes_untrusted(peer.to_bytes())
    assert peer.public_key() == key
    assert peer.matches(key)
    assert len({peer, PeerId.parse(str(peer))}) == 1


def test_peer_id_of_a_long_key_is_its_hash() -> None:
    key = PublicKey.from_protobuf_untrusted(bytes.fromhex(VECTORS["public_keys"]["rsa"]))
    peer = PeerId.from_public_key(key)
    assert str(peer).startswith("Qm")
    assert peer.public_key() is None
    assert PeerId.parse(peer.to_cid_text()) == peer


def test_peer_id_specification_examples() -> None:
    cid_form = PeerId.parse("bafzbeie5745rpv2m6tjyuugywy4d5ewrqgqqhfnf445he3omzpjbx5xqxe")
    assert cid_form == PeerId.parse("QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N")
    assert PeerId.parse("12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA").public_key() is not None
    secp = PeerId.from_public_key(PublicKey.from_protobuf_untrusted(bytes.fromhex(VECTORS["public_keys"]["secp256k1"])))
    assert str(secp) == "16Uiu2HAmLhLvBoYaoZfaMUKuibM6ac163GwKY74c5kiSLg5KvLpY"


def test_peer_ids_are_immutable_and_ordered() -> None:
    first, second = (PeerId.from_public_key(PrivateKey.generate(bytes([n]) * 32).public_key) for n in (1, 2))
    assert sorted([first, second]) == sorted([second, first], key=PeerId.to_bytes)
    with pytest.raises(AttributeError):
        first._bytes = b""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not a peer id: it is neither base 58"),
        ("alice", "nor a content id"),
        ("/ip4/192.0.2.1/tcp/4101", "nor a content id"),
        ("12D3KooW", "multihash|cut off|digest"),
        ("Qm0", "base 58"),
        ("bafkreibm6jg3ux5qumhcn2b3flc3tyu6dmlb4xa7u5bf44yegnrjhc4yeq", "0x55, not libp2p-key"),
        ("1" * 50, "in it|behind"),
    ],
)
def test_refused_peer_ids(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        PeerId.parse(text)
    assert "\n" not in str(caught.value)


def _foreign(key_type: KeyType, data: bytes) -> PublicKey:
    length = len(data)
    prefix = bytes([length]) if length < 128 else bytes([length & 0x7F | 0x80, length >> 7])
    return PublicKey.from_protobuf_untrusted(bytes([0x08, key_type, 0x12]) + prefix + data)
