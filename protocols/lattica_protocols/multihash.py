"""Multihash: a digest that says which function made it.

Wire: uvarint(function code) || uvarint(digest length) || digest (https://github.com/multiformats/multihash).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import blake3

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import MAX_MULTIHASH_DIGEST_BYTES
from lattica_protocols.varint import decode_uvarint_untrusted, encode_uvarint

IDENTITY = 0x00
SHA2_256 = 0x12
BLAKE3 = 0x1E

_DIGEST_BYTES = {SHA2_256: 32, BLAKE3: 32}


@dataclass(frozen=True, slots=True, order=True)
class Multihash:
    """`code` from the multicodec table, and the digest."""

    code: int
    digest: bytes

    @classmethod
    def of(cls, code: int, data: bytes) -> Multihash:
        """Hash `data`. `ValueError` for a function other than identity, SHA2-256 and BLAKE3."""
        if code == IDENTITY:
            return cls(code, bytes(data))
        if code == SHA2_256:
            return cls(code, hashlib.sha256(data).digest())
        if code == BLAKE3:
            return cls(code, blake3.blake3(data).digest())
        raise ValueError(f"unknown hash function 0x{code:x}")

    def matches(self, data: bytes) -> bool:
        """Whether `data` has this digest. `ValueError` for a function we do not have."""
        return Multihash.of(self.code, data).digest == self.digest

    def to_bytes(self) -> bytes:
        return encode_uvarint(self.code) + encode_uvarint(len(self.digest)) + self.digest

    @classmethod
    def from_bytes_untrusted(cls, data: bytes) -> Multihash:
        """Parse all of `data`. Functions we know have to have their full digest length."""
        multihash, end = decode_multihash_untrusted(data)
        if end != len(data):
            raise RemoteProtocolError(f"{len(data) - end} bytes behind the multihash")
        return multihash


def decode_multihash_untrusted(data: bytes, offset: int = 0) -> tuple[Multihash, int]:
    """The multihash at `offset` and the offset behind it."""
    code, offset = decode_uvarint_untrusted(data, offset)
    length, offset = decode_uvarint_untrusted(data, offset)
    if length > MAX_MULTIHASH_DIGEST_BYTES:
        raise RemoteProtocolError(f"digest of {length} bytes is over {MAX_MULTIHASH_DIGEST_BYTES}")
    if length != _DIGEST_BYTES.get(code, length):
        raise RemoteProtocolError(f"digest of {length} bytes for the hash function 0x{code:x}")
    if offset + length > len(data):
        raise RemoteProtocolError("multihash is cut off")
    return Multihash(code, bytes(data[offset : offset + length])), offset + length
