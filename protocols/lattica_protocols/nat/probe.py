"""The packets of a punch: STUN Binding requests and answers signed with the key of the attempt, as ICE does (RFC 8445).

    request     SOFTWARE (filler), USE-CANDIDATE (empty; when this path is chosen), MESSAGE-INTEGRITY, FINGERPRINT
    answer      XOR-MAPPED-ADDRESS, MESSAGE-INTEGRITY, FINGERPRINT; never longer than the request

The key is agreed on over an authenticated connection of the two peers (a relayed one), so that nobody else can answer
for the partner, or make us believe in a path, and a probe that comes from an unexpected address is still known to be
the partner's. Sharing STUN's first byte, probes go through the daemon's QUIC socket.
"""

from __future__ import annotations

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.stun import (
    Attribute,
    MessageType,
    SocketAddr,
    StunMessage,
    decode_message_untrusted,
    encode_address,
    encode_message,
)

KEY_BYTES = 32
_FILLER = b"lattica punch".ljust(20)
"""As long as an IPv6 address in the answer."""


def encode_probe(key: bytes, transaction_id: bytes, *, chosen: bool = False) -> bytes:
    """A probe; `chosen`: the sender settles on this path."""
    attributes = [(int(Attribute.SOFTWARE), _FILLER)]
    if chosen:
        attributes.append((int(Attribute.USE_CANDIDATE), b""))
    return encode_message(StunMessage(MessageType.REQUEST, transaction_id, tuple(attributes)), key=key)


def encode_probe_answer(key: bytes, transaction_id: bytes, seen: SocketAddr) -> bytes:
    """The answer to a probe that came from `seen`."""
    attributes = ((int(Attribute.XOR_MAPPED_ADDRESS), encode_address(seen, transaction_id)),)
    return encode_message(StunMessage(MessageType.SUCCESS, transaction_id, attributes), key=key)


def decode_probe_untrusted(data: bytes, key: bytes) -> StunMessage:
    """A probe or an answer that was signed with `key`."""
    message = decode_message_untrusted(data)
    if message.type not in (MessageType.REQUEST, MessageType.SUCCESS) or not message.is_signed_by(key):
        raise RemoteProtocolError("not a probe of this attempt")
    return message
