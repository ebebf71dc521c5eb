"""The messages of libp2p's Kademlia: `uvarint(length) || protobuf`, at most 16 KiB from us.

    Message   1 type        enum   PUT_VALUE 0, GET_VALUE 1, ADD_PROVIDER 2, GET_PROVIDERS 3, FIND_NODE 4, PING 5
              2 key         bytes  what the distance is measured to; the peer id (multihash) in FIND_NODE,
                                   the multihash of a CID in *_PROVIDER*, `/namespace/path` in *_VALUE
              3 record      Record value asked for, or to store
              8 closerPeers Peer*  answers: up to k peers closer to the key that the responder knows
              9 providerPeers Peer* GET_PROVIDERS answers, and the one provider in ADD_PROVIDER
             10 clusterLevel       unused, skipped
    Record    1 key, 2 value, 5 timeReceived (RFC 3339 text), rust-libp2p adds 666 publisher and 777 ttl (seconds)
    Peer      1 id (multihash), 2 addrs (multiaddr)*, 3 connection enum NOT_CONNECTED 0, CONNECTED 1, CAN 2, CANNOT 3

Each request but ADD_PROVIDER has one answer on the same stream, with the same type. A stream may carry several
requests one after the other. A field of number 0 is absent for proto3 writers: an absent type is PUT_VALUE.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import (
    KAD_MAX_ADDR_BYTES,
    KAD_MAX_ADDRS_PER_PEER,
    KAD_MAX_DECODED_ADDRS_PER_PEER,
    KAD_MAX_FOREIGN_MESSAGE_BYTES,
    KAD_MAX_KEY_BYTES,
    KAD_MAX_MESSAGE_BYTES,
    KAD_MAX_PEERS_IN_MESSAGE,
)
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId
from lattica_protocols.protobuf import Kind, Message, optional, repeated


class MessageType(enum.IntEnum):
    """What is asked; an answer repeats it."""

    PUT_VALUE = 0
    GET_VALUE = 1
    ADD_PROVIDER = 2
    GET_PROVIDERS = 3
    FIND_NODE = 4
    PING = 5


class Reach(enum.IntEnum):
    """What the sender says of its connection with a peer it names. A hint; we do not use it."""

    NOT_CONNECTED = 0
    CONNECTED = 1
    CAN_CONNECT = 2
    CANNOT_CONNECT = 3


@dataclass(frozen=True, slots=True)
class Record(Message):
    """A stored value. Which bytes are a valid value for a key is decided in `records`."""

    key: bytes | None = optional(1, Kind.BYTES, max_bytes=KAD_MAX_KEY_BYTES)
    value: bytes | None = optional(2, Kind.BYTES)
    time_received: str | None = optional(5, Kind.STRING, max_bytes=64)
    publisher: bytes | None = optional(666, Kind.BYTES, max_bytes=64)
    ttl: int | None = optional(777, Kind.UINT)


@dataclass(frozen=True, slots=True)
class PeerEntry(Message):
    """A peer as it stands in a message; `PeerAddrs` is the checked form."""

    id: bytes | None = optional(1, Kind.BYTES)
    addrs: Sequence[bytes] = repeated(2, Kind.BYTES, max_count=KAD_MAX_DECODED_ADDRS_PER_PEER)
    connection: int | None = optional(3, Kind.ENUM)


@dataclass(frozen=True, slots=True)
class KadMessage(Message):
    """A request or an answer."""

    type: int | None = optional(1, Kind.ENUM)
    key: bytes | None = optional(2, Kind.BYTES, max_bytes=KAD_MAX_KEY_BYTES)
    record: Record | None = optional(3, Record)
    closer_peers: Sequence[PeerEntry] = repeated(8, PeerEntry, max_count=KAD_MAX_PEERS_IN_MESSAGE)
    provider_peers: Sequence[PeerEntry] = repeated(9, PeerEntry, max_count=KAD_MAX_PEERS_IN_MESSAGE)


class PeerAddrs(NamedTuple):
    """A peer and where it may be; addresses without `/p2p`, best first."""

    peer: PeerId
    addrs: tuple[Multiaddr, ...] = ()


def decode_message_untrusted(data: bytes) -> KadMessage:
    """One message without its length prefix. The type is one of `MessageType`."""
    if len(data) > KAD_MAX_FOREIGN_MESSAGE_BYTES:
        raise RemoteProtocolError(f"Kademlia message of {len(data)} bytes")
    message = KadMessage.decode_untrusted(data)
    if message.type is None:
        return replace(message, type=MessageType.PUT_VALUE)
    if not 0 <= message.type <= MessageType.PING:
        raise RemoteProtocolError(f"unknown Kademlia message type {message.type}")
    return message


def peers_untrusted(entries: Iterable[PeerEntry], limit: int) -> list[PeerAddrs]:
    """The first `limit` peers that make sense.

    An entry with a malformed id and an address of a kind that we do not know are skipped, not refused: the peer that
    answers only repeats what it heard. An address that names another peer than its entry is skipped too.
    """
    out: dict[PeerId, PeerAddrs] = {}
    for entry in entries:
        if len(out) >= limit:
            break
        peer = _peer_untrusted(entry.id or b"")
        if peer is not None and peer not in out:
            out[peer] = PeerAddrs(peer, _addrs_untrusted(peer, entry.addrs))
    return list(out.values())


@lru_cache(maxsize=8192)
def _peer_untrusted(data: bytes) -> PeerId | None:
    """Cached, as the next: the answers of a lookup name the same peers again and again."""
    try:
        return PeerId.from_bytes_untrusted(data)
    except RemoteProtocolError:
        return None


@lru_cache(maxsize=8192)
def _addr_untrusted(data: bytes) -> tuple[Multiaddr, PeerId | None] | None:
    """An address without its last `/p2p/PEER`, and that peer. `None`: it cannot be used."""
    if len(data) > KAD_MAX_ADDR_BYTES:
        return None
    try:
        addr = Multiaddr.from_bytes_untrusted(data)
    except RemoteProtocolError:
        return None
    bare = addr.without_peer()
    return None if not bare.names() or bare.is_unspecified else (bare, addr.peer_id())


def _addrs_untrusted(peer: PeerId, raw: Iterable[bytes]) -> tuple[Multiaddr, ...]:
    out: dict[Multiaddr, None] = {}
    for data in raw:
        parsed = _addr_untrusted(data)
        if parsed is not None and parsed[1] in (None, peer):
            out[parsed[0]] = None
            if len(out) == KAD_MAX_ADDRS_PER_PEER:
                break
    return tuple(out)


def peer_entry(peer: PeerAddrs, reach: Reach = Reach.CAN_CONNECT) -> PeerEntry:
    """The form of the wire."""
    return PeerEntry(
        id=peer.peer.to_bytes(),
        addrs=tuple(addr.to_bytes() for addr in peer.addrs[:KAD_MAX_ADDRS_PER_PEER]),
        connection=int(reach),
    )


def encode_answer(message: KadMessage) -> bytes:
    """The bytes of `message`, its peer lists cut from the end until they fit into `KAD_MAX_MESSAGE_BYTES`."""
    data = message.encode()
    while len(data) > KAD_MAX_MESSAGE_BYTES and (message.provider_peers or message.closer_peers):
        # Closer peers make the lookup go on, so the longer list gives way, and providers in doubt.
        providers, closer = message.provider_peers, message.closer_peers
        if len(providers) >= len(closer):
            message = replace(message, provider_peers=providers[: len(providers) * 3 // 4])
        else:
            message = replace(message, closer_peers=closer[: len(closer) * 3 // 4])
        data = message.encode()
    return data
