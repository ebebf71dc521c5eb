"""The daemon itself: what it is, how it does, its settings, its end."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING, Any

import trio

from lattica._version import __version__

if TYPE_CHECKING:
    from lattica_daemon.daemon import Daemon


class ProcessControl:
    """Methods about the process."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def id(self) -> dict[str, Any]:
        """`{peer_id, addrs}`: addresses without `/p2p`, as others are told."""
        host = self._daemon.node.host
        return {"peer_id": str(host.peer_id), "addrs": [str(addr) for addr in host.advertised_addrs()]}

    async def status(self) -> dict[str, Any]:
        """One screen's worth; see `lattica status --json`."""
        daemon = self._daemon
        node, host = daemon.node, daemon.node.host
        connections = host.connections()
        by_path = Counter(connection.path for connection in connections)
        return {
            **await self.id(),
            "version": __version__,
            "pid": os.getpid(),
            "home": str(daemon.home.path),
            "uptime_seconds": round(trio.current_time() - daemon.started_at, 3),
            "reachability": host.reachability,
            "tried_addrs": {str(addr): verdict for addr, verdict in node.reach.verdicts().items()},
            "connections": len(connections),
            "connections_by_path": {path: by_path.get(path, 0) for path in ("tcp", "quic", "relay")},
            "peers": len(host.peers()),
            "sent_bytes": daemon.traffic.sent(connections),
            "received_bytes": daemon.traffic.received(connections),
            "store": daemon.store_summary(),
            "dht": node.kad.info(),
            "relay": self._relay(),
            "spaces": daemon.spaces_summary(),
            "services": sorted(daemon.offered_services()),
            "counters": dict(sorted(host.counters.items())),
        }

    def _relay(self) -> dict[str, Any]:
        """What we carry for others, and where others reach us through a relay."""
        node = self._daemon.node
        server = node.relay_server
        held = node.relay_client.reservations()
        return {
            "serving": server.serving,
            "reservations_given": len(list(server.table.reservations())),
            "circuits": len(server.circuits),
            "carried_bytes": server.circuits.carried_bytes,
            "reservations": {str(relay): [str(addr) for addr in addrs] for relay, addrs in held.items()},
        }

    async def config(self) -> dict[str, Any]:
        """Settings in force: `{running, home, settings: {key: {value, source, allowed, help}}}`."""
        daemon = self._daemon
        return {"running": True, "home": str(daemon.home.path), "settings": daemon.settings.describe()}

    async def shutdown(self) -> dict[str, Any]:
        """Drain and end, as after SIGTERM."""
        self._daemon.stop("a local client")
        return {"stopping": True}
