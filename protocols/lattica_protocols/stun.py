"""STUN messages (RFC 8489), as far as finding and opening NATs needs them: the Binding method.

     0                   1                   2                   3
     0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
    |0 0|          type             |   length of the attributes    |   a multiple of 4
    |                 magic cookie: 0x2112A442                      |
    |                 transaction id (96 bits)                      |
    then attributes:
    |          type                 |           length              |   of the value alone
    |  value, filled up to a multiple of 4 bytes with anything      |

    XOR-MAPPED-ADDRESS and its like: 0, family (1: IPv4, 2: IPv6), port, address; the XOR ones are XORed with the cookie
    (port: its upper half) and, for IPv6, the transaction id behind it, so that no NAT "corrects" them on the way.
    MESSAGE-INTEGRITY: HMAC-SHA1 of all before it, FINGERPRINT: CRC-32 of all before it XOR 0x5354554E; both calculated
    with a header length that ends with the attribute itself. Nothing but FINGERPRINT may follow the integrity.

The first two bits are zero and the first byte of a Binding message is 0 or 1, which tells STUN from QUIC on one socket
(RFC 9443). RFC 5780 adds CHANGE-REQUEST, RESPONSE-PORT, RESPONSE-ORIGIN and OTHER-ADDRESS to look at what a NAT does.
aioice's codec, which does the same, cannot be used in this layer: importing it loads asyncio.
"""

from __future__ import annotations

import hmac
import ipaddress
import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.limits import STUN_MAX_ATTRIBUTES, STUN_MAX_MESSAGE_BYTES

SocketAddr = tuple[str, int]
"""(IP address as text without a zone, UDP port)."""

MAGIC_COOKIE: Final = 0x2112A442
HEADER_BYTES: Final = 20
TRANSACTION_ID_BYTES: Final = 12
_HEADER = struct.Struct("!HHI12s")
_ATTRIBUTE = struct.Struct("!HH")
_FINGERPRINT_XOR = 0x5354554E
_INTEGRITY_BYTES = 20
_FAMILY_BYTES = {1: 4, 2: 16}
_REQUIRED_BELOW = 0x8000
"""Attributes of smaller numbers have to be understood by the receiver (RFC 8489 section 14)."""


class MessageType(IntEnum):
    """Binding messages; there is no other method that we speak."""

    REQUEST = 0x0001
    INDICATION = 0x0011
    SUCCESS = 0x0101
    ERROR = 0x0111


class Attribute(IntEnum):
    """Numbers from the STUN registry of IANA."""

    MAPPED_ADDRESS = 0x0001
    CHANGE_REQUEST = 0x0003
    USERNAME = 0x0006
    MESSAGE_INTEGRITY = 0x0008
    ERROR_CODE = 0x0009
    UNKNOWN_ATTRIBUTES = 0x000A
    XOR_MAPPED_ADDRESS = 0x0020
    PRIORITY = 0x0024
    USE_CANDIDATE = 0x0025
    PADDING = 0x0026
    RESPONSE_PORT = 0x0027
    SOFTWARE = 0x8022
    FINGERPRINT = 0x8028
    ICE_CONTROLLED = 0x8029
    ICE_CONTROLLING = 0x802A
    RESPONSE_ORIGIN = 0x802B
    OTHER_ADDRESS = 0x802C


_UNDERSTOOD = frozenset(int(attribute) for attribute in Attribute)
_CHANGE_IP, _CHANGE_PORT = 0x04, 0x02


