"""The genesis of a space: who owns it, what it is called, who may write from the start. Its hash is the space's id.

Wire: canonical msgpack, an array

    [1, owner: bin 32, name: str, nonce: bin 16, writers: [bin 32, …], quorum: uint, signers: [bin 32, …]]

Keys are raw Ed25519 keys. `writers` (sorted, without the owner) may write from the start. A checkpoint is valid with
the signature of an owner, or, when `quorum` is not 0, with those of `quorum` of the `signers` (sorted). A quorum is
more than half of them, so that no two sets of signers replace the history in two ways.

    id = BLAKE3("lattica-space-1" || genesis)        text: CIDv1, codec 0x0202, multihash BLAKE3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import msgpack
from blake3 import blake3

from lattica_protocols.blobs.canonical import CanonicalReader
from lattica_protocols.cid import Cid
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import REPLICA_MAX_NAME_BYTES, REPLICA_MAX_WRITERS
from lattica_protocols.multihash import BLAKE3, Multihash
from lattica_protocols.replica import SPACE_CODEC

_DOMAIN = b"lattica-space-1"
VERSION = 1
NONCE_BYTES = 16


@dataclass(frozen=True, slots=True)
class Genesis:
    """What a space starts from. Immutable; equal by all fields."""

    owner: bytes
    name: str
    nonce: bytes
    writers: tuple[bytes, ...] = ()
    quorum: int = 0
    signers: tuple[bytes, ...] = ()

    @classmethod
    def create(
        cls,
        owner: bytes,
        name: str,
        nonce: bytes,
        writers: Sequence[bytes] = (),
        quorum: int = 0,
        signers: Sequence[bytes] = (),
    ) -> Genesis:
        """A new genesis; keys are sorted. `ValueError` for a name that is too long or a quorum nobody can reach."""
        genesis = cls(owner, name, nonce, tuple(sorted(set(writers) - {owner})), quorum, tuple(sorted(set(signers))))
        try:
            return cls.decode_untrusted(genesis.encode())
        except RemoteProtocolError as error:
            raise ValueError(str(error)) from None

    @classmethod
    def decode_untrusted(cls, data: bytes) -> Genesis:
        """Parse a genesis; anything that is not in its one canonical form is refused."""
        reader = CanonicalReader(data)
        if reader.read_array_untrusted(7) != 7:
            raise RemoteProtocolError("a genesis has 7 fields")
        if reader.read_uint_untrusted(255) != VERSION:
            raise RemoteProtocolError("a genesis of an unknown version")
        owner = _key(reader)
        name = reader.read_str_untrusted(REPLICA_MAX_NAME_BYTES)
        nonce = reader.read_bin_untrusted(NONCE_BYTES)
        writers = _keys(reader)
        quorum = reader.read_uint_untrusted(REPLICA_MAX_WRITERS)
        signers = _keys(reader)
        reader.expect_end_untrusted()
        if len(nonce) != NONCE_BYTES or owner in writers:
            raise RemoteProtocolError("a genesis with a short nonce, or its owner among the writers")
        if quorum > len(signers) or (signers and 2 * quorum <= len(signers)):
            raise RemoteProtocolError(f"a quorum of {quorum} of {len(signers)} signers: it has to be more than half")
        return cls(owner, name, nonce, writers, quorum, signers)

    def encode(self) -> bytes:
        """The canonical bytes."""
        fields = [VERSION, self.owner, self.name, self.nonce, self.writers, self.quorum, self.signers]
        return bytes(msgpack.packb(fields))

    @property
    def id(self) -> bytes:
        """The space's id, 32 bytes."""
        return blake3(_DOMAIN + self.encode()).digest()


def space_text(space: bytes) -> str:
    """The text form of a space id."""
    return str(Cid(1, SPACE_CODEC, Multihash(BLAKE3, space)))


def parse_space(text: str) -> bytes:
    """The 32 bytes of a space id. `ValueError` with one clear line."""
    cid = Cid.parse(text)
    if cid.version != 1 or cid.codec != SPACE_CODEC or cid.multihash.code != BLAKE3 or len(cid.multihash.digest) != 32:
        raise ValueError(f"{text[:80]!r} is a content id, but not that of a space (codec 0x{SPACE_CODEC:x})")
    return cid.multihash.digest


def provider_key(space: bytes) -> bytes:
    """The key under which members of a space find each other in the DHT: its multihash."""
    return Multihash(BLAKE3, space).to_bytes()


def _key(reader: CanonicalReader) -> bytes:
    key = reader.read_bin_untrusted(32)
    if len(key) != 32:
        raise RemoteProtocolError(f"an Ed25519 key of {len(key)} bytes")
    return key


def _keys(reader: CanonicalReader) -> tuple[bytes, ...]:
    keys = tuple(_key(reader) for _ in range(reader.read_array_untrusted(REPLICA_MAX_WRITERS)))
    if any(a >= b for a, b in pairwise(keys)):
        raise RemoteProtocolError("keys that are not sorted, or twice there")
    return keys
