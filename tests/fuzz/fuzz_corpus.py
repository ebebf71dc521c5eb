"""Valid messages of every format, made by our own encoders: what mutation starts from.

Everything here is the same in each run, so that a seed replays: keys come from fixed bytes, and certificates, whose
signatures are random, from the vectors of the specification.
"""

from __future__ import annotations

import dataclasses
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from blake3 import blake3

from lattica_protocols.blobs import manifest, messages
from lattica_protocols.blobs.chunk_set import ChunkSet
from lattica_protocols.blobs.safetensors import Tensor
from lattica_protocols.cid import BLOB_MANIFEST, Cid
from lattica_protocols.envelope import SignedEnvelope
from lattica_protocols.identify import Identify
from lattica_protocols.kad import messages as kad_messages
from lattica_protocols.kad import records
from lattica_protocols.keys import PrivateKey
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.multihash import BLAKE3, SHA2_256, Multihash
from lattica_protocols.multistream import encode_message
from lattica_protocols.noise import NoiseIdentity
from lattica_protocols.peer_id import PeerId
from lattica_protocols.peer_record import PEER_RECORD_DOMAIN, PEER_RECORD_TYPE, PeerRecord
from lattica_protocols.protobuf import Kind, Message, optional, repeated, required
from lattica_protocols.rpc import frames, resume, tensors
from lattica_protocols.varint import encode_uvarint

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "identity.json").read_text())
NOW = 1_750_000_000.0
KEY = PrivateKey.generate(b"k" * 32)
PEER = PeerId.from_public_key(KEY.public_key)
OTHER_KEY = PrivateKey.generate(b"o" * 32)
OTHER = PeerId.from_public_key(OTHER_KEY.public_key)
HASH = Multihash.of(BLAKE3, b"x")
ADDRS = [
    Multiaddr.parse(text)
    for text in (
        "/ip4/1.2.3.4/tcp/9",
        f"/ip4/127.0.0.1/udp/9/quic-v1/p2p/{PEER}",
        f"/ip6/2001:db8::1/tcp/4001/p2p/{OTHER}/p2p-circuit/p2p/{PEER}",
        "/dns4/example.org/tcp/443/tls/sni/example.org/ws",
        "/ip6zone/eth0/ip6/fe80::1/udp/1/quic-v1",
        "/memory/7",
    )
]
RECORD = PeerRecord(PEER, 7, tuple(ADDRS[:3]))
VALUE_KEY, VALUE = records.seal_value(KEY, "name", b"value", sequence=3, expires=int(NOW) + 3600)


@dataclasses.dataclass(frozen=True, slots=True)
class AllKinds(Message):
    """Every kind of field there is, whether or not a message of today uses it."""

    number: int = required(1, Kind.UINT)
    signed: int | None = optional(2, Kind.INT)
    flag: bool | None = optional(3, Kind.BOOL)
    text: str | None = optional(4, Kind.STRING, max_bytes=100)
    four: int | None = optional(5, Kind.FIXED32)
    eight: int | None = optional(6, Kind.FIXED64)
    packed: tuple[int, ...] = repeated(7, Kind.UINT)
    few: tuple[int, ...] = repeated(8, Kind.ENUM, max_count=3)


ALL_KINDS = AllKinds(1, -1, True, "text", 4, 8, (1, 2), (3,)).encode() + b"\x3a\x03\x01\x80\x01"


def _identities() -> list[bytes]:
    return [
        *(bytes.fromhex(text) for text in VECTORS["public_keys"].values()),
        PEER.to_bytes(),
        PeerId.parse("QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC").to_bytes(),
        HASH.to_bytes(),
        Multihash.of(SHA2_256, b"x").to_bytes(),
        Cid.v1(BLOB_MANIFEST, BLAKE3, HASH.digest).to_bytes(),
        encode_uvarint(1 << 40),
        *(addr.to_bytes() for addr in ADDRS),
        RECORD.seal(KEY),
        SignedEnvelope.seal(KEY, PEER_RECORD_DOMAIN, PEER_RECORD_TYPE, b"payload").to_bytes(),
        *(bytes.fromhex(vector["der"]) for vector in VECTORS["tls_certificates"]),
        NoiseIdentity.create(KEY, b"s" * 32, ["/yamux/1.0.0"]).payload,
    ]


