"""The errors a user of Lattica sees. Each message is one line: what is wrong, and what to do where we know it."""

from __future__ import annotations


class LatticaError(Exception):
    """Base of all errors of this package."""


# -- connections ------------------------------------------------------------------------------------------------
class ConnectError(LatticaError):
    """No connection to the peer could be made."""


class DialError(ConnectError):
    """One address could not be dialled."""


class WrongPeer(DialError):
    """Another peer than the expected one answered at the address."""


class NoAddresses(ConnectError):
    """Nothing is known about where the peer is."""


class ConnectionLost(LatticaError):
    """The connection ended while it was in use."""


class PathLost(ConnectionLost):
    """The connection fell silent, or its address is gone: the peer may be reached over another path."""


class PathAltered(PathLost):
    """What came was not what the peer sent: somebody on the way, such as a relay, altered, repeated or cut it."""


class StreamReset(LatticaError):
    """The stream was reset by the peer or by us."""


class ProtocolNotSupported(LatticaError):
    """The peer speaks none of the protocols asked for."""


class PeerMisbehaved(LatticaError):
    """The peer broke a protocol; the message says which rule."""


# -- calls --------------------------------------------------------------------------------------------------------
class RpcError(LatticaError):
    """Base of everything that can go wrong with a call."""


class DeadlineExceeded(RpcError, TimeoutError):
    """The call's deadline passed."""


class CallCancelled(RpcError):
    """The other side cancelled the call."""


class ServiceNotFound(RpcError):
    """The peer offers no such service or method."""


class InvalidArgument(RpcError):
    """The arguments do not fit the method, or cannot be encoded."""


class ResourceExhausted(RpcError):
    """A limit of the other side was reached: too many calls, or a message over its limit."""


class RemoteError(RpcError):
    """The remote handler raised. `kind` is the exception's class name there, `str(self)` its message."""

    def __init__(self, message: str, kind: str = "Exception") -> None:
        super().__init__(message)
        self.kind = kind


# -- content and discovery ----------------------------------------------------------------------------------------
class ContentNotFound(LatticaError):
    """Nobody who was asked has the content."""


class ContentCorrupt(LatticaError):
    """Stored or received bytes do not have the hash they should have."""


class FileChanged(LatticaError):
    """A file changed while it was being shared."""


class StorageError(LatticaError):
    """A file or directory cannot be read or written."""


class StorageFull(StorageError):
    """The disk is full. What was already stored stays."""


class NotFound(LatticaError):
    """No value under this key."""


class InvalidRecord(LatticaError):
    """A record has a wrong signature, publisher, sequence number or expiry."""


# -- spaces -------------------------------------------------------------------------------------------------------
class SpaceNotFound(LatticaError):
    """The space is not on this peer, or nobody who was asked serves it."""


class NotWriter(LatticaError):
    """This peer has no right to write to the space; the message says who may give it."""


# -- the daemon ---------------------------------------------------------------------------------------------------
class DaemonNotRunning(LatticaError):
    """No daemon answers on the local socket."""


class HomeInUse(LatticaError):
    """Another daemon runs on the same home directory."""


class ConfigError(LatticaError):
    """A setting is wrong; the message names it, its value and what is allowed."""
