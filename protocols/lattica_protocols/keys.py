"""Identity keys: our own is Ed25519; of others we also verify RSA, ECDSA and secp256k1.

Wire (libp2p peer-ids specification), for public and private keys alike:

    message Key { required enum Type = 1; required bytes Data = 2; }     RSA 0, Ed25519 1, Secp256k1 2, ECDSA 3

    Ed25519    public: 32 bytes, so the whole is 08 01 12 20 || key; private: seed (32) || public key (32)
    RSA        PKIX DER; signatures PKCS#1 v1.5 over SHA-256
    Secp256k1  compressed point, 33 bytes; signatures DER over SHA-256
    ECDSA      PKIX DER, curves P-256, P-384, P-521; signatures DER over SHA-256

The encoding is deterministic (minimal varints, order of numbers, nothing else), because peer ids are hashes of it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TypeAlias

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import MAX_PUBLIC_KEY_BYTES, MAX_RSA_BITS, MAX_SIGNATURE_BYTES, MIN_RSA_BITS
from lattica_protocols.protobuf import Kind, Message, required

_Verifier: TypeAlias = VerifyKey | rsa.RSAPublicKey | ec.EllipticCurvePublicKey

MAX_RSA_EXPONENT = (1 << 31) - 1
"""As Go. A stranger's huge exponent would make each verification slow."""


class KeyType(enum.IntEnum):
    """The numbers of the protobuf enum."""

    RSA = 0
    ED25519 = 1
    SECP256K1 = 2
    ECDSA = 3


@dataclass(frozen=True, slots=True)
class _KeyMessage(Message):
    type: int = required(1, Kind.ENUM)
    data: bytes = required(2, Kind.BYTES, max_bytes=MAX_PUBLIC_KEY_BYTES)


@dataclass(frozen=True, slots=True)
class PublicKey:
    """Somebody's identity key. Equal and hashable by type and bytes."""

    type: KeyType
    data: bytes
    """The key as it stands in the protobuf, by type (see the module)."""
    _verifier: _Verifier = field(repr=False, compare=False)

    @classmethod
    def ed25519(cls, key: bytes) -> PublicKey:
        """From the 32 bytes of an Ed25519 key. `ValueError` for another length."""
        return cls(KeyType.ED25519, bytes(key), VerifyKey(bytes(key)))

    @classmethod
    def from_protobuf_untrusted(cls, data: bytes) -> PublicKey:
        """Parse and check the key, so that `verify` can only say yes or no."""
        if len(data) > MAX_PUBLIC_KEY_BYTES:
            raise RemoteProtocolError(f"public key of {len(data)} bytes is over {MAX_PUBLIC_KEY_BYTES}")
        message = _KeyMessage.decode_untrusted(data)
        try:
            key_type = KeyType(message.type)
        except ValueError:
            raise RemoteProtocolError(f"unknown key type {message.type}") from None
        return cls(key_type, message.data, _load_verifier_untrusted(key_type, message.data))

    def to_protobuf(self) -> bytes:
        """The deterministic encoding that peer ids are made of."""
        return _KeyMessage(type=self.type, data=self.data).encode()

    def verify(self, data: bytes, signature: bytes) -> bool:
        """Whether `signature` over `data` is of this key. Never raises for whatever bytes come in."""
        if len(signature) > MAX_SIGNATURE_BYTES:
            return False
        verifier = self._verifier
        try:
            if isinstance(verifier, VerifyKey):
                if len(signature) != 64:
                    return False
                verifier.verify(data, signature)
            elif isinstance(verifier, rsa.RSAPublicKey):
                verifier.verify(signature, data, padding.PKCS1v15(), hashes.SHA256())
            else:
                verifier.verify(signature, data, ec.ECDSA(hashes.SHA256()))
        except (BadSignatureError, InvalidSignature):
            return False
        return True


class PrivateKey:
    """Our identity: an Ed25519 key. Its text form never shows the secret."""

    __slots__ = ("_signing_key", "public_key")

    def __init__(self, seed: bytes) -> None:
        self._signing_key = SigningKey(seed)
        self.public_key = PublicKey.ed25519(bytes(self._signing_key.verify_key))

    @classmethod
    def generate(cls, seed: bytes) -> PrivateKey:
        """The key that 32 bytes of entropy make. `ValueError` for another length."""
        if len(seed) != 32:
            raise ValueError(f"an Ed25519 seed has 32 bytes, not {len(seed)}")
        return cls(bytes(seed))

    @classmethod
    def from_protobuf(cls, data: bytes) -> PrivateKey:
        """Read a stored key (64 or, from old files, 96 bytes of data). `ValueError` when it is damaged."""
        try:
            message = _KeyMessage.decode_untrusted(data)
        except RemoteProtocolError as error:
            raise ValueError(f"not a libp2p private key: {error}") from None
        if message.type != KeyType.ED25519:
            raise ValueError(f"key type {message.type} is not supported for our own key, only Ed25519")
        secret = message.data
        if len(secret) == 96 and secret[32:64] == secret[64:]:
            secret = secret[:64]
        if len(secret) != 64:
            raise ValueError(f"an Ed25519 private key has 64 bytes, not {len(secret)}")
        key = cls(secret[:32])
        if key.public_key.data != secret[32:]:
            raise ValueError("the private key does not fit the public key stored with it")
        return key

    def to_protobuf(self) -> bytes:
        """The stored form: type Ed25519, seed || public key."""
        return _KeyMessage(type=KeyType.ED25519, data=self.seed + self.public_key.data).encode()

    @property
    def seed(self) -> bytes:
        """The 32 secret bytes."""
        return bytes(self._signing_key)

    def sign(self, data: bytes) -> bytes:
        """64 bytes, deterministic (RFC 8032)."""
        return self._signing_key.sign(data).signature

    def __repr__(self) -> str:
        return f"PrivateKey(public={self.public_key.data.hex()})"

    def __reduce__(self) -> str:
        raise TypeError("a private key is not to be pickled")


def _load_verifier_untrusted(key_type: KeyType, data: bytes) -> _Verifier:
    try:
        match key_type:
            case KeyType.ED25519:
                if len(data) != 32:
                    raise RemoteProtocolError(f"Ed25519 key of {len(data)} bytes, not 32")
                return VerifyKey(data)
            case KeyType.SECP256K1:
                if len(data) != 33:
                    raise RemoteProtocolError(f"secp256k1 key of {len(data)} bytes, not 33")
                return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256K1(), data)
            case KeyType.RSA | KeyType.ECDSA:
                key = serialization.load_der_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise RemoteProtocolError(f"malformed {key_type.name} key") from None
    if key_type is KeyType.RSA and isinstance(key, rsa.RSAPublicKey):
        if not MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS:
            raise RemoteProtocolError(f"RSA key of {key.key_size} bits, not {MIN_RSA_BITS} to {MAX_RSA_BITS}")
        if key.public_numbers().e > MAX_RSA_EXPONENT:
            raise RemoteProtocolError("RSA key with a huge exponent")
        return key
    if key_type is KeyType.ECDSA and isinstance(key, ec.EllipticCurvePublicKey):
        if not isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1 | ec.SECP521R1):
            raise RemoteProtocolError(f"ECDSA key on the curve {key.curve.name}")
        return key
    raise RemoteProtocolError(f"the key is no {key_type.name} key")
