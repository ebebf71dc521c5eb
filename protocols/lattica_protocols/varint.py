"""Unsigned LEB128 integers ("uvarint") as multiformats uses them.

Seven bits a byte, least significant group first; the high bit says that another byte follows. The encoding has to be
minimal (no trailing zero group) and at most nine bytes, so a value is below 2**63
(https://github.com/multiformats/unsigned-varint). Protobuf allows itself ten bytes and sloppier encodings: its reader
stands in `protobuf.py`.
"""

from __future__ import annotations

from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.limits import MAX_UVARINT_BYTES

_SINGLE = [bytes((value,)) for value in range(128)]


def encode_uvarint(value: int) -> bytes:
    """`value` in 0 .. 2**63 - 1 as 1 to 9 bytes; `LocalProtocolError` for any other."""
    if 0 <= value < 128:
        return _SINGLE[value]
    if not 0 <= value < 1 << 63:
        raise LocalProtocolError(f"{value} does not fit into an unsigned varint of 63 bits")
    out = bytearray()
    while value >= 128:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def decode_uvarint_untrusted(data: bytes | bytearray | memoryview, offset: int = 0) -> tuple[int, int]:
    """The number at `offset` and the offset behind it. Cut off, over nine bytes and not minimal are all refused."""
    end = min(len(data), offset + MAX_UVARINT_BYTES)
    value = shift = 0
    for position in range(offset, end):
        byte = data[position]
        if byte < 128:
            if byte == 0 and shift:
                raise RemoteProtocolError("varint is not minimal")
            return value | byte << shift, position + 1
        value |= (byte & 0x7F) << shift
        shift += 7
    if end == offset + MAX_UVARINT_BYTES:
        raise RemoteProtocolError(f"varint is longer than {MAX_UVARINT_BYTES} bytes")
    raise RemoteProtocolError("varint is cut off")
