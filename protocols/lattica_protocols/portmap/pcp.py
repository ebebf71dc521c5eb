"""PCP, the Port Control Protocol (RFC 6887): what a router that is asked by UDP at port 5351 understands.

    request   version=2 | R=0 opcode:7 | reserved:16 | lifetime:32 | client IP:128
    answer    version=2 | R=1 opcode:7 | reserved:8 | result:8 | lifetime:32 | epoch:32 | reserved:96
    MAP (1)   nonce:96 | protocol:8 | reserved:24 | internal port:16 | external port:16 | external IP:128
    ANNOUNCE (0) has no more than the header

IPv4 addresses are written as IPv4-mapped IPv6. A MAP with lifetime 0 ends the mapping. The nonce is ours: whoever
does not see our packets cannot answer for the router. An older router, which knows NAT-PMP alone, answers in that
(version 0, result 1).
"""

from __future__ import annotations

import ipaddress
import random
import struct
from enum import IntEnum
from typing import Final

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import PORTMAP_MAX_DATAGRAM_BYTES
from lattica_protocols.portmap.mapping import Port, ProtocolName, Transport
from lattica_protocols.portmap.reply import Reply

VERSION: Final = 2
NONCE_BYTES: Final = 12
_IS_ANSWER: Final = 0x80
_HEADER = struct.Struct("!BBHI16s")
_ANSWER = struct.Struct("!BBBBII12x")
_MAP = struct.Struct("!12sB3xHH16s")
_NUMBERS: Final[dict[Transport, int]] = {"tcp": 6, "udp": 17}
_TRANSPORTS: Final = {number: name for name, number in _NUMBERS.items()}


class Opcode(IntEnum):
    """RFC 6887, section 19.1."""

    ANNOUNCE = 0
    MAP = 1


class Result(IntEnum):
    """RFC 6887, section 7.4."""

    SUCCESS = 0
    UNSUPP_VERSION = 1
    NOT_AUTHORIZED = 2
    MALFORMED_REQUEST = 3
    UNSUPP_OPCODE = 4
    UNSUPP_OPTION = 5
    MALFORMED_OPTION = 6
    NETWORK_FAILURE = 7
    NO_RESOURCES = 8
    UNSUPP_PROTOCOL = 9
    USER_EX_QUOTA = 10
    CANNOT_PROVIDE_EXTERNAL = 11
    ADDRESS_MISMATCH = 12
    EXCESSIVE_REMOTE_PEERS = 13


_REASONS: Final = {
    Result.NOT_AUTHORIZED: "the router does not allow it: port mapping is switched off there",
    Result.NETWORK_FAILURE: "the router has no address outside, or no connection",
    Result.NO_RESOURCES: "the router has no port or no public address to give: it may stand behind another NAT",
    Result.USER_EX_QUOTA: "the router gives this machine no more ports",
    Result.ADDRESS_MISMATCH: "there is another NAT between us and the router that answered",
}


class PcpCodec:
    """For one client and one router; holds the nonces of our mappings."""

    name: Final[ProtocolName] = "pcp"

    def __init__(self, local_ip: str, rng: random.Random) -> None:
        self._client = _packed(local_ip)
        self._version = ipaddress.ip_address(local_ip).version
        self._rng = rng
        self._nonces: dict[Port, bytes] = {}

    def encode_check(self) -> bytes:
        """ANNOUNCE: are you there, and since when?"""
        return _HEADER.pack(VERSION, Opcode.ANNOUNCE, 0, 0, self._client)

    def encode_map(self, port: Port, external_port: int, external_ip: str | None, lifetime: int) -> bytes:
        """MAP; what is suggested for outside may be 0 and `None`. The lifetime 0 deletes."""
        nonce = self._nonces.setdefault(port, self._rng.randbytes(NONCE_BYTES))
        any_ip = bytes(16) if self._version == 6 else bytes(10) + b"\xff\xff" + bytes(4)
        suggested = any_ip if external_ip is None else _packed(external_ip)
        header = _HEADER.pack(VERSION, Opcode.MAP, 0, lifetime, self._client)
        return header + _MAP.pack(nonce, _NUMBERS[port.transport], port.number, external_port, suggested)

    def decode_untrusted(self, data: bytes) -> Reply:
        """An answer to us."""
        if len(data) >= 4 and data[0] == 0 and data[1] & _IS_ANSWER:
            return Reply("check", error="the router speaks NAT-PMP instead", unsupported=True)
        if len(data) < _ANSWER.size or len(data) > PORTMAP_MAX_DATAGRAM_BYTES or len(data) % 4:
            raise RemoteProtocolError(f"a PCP answer of {len(data)} bytes")
        version, opcode, _, result, lifetime, epoch = _ANSWER.unpack_from(data)
        if not opcode & _IS_ANSWER:
            raise RemoteProtocolError("a PCP request, where an answer was expected")
        if version != VERSION or result == Result.UNSUPP_VERSION:
            return Reply("check", error=f"the router speaks PCP version {version} only", unsupported=True)
        error = "" if result == Result.SUCCESS else _reason(result)
        opcode &= ~_IS_ANSWER
        if opcode == Opcode.ANNOUNCE:
            return Reply("check", epoch=epoch)
        if opcode != Opcode.MAP:
            raise RemoteProtocolError(f"a PCP answer about opcode {opcode}")
        if len(data) < _ANSWER.size + _MAP.size:
            raise RemoteProtocolError("a PCP answer that is cut off")
        nonce, number, internal, external, address = _MAP.unpack_from(data, _ANSWER.size)
        port = Port(_TRANSPORTS.get(number, "tcp"), internal)
        if number not in _TRANSPORTS or self._nonces.get(port) != nonce:
            raise RemoteProtocolError("a PCP answer with a nonce that is not ours")
        return Reply(
            "map", epoch=epoch, port=port, error=error, external_ip=_text(address), external_port=external,
            lifetime=lifetime,
        )  # fmt: skip


def decode_announcement_untrusted(data: bytes) -> int:
    """The epoch in an ANNOUNCE that the router sends to everybody when it was restarted."""
    if len(data) < _ANSWER.size or len(data) > PORTMAP_MAX_DATAGRAM_BYTES:
        raise RemoteProtocolError(f"a PCP announcement of {len(data)} bytes")
    version, opcode, _, result, _, epoch = _ANSWER.unpack_from(data)
    if (version, opcode, result) != (VERSION, _IS_ANSWER | Opcode.ANNOUNCE, Result.SUCCESS):
        raise RemoteProtocolError("not a PCP announcement")
    return int(epoch)


def _reason(result: int) -> str:
    try:
        known = Result(result)
    except ValueError:
        return f"PCP result {result}"
    return f"PCP result {known.name}" + (f": {_REASONS[known]}" if known in _REASONS else "")


def _packed(ip: str) -> bytes:
    address = ipaddress.ip_address(ip.partition("%")[0])
    return address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed


def _text(packed: bytes) -> str:
    address = ipaddress.IPv6Address(packed)
    return str(address.ipv4_mapped or address)
