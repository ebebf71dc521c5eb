"""Protocol Buffers wire format for the handful of messages that libp2p defines with it.

A message is a frozen dataclass whose fields say their number and kind:

    @dataclass(frozen=True, slots=True)
    class Peer(Message):
        id: bytes = required(1, Kind.BYTES)
        addrs: Sequence[bytes] = repeated(2, Kind.BYTES, max_count=64)

    @dataclass(frozen=True, slots=True)
    class HopMessage(Message):
        type: int | None = optional(1, Kind.ENUM)
        peer: Peer | None = optional(2, Peer)
        nonce: int | None = optional(3, Kind.FIXED64)

    HopMessage(type=0, peer=Peer(id=b"x")).encode()
    HopMessage.decode_untrusted(data)

Rules: proto2 presence (a field that is present and zero stays, and is written; `None` is absent); a repeated field is a
tuple after decoding, empty when absent; fields are written in the order of their numbers, so the encoding is
deterministic; unknown fields are skipped; the last of several values of a single field counts. A message type cannot
contain itself, so the depth is bounded by the declarations, and the number of fields by `MAX_PROTOBUF_FIELDS`.

Wire: each field is `varint(number << 3 | wire type)` and a value: 0 varint, 1 eight bytes little-endian, 2
`varint(length) || bytes` (bytes, text, sub-messages, packed numbers), 5 four bytes little-endian. 3 and 4 (groups) are
refused. Varints here have up to ten bytes and need not be minimal, unlike `varint.py`.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, ClassVar, Final, Self, TypeAlias, cast

from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.limits import MAX_PROTOBUF_FIELDS

Buffer: TypeAlias = bytes | bytearray | memoryview

_VARINT: Final = 0
_EIGHT: Final = 1
_LENGTH: Final = 2
_FOUR: Final = 5


class Kind(enum.Enum):
    """How a field's value is written, and its Python type."""

    UINT = "uint"
    """uint32 and uint64: `int`, 0 .. 2**64 - 1."""
    INT = "int"
    """int32 and int64: `int`, negative numbers take ten bytes."""
    ENUM = "enum"
    """As INT; any number is accepted, also one that our table does not have."""
    BOOL = "bool"
    BYTES = "bytes"
    STRING = "string"
    """`str`; bytes that are not UTF-8 are refused."""
    FIXED32 = "fixed32"
    FIXED64 = "fixed64"


_WIRE_TYPES: Final = {
    Kind.UINT: _VARINT,
    Kind.INT: _VARINT,
    Kind.ENUM: _VARINT,
    Kind.BOOL: _VARINT,
    Kind.BYTES: _LENGTH,
    Kind.STRING: _LENGTH,
    Kind.FIXED32: _FOUR,
    Kind.FIXED64: _EIGHT,
}


def optional(number: int, kind: Kind | type[Message], *, max_bytes: int | None = None) -> Any:
    """A field that may be absent (`None`). `max_bytes` bounds bytes, text or the sub-message when decoding."""
    return dataclasses.field(default=None, metadata={"pb": (number, kind, False, False, max_bytes, None)})


def required(number: int, kind: Kind | type[Message], *, max_bytes: int | None = None) -> Any:
    """A field without which a message is refused, when decoding and when encoding."""
    return dataclasses.field(default=None, metadata={"pb": (number, kind, False, True, max_bytes, None)})


def repeated(
    number: int, kind: Kind | type[Message], *, max_bytes: int | None = None, max_count: int | None = None
) -> Any:
    """Any number of values, at most `max_count` when decoding. Numbers are written one by one and read packed too."""
    return dataclasses.field(default=(), metadata={"pb": (number, kind, True, False, max_bytes, max_count)})


@dataclasses.dataclass(frozen=True, slots=True)
class _Field:
    name: str
    number: int
    kind: Kind | type[Message]
    repeated: bool
    required: bool
    max_bytes: int | None
    max_count: int | None
    wire_type: int
    tag: bytes


class Message:
    """Base of all messages; the module's docstring shows how to declare one."""

    __slots__ = ()
    _schemas: ClassVar[dict[type[Message], tuple[list[_Field], dict[int, _Field]]]] = {}

    def encode(self) -> bytes:
        """The message's bytes. `LocalProtocolError` when a required field is missing or a number is out of range."""
        out = bytearray()
        for field in _schema(type(self))[0]:
            value = getattr(self, field.name)
            if value is None:
                if field.required:
                    raise LocalProtocolError(f"{type(self).__name__} needs the field {field.name}")
                continue
            for item in value if field.repeated else (value,):
                out += field.tag
                _append_value(out, field, item)
        return bytes(out)

    @classmethod
    def decode_untrusted(cls, data: Buffer) -> Self:
        """Read a whole message. The caller has bounded the size of `data`."""
        values: dict[str, Any] = {}
        known = _schema(cls)[1]
        data = bytes(data)
        offset, end, count = 0, len(data), 0
        while offset < end:
            count += 1
            if count > MAX_PROTOBUF_FIELDS:
                raise RemoteProtocolError(f"protobuf message has over {MAX_PROTOBUF_FIELDS} fields")
            tag, offset = _read_varint_untrusted(data, offset)
            raw, offset = _read_raw_untrusted(data, offset, tag & 7)
            field = known.get(tag >> 3)
            if field is not None:
                _store_untrusted(values, field, tag & 7, raw)
            elif not 0 < tag >> 3 < 1 << 29:
                raise RemoteProtocolError("protobuf field number is out of range")
        for field in _schema(cls)[0]:
            if field.repeated and field.name in values:
                values[field.name] = tuple(values[field.name])
            elif field.required and field.name not in values:
                raise RemoteProtocolError(f"{cls.__name__} without its field {field.name}")
        return cls(**values)


