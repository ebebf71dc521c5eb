"""Error codes of the wire to exceptions, and back: the one place where they meet."""

from __future__ import annotations

from lattica.errors import (
    CallCancelled,
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    InvalidArgument,
    LatticaError,
    RemoteError,
    ResourceExhausted,
    ServiceNotFound,
)
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.rpc import frames

_CLASSES: dict[int, type[LatticaError]] = {
    frames.SERVICE_NOT_FOUND: ServiceNotFound,
    frames.INVALID_ARGUMENT: InvalidArgument,
    frames.RESOURCE_EXHAUSTED: ResourceExhausted,
    frames.DEADLINE_EXCEEDED: DeadlineExceeded,
    frames.CANCELLED: CallCancelled,
    frames.UNREACHABLE: ConnectError,
    frames.CONNECTION_LOST: ConnectionLost,
}


def error_from_head_untrusted(head: bytes) -> LatticaError:
    """The exception for the head of an ERROR."""
    try:
        code, kind, message = frames.decode_error_head_untrusted(head)
    except RemoteProtocolError as error:
        return RemoteError(f"the peer sent an error that cannot be read: {error}", "ProtocolError")
    cls = _CLASSES.get(code)
    return RemoteError(message, kind) if cls is None else cls(message)


def status_of(error: BaseException) -> tuple[int, str, str]:
    """`(code, kind, message)` for what a handler raised. Nothing of the traceback or of objects leaves."""
    if isinstance(error, InvalidArgument):
        code = frames.INVALID_ARGUMENT
    elif isinstance(error, ResourceExhausted):
        code = frames.RESOURCE_EXHAUSTED
    else:
        code = frames.HANDLER_RAISED
    kind = error.kind if isinstance(error, RemoteError) else type(error).__name__
    return code, kind, message_of(error)


def message_of(error: BaseException) -> str:
    """`str(error)`, which is code of whoever wrote the exception's class and may itself raise."""
    try:
        return str(error)
    except Exception as second:  # whatever that code raises: the first error has to be told all the same
        return f"its text cannot be made: {type(second).__name__}"


def forward_status_of(error: LatticaError) -> tuple[int, str, str]:
    """`(code, kind, message)` for a call that could not be passed on."""
    for code, cls in _CLASSES.items():
        if isinstance(error, cls):
            return code, type(error).__name__, str(error)
    return frames.UNREACHABLE, type(error).__name__, str(error)
