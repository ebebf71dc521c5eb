"""Lattica: peers that find each other, call each other with tensors, and exchange models, behind any NAT.

A worker uses the daemon on its machine:

    import lattica

    lat = lattica.connect()                      # or: async with lattica.aconnect() as lat
    lat.serve("expert", Expert())
    y = lat.call(peer, "expert.forward", x, timeout=5)

or is a peer of its own, under trio:

    async with lattica.open_node(lattica.NodeConfig(listen=["/ip4/0.0.0.0/tcp/0"])) as node: ...

Names are imported on first use, so that `import lattica` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lattica._version import __version__

if TYPE_CHECKING:
    from lattica.client import AsyncClient, Client, aconnect, connect
    from lattica.errors import (
        CallCancelled,
        ConfigError,
        ConnectError,
        ConnectionLost,
        ContentCorrupt,
        ContentNotFound,
        DaemonNotRunning,
        DeadlineExceeded,
        DialError,
        FileChanged,
        HomeInUse,
        InvalidArgument,
        InvalidRecord,
        LatticaError,
        NoAddresses,
        NotFound,
        NotWriter,
        PeerMisbehaved,
        ProtocolNotSupported,
        RemoteError,
        ResourceExhausted,
        RpcError,
        ServiceNotFound,
        SpaceNotFound,
        StorageFull,
        StreamReset,
        WrongPeer,
    )
    from lattica.node import Node, NodeConfig, open_node
    from lattica.rpc import nonblocking

_HOMES = {
    "AsyncClient": "lattica.client",
    "Client": "lattica.client",
    "aconnect": "lattica.client",
    "connect": "lattica.client",
    "Node": "lattica.node",
    "NodeConfig": "lattica.node",
    "open_node": "lattica.node",
    "nonblocking": "lattica.rpc",
}

__all__ = [
    "AsyncClient",
    "CallCancelled",
    "Client",
    "ConfigError",
    "ConnectError",
    "ConnectionLost",
    "ContentCorrupt",
    "ContentNotFound",
    "DaemonNotRunning",
    "DeadlineExceeded",
    "DialError",
    "FileChanged",
    "HomeInUse",
    "InvalidArgument",
    "InvalidRecord",
    "LatticaError",
    "NoAddresses",
    "Node",
    "NodeConfig",
    "NotFound",
    "NotWriter",
    "PeerMisbehaved",
    "ProtocolNotSupported",
    "RemoteError",
    "ResourceExhausted",
    "RpcError",
    "ServiceNotFound",
    "SpaceNotFound",
    "StorageFull",
    "StreamReset",
    "WrongPeer",
    "__version__",
    "aconnect",
    "connect",
    "nonblocking",
    "open_node",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        value = getattr(importlib.import_module(_HOMES.get(name, "lattica.errors")), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'lattica' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
