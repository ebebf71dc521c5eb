"""Other peers: connect, find, ping, admit."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Literal, cast

import trio

from lattica.errors import DeadlineExceeded, InvalidArgument, NoAddresses, NotFound
from lattica_daemon.control.arguments import read_address, read_peer

if TYPE_CHECKING:
    from lattica.interfaces import Connection
    from lattica_daemon.daemon import Daemon

MAX_PINGS = 1000


class PeerControl:
    """Methods about peers."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def peers(self) -> list[dict[str, Any]]:
        """Connections that are up, one entry each."""
        host = self._daemon.node.host
        return [self._describe(connection) for connection in host.connections()]

    def _describe(self, connection: Connection) -> dict[str, Any]:
        info = self._daemon.node.host.peerstore.info(connection.peer_id)
        return {
            "peer_id": str(connection.peer_id),
            "path": connection.path,
            "addr": str(connection.remote_addr),
            "rtt_ms": None if connection.rtt is None else round(connection.rtt * 1e3, 3),
            "direction": connection.direction,
            "agent": "" if info is None else info.agent,
            "sent_bytes": connection.sent_bytes,
            "received_bytes": connection.received_bytes,
        }

    async def connect(self, target: str) -> dict[str, Any]:
        """Connect to an address (with or without `/p2p`) or, with a peer id alone, to where the network says it is."""
        host = self._daemon.node.host
        if target.startswith("/"):
            addr = read_address(target)
            connection = await host.connect(addr.peer_id(), [addr])
        else:
            peer = read_peer(target)
            if peer == host.peer_id:
                raise InvalidArgument("this is our own peer id")
            addrs = await self._daemon.node.find_peer(peer)
            if not addrs:
                raise NoAddresses(f"no address of {peer} is known here or found in the network")
            connection = await host.connect(peer, addrs)
        return self._describe(connection)

    async def disconnect(self, peer: str) -> dict[str, Any]:
        """Close all connections with a peer: `{peer_id, closed}`."""
        target = read_peer(peer)
        return {"peer_id": str(target), "closed": await self._daemon.node.host.disconnect(target)}

    async def find_peer(self, peer: str) -> dict[str, Any]:
        """`{peer_id, addrs}` from what is known here, else from the network."""
        target = read_peer(peer)
        addrs = await self._daemon.node.find_peer(target)
        if not addrs:
            raise NotFound(f"nobody who was asked knows where {target} is")
        return {"peer_id": str(target), "addrs": [str(addr) for addr in addrs]}

    async def ping(self, peer: str, count: int = 1, timeout_each: float = 10.0) -> AsyncIterator[dict[str, Any]]:
        """Yields `{rtt_ms, path}` for each round trip."""
        if not isinstance(count, int) or not 1 <= count <= MAX_PINGS:
            raise InvalidArgument(f"the count of pings is 1 to {MAX_PINGS}")
        node, target = self._daemon.node, read_peer(peer)
        if not node.host.connections(target):
            await node.host.connect(target, await node.find_peer(target))
        for _ in range(count):
            try:
                with trio.fail_after(timeout_each):
                    seconds = await node.ping.ping(target, timeout=float("inf"))
            except trio.TooSlowError:
                raise DeadlineExceeded(f"{target} did not answer a ping within {timeout_each:g} s") from None
            connection = node.host.connection(target)
            yield {"rtt_ms": round(seconds * 1e3, 3), "path": "" if connection is None else connection.path}

    async def set_rule(self, peer: str, verdict: str) -> dict[str, Any]:
        """`verdict` is `allow`, `block`, or empty to take the rule away. `{peer_id, verdict, closed}`."""
        target = read_peer(peer)
        if verdict not in ("allow", "block", ""):
            raise InvalidArgument("a rule is allow, block, or empty to take it away")
        daemon = self._daemon
        daemon.rules.set(target, cast('Literal["allow", "block"]', verdict) if verdict else None)
        closed = 0
        if daemon.rules.refusal(target) is not None:
            closed = await daemon.node.host.disconnect(target)
        return {"peer_id": str(target), "verdict": verdict, "closed": closed}

    async def rules(self) -> dict[str, Any]:
        """`{default, allow, block}`."""
        return self._daemon.rules.listing()

    async def services(self, peer: str) -> list[dict[str, Any]]:
        """What a peer offers: `[{name, methods}]`."""
        target = read_peer(peer)
        node = self._daemon.node
        if target == node.peer_id:
            found = self._daemon.offered_services()
        else:
            found = await node.rpc.call(target, "lattica.services")
        return [{"name": name, "methods": methods} for name, methods in sorted(found.items())]
