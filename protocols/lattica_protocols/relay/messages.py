"""Messages of circuit relay v2, each `uvarint(length) || protobuf` (libp2p/specs, relay/circuit-v2.md).

    /libp2p/circuit/relay/0.2.0/hop       to the relay: RESERVE, or CONNECT to a peer that has a reservation
    /libp2p/circuit/relay/0.2.0/stop      from the relay to that peer: CONNECT

    HopMessage  { Type type = 1; Peer peer = 2; Reservation reservation = 3; Limit limit = 4; Status status = 5; }
                  RESERVE 0, CONNECT 1, STATUS 2
    StopMessage { Type type = 1; Peer peer = 2; Limit limit = 3; Status status = 4; }
                  CONNECT 0, STATUS 1
    Peer        { bytes id = 1; repeated bytes addrs = 2; }
    Reservation { uint64 expire = 1 (unix seconds); repeated bytes addrs = 2; bytes voucher = 3; }
    Limit       { uint32 duration = 1 (seconds); uint64 data = 2 (bytes each way); }

After a STATUS of 100 the stream is the circuit: whatever follows the one message belongs to the peers.

Ours in two fields that the specification leaves open: a relay of ours writes the address from which it sees one peer
into `peer.addrs` of what it sends to the other, in the CONNECT of stop and in the STATUS of hop. Others skip it. It
tells hole punching where the partner really is (see `dcutr.py`).

js-libp2p writes milliseconds into `limit.duration`; limits are hints, so that does not matter. No limit at all means
that the circuit is as good as any connection: go-libp2p then opens all kinds of streams over it.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import RELAY_MAX_ADDRS
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId
from lattica_protocols.peer_record import decode_addrs_untrusted
from lattica_protocols.protobuf import Kind, Message, optional, repeated

HOP_PROTOCOL: Final = "/libp2p/circuit/relay/0.2.0/hop"
STOP_PROTOCOL: Final = "/libp2p/circuit/relay/0.2.0/stop"


class HopType(enum.IntEnum):
    """Between a peer and a relay."""

    RESERVE = 0
    CONNECT = 1
    STATUS = 2


class StopType(enum.IntEnum):
    """Between a relay and the target of a circuit."""

    CONNECT = 0
    STATUS = 1


class Status(enum.IntEnum):
    """How a request ended."""

    OK = 100
    RESERVATION_REFUSED = 200
    RESOURCE_LIMIT_EXCEEDED = 201
    PERMISSION_DENIED = 202
    CONNECTION_FAILED = 203
    NO_RESERVATION = 204
    MALFORMED_MESSAGE = 400
    UNEXPECTED_MESSAGE = 401


_IN_WORDS: Final = {
    Status.RESERVATION_REFUSED: "the relay has no place for us",
    Status.RESOURCE_LIMIT_EXCEEDED: "the relay is at one of its limits",
    Status.PERMISSION_DENIED: "the relay does not permit it",
    Status.CONNECTION_FAILED: "the relay cannot reach the peer",
    Status.NO_RESERVATION: "the peer has no reservation at this relay",
    Status.MALFORMED_MESSAGE: "the relay could not read our message",
    Status.UNEXPECTED_MESSAGE: "the relay did not expect our message",
}


def describe_status(status: int | None) -> str:
    """A refusal for people. Unknown numbers, and none at all, are named as such."""
    if status is None:
        return "the answer has no status"
    try:
        return _IN_WORDS[Status(status)]
    except (ValueError, KeyError):
        return f"status {status}"


@dataclass(frozen=True, slots=True)
class RelayPeer(Message):
    """The other end of a circuit."""

    id: bytes | None = optional(1, Kind.BYTES, max_bytes=128)
    addrs: Sequence[bytes] = repeated(2, Kind.BYTES, max_count=RELAY_MAX_ADDRS)

    @classmethod
    def make(cls, peer: PeerId, addrs: Sequence[Multiaddr] = ()) -> RelayPeer:
        return cls(id=peer.to_bytes(), addrs=tuple(addr.to_bytes() for addr in addrs))


@dataclass(frozen=True, slots=True)
class Reservation(Message):
    """What a relay granted."""

    expire: int | None = optional(1, Kind.UINT)
    addrs: Sequence[bytes] = repeated(2, Kind.BYTES, max_count=RELAY_MAX_ADDRS)
    voucher: bytes | None = optional(3, Kind.BYTES)


@dataclass(frozen=True, slots=True)
class Limit(Message):
    """How long a circuit lives and how much it carries each way; `None` or 0: no limit."""

    duration: int | None = optional(1, Kind.UINT)
    data: int | None = optional(2, Kind.UINT)


@dataclass(frozen=True, slots=True)
class HopMessage(Message):
    """One of the three, by `type`."""

    type: int | None = optional(1, Kind.ENUM)
    peer: RelayPeer | None = optional(2, RelayPeer)
    reservation: Reservation | None = optional(3, Reservation)
    limit: Limit | None = optional(4, Limit)
    status: int | None = optional(5, Kind.ENUM)


@dataclass(frozen=True, slots=True)
class StopMessage(Message):
    """One of the two, by `type`."""

    type: int | None = optional(1, Kind.ENUM)
    peer: RelayPeer | None = optional(2, RelayPeer)
    limit: Limit | None = optional(3, Limit)
    status: int | None = optional(4, Kind.ENUM)


def peer_untrusted(peer: RelayPeer | None) -> tuple[PeerId, tuple[Multiaddr, ...]]:
    """Who a message is about, and the addresses in it that we can read. Refused when it names nobody."""
    if peer is None or not peer.id:
        raise RemoteProtocolError("the relay message names no peer")
    return PeerId.from_bytes_untrusted(peer.id), decode_addrs_untrusted(peer.addrs)


def hop_status(status: Status, *, limit: Limit | None = None, peer: RelayPeer | None = None) -> bytes:
    """A relay's answer to CONNECT, and to a RESERVE that it refuses."""
    return HopMessage(type=HopType.STATUS, status=status, limit=limit, peer=peer).encode()


def stop_status(status: Status) -> bytes:
    """The target's answer to a relay's CONNECT."""
    return StopMessage(type=StopType.STATUS, status=status).encode()
