"""A signed state that replaces the operations before it.

Wire: canonical msgpack, an array

    [1, space: bin 32, number: uint, previous: bin 32, time: uint, root: bin 32, operations: uint,
     owners: [bin], writers: [bin], former: [bin],
     chains: [[author, instance, seq, end, last, time], …], heads: [bin 32, …],
     excluded: [[author, seq, instance], …], state: bin 32, covered: bin 32, handed over: [bin, …],
     renamed: [[client, start, end, name], …]]

`root` and `operations` are those of the replica that made it, just before. `chains` says where each chain stood.
`state` is the BLAKE3 of the document (a yrs update), `covered` that of the sorted 8-byte prefixes of the ids of all
operations it replaces, including those that earlier checkpoints did. `previous` is the id of the checkpoint before, 32
zero bytes for the first. `handed over` are all HAND_OVER operations so far, so that somebody who only knows the
genesis can see that the signer is the owner now. `renamed` are items of equivocators with another client id in the
document, by their old names: an operation from before the checkpoint may name them. Of two checkpoints the one with the
higher number is taken, then the one with more operations, then the one with the smaller id.

    id        = BLAKE3("lattica-checkpoint-1" || bytes)
    signed    = [bytes, [[key: bin 32, Ed25519("lattica-checkpoint-1" || id)], …]]      an owner's, or a quorum's
    on disk and on the wire: [signed, state, covered]
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgpack
from blake3 import blake3
from nacl.bindings import crypto_sign_open
from nacl.exceptions import BadSignatureError
from pycrdt import Doc

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.keys import PrivateKey
from lattica_protocols.limits import (
    REPLICA_MAX_CHECKPOINT_BYTES,
    REPLICA_MAX_COVERED,
    REPLICA_MAX_STATE_BYTES,
    REPLICA_MAX_TIPS,
    REPLICA_MAX_WRITERS,
)
from lattica_protocols.replica.floor import COVERED_PREFIX, ChainEnd, Floor
from lattica_protocols.replica.genesis import Genesis
from lattica_protocols.replica.operation import Kind, Operation
from lattica_protocols.replica.placement import places_of_state_untrusted
from lattica_protocols.replica.plain import apply_untrusted
from lattica_protocols.varint import decode_uvarint_untrusted

_DOMAIN = b"lattica-checkpoint-1"
VERSION = 1
MAX_KEYS = REPLICA_MAX_WRITERS * 64
"""Keys in a list of a checkpoint: all that ever wrote."""

MAX_HEAD_BYTES = 4 << 20
"""The header and the signatures."""
MAX_ARRAY = max(MAX_KEYS, REPLICA_MAX_TIPS)


class Head(enum.Enum):
    """What the first bytes of a checkpoint are."""

    SIGNED = enum.auto()
    UNSIGNED = enum.auto()
    """It has the id that was asked for, but not enough of those who may signed it."""
    WRONG = enum.auto()
    """It is not what was asked for."""
    CUT_OFF = enum.auto()


Rank = tuple[int, int, bytes]
"""Number, operations and id of a checkpoint."""
NO_RANK: Rank = (0, 0, bytes(32))
"""That of the genesis."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint with its state. Parsed ones are signed by enough of those who may."""

    space: bytes
    number: int
    previous: bytes
    time: int
    root: bytes
    operations: int
    floor: Floor
    state: bytes
    header: bytes
    """The signed bytes."""
    signatures: tuple[tuple[bytes, bytes], ...] = ()

    @property
    def id(self) -> bytes:
        return blake3(_DOMAIN + self.header).digest()

    @classmethod
    def make(
        cls,
        *,
        space: bytes,
        number: int,
        previous: bytes,
        time: int,
        root: bytes,
        operations: int,
        floor: Floor,
        state: bytes,
    ) -> Checkpoint:
        """An unsigned checkpoint."""
        covered = b"".join(sorted(floor.covered))
        chains = [
            [author, instance, end.seq, end.end, end.last, end.time]
            for (author, instance), end in sorted(floor.chains.items())
        ]
        excluded = [[author, seq, instance] for author, (seq, instance) in sorted(floor.excluded.items())]
        fields = [
            VERSION,
            space,
            number,
            previous,
            time,
            root,
            operations,
            sorted(floor.owners),
            sorted(floor.writers),
            sorted(floor.former),
            chains,
            sorted(floor.heads),
            excluded,
            blake3(state).digest(),
            blake3(covered).digest(),
            floor.handed_over,
            sorted(floor.renamed),
        ]
        return cls(space, number, previous, time, root, operations, floor, state, msgpack.packb(fields))

    def signed(self, key: PrivateKey) -> Checkpoint:
        """The same with the signature of `key`, too."""
        others = tuple(pair for pair in self.signatures if pair[0] != key.public_key.data)
        return self.with_signatures(dict([*others, (key.public_key.data, key.sign(_DOMAIN + self.id))]))

    def with_signatures(self, signatures: Mapping[bytes, bytes]) -> Checkpoint:
        """The same with these signatures, by key."""
        return replace(self, signatures=tuple(sorted(signatures.items())))

    def encode(self) -> bytes:
        """The form on disk and on the wire."""
        covered = b"".join(sorted(self.floor.covered))
        return bytes(msgpack.packb([[self.header, self.signatures], self.state, covered]))

    @classmethod
    def decode_untrusted(cls, data: bytes, genesis: Genesis, owners: frozenset[bytes] = frozenset()) -> Checkpoint:
        """Parse a checkpoint, check its signatures (`owners`: who owns the space as far as we know) and that its parts
        belong together. The state is loaded only when enough of those who may have signed it did."""
        if len(data) > REPLICA_MAX_CHECKPOINT_BYTES:
            raise RemoteProtocolError(f"checkpoint of {len(data)} bytes")
        space = genesis.id
        try:
            (header, signatures), state, covered = _unpack(data)
            fields = read_header_untrusted(header, space)
            number, previous, time, root, operations, owned, writers, former, chains, heads, excluded = fields[2:13]
            pairs = tuple((_check_key(key), bytes(signature)) for key, signature in signatures[:REPLICA_MAX_WRITERS])
            handed = tuple(bytes(op) for op in fields[15][:REPLICA_MAX_WRITERS])
            trusted = owners | follow_hand_overs_untrusted(handed, genesis)
            if len(valid_signers(genesis, trusted, header, pairs)) < (genesis.quorum or 1):
                raise RemoteProtocolError("checkpoint that nobody signed who may")
            if blake3(state).digest() != fields[13] or blake3(covered).digest() != fields[14]:
                raise RemoteProtocolError("checkpoint whose state is not the one it signs")
            floor = Floor(
                _keys(owned),
                _keys(writers),
                _keys(former),
                _chains(chains),
                vector_of(state),
                _keys(heads),
                _excluded(excluded),
                _prefixes(covered),
                _renamed(fields[16]),
                handed,
                state,
            )
        except (ValueError, TypeError, msgpack.UnpackException, RecursionError):
            raise RemoteProtocolError("not a checkpoint") from None
        return cls(space, number, previous, time, root, operations, floor, state, header, pairs)

    @classmethod
    def check_head_untrusted(cls, data: bytes, checkpoint: bytes, genesis: Genesis, owners: frozenset[bytes]) -> Head:
        """What the first bytes of an encoded checkpoint tell, before the rest of up to 100 MB is fetched."""
        unpacker = msgpack.Unpacker(use_list=False, max_buffer_size=MAX_HEAD_BYTES, max_array_len=MAX_ARRAY)
        try:
            unpacker.feed(data[:MAX_HEAD_BYTES])
            if unpacker.read_array_header() != 3:
                return Head.WRONG
            header, signatures = unpacker.unpack()
            if type(header) is not bytes or blake3(_DOMAIN + header).digest() != checkpoint:
                return Head.WRONG
            fields = read_header_untrusted(header, genesis.id)
            pairs = tuple((_check_key(key), bytes(signature)) for key, signature in signatures[:REPLICA_MAX_WRITERS])
            handed = tuple(bytes(op) for op in fields[15][:REPLICA_MAX_WRITERS])
            trusted = owners | follow_hand_overs_untrusted(handed, genesis)
        except msgpack.OutOfData:
            return Head.CUT_OFF if len(data) < MAX_HEAD_BYTES else Head.WRONG
        except (ValueError, TypeError, msgpack.UnpackException, RecursionError, RemoteProtocolError):
            return Head.WRONG
        enough = len(valid_signers(genesis, trusted, header, pairs)) >= (genesis.quorum or 1)
        return Head.SIGNED if enough else Head.UNSIGNED

    @property
    def rank(self) -> Rank:
        return self.number, self.operations, self.id

    def ranks_above(self, other: Rank) -> bool:
        """Whether this one is to be taken instead of `other`."""
        return ranks_above(self.rank, other)