@dataclass(frozen=True, slots=True)
class StunMessage:
    """A Binding message. `attributes`: (number, value), in the order of the wire, without the FINGERPRINT."""

    type: MessageType
    transaction_id: bytes
    attributes: tuple[tuple[int, bytes], ...] = ()
    signed: bytes = b""
    """What the MESSAGE-INTEGRITY, if any, was calculated over: header with its length put right, and attributes."""

    def get(self, attribute: Attribute) -> bytes | None:
        """The value of the first of that number; later ones do not count (RFC 8489 section 14)."""
        for number, value in self.attributes:
            if number == attribute:
                return value
        return None

    @property
    def unknown(self) -> list[int]:
        """Numbers of attributes that have to be understood, and are not."""
        return [number for number, _ in self.attributes if number < _REQUIRED_BELOW and number not in _UNDERSTOOD]

    @property
    def mapped_untrusted(self) -> SocketAddr | None:
        """The address that the sender says it saw; `None` when it says nothing."""
        value = self.get(Attribute.XOR_MAPPED_ADDRESS)
        if value is not None:
            return decode_address_untrusted(value, self.transaction_id)
        return self.address_untrusted(Attribute.MAPPED_ADDRESS)

    def address_untrusted(self, attribute: Attribute) -> SocketAddr | None:
        """The address in an attribute that is not XORed."""
        value = self.get(attribute)
        return None if value is None else decode_address_untrusted(value, None)

    def is_signed_by(self, key: bytes) -> bool:
        """Whether the message carries a MESSAGE-INTEGRITY made with `key`, and nothing before it was changed."""
        value = self.get(Attribute.MESSAGE_INTEGRITY)
        return value is not None and hmac.compare_digest(value, hmac.digest(key, self.signed, "sha1"))


def is_stun(data: bytes) -> bool:
    """Whether a datagram is STUN, by its header alone."""
    return len(data) >= HEADER_BYTES and data[0] < 4 and int.from_bytes(data[4:8], "big") == MAGIC_COOKIE


def decode_message_untrusted(data: bytes) -> StunMessage:
    """The message in a datagram: whole, of the Binding method, with a right FINGERPRINT where there is one."""
    if not is_stun(data):
        raise RemoteProtocolError("not a STUN message")
    if len(data) > STUN_MAX_MESSAGE_BYTES:
        raise RemoteProtocolError(f"a STUN message of {len(data)} bytes")
    number, length, _, transaction_id = _HEADER.unpack_from(data)
    if length % 4 or HEADER_BYTES + length != len(data):
        raise RemoteProtocolError("the length of a STUN message is wrong")
    try:
        kind = MessageType(number)
    except ValueError:
        raise RemoteProtocolError(f"a STUN message of type 0x{number:04x}") from None
    attributes: list[tuple[int, bytes]] = []
    signed = b""
    offset = HEADER_BYTES
    while offset < len(data):
        number, size = _ATTRIBUTE.unpack_from(data, offset)  # lengths are multiples of 4: a header is always whole
        start = offset
        value = data[start + 4 : start + 4 + size]
        offset = start + 4 + size + -size % 4
        if offset > len(data):
            raise RemoteProtocolError("a STUN attribute is cut off")
        if number == Attribute.FINGERPRINT:
            if offset != len(data) or value != _fingerprint(data[:start]):
                raise RemoteProtocolError("the fingerprint of a STUN message is wrong")
        elif signed:
            continue  # behind the integrity nothing counts: it could have been added on the way
        elif number == Attribute.MESSAGE_INTEGRITY:
            if size != _INTEGRITY_BYTES:
                raise RemoteProtocolError(f"a STUN integrity of {size} bytes")
            signed = _with_length(data[:start], offset - HEADER_BYTES)
            attributes.append((number, value))
        else:
            attributes.append((number, value))
        if len(attributes) > STUN_MAX_ATTRIBUTES:
            raise RemoteProtocolError("a STUN message of too many attributes")
    return StunMessage(kind, transaction_id, tuple(attributes), signed)


