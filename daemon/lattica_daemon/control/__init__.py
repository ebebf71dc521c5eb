"""The `daemon` service: what the command line and workers on this machine can ask of the daemon.

It is offered on the local socket only, never to other peers. Each module here holds the methods of one noun; they take
and return plain values (texts, numbers, lists, maps). A method that takes long yields maps with `state`, `bytes` and
`total`, and a last one with `state == "done"` that carries the result. Errors are those of `lattica.errors`; the
message is one line made to be shown.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lattica_daemon.control.bench import BenchControl
from lattica_daemon.control.content import ContentControl
from lattica_daemon.control.dht import DhtControl
from lattica_daemon.control.nat import NatControl
from lattica_daemon.control.peers import PeerControl
from lattica_daemon.control.process import ProcessControl
from lattica_daemon.control.spaces import SpaceControl

if TYPE_CHECKING:
    from lattica_daemon.daemon import Daemon

SERVICE_NAME = "daemon"


def control_methods(daemon: Daemon) -> dict[str, Callable[..., Any]]:
    """All methods of the service, by name."""
    parts = (
        ProcessControl(daemon),
        PeerControl(daemon),
        ContentControl(daemon),
        DhtControl(daemon),
        SpaceControl(daemon),
        BenchControl(daemon),
        NatControl(daemon),
    )
    methods: dict[str, Callable[..., Any]] = {}
    for part in parts:
        for name in vars(type(part)):
            if not name.startswith("_"):
                assert name not in methods, name
                methods[name] = getattr(part, name)
    return methods
