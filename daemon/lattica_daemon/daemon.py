"""The running daemon: a node, the local socket, and what stands between them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import trio

from lattica.rpc.forward import Forwarder
from lattica_daemon.control import SERVICE_NAME, control_methods
from lattica_daemon.control.arguments import read_peer
from lattica_daemon.doctor.peer import behaviour_to_plain
from lattica_daemon.doctor.relay_delay import RelayTripsForPeers
from lattica_daemon.home import Home
from lattica_daemon.measured import BenchService
from lattica_daemon.rules import PeerRules
from lattica_daemon.settings import Settings
from lattica_protocols.limits import RPC_MAX_DAEMON_VALUE
from lattica_protocols.nat.behaviour import NatBehaviour

if TYPE_CHECKING:
    from lattica.interfaces import Connection
    from lattica.local.server import LocalServer
    from lattica.node import Node

log = logging.getLogger("lattica_daemon")

DRAIN_POLL = 0.05
"""Seconds between two looks at the calls in flight while draining."""


class Daemon:
    """What the control methods work on. `stopping` is set once, by a signal or a client."""

    def __init__(self, home: Home, settings: Settings, node: Node, rules: PeerRules, nursery: trio.Nursery) -> None:
        self.home = home
        self.settings = settings
        self.node = node
        self.nursery = nursery
        self.rules = rules
        self.started_at = trio.current_time()
        self.traffic = Traffic()
        self.stopping = trio.Event()
        self.local: LocalServer | None = None
        self.forwarder = Forwarder(node.rpc, node.peer_id, nursery)
        self.forwarder.serve_local(SERVICE_NAME, control_methods(self))
        self._relay_trips = RelayTripsForPeers(node)
        asked = {
            "services": self._services_for_peers,
            "nat": self._nat_for_peers,
            "relay_trip": self._relay_trip_for_peers,
        }
        node.rpc.serve("bench", BenchService(), max_value=RPC_MAX_DAEMON_VALUE)
        node.rpc.serve("lattica", asked, max_value=RPC_MAX_DAEMON_VALUE)

    def stop(self, why: str) -> None:
        """Begin to drain. Safe to call twice."""
        if not self.stopping.is_set():
            log.info("stopping reason=%s", why)
            self.stopping.set()

    async def _services_for_peers(self) -> dict[str, list[str]]:
        return self.offered_services()

    async def _nat_for_peers(self) -> dict[str, Any]:
        """What stands between us, for the other side's `lattica doctor`."""
        nat = self.node.nat
        return behaviour_to_plain(NatBehaviour() if nat is None else nat.behaviour)

    async def _relay_trip_for_peers(self, relay: str) -> float | None:
        """Seconds of our round trip with the relay between us, for the other side's `lattica doctor`."""
        return await self._relay_trips.trip(read_peer(relay))

    def offered_services(self) -> dict[str, list[str]]:
        """What peers can call here: names of services, each with its methods (without the service's name)."""
        found = {**self.node.rpc.services(), **self.forwarder.services()}
        return {name: [method.rpartition(".")[2] for method in methods] for name, methods in found.items()}

    def calls_in_flight(self) -> int:
        """Calls that a peer or a local client waits for."""
        clients = () if self.local is None else self.local.clients
        return self.node.rpc.calls_in_flight() + sum(client.machine.inbound_calls for client in clients)

    async def drain(self) -> None:
        """Accept nobody new, then give calls in flight their time to finish."""
        await self.node.host.stop_listening()
        with trio.move_on_after(self.settings.daemon.drain_seconds) as scope:
            while self.calls_in_flight():  # noqa: ASYNC110  # the counts belong to machines that know no events
                await trio.sleep(DRAIN_POLL)
        if scope.cancelled_caught:
            log.warning("drain_cut_short count=%d", self.calls_in_flight())

    async def count_traffic(self) -> None:
        """Keep what connections carried after they are gone."""
        from lattica.host import PeerConnected

        async for event in self.node.host.subscribe():
            if isinstance(event, PeerConnected):
                self.traffic.add(event.connection)

    def store_summary(self) -> dict[str, Any]:
        """`{blobs, bytes, damaged}` of what is complete in the content store."""
        store = self.node.blobs.store
        blobs = [blob for blob in store.list() if blob.complete]
        return {"blobs": len(blobs), "bytes": sum(blob.bytes for blob in blobs), "damaged": store.catalog.damaged}

    def spaces_summary(self) -> dict[str, Any]:
        """`{spaces, operations, bytes, damaged}` of the replicated state here."""
        spaces, store = self.node.spaces.list(), self.node.spaces.store
        return {
            "spaces": len(spaces),
            "operations": sum(space.operations for space in spaces),
            "bytes": store.stored_bytes(),
            "damaged": store.damaged,
        }


class Traffic:
    """Bytes of all connections since the start, also of those that are gone."""

    def __init__(self) -> None:
        self._open: dict[int, Connection] = {}
        self._sent = 0
        self._received = 0

    def add(self, connection: Connection) -> None:
        """A connection came up."""
        self._settle()
        self._open[id(connection)] = connection

    def sent(self, connections: Iterable[Connection]) -> int:
        """Bytes sent; `connections` are those up now."""
        self._settle()
        return self._sent + sum(c.sent_bytes for c in {**self._open, **{id(c): c for c in connections}}.values())

    def received(self, connections: Iterable[Connection]) -> int:
        """Bytes received; `connections` are those up now."""
        self._settle()
        return self._received + sum(
            c.received_bytes for c in {**self._open, **{id(c): c for c in connections}}.values()
        )

    def _settle(self) -> None:
        for key, connection in list(self._open.items()):
            if connection.closed.is_set():
                self._sent += connection.sent_bytes
                self._received += connection.received_bytes
                del self._open[key]