def encode_message(message: StunMessage, *, key: bytes | None = None, fingerprint: bool = True) -> bytes:
    """The datagram for `message`; with `key` it carries a MESSAGE-INTEGRITY."""
    if len(message.transaction_id) != TRANSACTION_ID_BYTES:
        raise LocalProtocolError("a transaction id has 12 bytes")
    parts = []
    for number, value in message.attributes:
        parts.append(_ATTRIBUTE.pack(number, len(value)) + value + bytes(-len(value) % 4))
    data = _HEADER.pack(message.type, 0, MAGIC_COOKIE, message.transaction_id) + b"".join(parts)
    data = _with_length(data, len(data) - HEADER_BYTES)
    if key is not None:
        data = _with_length(data, len(data) - HEADER_BYTES + 4 + _INTEGRITY_BYTES)
        digest = hmac.digest(key, data, "sha1")
        data += _ATTRIBUTE.pack(Attribute.MESSAGE_INTEGRITY, _INTEGRITY_BYTES) + digest
    if fingerprint:
        data = _with_length(data, len(data) - HEADER_BYTES + 8)
        data += _ATTRIBUTE.pack(Attribute.FINGERPRINT, 4) + _fingerprint(data)
    if len(data) > STUN_MAX_MESSAGE_BYTES:
        raise LocalProtocolError(f"a STUN message of {len(data)} bytes")
    return data


# -- addresses --------------------------------------------------------------------------------------------------------
def encode_address(addr: SocketAddr, transaction_id: bytes | None) -> bytes:
    """The value of an address attribute; XORed when the transaction id is given."""
    ip = ipaddress.ip_address(addr[0].partition("%")[0])
    port, packed = addr[1], ip.packed
    if transaction_id is not None:
        port ^= MAGIC_COOKIE >> 16
        packed = _xor(packed, transaction_id)
    return struct.pack("!BBH", 0, 1 if ip.version == 4 else 2, port) + packed


def decode_address_untrusted(value: bytes, transaction_id: bytes | None) -> SocketAddr:
    """What `encode_address` made."""
    if len(value) < 4 or len(value) != 4 + _FAMILY_BYTES.get(value[1], -1):
        raise RemoteProtocolError("a STUN address of unknown form")
    port, packed = int.from_bytes(value[2:4], "big"), value[4:]
    if transaction_id is not None:
        port ^= MAGIC_COOKIE >> 16
        packed = _xor(packed, transaction_id)
    return str(ipaddress.ip_address(packed)), port


def _xor(packed: bytes, transaction_id: bytes) -> bytes:
    mask = MAGIC_COOKIE.to_bytes(4, "big") + transaction_id
    return bytes(a ^ b for a, b in zip(packed, mask, strict=False))


# -- small attributes -------------------------------------------------------------------------------------------------
def encode_change_request(*, ip: bool, port: bool) -> bytes:
    """Ask for the answer from the other IP address, the other port, or both (RFC 5780 section 7.2)."""
    return struct.pack("!I", ip * _CHANGE_IP | port * _CHANGE_PORT)


def decode_change_request_untrusted(value: bytes) -> tuple[bool, bool]:
    """(other IP, other port)."""
    if len(value) != 4:
        raise RemoteProtocolError("a CHANGE-REQUEST of unknown form")
    return bool(value[3] & _CHANGE_IP), bool(value[3] & _CHANGE_PORT)


def encode_response_port(port: int) -> bytes:
    """Ask for the answer at another port of the same address (RFC 5780 section 7.5)."""
    return struct.pack("!HH", port, 0)


def decode_response_port_untrusted(value: bytes) -> int:
    """The port; never 0."""
    if len(value) != 4 or not (port := int.from_bytes(value[:2], "big")):
        raise RemoteProtocolError("a RESPONSE-PORT of unknown form")
    return port


def encode_error(code: int, reason: str) -> bytes:
    """The value of ERROR-CODE."""
    return struct.pack("!HBB", 0, code // 100, code % 100) + reason.encode()


def decode_error_untrusted(value: bytes) -> int:
    """The code, 300 to 699."""
    if len(value) < 4 or not 3 <= value[2] & 7 <= 6 or value[3] > 99:
        raise RemoteProtocolError("an ERROR-CODE of unknown form")
    return (value[2] & 7) * 100 + value[3]


# -- inside -----------------------------------------------------------------------------------------------------------
def _with_length(data: bytes, length: int) -> bytes:
    return data[:2] + struct.pack("!H", length) + data[4:]


def _fingerprint(before: bytes) -> bytes:
    """`before` must already have the length that includes the fingerprint, as the messages on the wire do."""
    return struct.pack("!I", zlib.crc32(before) ^ _FINGERPRINT_XOR)
