"""The certificate by which libp2p peers prove their identity inside TLS 1.3 (QUIC, and `/tls/1.0.0` on TCP).

A peer makes a key for its certificate that has nothing to do with its identity, and a self-signed X.509 certificate
with the extension 1.3.6.1.4.1.53594.1.1:

    SignedKey ::= SEQUENCE { publicKey OCTET STRING, signature OCTET STRING }      (DER)
    publicKey = the identity key's protobuf
    signature = by the identity key over "libp2p-tls-handshake:" || the certificate key's SubjectPublicKeyInfo (DER)

What has to be checked (https://github.com/libp2p/specs/blob/master/tls/tls.md): exactly one certificate in the chain,
inside its dates, signed by itself, the extension there once, its signature valid, no other critical extension. Whether
the peer id is the expected one is for the caller. ALPN is `libp2p`, there is no SNI, and both sides show a certificate.
"""

from __future__ import annotations

import datetime
import warnings
from typing import Final, TypeAlias

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import NameOID

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.keys import PrivateKey, PublicKey
from lattica_protocols.limits import MAX_TLS_CERTIFICATE_BYTES

ALPN: Final = "libp2p"
EXTENSION_OID: Final = x509.ObjectIdentifier("1.3.6.1.4.1.53594.1.1")
SIGNATURE_PREFIX: Final = b"libp2p-tls-handshake:"

CLOCK_SKEW_SECONDS: Final = 86_400
"""Our certificate is valid from a day ago: clocks of home machines are wrong by hours, rarely by days."""
LIFETIME_SECONDS: Final = 100 * 365 * 86_400
"""As go-libp2p. The certificate lives as long as the process; its dates protect nothing."""

_CertificateKey: TypeAlias = ec.EllipticCurvePrivateKey


def make_certificate(
    key: PrivateKey, certificate_key: _CertificateKey, *, serial: int, unix_now: float
) -> x509.Certificate:
    """A certificate that proves `key`.

    `certificate_key` is a fresh P-256 key and `serial` a random positive number below 2**159: entropy is the caller's.
    """
    spki = _subject_public_key_info(certificate_key.public_key())
    signed_key = _encode_signed_key(key.public_key.to_protobuf(), key.sign(SIGNATURE_PREFIX + spki))
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "libp2p")])
    now = datetime.datetime.fromtimestamp(int(unix_now), datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(certificate_key.public_key())
        .serial_number(serial)
        .not_valid_before(now - datetime.timedelta(seconds=CLOCK_SKEW_SECONDS))
        .not_valid_after(now + datetime.timedelta(seconds=LIFETIME_SECONDS))
        .add_extension(x509.UnrecognizedExtension(EXTENSION_OID, signed_key), critical=True)
        .sign(certificate_key, hashes.SHA256())
    )


def verify_certificate_untrusted(certificate: x509.Certificate | bytes, unix_now: float) -> PublicKey:
    """The identity key that a certificate (parsed, or DER) proves. The caller checks that the chain has no other."""
    der = certificate if isinstance(certificate, bytes) else certificate.public_bytes(serialization.Encoding.DER)
    if len(der) > MAX_TLS_CERTIFICATE_BYTES:
        raise RemoteProtocolError(f"certificate of {len(der)} bytes is over {MAX_TLS_CERTIFICATE_BYTES}")
    try:
        parsed = _load_untrusted(certificate) if isinstance(certificate, bytes) else certificate
        signed_key = _read_extension_untrusted(parsed)
        not_before, not_after = parsed.not_valid_before_utc, parsed.not_valid_after_utc
        spki = _subject_public_key_info(parsed.public_key())
        parsed.verify_directly_issued_by(parsed)
    except InvalidSignature:
        raise RemoteProtocolError("the certificate is not signed by its own key") from None
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.InvalidVersion) as error:
        raise RemoteProtocolError(f"malformed certificate: {error}") from None
    if not not_before.timestamp() <= unix_now <= not_after.timestamp():
        raise RemoteProtocolError(f"the certificate is valid from {not_before} to {not_after} only")
    encoded_key, signature = _decode_signed_key_untrusted(signed_key)
    key = PublicKey.from_protobuf_untrusted(encoded_key)
    if not key.verify(SIGNATURE_PREFIX + spki, signature):
        raise RemoteProtocolError("the certificate's identity signature is wrong")
    return key


def _load_untrusted(der: bytes) -> x509.Certificate:
    # Serial numbers that are not positive draw a warning. They mean nothing here, and a stranger must not fill our log.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CryptographyDeprecationWarning)
        return x509.load_der_x509_certificate(der)


def _read_extension_untrusted(certificate: x509.Certificate) -> bytes:
    signed_key = None
    for extension in certificate.extensions:
        if extension.oid == EXTENSION_OID and isinstance(extension.value, x509.UnrecognizedExtension):
            signed_key = extension.value.value
        elif extension.critical:
            raise RemoteProtocolError(f"critical certificate extension {extension.oid.dotted_string}")
    if signed_key is None:
        raise RemoteProtocolError("the certificate has no libp2p extension")
    return signed_key


def _subject_public_key_info(key: object) -> bytes:
    # All public key classes of `cryptography` have it; their union type has no common base.
    return key.public_bytes(  # type: ignore[attr-defined, no-any-return]
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


# -- the two DER shapes of the extension ----------------------------------------------------------------------
def _encode_signed_key(public_key: bytes, signature: bytes) -> bytes:
    return _encode_der(0x30, _encode_der(0x04, public_key) + _encode_der(0x04, signature))


def _encode_der(tag: int, content: bytes) -> bytes:
    length = len(content)
    if length < 128:
        return bytes((tag, length)) + content
    size = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(size))) + size + content


def _decode_signed_key_untrusted(data: bytes) -> tuple[bytes, bytes]:
    sequence, rest = _decode_der_untrusted(data, 0x30)
    public_key, sequence = _decode_der_untrusted(sequence, 0x04)
    signature, sequence = _decode_der_untrusted(sequence, 0x04)
    if rest or sequence:
        raise RemoteProtocolError("stray bytes in the libp2p certificate extension")
    return public_key, signature


def _decode_der_untrusted(data: bytes, tag: int) -> tuple[bytes, bytes]:
    """(content, rest) of one element; lengths over two bytes cannot be right inside a bounded certificate."""
    if len(data) < 2 or data[0] != tag:
        raise RemoteProtocolError("malformed libp2p certificate extension")
    length, start = data[1], 2
    if length >= 0x80:
        count = length & 0x7F
        if not 1 <= count <= 2:
            raise RemoteProtocolError("malformed length in the libp2p certificate extension")
        start = 2 + count
        length = int.from_bytes(data[2:start], "big")
        if length < (0x80 if count == 1 else 0x100):
            raise RemoteProtocolError("length in the libp2p certificate extension is not minimal")
    if start + length > len(data):
        raise RemoteProtocolError("libp2p certificate extension is cut off")
    return data[start : start + length], data[start + length :]
