"""Content identifiers (https://github.com/multiformats/cid).

    version 1   01 || uvarint(codec) || multihash; text: multibase, ours is `b` (base 32)
    version 0   a bare SHA2-256 multihash (12 20 || digest), codec dag-pb; text: base 58, `Qm...`

We write version 1 and read both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import total_ordering

from lattica_protocols.base_encoding import decode_base58, decode_multibase, encode_base58, encode_multibase
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.multihash import Multihash, decode_multihash_untrusted
from lattica_protocols.varint import decode_uvarint_untrusted, encode_uvarint

RAW = 0x55
DAG_PB = 0x70
LIBP2P_KEY = 0x72
BLOB_MANIFEST = 0x0201
"""Ours: the manifest of a blob (see the registry in protocols/README.md)."""


@total_ordering
@dataclass(frozen=True, slots=True)
class Cid:
    """An immutable content id. Ordered by its bytes."""

    version: int
    codec: int
    multihash: Multihash

    @classmethod
    def v1(cls, codec: int, code: int, digest: bytes) -> Cid:
        return cls(1, codec, Multihash(code, bytes(digest)))

    @classmethod
    def parse(cls, text: str) -> Cid:
        """From text, either version; a leading `/ipfs/` is skipped. `ValueError` with one clear line."""
        bare = text.strip().removeprefix("/ipfs/")
        try:
            if len(bare) == 46 and bare.startswith("Qm"):
                return cls.from_bytes_untrusted(decode_base58(bare))
            cid = cls.from_bytes_untrusted(decode_multibase(bare))
        except (ValueError, RemoteProtocolError) as error:
            raise ValueError(f"{text[:80]!r} is not a content id: {error}") from None
        if cid.version == 0:
            raise ValueError(f"{text[:80]!r} is not a content id: version 0 is written without a multibase prefix")
        return cid

    @classmethod
    def from_bytes_untrusted(cls, data: bytes) -> Cid:
        """Parse all of `data`."""
        cid, end = decode_cid_untrusted(data)
        if end != len(data):
            raise RemoteProtocolError(f"{len(data) - end} bytes behind the content id")
        return cid

    def to_bytes(self) -> bytes:
        if self.version == 0:
            return self.multihash.to_bytes()
        return b"\x01" + encode_uvarint(self.codec) + self.multihash.to_bytes()

    def __str__(self) -> str:
        return encode_base58(self.to_bytes()) if self.version == 0 else encode_multibase(self.to_bytes())

    def __repr__(self) -> str:
        return f"Cid({str(self)!r})"

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, Cid):
            return NotImplemented
        return self.to_bytes() < other.to_bytes()


def decode_cid_untrusted(data: bytes, offset: int = 0) -> tuple[Cid, int]:
    """The content id at `offset` and the offset behind it."""
    if bytes(data[offset : offset + 2]) == b"\x12\x20":
        multihash, end = decode_multihash_untrusted(data, offset)
        return Cid(0, DAG_PB, multihash), end
    version, offset = decode_uvarint_untrusted(data, offset)
    if version != 1:
        raise RemoteProtocolError(f"content id of version {version}")
    codec, offset = decode_uvarint_untrusted(data, offset)
    multihash, end = decode_multihash_untrusted(data, offset)
    return Cid(1, codec, multihash), end
