"""Signed envelopes (libp2p RFC 2): a payload with its signer, safe against being replayed as something else.

    message Envelope { bytes/message public_key = 1; bytes payload_type = 2; bytes payload = 3; bytes signature = 5; }

The signature is over, for each of domain, payload type and payload: `uvarint(length) || bytes`. The domain is not sent;
both sides know it. Peer records: domain `libp2p-peer-record`, type 03 01 (go-libp2p core/peer/record.go). Relay
vouchers: domain `libp2p-relay-rsvp`, type 03 02.
"""

from __future__ import annotations

from dataclasses import dataclass

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.keys import PrivateKey, PublicKey
from lattica_protocols.limits import MAX_ENVELOPE_BYTES, MAX_PUBLIC_KEY_BYTES, MAX_SIGNATURE_BYTES
from lattica_protocols.peer_id import PeerId
from lattica_protocols.protobuf import Kind, Message, required
from lattica_protocols.varint import encode_uvarint


@dataclass(frozen=True, slots=True)
class _EnvelopeMessage(Message):
    public_key: bytes = required(1, Kind.BYTES, max_bytes=MAX_PUBLIC_KEY_BYTES)
    payload_type: bytes = required(2, Kind.BYTES, max_bytes=64)
    payload: bytes = required(3, Kind.BYTES)
    signature: bytes = required(5, Kind.BYTES, max_bytes=MAX_SIGNATURE_BYTES)


@dataclass(frozen=True, slots=True)
class SignedEnvelope:
    """An envelope whose signature is ours or was verified: there is no other way to get one."""

    public_key: PublicKey
    payload_type: bytes
    payload: bytes
    signature: bytes

    @classmethod
    def seal(cls, key: PrivateKey, domain: str, payload_type: bytes, payload: bytes) -> SignedEnvelope:
        """Sign `payload` as `payload_type` in `domain`."""
        signature = key.sign(_signed_bytes(domain, payload_type, payload))
        return cls(key.public_key, payload_type, payload, signature)

    @classmethod
    def open_untrusted(cls, data: bytes, domain: str, payload_type: bytes) -> SignedEnvelope:
        """Parse and verify: another type or a signature that does not fit the domain is refused."""
        if len(data) > MAX_ENVELOPE_BYTES:
            raise RemoteProtocolError(f"signed envelope of {len(data)} bytes is over {MAX_ENVELOPE_BYTES}")
        message = _EnvelopeMessage.decode_untrusted(data)
        if message.payload_type != payload_type:
            raise RemoteProtocolError(f"signed envelope of type {message.payload_type.hex()}, not {payload_type.hex()}")
        key = PublicKey.from_protobuf_untrusted(message.public_key)
        if not key.verify(_signed_bytes(domain, payload_type, message.payload), message.signature):
            raise RemoteProtocolError("signed envelope with a wrong signature")
        return cls(key, message.payload_type, message.payload, message.signature)

    @property
    def signer(self) -> PeerId:
        """The peer id of the key that signed."""
        return PeerId.from_public_key(self.public_key)

    def to_bytes(self) -> bytes:
        return _EnvelopeMessage(
            public_key=self.public_key.to_protobuf(),
            payload_type=self.payload_type,
            payload=self.payload,
            signature=self.signature,
        ).encode()


def _signed_bytes(domain: str, payload_type: bytes, payload: bytes) -> bytes:
    fields = domain.encode(), payload_type, payload
    return b"".join(encode_uvarint(len(field)) + field for field in fields)
