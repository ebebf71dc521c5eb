"""The frames of `/lattica/rpc/1`: constants, header, and the heads that are not values.

    offset size   little-endian
    0      u32    body length (head + tail)
    4      u8     kind
    5      u8     flags
    6      u16    head length
    8      u32    call id
    12     ...    head, then tail

    request head: u32 deadline in ms | u8 route length | u8 method length | route | method | arguments
    DETACHED:     the body after the head is u32 tail id | u32 tail length, the tail itself goes another way
    credit head:  u32 items | u32 bytes
    error head:   msgpack [code, kind, message]
    hello head:   msgpack map

Everything about meaning and order stands in `protocols/specs/rpc.md`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import msgpack

from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.limits import (
    RPC_INITIAL_CALLS,
    RPC_MAX_ERROR_KIND,
    RPC_MAX_ERROR_MESSAGE,
    RPC_MAX_HEAD,
    RPC_MAX_METHOD,
    RPC_MAX_ROUTE,
    RPC_MAX_TAIL,
)

Buffer: TypeAlias = bytes | bytearray | memoryview

PROTOCOL_ID: Final = "/lattica/rpc/1"

# -- kinds -----------------------------------------------------------------------------------------
REQUEST: Final = 1
RESPONSE: Final = 2
ITEM: Final = 3
END: Final = 4
ERROR: Final = 5
CANCEL: Final = 6
CREDIT: Final = 7
BULK: Final = 8
HELLO: Final = 9
PING: Final = 10
GOAWAY: Final = 11
ACK: Final = 12
RESUME: Final = 13

# -- flags -----------------------------------------------------------------------------------------
FINAL: Final = 0x01
CLIENT_STREAM: Final = 0x02
SERVER_STREAM: Final = 0x04
DETACHED: Final = 0x08
KEYWORDS: Final = 0x10
IGNORABLE: Final = 0x80

# -- error codes -----------------------------------------------------------------------------------
SERVICE_NOT_FOUND: Final = 1
INVALID_ARGUMENT: Final = 2
RESOURCE_EXHAUSTED: Final = 3
DEADLINE_EXCEEDED: Final = 4
CANCELLED: Final = 5
HANDLER_RAISED: Final = 6
UNREACHABLE: Final = 7
CONNECTION_LOST: Final = 8
INTERNAL: Final = 9

VALUE_HEAD: Final = b"\xd8\x05"
"""How a head begins whose value is in the tail: msgpack's fixext 16 with our extension 5."""

HEADER: Final = struct.Struct("<IBBHI")
HEADER_SIZE: Final = HEADER.size
REQUEST_PRELUDE: Final = struct.Struct("<IBB")
DETACHED_TRAILER: Final = struct.Struct("<II")
CREDIT_HEAD: Final = struct.Struct("<II")

REQUEST_FRAME: Final = struct.Struct("<IBBHIIBB")
"""Header and request prelude in one go: the hot path of a caller."""


def encode_frame(kind: int, flags: int, call_id: int, head: bytes = b"", tail_length: int = 0) -> bytes:
    """Header and head of a frame; `tail_length` bytes of tail have to follow on the same stream."""
    return HEADER.pack(len(head) + tail_length, kind, flags, len(head), call_id) + head


def encode_detached(kind: int, flags: int, call_id: int, head: bytes, tail_id: int, tail_length: int) -> bytes:
    """A whole frame whose tail of `tail_length` bytes goes another way under the number `tail_id`."""
    header = HEADER.pack(len(head) + DETACHED_TRAILER.size, kind, flags | DETACHED, len(head), call_id)
    return header + head + DETACHED_TRAILER.pack(tail_id, tail_length)


def encode_bulk_header(tail_id: int, tail_length: int) -> bytes:
    """What goes before a detached tail on a bulk stream."""
    return HEADER.pack(tail_length, BULK, 0, 0, tail_id)


# -- request ---------------------------------------------------------------------------------------
def encode_request_head(method: bytes, args: bytes, deadline_ms: int, route: bytes = b"") -> bytes:
    """The head of a REQUEST. Raises `LocalProtocolError` when method or route have a wrong length."""
    if not 0 < len(method) <= RPC_MAX_METHOD or len(route) > RPC_MAX_ROUTE:
        raise _wrong_length(method, route)
    return REQUEST_PRELUDE.pack(deadline_ms, len(route), len(method)) + route + method + args


def encode_request(flags: int, call_id: int, method: bytes, args: bytes, deadline_ms: int, route: bytes = b"") -> bytes:
    """A whole REQUEST without a tail. Errors as in `encode_request_head`, and when `args` do not fit into a head."""
    if not 0 < len(method) <= RPC_MAX_METHOD or len(route) > RPC_MAX_ROUTE:
        raise _wrong_length(method, route)
    length = 6 + len(route) + len(method) + len(args)
    if length > RPC_MAX_HEAD:
        raise LocalProtocolError(f"arguments of {len(args)} bytes do not fit into a head")
    prelude = REQUEST_FRAME.pack(length, REQUEST, flags, length, call_id, deadline_ms, len(route), len(method))
    return b"".join((prelude, route, method, args))


