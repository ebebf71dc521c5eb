"""Which values are valid under which keys, and which of two valid ones is the newer.

A key is `/namespace/rest`. Two namespaces have validators, others are refused (or, for networks that want it, anything
is taken: the Rust lattica stores unsigned values under bare keys).

`/lattica/<publisher>/<name>`: the publisher's peer id in base 58 and a name of 1 to 128 bytes of printable UTF-8 (it
may contain slashes). The value is a signed envelope (libp2p RFC 2, see `envelope`) with

    domain        `lattica-dht-record`          never sent, part of what is signed
    payload type  `/lattica/dht-record/1`       as bytes
    payload       protobuf: 1 key bytes, 2 value bytes, 3 sequence uint64, 4 expires uint64 (Unix seconds)

and must be encoded canonically (as `protobuf.Message.encode` writes it, no other fields): a signature covers the
payload only, so otherwise whoever passes a record on could make other bytes of it. It is valid when the signer is the
publisher named in the key, the key in the payload is the key asked for, and it has not expired and does not expire
later than 30 days from now. The higher (sequence, expires, bytes) wins. specs/dht-records.md has vectors.

`/pk/<multihash>`: the public key (protobuf) of the peer id with these bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from lattica_protocols.envelope import SignedEnvelope
from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.keys import PrivateKey, PublicKey
from lattica_protocols.limits import (
    KAD_MAX_KEY_BYTES,
    KAD_MAX_NAME_BYTES,
    KAD_MAX_RECORD_LIFETIME,
    KAD_MAX_VALUE_BYTES,
)
from lattica_protocols.peer_id import PeerId
from lattica_protocols.protobuf import Kind, Message, required

DOMAIN = "lattica-dht-record"
PAYLOAD_TYPE = b"/lattica/dht-record/1"
NAMESPACE = b"/lattica/"
PUBLIC_KEY_NAMESPACE = b"/pk/"

Rank = tuple[int, int, bytes]
"""Orders the values of one key; the highest wins."""


@dataclass(frozen=True, slots=True)
class SignedValue:
    """A verified `/lattica/` record."""

    publisher: PeerId
    name: str
    value: bytes
    sequence: int
    expires: int
    """Unix seconds."""


class Validator(Protocol):
    """The rules of one namespace."""

    def check_untrusted(self, key: bytes, value: bytes, unix_now: float) -> None:
        """Raise `RemoteProtocolError` when `value` may not stand under `key`."""

    def rank(self, key: bytes, value: bytes) -> Rank:
        """Of a value that was checked."""

    def expires(self, key: bytes, value: bytes) -> float | None:
        """Unix seconds at which a checked value ends, `None`: whenever the holder likes."""


# -- /lattica/ ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _Payload(Message):
    key: bytes = required(1, Kind.BYTES, max_bytes=KAD_MAX_KEY_BYTES)
    value: bytes = required(2, Kind.BYTES, max_bytes=KAD_MAX_VALUE_BYTES)
    sequence: int = required(3, Kind.UINT)
    expires: int = required(4, Kind.UINT)


def record_key(publisher: PeerId, name: str) -> bytes:
    """The key of `publisher`'s value `name`. `LocalProtocolError` for a name that is not allowed."""
    raw = name.encode()
    if not 0 < len(raw) <= KAD_MAX_NAME_BYTES or not name.isprintable():
        raise LocalProtocolError(f"a record name has 1 to {KAD_MAX_NAME_BYTES} bytes of printable text: {name[:80]!r}")
    return NAMESPACE + str(publisher).encode() + b"/" + raw


def seal_value(private_key: PrivateKey, name: str, value: bytes, *, sequence: int, expires: int) -> tuple[bytes, bytes]:
    """The key and the signed record of our own value. `expires` in Unix seconds.

    `LocalProtocolError`: the name is not allowed, or the record would be over `KAD_MAX_VALUE_BYTES`.
    """
    key = record_key(PeerId.from_public_key(private_key.public_key), name)
    payload = _Payload(key=key, value=value, sequence=sequence, expires=expires).encode()
    record = SignedEnvelope.seal(private_key, DOMAIN, PAYLOAD_TYPE, payload).to_bytes()
    if len(record) > KAD_MAX_VALUE_BYTES:
        raise LocalProtocolError(
            f"a value of {len(value)} bytes is too long: with its signature it has {len(record)} bytes, "
            f"and {KAD_MAX_VALUE_BYTES} are allowed"
        )
    return key, record


def open_value_untrusted(key: bytes, record: bytes) -> SignedValue:
    """Verify a `/lattica/` record. Whether it has expired is the caller's question."""
    if len(record) > KAD_MAX_VALUE_BYTES or len(key) > KAD_MAX_KEY_BYTES:
        raise RemoteProtocolError(f"record of {len(record)} bytes is over {KAD_MAX_VALUE_BYTES}")
    return _open_untrusted(bytes(key), bytes(record))


