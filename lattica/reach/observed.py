"""Our addresses as peers see them: what identify tells, weighed by `ObservedAddrs`, advertised once it is confirmed."""

from __future__ import annotations

import ipaddress
import logging
from typing import TYPE_CHECKING

import trio

from lattica.host import PeerConnected, PeerDisconnected, PeerIdentified
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.nat.observed import Confirmed, Observation, ObservedAddrs

if TYPE_CHECKING:
    from lattica.host import Host
    from lattica.interfaces import Connection
    from lattica_protocols.peer_id import PeerId
    from lattica_protocols.stun import SocketAddr

log = logging.getLogger("lattica.reach")


class ObservedAddresses:
    """Adds confirmed observed addresses to what `host` advertises. `run` in a task."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._machine = ObservedAddrs()
        self._connections: dict[int, Connection] = {}
        self._confirmed: list[Confirmed] = []
        self._wakeup = trio.Event()
        host.address_sources.append(self.addrs)

    def addrs(self) -> list[Multiaddr]:
        """Confirmed ones, the best confirmed first."""
        return [confirmed.addr for confirmed in self._confirmed]

    def confirmed(self) -> list[Confirmed]:
        """The same with the weight of what was said."""
        return list(self._confirmed)

    async def run(self) -> None:
        """Until cancelled."""
        events = self._host.subscribe()
        for peer in self._host.peers():
            self._learn(peer)
        self._update()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._expire)
            async for event in events:
                if isinstance(event, PeerIdentified):
                    self._learn(event.peer)
                elif not isinstance(event, PeerConnected | PeerDisconnected):
                    continue
                self._update()

    def reset(self) -> None:
        """Our interfaces changed: what was seen before is of no use."""
        self._machine.reset()
        for connection in self._host.connections():
            connection.observed_addr = None
        self._update()

    async def _expire(self) -> None:
        while True:
            self._wakeup = trio.Event()
            due = self._machine.next_timeout()
            with trio.move_on_at(float("inf") if due is None else due):
                await self._wakeup.wait()
                continue
            self._update()

    def _learn(self, peer: PeerId) -> None:
        for connection in self._host.connections(peer):
            observation = self._observation(connection)
            if observation is not None and self._machine.observe(observation, trio.current_time()):
                self._connections[id(connection)] = connection

    def stun_answered(self, listen: Multiaddr, observer: SocketAddr, mapped: SocketAddr) -> None:
        """Somebody whom we asked sees our UDP socket `listen` at `mapped`."""
        key = ("stun", observer[0])
        now = trio.current_time()
        ip = ipaddress.ip_address(observer[0])
        self._machine.observe(Observation(key, ip, True, listen, Multiaddr.quic(*mapped)), now)
        self._machine.connection_gone(key, now)
        self._update()

    def _observation(self, connection: Connection) -> Observation | None:
        seen, observer = connection.observed_addr, connection.remote_addr.ip()
        if seen is None or observer is None or connection.path not in ("tcp", "quic"):
            return None
        listen = _socket_of(connection, self._host.bound_addrs())
        if listen is None:
            return None
        outbound = connection.direction == "outbound"
        return Observation(id(connection), observer, outbound, listen, seen.without_peer())

    def _update(self) -> None:
        now = trio.current_time()
        for key, connection in list(self._connections.items()):
            if connection.closed.is_set():
                del self._connections[key]
                # the number may name another connection later; this one's word stays under a name of its own
                self._machine.connection_gone(key, now, kept_as=object())
        before = set(self.addrs())
        self._confirmed = self._machine.confirmed(now)
        self._wakeup.set()
        if set(self.addrs()) != before:
            log.info("observed_addrs addrs=%s", " ".join(map(str, self.addrs())) or "none")
            self._host.addrs_changed()
            if not set(self.addrs()) <= before:
                self._host.network_changed()


def _socket_of(connection: Connection, bound: list[Multiaddr]) -> Multiaddr | None:
    """Of the sockets we listen on, the one that `connection` uses; `None` when it left from another port."""
    local = connection.local_addr.without_peer()
    found, ip = local.host_port(), local.ip()
    for addr in bound:
        bound_port = addr.host_port()
        if addr.names() != local.names() or bound_port is None or found is None:
            continue
        if bound_port[2] == found[2] and (addr.is_unspecified or addr.ip() == ip or local.is_unspecified):
            return addr
    return None