def identify() -> bytes:
    return Identify(
        KEY.public_key,
        tuple(ADDRS),
        ("/ipfs/ping/1.0.0", "/lattica/rpc/1"),
        ADDRS[0],
        "lattica",
        "agent",
        RECORD.seal(KEY),
    ).encode()


# -- Kademlia -------------------------------------------------------------------------------------------------------
@cache
def kad_requests() -> list[bytes]:
    """One of each kind, all acceptable to a server."""
    kind, message = kad_messages.MessageType, kad_messages.KadMessage
    entry = kad_messages.PeerEntry(id=PEER.to_bytes(), addrs=[addr.to_bytes() for addr in ADDRS], connection=1)
    record = kad_messages.Record(key=VALUE_KEY, value=VALUE, time_received="2025-01-01T00:00:00Z", ttl=5)
    public_key = b"/pk/" + PEER.to_bytes()
    stored_key = kad_messages.Record(key=public_key, value=KEY.public_key.to_protobuf())
    return [
        message(type=kind.FIND_NODE, key=OTHER.to_bytes(), closer_peers=[entry]).encode(),
        message(type=kind.ADD_PROVIDER, key=HASH.to_bytes(), provider_peers=[entry]).encode(),
        message(type=kind.GET_PROVIDERS, key=HASH.to_bytes()).encode(),
        message(type=kind.PUT_VALUE, key=VALUE_KEY, record=record).encode(),
        message(type=kind.PUT_VALUE, key=public_key, record=stored_key).encode(),
        message(type=kind.GET_VALUE, key=VALUE_KEY).encode(),
        message(type=kind.PING).encode(),
    ]


# -- content --------------------------------------------------------------------------------------------------------
@cache
def manifests() -> list[bytes]:
    hashes = b"".join(blake3(bytes([n])).digest() for n in range(3))
    table = (Tensor("a.weight", "F32", (3, 4), 0, 48), Tensor("b", "BF16", (), 48, 50))
    blob, cid, _ = manifest.make_blob(2_500_000, hashes, table)
    entries = (manifest.FolderEntry("a/b.bin", 3, cid), manifest.FolderEntry("c", 2_500_000, cid))
    large, _, _ = manifest.make_blob(1 << 38, bytes(32 << 18))
    return [blob, large, manifest.encode_manifest(manifest.FolderManifest(entries))]


def bitmap() -> bytes:
    have = ChunkSet(20)
    for index in (0, 3, 7, 8, 19):
        have.add(index)
    return have.to_bytes()


# -- RPC ------------------------------------------------------------------------------------------------------------
@cache
def rpc_values() -> list[tuple[bytes, bytes]]:
    """(head, tail) of values of every kind, as arguments: arrays of one."""
    values: list[Any] = [
        None,
        7,
        "text",
        {"a": [1, 2.5, b"x" * 9], "b": {}},
        b"x" * 5000,
        bytearray(b"y" * 100),
        np.arange(1000, dtype=np.float32).reshape(10, 100),
        np.zeros((2, 3), np.int8),
        np.zeros((0, 5)),
        {"list": ["v" * 50] * 1000},
    ]
    out = []
    for value in values:
        head, buffers = tensors.encode_value([value])
        out.append((head, b"".join(bytes(buffer) for buffer in buffers)))
    out.append((msgpack.packb([{1: 2, None: 3, (4, 5): 6}], datetime=True), b""))
    out.append((msgpack.packb([msgpack.Timestamp(5, 6)]), b""))
    return out


