"""One operation: an edit of the document, or a change of who may write.

Wire: canonical msgpack, an array

    [kind: uint, author: bin 32, instance: uint 32, seq: uint, parents: [bin 32, …], time: uint, body: bin,
     signature: bin 64]

    kind 0 EDIT        body: a yrs update (v1), empty for an operation that only merges heads
    kind 1 GRANT       body: the key (32 bytes) that may write from now on
    kind 2 REMOVE      body: the key that may not write any more
    kind 3 HAND_OVER   body: the key that owns the space instead of the author

`instance` tells apart the chains of one author: a member that lost its memory starts a new one, because it cannot know
its last `seq`. For `seq` above 0 `parents[0]` is the author's operation before this one in the same chain; the other
parents are the heads the author saw, sorted, none twice. `time` is in Unix seconds.

    signature = Ed25519("lattica-replica-op-1" || space || all bytes before the signature's)
    id        = BLAKE3(space || all bytes)

The space is not sent, it is signed. The id covers the signature: Ed25519 signatures are not malleable by others
(libsodium refuses non-canonical ones), and an author who signs one body twice has equivocated.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from itertools import pairwise

import msgpack
from blake3 import blake3
from nacl.bindings import crypto_sign_open
from nacl.exceptions import BadSignatureError

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.keys import PrivateKey
from lattica_protocols.limits import (
    REPLICA_MAX_OPERATION_BYTES,
    REPLICA_MAX_PARENTS,
    REPLICA_MAX_UPDATE_BYTES,
)

SIGNED_PREFIX = b"lattica-replica-op-1"
"""Before the space and the operation in what is signed."""
_pack = msgpack.Packer().pack
"""`packb` makes a packer with a buffer of 256 KiB for each call, which takes as long as the packing."""
_SIGNATURE_TAIL = 66
"""The signature with its msgpack header: always the last 66 bytes."""
_MAX_SEQ = (1 << 40) - 1
_MAX_TIME = (1 << 40) - 1


class Kind(enum.IntEnum):
    EDIT = 0
    GRANT = 1
    REMOVE = 2
    HAND_OVER = 3


class Operation:
    """A parsed operation. Whether its signature is right is asked with `check_signature`."""

    __slots__ = ("author", "body", "encoded", "id", "instance", "kind", "parents", "seq", "time", "verified")

    kind: int
    author: bytes
    instance: int
    seq: int
    parents: tuple[bytes, ...]
    time: int
    body: bytes
    encoded: bytes
    id: bytes
    verified: bool
    """The signature was checked, or is ours."""

    @classmethod
    def seal(
        cls,
        key: PrivateKey,
        space: bytes,
        *,
        kind: int = Kind.EDIT,
        instance: int,
        seq: int,
        parents: Sequence[bytes],
        time: int,
        body: bytes,
    ) -> Operation:
        """Make and sign an operation. The caller keeps the rules: seq, links, contents."""
        author = key.public_key.data
        unsigned = msgpack.packb([kind, author, instance, seq, parents, time, body, b""])[:-2]
        signature = key.sign(SIGNED_PREFIX + space + unsigned)
        operation = cls._of(kind, author, instance, seq, tuple(parents), time, body)
        operation.encoded = unsigned + b"\xc4\x40" + signature
        operation.id = blake3(space + operation.encoded).digest()
        operation.verified = True
        return operation

    @classmethod
    def _of(
        cls, kind: int, author: bytes, instance: int, seq: int, parents: tuple[bytes, ...], time: int, body: bytes
    ) -> Operation:
        operation = cls()
        operation.kind = kind
        operation.author = author
        operation.instance = instance
        operation.seq = seq
        operation.parents = parents
        operation.time = time
        operation.body = body
        return operation

    @classmethod
    def decode_untrusted(cls, data: bytes, space: bytes) -> Operation:
        """Parse and check the form, not the signature."""
        if len(data) > REPLICA_MAX_OPERATION_BYTES:
            raise RemoteProtocolError(f"operation of {len(data)} bytes is over {REPLICA_MAX_OPERATION_BYTES}")
        if data[-_SIGNATURE_TAIL:-64] != b"\xc4\x40":
            raise RemoteProtocolError("not an operation: no signature at its end")
        try:
            fields = msgpack.unpackb(
                data, use_list=False, max_array_len=REPLICA_MAX_PARENTS, max_map_len=0, max_str_len=0, max_ext_len=0
            )
            kind, author, instance, seq, parents, time, body, signature = fields
            canonical = type(fields) is tuple and _pack(fields) == data
        except (ValueError, TypeError, msgpack.UnpackException, RecursionError):
            raise RemoteProtocolError("not an operation") from None
        if not canonical:
            raise RemoteProtocolError("operation not in canonical form")
        _check_types(kind, author, instance, seq, parents, time, body, signature)
        operation = cls._of(kind, author, instance, seq, parents, time, body)
        operation.encoded = data
        operation.id = blake3(space + data).digest()
        operation.verified = False
        return operation

    @classmethod
    def following(
        cls,
        last: Operation,
        space: bytes,
        *,
        kind: int,
        others: tuple[bytes, ...],
        elapsed: int,
        body: bytes,
        signature: bytes,
    ) -> Operation:
        """The operation after `last` in its chain, from what is its own; `others`: parents beside `last`.

        The form is checked, not the signature. Raises `RemoteProtocolError`.
        """
        author, instance, seq, time = last.author, last.instance, last.seq + 1, last.time + elapsed
        parents = (last.id, *others)
        if seq > _MAX_SEQ or time > _MAX_TIME or len(parents) > REPLICA_MAX_PARENTS or len(signature) != 64:
            raise RemoteProtocolError("operation with a number out of range")
        _check_body(kind, body)
        if others:
            _check_parents(parents, True)
        operation = cls._of(kind, author, instance, seq, parents, time, body)
        operation.encoded = _pack((kind, author, instance, seq, parents, time, body, signature))
        operation.id = blake3(space + operation.encoded).digest()
        operation.verified = False
        return operation

    def check_signature(self, space: bytes) -> bool:
        """Whether the author signed this for `space`. About 65 µs; releases the GIL."""
        if not self.verified:
            data = self.encoded
            try:
                crypto_sign_open(data[-64:] + SIGNED_PREFIX + space + data[:-_SIGNATURE_TAIL], self.author)
            except (BadSignatureError, ValueError):
                return False
            self.verified = True
        return True

    @property
    def chain(self) -> tuple[bytes, int]:
        """Author and instance."""
        return self.author, self.instance

    def __repr__(self) -> str:
        return f"Operation({Kind(self.kind).name} {self.id.hex()[:8]} by {self.author.hex()[:8]} seq {self.seq})"


def _check_types(
    kind: object,
    author: object,
    instance: object,
    seq: object,
    parents: object,
    time: object,
    body: object,
    signature: object,
) -> None:
    types = (type(kind), type(author), type(instance), type(seq), type(parents), type(time), type(body))
    if types != _TYPES or type(signature) is not bytes:
        raise RemoteProtocolError("operation with a field of a wrong type")
    assert isinstance(parents, tuple)
    assert isinstance(author, bytes)
    assert isinstance(body, bytes)
    if len(author) != 32 or len(signature) != 64:
        raise RemoteProtocolError("operation whose author or signature has a wrong length")
    if not (0 <= kind <= 3 and 0 <= instance <= 0xFFFFFFFF and 0 <= seq <= _MAX_SEQ and 0 <= time <= _MAX_TIME):  # type: ignore[operator]
        raise RemoteProtocolError("operation with a number out of range")
    _check_parents(parents, bool(seq))
    _check_body(kind, body)


def _check_body(kind: object, body: bytes) -> None:
    if len(body) > REPLICA_MAX_UPDATE_BYTES or (kind != Kind.EDIT and len(body) != 32):
        raise RemoteProtocolError("operation whose body is too long, or is no key")


def _check_parents(parents: tuple[bytes, ...], follows: bool) -> None:
    """The author's operation before it first (when it `follows` one), the others sorted, none twice."""
    for parent in parents:
        if type(parent) is not bytes or len(parent) != 32:
            raise RemoteProtocolError("operation with a parent that is no hash")
    if follows and not parents:
        raise RemoteProtocolError("operation that lacks its predecessor")
    if len(parents) > 1:
        others = parents[1:] if follows else parents
        if any(a >= b for a, b in pairwise(others)) or (follows and parents[0] in others):
            raise RemoteProtocolError("operation whose parents are not sorted, or are there twice")


_TYPES = (int, bytes, int, int, tuple, int, bytes)
