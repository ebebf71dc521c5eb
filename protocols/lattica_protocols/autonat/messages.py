"""AutoNAT's messages, each as `uvarint(length) || protobuf`.

Version 2, `/libp2p/autonat/2/dial-request`: one request on a stream.

    client                                   server
    DialRequest {addrs, nonce}       ->
                                     <-      [DialDataRequest {addr_index, bytes}]
    [DialDataResponse {data}] ...    ->                 as many as it takes; data has at most 4,096 bytes
                                                        the server dials addrs[addr_index], and opens there
        /libp2p/autonat/2/dial-back          <-         DialBack {nonce}
                                             ->         DialBackResponse {status}
                                     <-      DialResponse {status, addr_index, dial_status}

    message Message { oneof { DialRequest 1; DialResponse 2; DialDataRequest 3; DialDataResponse 4 } }

Data is asked for when the address is not at the IP address that the client has itself, so that nobody can have a third
party dialled at less than what the dial costs it.

Version 1, `/libp2p/autonat/1.0.0`: `Message {type DIAL, dial {peer {id, addrs}}}`, answered by `Message {type
DIAL_RESPONSE, response {status, text, addr}}`. Only addresses at the IP address that the client is seen at are dialled.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from lattica_protocols import limits
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId
from lattica_protocols.peer_record import decode_addrs_untrusted
from lattica_protocols.protobuf import Kind, Message, optional, repeated

DIAL_REQUEST_PROTOCOL: Final = "/libp2p/autonat/2/dial-request"
DIAL_BACK_PROTOCOL: Final = "/libp2p/autonat/2/dial-back"
V1_PROTOCOL: Final = "/libp2p/autonat/1.0.0"


# -- version 2 ---------------------------------------------------------------------------------------------------
class ResponseStatus(enum.IntEnum):
    """What became of the request."""

    INTERNAL_ERROR = 0
    REJECTED = 100
    """Too many requests."""
    DIAL_REFUSED = 101
    """None of the addresses is one that the server dials."""
    OK = 200


class DialStatus(enum.IntEnum):
    """What became of the dial."""

    UNUSED = 0
    DIAL_ERROR = 100
    DIAL_BACK_ERROR = 101
    """The connection came about, the stream on it did not."""
    OK = 200


@dataclass(frozen=True, slots=True)
class DialRequest(Message):
    """The first message of a client: the addresses to try, in the order of its wishes, and what to say there."""

    addrs: Sequence[bytes] = repeated(1, Kind.BYTES, max_count=limits.AUTONAT_MAX_ADDRS)
    nonce: int | None = optional(2, Kind.FIXED64)


@dataclass(frozen=True, slots=True)
class DialResponse(Message):
    """The last one of a server. `addr_index` and `dial_status` mean something when the status is OK."""

    status: int | None = optional(1, Kind.ENUM)
    addr_index: int | None = optional(2, Kind.UINT)
    dial_status: int | None = optional(3, Kind.ENUM)


@dataclass(frozen=True, slots=True)
class DialDataRequest(Message):
    """What a dial to `addrs[addr_index]` costs the client, in bytes."""

    addr_index: int | None = optional(1, Kind.UINT)
    num_bytes: int | None = optional(2, Kind.UINT)


@dataclass(frozen=True, slots=True)
class DialDataResponse(Message):
    """A part of it; what is in the bytes does not matter."""

    data: bytes | None = optional(1, Kind.BYTES, max_bytes=limits.AUTONAT_MAX_DATA_BYTES)


@dataclass(frozen=True, slots=True)
class AutonatMessage(Message):
    """One of the four."""

    dial_request: DialRequest | None = optional(1, DialRequest)
    dial_response: DialResponse | None = optional(2, DialResponse)
    data_request: DialDataRequest | None = optional(3, DialDataRequest)
    data_response: DialDataResponse | None = optional(4, DialDataResponse)


@dataclass(frozen=True, slots=True)
class DialBack(Message):
    """The proof: what only the client and the server know arrived at the address."""

    nonce: int | None = optional(1, Kind.FIXED64)


@dataclass(frozen=True, slots=True)
class DialBackResponse(Message):
    """The client has it; 0 is the only status."""

    status: int | None = optional(1, Kind.ENUM)


# -- version 1 ---------------------------------------------------------------------------------------------------
class V1Type(enum.IntEnum):
    """What a message of version 1 is."""

    DIAL = 0
    DIAL_RESPONSE = 1


class V1Status(enum.IntEnum):
    """What became of a request of version 1."""

    OK = 0
    DIAL_ERROR = 100
    DIAL_REFUSED = 101
    BAD_REQUEST = 200
    INTERNAL_ERROR = 300


@dataclass(frozen=True, slots=True)
class V1Peer(Message):
    """The client and its addresses."""

    id: bytes | None = optional(1, Kind.BYTES, max_bytes=limits.MAX_PUBLIC_KEY_BYTES)
    addrs: Sequence[bytes] = repeated(2, Kind.BYTES, max_count=limits.AUTONAT_MAX_ADDRS)


@dataclass(frozen=True, slots=True)
class V1Dial(Message):
    """A request."""

    peer: V1Peer | None = optional(1, V1Peer)


@dataclass(frozen=True, slots=True)
class V1Response(Message):
    """An answer; `addr` is the address that was reached."""

    status: int | None = optional(1, Kind.ENUM)
    text: str | None = optional(2, Kind.STRING, max_bytes=limits.MAX_IDENTIFY_TEXT_BYTES)
    addr: bytes | None = optional(3, Kind.BYTES)


@dataclass(frozen=True, slots=True)
class V1Message(Message):
    """Either of them, by `type`."""

    type: int | None = optional(1, Kind.ENUM)
    dial: V1Dial | None = optional(2, V1Dial)
    response: V1Response | None = optional(3, V1Response)


def v1_addrs_untrusted(data: bytes, peer: PeerId) -> tuple[Multiaddr, ...]:
    """The addresses in a version 1 request of `peer`."""
    message = V1Message.decode_untrusted(data)
    if message.type != V1Type.DIAL or message.dial is None or message.dial.peer is None:
        raise RemoteProtocolError("no DIAL")
    about = message.dial.peer
    if about.id is not None and PeerId.from_bytes_untrusted(about.id) != peer:
        raise RemoteProtocolError("asks to dial another peer")
    return decode_addrs_untrusted(about.addrs)


def v1_response(status: V1Status, text: str = "", addr: Multiaddr | None = None) -> bytes:
    """The answer of a version 1 server."""
    response = V1Response(status=status, text=text or None, addr=None if addr is None else addr.to_bytes())
    return V1Message(type=V1Type.DIAL_RESPONSE, response=response).encode()
