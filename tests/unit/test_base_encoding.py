"""Base 58, 32 and 64 as multiformats has them, by the vectors of their specifications."""

from collections.abc import Callable

import pytest

from lattica_protocols import base_encoding as base


# From https://datatracker.ietf.org/doc/html/draft-msporny-base58 and the multibase repository's tests.
@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"Hello World!", "2NEpo7TZRRrLZSi2U"),
        (
            b"The quick brown fox jumps over the lazy dog.",
            "USm3fpXnKG5EUBx2ndxBDMPVciP5hGey2Jh4NDv6gmeo1LkMeiKrLJUUBk6Z",
        ),
        (bytes.fromhex("0000287fb4cd"), "11233QC4"),
        (b"", ""),
        (b"\0\0", "11"),
    ],
)
def test_base58(data: bytes, text: str) -> None:
    assert base.encode_base58(data) == text
    assert base.decode_base58(text) == data


@pytest.mark.parametrize("text", ["0", "O", "I", "l", "a b", "ü", "1" * 5000])
def test_base58_refuses(text: str) -> None:
    with pytest.raises(ValueError):
        base.decode_base58(text)


@pytest.mark.parametrize(
    "text",
    ["bpfsxgidnmfxgsibb", "BPFSXGIDNMFXGSIBB", "zUXE7GvtEk8XTXs1GF8HSGbVA9FCX9SEBPe", "f68656c6c6f", "ueWVzIG1hbmkgIQ"],
)
def test_multibase_round_trip(text: str) -> None:
    data = base.decode_multibase(text)
    assert base.encode_multibase(data, text[0].lower()).lower() == text.lower()


def test_multibase_vectors() -> None:
    data = b"yes mani !"
    assert base.encode_multibase(data, "b") == "bpfsxgidnmfxgsibb"
    assert base.encode_multibase(data, "z") == "z7paNL19xttacUY"
    assert base.encode_multibase(data, "u") == "ueWVzIG1hbmkgIQ"
    assert base.encode_multibase(data, "f") == "f796573206d616e692021"


@pytest.mark.parametrize(
    ("decode", "text"),
    [
        (base.decode_base32, "a"),
        (base.decode_base32, "a1"),
        (base.decode_base32, "mz"),
        (base.decode_base32, "me======"),
        (base.decode_base64url, "a"),
        (base.decode_base64url, "ab+c"),
        (base.decode_base64url, "YR"),
        (base.decode_base64url, "YQ=="),
        (base.decode_multibase, ""),
        (base.decode_multibase, "mYQ"),
        (base.decode_multibase, "fabc"),
    ],
)
def test_malformed_text_is_refused(decode: Callable[[str], bytes], text: str) -> None:
    with pytest.raises(ValueError):
        decode(text)


def test_unknown_base() -> None:
    with pytest.raises(ValueError, match="unknown multibase"):
        base.encode_multibase(b"", "Q")
