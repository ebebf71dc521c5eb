"""Content ids and multihashes: both versions, known content, and what is refused."""

import pytest

from lattica_protocols.cid import BLOB_MANIFEST, DAG_PB, RAW, Cid, decode_cid_untrusted
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.multihash import BLAKE3, IDENTITY, SHA2_256, Multihash

V0 = "QmdfTbBqBPQ7VNxZEYEj14VmRuZBkqFbiwReogJgS1zR1n"  # the example in the specification
V1 = "bafybeihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"  # the same content


def test_both_versions() -> None:
    old, new = Cid.parse(V0), Cid.parse(V1)
    assert (old.version, old.codec) == (0, DAG_PB)
    assert (new.version, new.codec) == (1, DAG_PB)
    assert old.multihash == new.multihash
    assert str(old) == V0
    assert str(new) == V1
    assert old != new
    assert Cid.parse(f"/ipfs/{V1}") == new
    for cid in (old, new):
        assert Cid.from_bytes_untrusted(cid.to_bytes()) == cid
        assert decode_cid_untrusted(b"x" + cid.to_bytes() + b"y", 1) == (cid, 1 + len(cid.to_bytes()))


def test_known_content() -> None:
    # `ipfs add --cid-version 1 --raw-leaves` of "hello world"
    cid = Cid(1, RAW, Multihash.of(SHA2_256, b"hello world"))
    assert str(cid) == "bafkreifzjut3te2nhyekklss27nh3k72ysco7y32koao5eei66wof36n5e"
    assert cid.multihash.matches(b"hello world")
    assert not cid.multihash.matches(b"hello")


def test_blake3() -> None:
    multihash = Multihash.of(BLAKE3, b"")
    assert multihash.digest.hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    cid = Cid.v1(BLOB_MANIFEST, BLAKE3, multihash.digest)
    assert cid.to_bytes()[:5] == bytes.fromhex("0181041e20")
    assert Cid.parse(str(cid)) == cid
    assert sorted([cid, Cid.parse(V0)]) == [cid, Cid.parse(V0)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "multibase"),
        ("hello", "multibase"),
        ("Qm" + "0" * 44, "base 58"),
        ("z" + V0, "version 0"),
        ("b" + "a" * 9, "base 32|version"),
        (V1[:-2], "base 32|cut off"),
    ],
)
def test_refused_text(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Cid.parse(text)


@pytest.mark.parametrize(
    ("binary", "reason"),
    [
        ("", "cut off"),
        ("02551220" + "00" * 32, "version 2"),
        ("01551220" + "00" * 31, "cut off"),
        ("01551220" + "00" * 33, "behind"),
        ("0155121f" + "00" * 31, "digest of 31"),
        ("01551e21" + "00" * 33, "digest of 33"),
        ("01553381" + "01" + "00" * 129, "over 128"),
    ],
)
def test_refused_binary(binary: str, reason: str) -> None:
    with pytest.raises(RemoteProtocolError, match=reason):
        Cid.from_bytes_untrusted(bytes.fromhex(binary))


def test_multihash() -> None:
    assert Multihash.of(IDENTITY, b"ab").to_bytes() == b"\x00\x02ab"
    with pytest.raises(ValueError, match="0x13"):
        Multihash.of(0x13, b"")
    with pytest.raises(RemoteProtocolError, match="behind"):
        Multihash.from_bytes_untrusted(b"\x00\x00\x00")