def ranks_above(one: Rank, other: Rank) -> bool:
    """Whether the checkpoint `one` is to be taken instead of `other`."""
    return (*one[:2], other[2]) > (*other[:2], one[2])


def read_header_untrusted(header: bytes, space: bytes) -> tuple[Any, ...]:
    """The fields of a checkpoint's header. The lists in it are checked where they are used."""
    try:
        fields = _unpack(header)
        if msgpack.packb(fields) != header or len(fields) != 17 or fields[:2] != (VERSION, space):
            raise RemoteProtocolError("not a checkpoint of this space")
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError):
        raise RemoteProtocolError("not a checkpoint") from None
    _check_numbers(fields[2], fields[4], fields[6])
    for digest in (fields[3], fields[5], *fields[13:15]):
        _check_key(digest)
    return tuple(fields)


def follow_hand_overs_untrusted(handed: Sequence[bytes], genesis: Genesis) -> frozenset[bytes]:
    """The owners that a list of HAND_OVER operations leads to, each signed by one of those before."""
    owners = {genesis.owner}
    for data in handed:
        op = Operation.decode_untrusted(data, genesis.id)
        if op.kind != Kind.HAND_OVER or op.author not in owners or not op.check_signature(genesis.id):
            raise RemoteProtocolError("a hand-over that no owner signed")
        owners.add(op.body)
    return frozenset(owners)


