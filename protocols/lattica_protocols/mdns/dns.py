"""As much DNS (RFC 1035, RFC 6762) as libp2p's mDNS needs: questions, and PTR and TXT records.

    header    id:16 | flags:16 (0x8400 in answers) | counts of questions, answers, authorities, additionals: 16 each
    question  name | type:16 | class:16
    record    name | type:16 | class:16 | TTL:32 | length:16 | data
    name      labels (length:8 and so many bytes) until one of length 0, or a pointer (11, offset:14) to an earlier one

A codec of our own because the libraries do not fit: zeroconf runs on asyncio in a thread of its own, resolves only
services with an SRV record (libp2p's specification has none), and keeps one TXT value of each key, where libp2p repeats
`dnsaddr`; dnspython loads sockets and TLS, which have no place in this layer.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import MDNS_MAX_NAME_BYTES, MDNS_MAX_PACKET_BYTES, MDNS_MAX_RECORDS, MDNS_MAX_TEXTS

PTR: Final = 12
TXT: Final = 16
ANY: Final = 255
_IN: Final = 1
_FLUSH: Final = 0x8000
"""Of the class in an answer: this record replaces others; in a question: a unicast answer is welcome."""
_RESPONSE: Final = 0x8400
_HEADER = struct.Struct("!HHHHHH")
_QUESTION = struct.Struct("!HH")
_RECORD = struct.Struct("!HHIH")


@dataclass(frozen=True, slots=True)
class Record:
    """`name` in lower case. `target` of a PTR, `texts` of a TXT; other types have neither."""

    name: str
    type: int
    ttl: int
    target: str = ""
    texts: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Packet:
    """What came in one datagram."""

    is_response: bool
    id: int
    questions: tuple[tuple[str, int], ...]
    records: tuple[Record, ...]
    """Answers and additional ones."""


def encode_query(name: str) -> bytes:
    """Who offers `name`?"""
    return _HEADER.pack(0, 0, 1, 0, 0, 0) + _name(name) + _QUESTION.pack(PTR, _IN)


def encode_answer(service: str, instance: str, texts: Sequence[bytes], ttl: int, query_id: int = 0) -> bytes:
    """`instance` offers `service`; `texts` are about it, 255 bytes at most each. TTL 0: no more."""
    pointer = _name(instance)
    data = b"".join(bytes([len(text)]) + text for text in texts) or b"\x00"
    answer = _name(service) + _RECORD.pack(PTR, _IN, ttl, len(pointer)) + pointer
    additional = pointer + _RECORD.pack(TXT, _IN | _FLUSH, ttl, len(data)) + data
    return _HEADER.pack(query_id, _RESPONSE, 0, 1, 0, 1) + answer + additional


def decode_packet_untrusted(data: bytes) -> Packet:
    """A datagram from port 5353."""
    if not _HEADER.size <= len(data) <= MDNS_MAX_PACKET_BYTES:
        raise RemoteProtocolError(f"an mDNS packet of {len(data)} bytes")
    packet_id, flags, *counts = _HEADER.unpack_from(data)
    if sum(counts) > MDNS_MAX_RECORDS:
        raise RemoteProtocolError(f"an mDNS packet with {sum(counts)} records")
    at = _HEADER.size
    questions, records = [], []
    for _ in range(counts[0]):
        name, at = _name_untrusted(data, at)
        if len(data) < at + _QUESTION.size:
            raise RemoteProtocolError("an mDNS packet that is cut off")
        questions.append((name, _QUESTION.unpack_from(data, at)[0]))
        at += _QUESTION.size
    for _ in range(sum(counts[1:])):
        record, at = _record_untrusted(data, at)
        records.append(record)
    return Packet(bool(flags & 0x8000), packet_id, tuple(questions), tuple(records))


def _record_untrusted(data: bytes, at: int) -> tuple[Record, int]:
    name, at = _name_untrusted(data, at)
    if len(data) < at + _RECORD.size:
        raise RemoteProtocolError("an mDNS packet that is cut off")
    kind, _, ttl, length = _RECORD.unpack_from(data, at)
    at += _RECORD.size
    end = at + length
    if len(data) < end:
        raise RemoteProtocolError("an mDNS record that is cut off")
    if kind == PTR:
        return Record(name, kind, ttl, target=_name_untrusted(data, at)[0]), end
    if kind == TXT:
        return Record(name, kind, ttl, texts=_texts_untrusted(data[at:end])), end
    return Record(name, kind, ttl), end


def _texts_untrusted(data: bytes) -> tuple[bytes, ...]:
    found: list[bytes] = []
    at = 0
    while at < len(data):
        length = data[at]
        if at + 1 + length > len(data) or len(found) == MDNS_MAX_TEXTS:
            raise RemoteProtocolError("a TXT record with too many texts, or cut off")
        found.append(data[at + 1 : at + 1 + length])
        at += 1 + length
    return tuple(found)


def _name(name: str) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode("ascii") for label in name.split(".")) + b"\x00"


def _name_untrusted(data: bytes, at: int) -> tuple[str, int]:
    """The name at `at` and where it ends. Pointers lead backwards only, so that they come to an end."""
    labels: list[bytes] = []
    end, total, lowest = None, 0, at
    while True:
        if at >= len(data):
            raise RemoteProtocolError("an mDNS name that is cut off")
        length = data[at]
        if length >= 0xC0:
            if at + 2 > len(data):
                raise RemoteProtocolError("an mDNS name that is cut off")
            end = at + 2 if end is None else end
            at = int.from_bytes(data[at : at + 2], "big") & 0x3FFF
            if at >= lowest:
                raise RemoteProtocolError("an mDNS name that points forwards")
            lowest = at
            continue
        if length > 63:
            raise RemoteProtocolError("an mDNS label of a kind that is not known")
        at += 1
        if not length:
            return b".".join(labels).decode("latin-1").lower(), at if end is None else end
        total += length + 1
        if total > MDNS_MAX_NAME_BYTES or at + length > len(data):
            raise RemoteProtocolError("an mDNS name that is too long or cut off")
        labels.append(data[at : at + length])
        at += length
