"""Unsigned varints, by the vectors of multiformats."""

import pytest

from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.varint import decode_uvarint_untrusted, encode_uvarint

# From https://github.com/multiformats/unsigned-varint
VECTORS = [
    (0, "00"),
    (1, "01"),
    (127, "7f"),
    (128, "8001"),
    (255, "ff01"),
    (300, "ac02"),
    (16384, "808001"),
    ((1 << 63) - 1, "ffffffffffffffff7f"),
]


@pytest.mark.parametrize(("value", "encoded"), VECTORS)
def test_vectors(value: int, encoded: str) -> None:
    assert encode_uvarint(value).hex() == encoded
    assert decode_uvarint_untrusted(b"xx" + bytes.fromhex(encoded) + b"\xff", 2) == (value, 2 + len(encoded) // 2)


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        ("", "cut off"),
        ("80", "cut off"),
        ("8000", "not minimal"),
        ("ff00", "not minimal"),
        ("80808080808080808001", "longer than 9"),
        ("ffffffffffffffffff", "longer than 9"),
    ],
)
def test_refused(encoded: str, reason: str) -> None:
    with pytest.raises(RemoteProtocolError, match=reason):
        decode_uvarint_untrusted(bytes.fromhex(encoded))


@pytest.mark.parametrize("value", [-1, 1 << 63])
def test_out_of_range(value: int) -> None:
    with pytest.raises(LocalProtocolError):
        encode_uvarint(value)