def _schema(cls: type[Message]) -> tuple[list[_Field], dict[int, _Field]]:
    schema = Message._schemas.get(cls)
    if schema is None:
        fields = []
        for declared in dataclasses.fields(cast(Any, cls)):
            number, kind, is_repeated, is_required, max_bytes, max_count = declared.metadata["pb"]
            wire_type = _WIRE_TYPES[kind] if isinstance(kind, Kind) else _LENGTH
            tag = bytearray()
            _append_varint(tag, number << 3 | wire_type)
            fields.append(
                _Field(
                    declared.name, number, kind, is_repeated, is_required, max_bytes, max_count, wire_type, bytes(tag)
                )
            )
        fields.sort(key=lambda field: field.number)
        schema = fields, {field.number: field for field in fields}
        assert len(schema[1]) == len(fields), f"{cls.__name__} uses a field number twice"
        Message._schemas[cls] = schema
    return schema


# -- writing --------------------------------------------------------------------------------------------------------
def _append_varint(out: bytearray, value: int) -> None:
    while value >= 128:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def _append_value(out: bytearray, field: _Field, value: Any) -> None:
    kind = field.kind
    if field.wire_type == _LENGTH:
        data = value if kind is Kind.BYTES else value.encode()
        _append_varint(out, len(data))
        out += data
        return
    number = int(value)
    bits = 32 if kind is Kind.FIXED32 else 64
    signed = kind is Kind.INT or kind is Kind.ENUM
    low, high = (-(1 << 63), 1 << 63) if signed else (0, 1 << bits)
    if not low <= number < high:
        raise LocalProtocolError(f"{number} is out of range for the protobuf field {field.name}")
    if field.wire_type == _VARINT:
        _append_varint(out, number & 0xFFFF_FFFF_FFFF_FFFF)
    else:
        out += number.to_bytes(bits // 8, "little")


# -- reading --------------------------------------------------------------------------------------------------------
def _read_varint_untrusted(data: bytes, offset: int) -> tuple[int, int]:
    end = len(data)
    value = shift = 0
    while offset < end:
        byte = data[offset]
        offset += 1
        if byte < 128:
            return (value | byte << shift) & 0xFFFF_FFFF_FFFF_FFFF, offset
        value |= (byte & 0x7F) << shift
        shift += 7
        if shift >= 70:
            raise RemoteProtocolError("protobuf varint is longer than 10 bytes")
    raise RemoteProtocolError("protobuf varint is cut off")


def _read_raw_untrusted(data: bytes, offset: int, wire_type: int) -> tuple[int | bytes, int]:
    """The value at `offset`, not yet interpreted, and the offset behind it."""
    if wire_type == _VARINT:
        return _read_varint_untrusted(data, offset)
    if wire_type == _LENGTH:
        length, offset = _read_varint_untrusted(data, offset)
    elif wire_type == _EIGHT:
        length = 8
    elif wire_type == _FOUR:
        length = 4
    else:
        raise RemoteProtocolError(f"protobuf wire type {wire_type} is not supported")
    end = offset + length
    if end > len(data):
        raise RemoteProtocolError("protobuf field is cut off")
    raw = data[offset:end]
    return (raw, end) if wire_type == _LENGTH else (int.from_bytes(raw, "little"), end)


def _store_untrusted(values: dict[str, Any], field: _Field, wire_type: int, raw: int | bytes) -> None:
    if wire_type == field.wire_type:
        items = [_interpret_untrusted(field, raw)]
    elif field.repeated and field.wire_type == _VARINT and isinstance(raw, bytes):
        items = _unpack_untrusted(field, raw)
    else:
        raise RemoteProtocolError(f"protobuf field {field.name} has the wrong wire type {wire_type}")
    if not field.repeated:
        values[field.name] = items[0]
        return
    stored = values.setdefault(field.name, [])
    stored += items
    limit = MAX_PROTOBUF_FIELDS if field.max_count is None else field.max_count
    if len(stored) > limit:
        raise RemoteProtocolError(f"over {limit} values in the protobuf field {field.name}")


def _unpack_untrusted(field: _Field, raw: bytes) -> list[Any]:
    if len(raw) > 10 * MAX_PROTOBUF_FIELDS:
        raise RemoteProtocolError(f"packed protobuf field {field.name} is too long")
    items, offset = [], 0
    while offset < len(raw):
        number, offset = _read_varint_untrusted(raw, offset)
        items.append(_interpret_untrusted(field, number))
    return items


def _interpret_untrusted(field: _Field, raw: int | bytes) -> Any:
    kind = field.kind
    if isinstance(raw, int):
        if kind is Kind.BOOL:
            return raw != 0
        if (kind is Kind.INT or kind is Kind.ENUM) and raw >= 1 << 63:
            return raw - (1 << 64)
        return raw
    if field.max_bytes is not None and len(raw) > field.max_bytes:
        raise RemoteProtocolError(f"{len(raw)} bytes in the protobuf field {field.name}, over {field.max_bytes}")
    if kind is Kind.BYTES:
        return raw
    if kind is Kind.STRING:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise RemoteProtocolError(f"protobuf field {field.name} is not UTF-8") from None
    assert not isinstance(kind, Kind)
    return kind.decode_untrusted(raw)