def rpc_heads() -> list[bytes]:
    return [
        frames.encode_error_head(frames.HANDLER_RAISED, "ValueError", "no"),
        frames.encode_request_head(b"echo.echo", msgpack.packb([1, 2]), 5000, b"route"),
        frames.encode_hello(frames.Hello(b"s" * 16, features=frozenset({"a"})))[frames.HEADER_SIZE :],
        frames.encode_hello(frames.Hello(b"s" * 16, bulk=True))[frames.HEADER_SIZE :],
    ]


def rpc_account() -> bytes:
    return resume.Account(70_000, 3, (5, 6)).encode()


# -- everything, and random messages --------------------------------------------------------------------------------
@cache
def everything() -> list[bytes]:
    """Every valid encoding, whatever format: what a parser without seeds of its own starts from."""
    return [
        *_identities(),
        ALL_KINDS,
        identify(),
        encode_message("/multistream/1.0.0") + encode_message("/lattica/rpc/1"),
        VALUE_KEY,
        VALUE,
        *kad_requests(),
        *manifests(),
        bitmap(),
        messages.encode_ranges([(0, 2), (5, 1)]),
        messages.encode_frame(messages.Kind.WANT, 1, HASH.to_bytes()),
        *rpc_heads(),
        *(head for head, _ in rpc_values()),
    ]


def random_message(cls: type[Message], rng: random.Random) -> Message:
    """A message whose fields have the right types and strange values; it may still be refused."""
    values: dict[str, Any] = {}
    for declared in dataclasses.fields(cls):  # type: ignore[arg-type]
        _, kind, is_repeated, is_required, _, _ = declared.metadata["pb"]
        if not is_required and rng.random() < 0.3:
            continue
        count = int(300 ** rng.random()) if is_repeated else 1
        items = [_random_field(kind, rng) for _ in range(count)]
        values[declared.name] = items if is_repeated else items[0]
    return cls(**values)


def _random_field(kind: Kind | type[Message], rng: random.Random) -> Any:
    if not isinstance(kind, Kind):
        return random_message(kind, rng)
    if kind is Kind.BYTES:
        return rng.choice(everything())[:4096] if rng.random() < 0.7 else rng.randbytes(rng.randrange(40))
    if kind is Kind.STRING:
        return rng.choice(("", "/a", "\x00", "é" * 50, "x" * 300, "/lattica/rpc/1"))
    if kind is Kind.BOOL:
        return rng.random() < 0.5
    if kind is Kind.FIXED32:
        return rng.randrange(1 << 32)
    return rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 255, 1 << 31, (1 << 63) - 1))


def random_msgpack(rng: random.Random, depth: int = 0) -> bytes:
    """Well-formed msgpack of any shape, extensions of our numbers among it."""
    choice = rng.randrange(12 if depth < 4 else 8)
    if choice == 0:
        return bytes(msgpack.packb(rng.choice((None, True, False, 0, -1, 1 << 40, -(1 << 50), 2.5, float("nan")))))
    if choice == 1:
        return bytes(msgpack.packb(rng.randrange(1 << 64)))
    if choice in (2, 3):
        return bytes(msgpack.packb(rng.choice(("", "kind", "v", "é", "x" * 40))))
    if choice == 4:
        return bytes(msgpack.packb(rng.randbytes(rng.randrange(40))))
    if choice in (5, 6, 7):
        offsets = [rng.choice((0, 1, 64, 128, 1 << 20, 1 << 63)).to_bytes(8, "little") for _ in range(rng.randrange(5))]
        data = bytes([rng.randrange(22), rng.choice((0, 1, 2, 32, 33, 255))]) * rng.randrange(2) + b"".join(offsets)
        return bytes(msgpack.packb(msgpack.ExtType(rng.choice((1, 1, 2, 3, 4, 5, 6, 127)), data)))
    items = [random_msgpack(rng, depth + 1) for _ in range(rng.randrange(6))]
    if choice < 10:
        return bytes([0x90 | len(items)]) + b"".join(items)
    return bytes([0x80 | len(items) // 2]) + b"".join(items[: len(items) // 2 * 2])
