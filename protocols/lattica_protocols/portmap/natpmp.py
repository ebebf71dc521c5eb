"""NAT-PMP (RFC 6886): PCP's predecessor, at the same port 5351.

    address   request  00 00
              answer   00 80 | result:16 | epoch:32 | external IPv4:32
    map       request  00 op | 0:16 | internal port:16 | external port:16 | lifetime:32       op 1: UDP, 2: TCP
              answer   00 80+op | result:16 | epoch:32 | internal port:16 | external port:16 | lifetime:32

A request with lifetime 0 and external port 0 ends the mapping. There is no nonce: an answer is known by the router's
address and by the port that was asked for.
"""

from __future__ import annotations

import ipaddress
import struct
from typing import Final

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.portmap.mapping import Port, ProtocolName, Transport
from lattica_protocols.portmap.reply import Reply

_IS_ANSWER: Final = 0x80
_REQUEST = struct.Struct("!BBHHHI")
_HEAD = struct.Struct("!BBHI")
_MAPPED = struct.Struct("!HHI")
_OPCODES: Final[dict[Transport, int]] = {"udp": 1, "tcp": 2}
_TRANSPORTS: Final = {number: name for name, number in _OPCODES.items()}
_UNSUPPORTED_VERSION: Final = 1
_ERRORS: Final = {
    1: "the router does not know this version",
    2: "the router does not allow it: port mapping is switched off there",
    3: "the router has no address outside: it has no connection, or stands behind another NAT",
    4: "the router has no port left",
    5: "the router does not know this request",
}


class NatPmpCodec:
    """The counterpart of `PcpCodec`."""

    name: Final[ProtocolName] = "nat-pmp"

    def encode_check(self) -> bytes:
        """What is your address outside, and since when are you running?"""
        return b"\x00\x00"

    def encode_map(self, port: Port, external_port: int, external_ip: str | None, lifetime: int) -> bytes:
        """`external_ip` is not said in this protocol. The lifetime 0 deletes."""
        suggested = external_port if lifetime else 0
        return _REQUEST.pack(0, _OPCODES[port.transport], 0, port.number, suggested, lifetime)

    def decode_untrusted(self, data: bytes) -> Reply:
        """An answer to us."""
        if len(data) < 4 or not data[1] & _IS_ANSWER:
            raise RemoteProtocolError("not a NAT-PMP answer")
        if data[0] != 0:
            return Reply("check", error=f"the router speaks version {data[0]} only", unsupported=True)
        opcode = data[1] & ~_IS_ANSWER
        result = int.from_bytes(data[2:4], "big")
        if result == _UNSUPPORTED_VERSION:
            return Reply("check", error=_ERRORS[result], unsupported=True)
        if len(data) < _HEAD.size:
            raise RemoteProtocolError(f"a NAT-PMP answer of {len(data)} bytes")
        epoch = _HEAD.unpack_from(data)[3]
        error = "" if not result else f"NAT-PMP result {result}: {_ERRORS.get(result, 'not a known one')}"
        if opcode == 0:
            return Reply("check", epoch=epoch, error=error, external_ip=None if error else _address_untrusted(data))
        transport = _TRANSPORTS.get(opcode)
        if transport is None or len(data) < _HEAD.size + _MAPPED.size:
            raise RemoteProtocolError(f"a NAT-PMP answer of {len(data)} bytes about opcode {opcode}")
        internal, external, lifetime = _MAPPED.unpack_from(data, _HEAD.size)
        port = Port(transport, internal)
        # the lifetime of an error means nothing here
        return Reply("map", epoch, port, error, None, external, 0 if error else lifetime)


def decode_announcement_untrusted(data: bytes) -> int:
    """The epoch in what the router tells everybody when it started or its address changed."""
    if len(data) != _HEAD.size + 4 or data[:4] != b"\x00\x80\x00\x00":
        raise RemoteProtocolError("not a NAT-PMP announcement")
    return int(_HEAD.unpack_from(data)[3])


def _address_untrusted(data: bytes) -> str:
    packed = data[_HEAD.size : _HEAD.size + 4]
    if len(packed) != 4:
        raise RemoteProtocolError("a NAT-PMP answer without the address")
    return str(ipaddress.IPv4Address(packed))