@lru_cache(maxsize=256)
def _open_untrusted(key: bytes, record: bytes) -> SignedValue:
    """Cached: a lookup gets the same record from many peers, and ranks it again and again."""
    publisher, name = _split_untrusted(key)
    envelope = SignedEnvelope.open_untrusted(record, DOMAIN, PAYLOAD_TYPE)
    payload = _Payload.decode_untrusted(envelope.payload)
    if envelope.to_bytes() != record or payload.encode() != envelope.payload:
        raise RemoteProtocolError("record is not encoded canonically")
    if payload.key != key:
        raise RemoteProtocolError("record was made for another key")
    if envelope.signer != publisher:
        raise RemoteProtocolError(f"record signed by {envelope.signer}, who does not own the key")
    return SignedValue(publisher, name, payload.value, payload.sequence, payload.expires)


def _split_untrusted(key: bytes) -> tuple[PeerId, str]:
    text, slash, raw = key.removeprefix(NAMESPACE).partition(b"/")
    try:
        publisher, name = PeerId.parse(text.decode("ascii")), raw.decode()
    except ValueError:
        raise RemoteProtocolError("key is not /lattica/<peer id>/<name>") from None
    if not slash or not 0 < len(raw) <= KAD_MAX_NAME_BYTES or not name.isprintable():
        raise RemoteProtocolError("key is not /lattica/<peer id>/<name>")
    if str(publisher).encode() != text:
        raise RemoteProtocolError("the peer id in the key is not in base 58")
    return publisher, name


class SignedValueValidator:
    """`/lattica/`."""

    def check_untrusted(self, key: bytes, value: bytes, unix_now: float) -> None:
        record = open_value_untrusted(key, value)
        if record.expires <= unix_now:
            raise RemoteProtocolError("record has expired")
        if record.expires > unix_now + KAD_MAX_RECORD_LIFETIME:
            raise RemoteProtocolError("record expires too far in the future")

    def rank(self, key: bytes, value: bytes) -> Rank:
        record = open_value_untrusted(key, value)
        return record.sequence, record.expires, value

    def expires(self, key: bytes, value: bytes) -> float | None:
        return float(open_value_untrusted(key, value).expires)


# -- /pk/ -----------------------------------------------------------------------------------------------------------
class PublicKeyValidator:
    """`/pk/`."""

    def check_untrusted(self, key: bytes, value: bytes, unix_now: float) -> None:
        peer = PeerId.from_bytes_untrusted(key.removeprefix(PUBLIC_KEY_NAMESPACE))
        if not peer.matches(PublicKey.from_protobuf_untrusted(value)):
            raise RemoteProtocolError("public key does not fit the peer id in its key")

    def rank(self, key: bytes, value: bytes) -> Rank:
        return 0, 0, b""

    def expires(self, key: bytes, value: bytes) -> float | None:
        return None


# -- all of them ----------------------------------------------------------------------------------------------------
class AnyValue:
    """No rules: anybody may overwrite anything, the last one wins at each peer and the first answer in a lookup."""

    def check_untrusted(self, key: bytes, value: bytes, unix_now: float) -> None:
        return None

    def rank(self, key: bytes, value: bytes) -> Rank:
        return 0, 0, b""

    def expires(self, key: bytes, value: bytes) -> float | None:
        return None


DEFAULT_VALIDATORS: Mapping[bytes, Validator] = {
    NAMESPACE: SignedValueValidator(),
    PUBLIC_KEY_NAMESPACE: PublicKeyValidator(),
}


class Validators:
    """The rules of all namespaces that a node takes part in."""

    def __init__(
        self, by_namespace: Mapping[bytes, Validator] = DEFAULT_VALIDATORS, *, accept_any: bool = False
    ) -> None:
        """`accept_any`: keys of no known namespace may have any value. Only for networks that rely on it."""
        self._by_namespace = dict(by_namespace)
        self._other: Validator | None = AnyValue() if accept_any else None

    def check_untrusted(self, key: bytes, value: bytes, unix_now: float) -> None:
        """Raise `RemoteProtocolError` with the reason when `value` may not stand under `key`."""
        if not 0 < len(key) <= KAD_MAX_KEY_BYTES:
            raise RemoteProtocolError(f"key of {len(key)} bytes, 1 to {KAD_MAX_KEY_BYTES} are allowed")
        if len(value) > KAD_MAX_VALUE_BYTES:
            raise RemoteProtocolError(f"value of {len(value)} bytes is over {KAD_MAX_VALUE_BYTES}")
        validator = self._validator(key)
        if validator is None:
            raise RemoteProtocolError("no rules for keys of this namespace")
        validator.check_untrusted(key, value, unix_now)

    def refusal(self, key: bytes, value: bytes, unix_now: float) -> str | None:
        """Why `value` may not stand under `key`, `None` when it may."""
        try:
            self.check_untrusted(key, value, unix_now)
        except RemoteProtocolError as error:
            return str(error)
        return None

    def better(self, key: bytes, new: bytes, old: bytes) -> bool:
        """Whether `new` beats `old`; both were checked. Equal ranks do not."""
        validator = self._validator(key)
        return validator is not None and validator.rank(key, new) > validator.rank(key, old)

    def expires(self, key: bytes, value: bytes) -> float | None:
        """Unix seconds at which a checked value ends by itself."""
        validator = self._validator(key)
        return None if validator is None else validator.expires(key, value)

    def _validator(self, key: bytes) -> Validator | None:
        for namespace, validator in self._by_namespace.items():
            if key.startswith(namespace):
                return validator
        return self._other
