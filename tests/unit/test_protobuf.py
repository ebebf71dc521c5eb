"""The wire format of Protocol Buffers, by its published examples."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.limits import MAX_PROTOBUF_FIELDS
from lattica_protocols.protobuf import Kind, Message, optional, repeated, required


@dataclass(frozen=True, slots=True)
class Inner(Message):
    id: bytes = required(1, Kind.BYTES, max_bytes=4)


@dataclass(frozen=True, slots=True)
class Everything(Message):
    text: str | None = optional(9, Kind.STRING)  # declared out of order on purpose
    number: int | None = optional(1, Kind.UINT)
    signed: int | None = optional(2, Kind.INT)
    choice: int | None = optional(3, Kind.ENUM)
    flag: bool | None = optional(4, Kind.BOOL)
    small: int | None = optional(5, Kind.FIXED32)
    large: int | None = optional(6, Kind.FIXED64)
    inner: Inner | None = optional(7, Inner)
    inners: Sequence[Inner] = repeated(8, Inner, max_count=3)
    numbers: Sequence[int] = repeated(100, Kind.UINT)


def test_published_vectors() -> None:
    # protobuf.dev/programming-guides/encoding: field 1 = 150; a string "testing"; packed 3, 270, 86942
    assert Everything(number=150).encode().hex() == "089601"
    assert Everything.decode_untrusted(bytes.fromhex("089601")).number == 150
    assert Everything(text="testing").encode().hex() == "4a0774657374696e67"
    packed = bytes.fromhex("a206" + "06" + "038e029ea705")
    assert Everything.decode_untrusted(packed).numbers == (3, 270, 86942)
    assert Everything(signed=-2).encode().hex() == "10feffffffffffffffff01"


def test_round_trip_in_the_order_of_numbers() -> None:
    message = Everything("ä", 0, -1, 5, False, 7, 1 << 63, Inner(b"a"), (Inner(b""), Inner(b"bc")), (1, 2))
    encoded = message.encode()
    assert Everything.decode_untrusted(encoded) == message
    assert encoded.hex() == (
        "0800" "10ffffffffffffffffff01" "1805" "2000" "2d07000000" "310000000000000080"
        "3a030a0161" "42020a00" "42040a026263" "4a02c3a4" "a00601" "a00602"
    )  # fmt: skip


def test_absent_is_not_zero() -> None:
    assert Everything().encode() == b""
    assert Everything.decode_untrusted(b"") == Everything()
    assert Everything.decode_untrusted(b"\x08\x00").number == 0
    assert Everything.decode_untrusted(memoryview(b"\x20\x02")).flag is True


def test_unknown_fields_are_skipped_and_the_last_single_value_counts() -> None:
    unknown = bytes.fromhex("f80701" "f9070102030405060708" "fa0703616263" "fd0701020304")  # fmt: skip
    assert Everything.decode_untrusted(unknown + b"\x08\x01\x08\x02" + unknown).number == 2


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        ("08", "cut off"),
        ("0880", "cut off"),
        ("08ffffffffffffffffffff01", "longer than 10"),
        ("3a05", "cut off"),
        ("4a02ff00", "cut off|UTF-8"),
        ("4a01ff", "UTF-8"),
        ("2d070000", "cut off"),
        ("3100", "cut off"),
        ("0b", "wire type 3"),
        ("0f", "wire type 7"),
        ("0a00", "wrong wire type"),
        ("4800", "wrong wire type"),
        ("0000", "out of range"),
        ("8080808080010000", "out of range"),
        ("3a00", "without its field id"),
        ("3a070a050102030405", "over 4"),
        ("42020a0042020a0042020a0042020a00", "over 3 values"),
    ],
)
def test_refused(encoded: str, reason: str) -> None:
    with pytest.raises(RemoteProtocolError, match=reason):
        Everything.decode_untrusted(bytes.fromhex(encoded))


@pytest.mark.parametrize("flood", [b"\x08\x00", b"\xa0\x06\x00", b"\xf8\x07\x00"])
def test_too_many_fields(flood: bytes) -> None:
    Everything.decode_untrusted(flood * MAX_PROTOBUF_FIELDS)
    with pytest.raises(RemoteProtocolError, match="over 4096"):
        Everything.decode_untrusted(flood * (MAX_PROTOBUF_FIELDS + 1))


def test_too_many_packed_values() -> None:
    with pytest.raises(RemoteProtocolError, match="over 4096"):
        Everything.decode_untrusted(bytes.fromhex("a2068120") + bytes(4097))


@pytest.mark.parametrize(
    "message",
    [Everything(number=-1), Everything(number=1 << 64), Everything(small=1 << 32), Everything(signed=1 << 63), Inner()],
)
def test_our_own_mistakes(message: Message) -> None:
    with pytest.raises(LocalProtocolError):
        message.encode()
