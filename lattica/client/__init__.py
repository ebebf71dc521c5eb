"""The bindings a worker uses: `connect` (sync) and `aconnect` (trio or asyncio) to the daemon on this machine.

Both speak RPC over the daemon's Unix socket; the daemon passes calls on to peers and brings in those of peers.

When the daemon goes away, calls that run fail with `ConnectionLost` at once. The next call connects again and offers
the same services again; a client that offers services also tries by itself, every second.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lattica.client.asynchronous import AsyncClient, aconnect
    from lattica.client.synchronous import Client, connect

_HOMES = {
    "AsyncClient": "lattica.client.asynchronous",
    "Client": "lattica.client.synchronous",
    "aconnect": "lattica.client.asynchronous",
    "connect": "lattica.client.synchronous",
}
__all__ = ["AsyncClient", "Client", "aconnect", "connect"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'lattica.client' has no attribute {name!r}")
