"""Peer ids: the multihash of a public key.

Keys whose protobuf has at most 42 bytes (Ed25519: 36) stand in the id itself (identity multihash, `00 24 ||` key),
others by their SHA2-256 (`12 20 ||` digest). Text: base58btc of the multihash (`12D3KooW...`, `Qm...`), which is what
we write, or a CID of version 1 with the codec libp2p-key (`bafzaa...`), which we also read.
"""

from __future__ import annotations

from functools import lru_cache, total_ordering

from lattica_protocols.base_encoding import decode_base58, encode_base58
from lattica_protocols.cid import LIBP2P_KEY, Cid
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.keys import PublicKey
from lattica_protocols.limits import MAX_INLINE_KEY_BYTES
from lattica_protocols.multihash import IDENTITY, SHA2_256, Multihash


@total_ordering
class PeerId:
    """Who a peer is. Immutable, hashable, ordered by its bytes."""

    __slots__ = ("_bytes", "_text")

    _bytes: bytes
    _text: str | None

    def __init__(self, multihash: Multihash) -> None:
        """From a multihash that was checked; everybody else uses the class methods."""
        object.__setattr__(self, "_bytes", multihash.to_bytes())
        object.__setattr__(self, "_text", None)

    @classmethod
    def from_public_key(cls, key: PublicKey) -> PeerId:
        encoded = key.to_protobuf()
        return cls(Multihash.of(IDENTITY if len(encoded) <= MAX_INLINE_KEY_BYTES else SHA2_256, encoded))

    @classmethod
    def parse(cls, text: str) -> PeerId:
        """Either text form. `ValueError` with one clear line."""
        return _parse(text)

    @classmethod
    def from_bytes_untrusted(cls, data: bytes) -> PeerId:
        """From the multihash's bytes."""
        return cls(_checked_untrusted(Multihash.from_bytes_untrusted(bytes(data))))

    def to_bytes(self) -> bytes:
        """The multihash."""
        return self._bytes

    def to_cid_text(self) -> str:
        """The CID form (base 32)."""
        return str(Cid(1, LIBP2P_KEY, Multihash.from_bytes_untrusted(self._bytes)))

    def short(self) -> str:
        """The last 8 characters, for logs and tables: the first ones are the same for all Ed25519 ids."""
        return str(self)[-8:]

    def public_key(self) -> PublicKey | None:
        """The key, when the id contains it (and it is a valid key)."""
        if self._bytes[0] != IDENTITY:
            return None
        try:
            return PublicKey.from_protobuf_untrusted(self._bytes[2:])
        except RemoteProtocolError:
            return None

    def matches(self, key: PublicKey) -> bool:
        """Whether this is the id of `key`."""
        return PeerId.from_public_key(key) == self

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a PeerId is immutable")

    def __str__(self) -> str:
        if self._text is None:
            object.__setattr__(self, "_text", encode_base58(self._bytes))
        assert self._text is not None
        return self._text

    def __repr__(self) -> str:
        return f"PeerId({str(self)!r})"

    def __reduce__(self) -> tuple[object, ...]:
        return PeerId.from_bytes_untrusted, (self._bytes,)  # for `copy`, which otherwise sets attributes

    def __hash__(self) -> int:
        return hash(self._bytes)

    def __eq__(self, other: object) -> bool:
        return self._bytes == other._bytes if isinstance(other, PeerId) else NotImplemented

    def __lt__(self, other: object) -> bool:
        return self._bytes < other._bytes if isinstance(other, PeerId) else NotImplemented


def _checked_untrusted(multihash: Multihash) -> Multihash:
    if multihash.code == IDENTITY:
        if not 0 < len(multihash.digest) <= MAX_INLINE_KEY_BYTES:
            raise RemoteProtocolError(f"peer id with a key of {len(multihash.digest)} bytes in it")
    elif multihash.code != SHA2_256:
        raise RemoteProtocolError(f"peer id with the hash function 0x{multihash.code:x}")
    return multihash


@lru_cache(maxsize=1024)
def _parse(text: str) -> PeerId:
    try:
        if text.startswith(("1", "Qm")):
            return PeerId.from_bytes_untrusted(decode_base58(text))
        try:
            cid = Cid.parse(text)
        except ValueError:
            raise ValueError("it is neither base 58 (12D3Koo…, Qm…) nor a content id (bafz…)") from None
        if cid.codec != LIBP2P_KEY or cid.version != 1:
            raise ValueError(f"its codec is 0x{cid.codec:x}, not libp2p-key")
        return PeerId(_checked_untrusted(cid.multihash))
    except (ValueError, RemoteProtocolError) as error:
        raise ValueError(f"{text[:80]!r} is not a peer id: {error}") from None