def vector_of(state: bytes) -> dict[int, int]:
    """Clock behind the items of each client in an update that starts from nothing. `RemoteProtocolError` when it is
    damaged, or such that it must not be loaded."""
    if type(state) is not bytes or len(state) > REPLICA_MAX_STATE_BYTES:
        raise RemoteProtocolError("a state over the limit")
    places_of_state_untrusted(state)
    # Loaded into a document of its own, because the vector of the bytes alone would trust their frame.
    doc = Doc[Any]()
    apply_untrusted(doc, state)
    vector = doc.get_state()
    count, at = decode_uvarint_untrusted(vector, 0)
    out = {}
    for _ in range(count):
        client, at = decode_uvarint_untrusted(vector, at)
        out[client], at = decode_uvarint_untrusted(vector, at)
    return out


def valid_signers(
    genesis: Genesis, owners: frozenset[bytes], header: bytes, signatures: Sequence[tuple[bytes, bytes]]
) -> set[bytes]:
    """Those who may sign a checkpoint and signed this header."""
    may = set(genesis.signers) if genesis.quorum else owners
    signed = _DOMAIN + blake3(_DOMAIN + header).digest()
    return {key for key, signature in signatures if key in may and _verify(key, signed, signature)}


def _unpack(data: bytes) -> Any:
    return msgpack.unpackb(
        data,
        use_list=False,
        max_array_len=MAX_ARRAY,
        max_map_len=0,
        max_str_len=0,
        max_ext_len=0,
        max_bin_len=REPLICA_MAX_STATE_BYTES + 8 * REPLICA_MAX_COVERED,
    )


def _check_key(key: object) -> bytes:
    if type(key) is not bytes or len(key) != 32:
        raise RemoteProtocolError("checkpoint with a key or hash of a wrong length")
    return key


def _check_numbers(*numbers: object) -> None:
    for number in numbers:
        if type(number) is not int or not 0 <= number < 1 << 53:
            raise RemoteProtocolError("checkpoint with a number out of range")


def _check_instance(instance: int) -> None:
    if instance >= 1 << 32:
        raise RemoteProtocolError("checkpoint with an instance out of range")


def _keys(keys: Sequence[object]) -> frozenset[bytes]:
    return frozenset(_check_key(key) for key in keys)


def _chains(chains: Sequence[Any]) -> dict[tuple[bytes, int], ChainEnd]:
    out = {}
    for author, instance, seq, end, last, time in chains:
        _check_numbers(instance, seq, end, time)
        _check_instance(instance)
        out[_check_key(author), instance] = ChainEnd(seq, end, _check_key(last), time)
    return out


def _excluded(excluded: Sequence[Any]) -> dict[bytes, tuple[int, int]]:
    out = {}
    for author, seq, instance in excluded:
        _check_numbers(seq, instance)
        _check_instance(instance)
        out[_check_key(author)] = (seq, instance)
    return out


def _renamed(rows: Sequence[Any]) -> tuple[tuple[int, int, int, int], ...]:
    for client, start, end, name in rows:
        _check_numbers(client, start, end, name)
    return tuple(rows)


def _prefixes(covered: bytes) -> frozenset[bytes]:
    if len(covered) % COVERED_PREFIX or len(covered) > COVERED_PREFIX * REPLICA_MAX_COVERED:
        raise RemoteProtocolError("checkpoint with a list of operations that is cut off or too long")
    return frozenset(covered[at : at + COVERED_PREFIX] for at in range(0, len(covered), COVERED_PREFIX))


def _verify(key: bytes, message: bytes, signature: bytes) -> bool:
    try:
        crypto_sign_open(signature + message, key)
    except (BadSignatureError, ValueError):
        return False
    return len(signature) == 64