def _wrong_length(method: bytes, route: bytes) -> LocalProtocolError:
    if len(route) > RPC_MAX_ROUTE:
        return LocalProtocolError(f"a route has at most {RPC_MAX_ROUTE} bytes, not {len(route)}")
    return LocalProtocolError(f"a method name has 1 to {RPC_MAX_METHOD} bytes, not {len(method)}")


def decode_request_head_untrusted(head: bytes) -> tuple[int, bytes, bytes, bytes]:
    """`(deadline in ms, route, method, arguments)` of a request head. The method may not be UTF-8."""
    if len(head) < 7:
        raise RemoteProtocolError("request head is cut short")
    deadline_ms, route_length, method_length = REQUEST_PRELUDE.unpack_from(head)
    args = 6 + route_length + method_length
    if method_length == 0 or args > len(head):
        raise RemoteProtocolError("request head: route and method do not fit")
    return deadline_ms, head[6 : 6 + route_length], head[6 + route_length : args], head[args:]


# -- error -----------------------------------------------------------------------------------------
def encode_error_head(code: int, kind: str, message: str) -> bytes:
    """The head of an ERROR; texts that are too long are cut."""
    packed: bytes = msgpack.packb(
        [code, kind[:RPC_MAX_ERROR_KIND], message[:RPC_MAX_ERROR_MESSAGE]], unicode_errors="replace"
    )
    return packed


def decode_error_head_untrusted(head: bytes) -> tuple[int, str, str]:
    """`(code, kind, message)` of an error head."""
    match _unpack_untrusted(head, "error head"):
        case [int(code), str(kind), str(message), *_]:
            return code, kind[:RPC_MAX_ERROR_KIND], message[:RPC_MAX_ERROR_MESSAGE]
    raise RemoteProtocolError("error head is not [code, kind, message]")


# -- hello -----------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Hello:
    """The first frame of a stream in each direction."""

    session: bytes = b""
    """16 random bytes from the opener of a control stream; which session a bulk stream belongs to."""
    bulk: bool = False
    calls: int = RPC_INITIAL_CALLS
    """Calls the sender accepts at once."""
    tail: int = RPC_MAX_TAIL
    """The longest tail the sender accepts, bytes."""
    features: frozenset[str] = frozenset()
    epoch: int = 0
    """Of a bulk stream: the control stream that it goes with, see `resume`."""


def encode_hello(hello: Hello) -> bytes:
    """A whole HELLO frame."""
    fields: dict[str, Any] = {"v": 1}
    if hello.session:
        fields["session"] = hello.session
    if hello.bulk:
        fields["bulk"] = True
        if hello.epoch:
            fields["epoch"] = hello.epoch
    else:
        fields |= {"calls": hello.calls, "tail": hello.tail, "features": sorted(hello.features)}
    return encode_frame(HELLO, 0, 0, msgpack.packb(fields))


def decode_hello_head_untrusted(head: bytes) -> Hello:
    """The head of a HELLO frame."""
    fields = _unpack_untrusted(head, "hello")
    if not isinstance(fields, dict) or fields.get("v") != 1:
        raise RemoteProtocolError("hello is not version 1")
    session, bulk = fields.get("session", b""), fields.get("bulk", False)
    calls, tail = fields.get("calls", RPC_INITIAL_CALLS), fields.get("tail", RPC_MAX_TAIL)
    features, epoch = fields.get("features", []), fields.get("epoch", 0)
    if not (isinstance(session, bytes) and len(session) in (0, 16) and isinstance(bulk, bool)):
        raise RemoteProtocolError("hello: session is 16 bytes and bulk a bool")
    if not (isinstance(epoch, int) and 0 <= epoch <= 0xFFFFFFFF):
        raise RemoteProtocolError("hello: epoch is a number of 32 bits")
    if not (isinstance(calls, int) and isinstance(tail, int) and calls > 0 and tail >= 0):
        raise RemoteProtocolError("hello: calls and tail are positive numbers")
    if not (isinstance(features, list) and all(isinstance(name, str) for name in features)):
        raise RemoteProtocolError("hello: features is a list of names")
    if bulk and not session:
        raise RemoteProtocolError("hello of a bulk stream names no session")
    return Hello(session, bulk, calls, tail, frozenset(features), epoch)


def _unpack_untrusted(head: bytes, what: str) -> Any:
    try:
        return msgpack.unpackb(head)
    except (ValueError, TypeError) as error:  # TypeError: a map key that cannot be hashed
        raise RemoteProtocolError(f"{what} is not msgpack: {error}") from None
