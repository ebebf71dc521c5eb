"""What the sync and the async client do alike: connecting, arguments, results, errors."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lattica import errors
from lattica.errors import (
    ConnectionLost,
    DaemonNotRunning,
    InvalidArgument,
    LatticaError,
    PeerMisbehaved,
    RemoteError,
)
from lattica.local.channel import FEATURES, LOCAL_LIMITS
from lattica.local.memfd import SegmentPool
from lattica.rpc.methods import Method
from lattica.rpc.status import error_from_head_untrusted, status_of
from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.limits import LOCAL_FD_OVER, LOCAL_MAX_SERVICE_NAME
from lattica_protocols.rpc.calls import Call
from lattica_protocols.rpc.connection import RpcConnection
from lattica_protocols.rpc.frames import (
    CLIENT_STREAM,
    INVALID_ARGUMENT,
    RESOURCE_EXHAUSTED,
    SERVER_STREAM,
    Buffer,
)
from lattica_protocols.rpc.tensors import decode_args_untrusted, decode_value_untrusted, encode_args

if TYPE_CHECKING:
    from lattica_protocols.peer_id import PeerId

CONNECT_TIMEOUT: Final = 5.0
"""Seconds for the daemon to accept and greet: it answers within milliseconds unless its machine is swapping."""
RECONNECT_SECONDS: Final = 1.0
"""Pause between attempts of a client that offers services while the daemon is away."""
HANDLER_THREADS: Final = 16
"""Plain `def` handlers that run at once in one client."""
DAEMON: Final = "daemon"
"""The daemon's own service for its clients."""


# -- connecting -------------------------------------------------------------------------------------------------
def new_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)


def connect_error(path: Path, error: OSError) -> DaemonNotRunning:
    """Why nobody answers at `path`."""
    if isinstance(error, PermissionError):
        return DaemonNotRunning(f"the daemon's socket at {path} belongs to another user")
    if isinstance(error, (FileNotFoundError, ConnectionRefusedError, NotADirectoryError)):
        return no_daemon(path)
    return DaemonNotRunning(f"cannot connect to the daemon at {path}: {error.strerror or error}")


def no_daemon(path: Path) -> DaemonNotRunning:
    return DaemonNotRunning(f"no daemon answers at {path}; start one with 'lattica up'")


def new_machine(pool: SegmentPool) -> RpcConnection:
    return RpcConnection(
        initiator=True,
        session=os.urandom(16),
        limits=LOCAL_LIMITS,
        features=FEATURES,
        allocate=pool.allocate_tail,
    )


# -- calling ------------------------------------------------------------------------------------------------------
def route_of(peer: str | PeerId | None) -> bytes:
    """The route of a call: a peer id in either text form, or None for the daemon itself."""
    if peer is None:
        return b""
    return _route_of_text(peer) if isinstance(peer, str) else peer.to_bytes()


@lru_cache(maxsize=1024)
def _route_of_text(peer: str) -> bytes:
    from lattica_protocols.peer_id import PeerId

    try:
        return PeerId.parse(peer).to_bytes()
    except ValueError as error:
        raise InvalidArgument(str(error)) from None


def encode_call(
    method: str, args: Sequence[object], kwargs: Mapping[str, object]
) -> tuple[bytes, Sequence[Buffer], int]:
    """`(head, buffers, request flags)` of the arguments."""
    try:
        return encode_args(args, kwargs)
    except LocalProtocolError as error:
        raise InvalidArgument(f"an argument of {method}: {error}") from error


def stage(pool: SegmentPool, tails: Sequence[Buffer], over: int | None) -> Sequence[Buffer]:
    """Copy long buffers into shared memory now, where it holds nobody up, if that is how they will go."""
    if tails and over is not None:
        length = sum(map(len, tails))
        if length > max(over, LOCAL_FD_OVER):
            return (pool.stage(tails, length),)
    return tails


def decode_result(method: str, head: bytes, tail: Buffer) -> Any:
    """The value of a RESPONSE or an ITEM."""
    try:
        return decode_value_untrusted(head, tail)
    except RemoteProtocolError as error:
        raise PeerMisbehaved(f"the result of {method} cannot be decoded: {error}") from None
    except LocalProtocolError as error:
        raise InvalidArgument(f"the result of {method}: {error}") from None


def call_error(head: bytes, method: str, to_daemon: bool) -> LatticaError:
    """The exception for an ERROR. The daemon's own errors come back as the class they were raised as."""
    error = error_from_head_untrusted(head)
    if to_daemon and isinstance(error, RemoteError) and method.startswith(f"{DAEMON}."):
        cls = getattr(errors, error.kind, None)
        if isinstance(cls, type) and issubclass(cls, LatticaError) and cls is not RemoteError:
            return cls(str(error))
    return error


def session_over() -> ConnectionLost:
    return ConnectionLost("the connection to the daemon is over")


# -- serving ------------------------------------------------------------------------------------------------------
def check_service_name(name: str) -> None:
    if not name or name.startswith("_") or "." in name or len(name.encode()) > LOCAL_MAX_SERVICE_NAME:
        raise ValueError(
            f"{name!r} is no name for a service: 1 to {LOCAL_MAX_SERVICE_NAME} bytes, no underscore in front, no dot"
        )


def expect_callers() -> None:
    """Load what is needed to tell who calls: whoever serves, not its first caller, should wait for that."""
    import lattica_protocols.peer_id  # noqa: F401


def decode_request(
    call: Call, method: Method, head: bytes, tail: Buffer
) -> tuple[list[Any], dict[str, Any]] | tuple[int, str, str]:
    """The arguments of an inbound call, or why it is refused."""
    if method.gives_stream and not call.flags & SERVER_STREAM:
        return INVALID_ARGUMENT, "InvalidArgument", f"{call.method} yields items: stream it instead of calling it"
    if method.takes_stream and not call.flags & CLIENT_STREAM:
        message = f"{call.method} takes a stream of items: open_call it and send"
        return INVALID_ARGUMENT, "InvalidArgument", message
    try:
        return decode_args_untrusted(head, tail, call.flags)
    except (RemoteProtocolError, LocalProtocolError) as error:
        return INVALID_ARGUMENT, "InvalidArgument", f"the arguments of {call.method}: {error}"


def handler_error(
    error: BaseException, call: Call, method: Method, args: list[Any], kwargs: dict[str, Any]
) -> tuple[int, str, str]:
    """`(code, kind, message)` for what a handler raised, or for a result that cannot be sent."""
    if isinstance(error, LocalProtocolError):
        return RESOURCE_EXHAUSTED, "InvalidResult", f"the result: {error}"
    if isinstance(error, TypeError) and (misfit := method.misfit(args, kwargs)) is not None:
        return INVALID_ARGUMENT, "InvalidArgument", f"{call.method}: {misfit}"
    return status_of(error)


def caller_of(call: Call) -> PeerId:
    """Who made an inbound call. The daemon is believed: it knows from the handshake."""
    return _peer_of_route(call.route)


@lru_cache(maxsize=1024)
def _peer_of_route(route: bytes) -> PeerId:
    from lattica_protocols.peer_id import PeerId

    return PeerId.from_bytes_untrusted(route)
