"""The messages of `/lattica/replica/1`. Each stands alone: lost, repeated and reordered ones do no harm.

On a stream: u32 length (big endian) || message. A message is a msgpack array `[kind, tag: bin 8, …]`;
the tag is the first 8 bytes of the space's id, which whoever holds the space knows:

    1 HELLO           digest, checkpoint number, its operations, its id
                                                                    what the sender has, in 32 bytes
    2 FRONTIER        checkpoint id, full, [[author, instance, seq, first 8 bytes of the id], …],
                      [[author, seq, instance], …]                  chain ends and exclusions; asks for what is missing
    3 OPERATIONS      batch, [operation, …]                         a row (`short_form`), parents first. Batch 0:
                                                                    pushed; others want an ACK
    4 ACK             batch
    5 WANT            [id, …]                                       parents that are missing
    6 FORKS           [[operation, …], …]                           proofs of equivocation (`equivocation`)
    7 GET_CHECKPOINT  id, offset
    8 CHECKPOINT      id, offset, total, bytes
    9 PRESENCE        [[key, time, info, signature], …]
    10 UNKNOWN                                                      the sender has no such space
    11 GET_GENESIS    space id
    12 GENESIS        genesis
    13 PROPOSAL       header, [[key, signature], …]                 a checkpoint that a quorum has to sign

`full` in a FRONTIER: count only those chain ends as known whose id the receiver has. Otherwise a chain end that is
ahead of the receiver's stands for all of the chain before it, too.

    digest = BLAKE3("lattica-replica-digest" || checkpoint id || exclusions digest || heads, sorted)
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgpack

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import (
    REPLICA_BATCH_OPERATIONS,
    REPLICA_MAX_CHECKPOINT_BYTES,
    REPLICA_MAX_INSTANCES,
    REPLICA_MAX_MESSAGE_BYTES,
    REPLICA_MAX_PRESENCE_BYTES,
    REPLICA_MAX_PRESENT,
    REPLICA_MAX_PROPOSAL_BYTES,
    REPLICA_MAX_TIPS,
    REPLICA_MAX_WANTED,
    REPLICA_MAX_WRITERS,
)


class Kind(enum.IntEnum):
    HELLO = 1
    FRONTIER = 2
    OPERATIONS = 3
    ACK = 4
    WANT = 5
    FORKS = 6
    GET_CHECKPOINT = 7
    CHECKPOINT = 8
    PRESENCE = 9
    UNKNOWN = 10
    GET_GENESIS = 11
    GENESIS = 12
    PROPOSAL = 13


TAG_BYTES = 8
"""Of a space's id, in each message. Two spaces of one peer with one tag are found at joining, and refused."""
MAX_FORKS = 64
"""Proofs in one message."""

_Check = Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class Message:
    """A parsed message: `fields` are those behind the tag, with the types that the module's header says."""

    kind: Kind
    tag: bytes
    fields: tuple[Any, ...]


def encode_message(kind: Kind, space: bytes, *fields: object) -> bytes:
    """A message about the space with the id `space`."""
    return bytes(msgpack.packb([kind, space[:TAG_BYTES], *fields]))


def decode_message_untrusted(data: bytes) -> Message:
    """Parse a message; the types and lengths of all fields are checked, operations are still bytes."""
    if len(data) > REPLICA_MAX_MESSAGE_BYTES:
        raise RemoteProtocolError(f"message of {len(data)} bytes is over {REPLICA_MAX_MESSAGE_BYTES}")
    try:
        parts = msgpack.unpackb(
            data, use_list=False, max_array_len=REPLICA_MAX_TIPS, max_map_len=0, max_str_len=0, max_ext_len=0
        )
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError):
        raise RemoteProtocolError("not a message") from None
    if type(parts) is not tuple or len(parts) < 2 or type(parts[0]) is not int or not _exactly(TAG_BYTES)(parts[1]):
        raise RemoteProtocolError("not a message")
    shape = _SHAPES.get(parts[0])
    fields = parts[2:]
    if (
        shape is None
        or len(shape) != len(fields)
        or not all(check(part) for check, part in zip(shape, fields, strict=True))
    ):
        raise RemoteProtocolError(f"malformed message of kind {parts[0]}")
    return Message(Kind(parts[0]), parts[1], fields)


def _is_hash(value: object) -> bool:
    return type(value) is bytes and len(value) == 32


def _is_number(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def _is_bool(value: object) -> bool:
    return type(value) is bool


def _bytes_up_to(limit: int) -> _Check:
    return lambda value: type(value) is bytes and len(value) <= limit


def _exactly(length: int) -> _Check:
    return lambda value: type(value) is bytes and len(value) == length


def _row(*checks: _Check) -> _Check:
    return lambda value: (
        type(value) is tuple
        and len(value) == len(checks)
        and all(check(part) for check, part in zip(checks, value, strict=True))
    )


def _list(check: _Check, limit: int) -> _Check:
    return lambda value: type(value) is tuple and len(value) <= limit and all(check(part) for part in value)


_SOME_BYTES = _bytes_up_to(REPLICA_MAX_MESSAGE_BYTES)

_SHAPES: dict[int, tuple[_Check, ...]] = {
    Kind.HELLO: (_is_hash, _is_number, _is_number, _is_hash),
    Kind.FRONTIER: (
        _is_hash,
        _is_bool,
        _list(_row(_is_hash, _is_number, _is_number, _exactly(8)), REPLICA_MAX_TIPS),
        _list(_row(_is_hash, _is_number, _is_number), REPLICA_MAX_TIPS),
    ),
    Kind.OPERATIONS: (_is_number, _list(_SOME_BYTES, REPLICA_BATCH_OPERATIONS)),
    Kind.ACK: (_is_number,),
    Kind.WANT: (_list(_is_hash, REPLICA_MAX_WANTED),),
    Kind.FORKS: (_list(_list(_SOME_BYTES, REPLICA_MAX_INSTANCES + 1), MAX_FORKS),),
    Kind.GET_CHECKPOINT: (_is_hash, _is_number),
    Kind.CHECKPOINT: (
        _is_hash,
        _is_number,
        lambda value: _is_number(value) and value <= REPLICA_MAX_CHECKPOINT_BYTES,
        _SOME_BYTES,
    ),
    Kind.PRESENCE: (
        _list(_row(_is_hash, _is_number, _bytes_up_to(REPLICA_MAX_PRESENCE_BYTES), _exactly(64)), REPLICA_MAX_PRESENT),
    ),
    Kind.UNKNOWN: (),
    Kind.GET_GENESIS: (_is_hash,),
    Kind.GENESIS: (_bytes_up_to(2 * 256 * 34 + 512),),
    Kind.PROPOSAL: (
        _bytes_up_to(REPLICA_MAX_PROPOSAL_BYTES),
        _list(_row(_is_hash, _exactly(64)), REPLICA_MAX_WRITERS),
    ),
}
