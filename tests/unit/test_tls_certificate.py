"""Certificates of libp2p's TLS, by the vectors of its specification."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID

from lattica_protocols import tls
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.keys import PrivateKey
from lattica_protocols.peer_id import PeerId

NOW = 1_750_000_000.0
DAY = 86_400
KEY = PrivateKey.generate(b"k" * 32)
CERTIFICATE_KEY = ec.derive_private_key(12345, ec.SECP256R1())
VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "identity.json").read_text())["tls_certificates"]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_specification_vectors(vector: dict[str, Any]) -> None:
    der = bytes.fromhex(vector["der"])
    if vector["peer_id"] is None:
        with pytest.raises(RemoteProtocolError, match="identity signature is wrong"):
            tls.verify_certificate_untrusted(der, NOW)
    else:
        assert str(PeerId.from_public_key(tls.verify_certificate_untrusted(der, NOW))) == vector["peer_id"]


def test_our_certificate() -> None:
    certificate = tls.make_certificate(KEY, CERTIFICATE_KEY, serial=7, unix_now=NOW)
    assert tls.verify_certificate_untrusted(certificate, NOW) == KEY.public_key
    assert tls.verify_certificate_untrusted(_der(certificate), NOW) == KEY.public_key
    assert len(_der(certificate)) < 500
    assert certificate.serial_number == 7


@pytest.mark.parametrize("seconds", [-2 * DAY, 101 * 365 * DAY])
def test_outside_its_dates(seconds: float) -> None:
    certificate = tls.make_certificate(KEY, CERTIFICATE_KEY, serial=7, unix_now=NOW)
    with pytest.raises(RemoteProtocolError, match="valid from"):
        tls.verify_certificate_untrusted(certificate, NOW + seconds)


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def _good_extension(spki_of: Any = CERTIFICATE_KEY) -> x509.UnrecognizedExtension:
    spki = tls._subject_public_key_info(spki_of.public_key())
    signature = KEY.sign(tls.SIGNATURE_PREFIX + spki)
    return x509.UnrecognizedExtension(
        tls.EXTENSION_OID, tls._encode_signed_key(KEY.public_key.to_protobuf(), signature)
    )


def _build(
    *extensions: tuple[x509.ExtensionType, bool], key: Any = CERTIFICATE_KEY, signer: Any = None
) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.fromtimestamp(NOW, datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    signer = signer or key
    return builder.sign(signer, None if isinstance(signer, ed25519.Ed25519PrivateKey) else hashes.SHA256())


@pytest.mark.parametrize("critical", [True, False])
def test_extension_may_be_critical_or_not_and_others_are_ignored(critical: bool) -> None:
    other = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"anything")
    certificate = _build((other, False), (_good_extension(), critical))
    assert tls.verify_certificate_untrusted(certificate, NOW) == KEY.public_key


def test_an_ed25519_certificate_key() -> None:
    key = ed25519.Ed25519PrivateKey.from_private_bytes(b"c" * 32)
    assert tls.verify_certificate_untrusted(_build((_good_extension(key), True), key=key), NOW) == KEY.public_key


def test_refused_certificates() -> None:
    stranger = ec.derive_private_key(999, ec.SECP256R1())
    critical = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"anything")
    stray = x509.UnrecognizedExtension(tls.EXTENSION_OID, _good_extension().value + b"x")
    cut_off = x509.UnrecognizedExtension(tls.EXTENSION_OID, _good_extension().value[:-1])
    good = _der(_build((_good_extension(), True)))
    cases: list[tuple[x509.Certificate | bytes, str]] = [
        (_build(), "no libp2p extension"),
        (_build((_good_extension(), True), (critical, True)), "critical certificate extension 1.2.3.4"),
        (_build((_good_extension(), True), signer=stranger), "not signed by its own key"),
        (_build((_good_extension(stranger), True)), "identity signature is wrong"),
        (_build((stray, True)), "stray bytes"),
        (_build((cut_off, True)), "cut off"),
        (good[:-1], "malformed certificate"),
        (b"", "malformed certificate"),
        (bytes(9000), "over 8192"),
    ]
    for certificate, reason in cases:
        with pytest.raises(RemoteProtocolError, match=reason):
            tls.verify_certificate_untrusted(certificate, NOW)


def test_a_negative_serial_number_draws_no_warning() -> None:
    key = ec.derive_private_key(5, ec.SECP256R1())
    der = _der(_build((_good_extension(key), True), key=key))
    with pytest.raises(RemoteProtocolError, match="not signed by its own key"):
        tls.verify_certificate_untrusted(der.replace(b"\x02\x01\x01", b"\x02\x01\xff", 1), NOW)


def test_extension_twice_is_refused() -> None:
    other = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.53594.1.2"), b"anything")
    der = _der(_build((_good_extension(), True), (other, False)))
    last_arc_changed = der.replace(bytes.fromhex("2b0601040183a25a0102"), bytes.fromhex("2b0601040183a25a0101"))
    assert der != last_arc_changed
    with pytest.raises(RemoteProtocolError, match=r"malformed certificate: .*[Dd]uplicate"):
        tls.verify_certificate_untrusted(last_arc_changed, NOW)


@pytest.mark.parametrize(
    ("extension", "reason"),
    [
        ("", "malformed libp2p"),
        ("3000", "malformed libp2p"),
        ("31020400", "malformed libp2p"),
        ("30830000040400", "malformed length"),
        ("3080", "malformed length"),
        ("308104" + "04000400", "not minimal"),
        ("3082000404000400", "not minimal"),
        ("3005" + "0400" + "0400" + "00", "stray"),
        ("3004" + "0400" + "0400", "field type"),
    ],
)
def test_malformed_extension(extension: str, reason: str) -> None:
    value = x509.UnrecognizedExtension(tls.EXTENSION_OID, bytes.fromhex(extension))
    with pytest.raises(RemoteProtocolError, match=reason):
        tls.verify_certificate_untrusted(_build((value, True)), NOW)
