"""Tells each connection how long it may be silent (`lattica_protocols.paths.keep_alive`): what is in between?

Nothing that could forget it when the peer is in a network of ours, or when it sees us at an address and port of our own
at which strangers reach us: then neither a NAT nor a firewall minds who began. All else is taken for a mapping.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import TYPE_CHECKING

from lattica.host import PeerConnected, PeerIdentified, SelfChanged
from lattica.listen_addrs import interface_ips, interface_networks
from lattica_protocols.nat.behaviour import Filtering, Mapping, NatBehaviour
from lattica_protocols.paths.keep_alive import keep_alive_seconds

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from lattica.host import Host
    from lattica.interfaces import Connection
    from lattica_protocols.multiaddr import Multiaddr
    from lattica_protocols.nat.scope import IpAddress


class KeepAlives:
    """One for each node. `run` in a task."""

    def __init__(
        self,
        host: Host,
        *,
        reached: Callable[[], Iterable[Multiaddr]],
        nat: Callable[[], NatBehaviour] = NatBehaviour,
    ) -> None:
        """`reached`: our addresses at which strangers were seen to reach us. `nat`: what our NATs do."""
        self._host = host
        self._reached = reached
        self._nat = nat

    async def run(self) -> None:
        """Until cancelled."""
        events = self._host.subscribe()
        self.update()
        async for event in events:
            if isinstance(event, PeerConnected):
                self._update([event.connection])
            elif isinstance(event, PeerIdentified):
                self._update(self._host.connections(event.peer))
            elif isinstance(event, SelfChanged):
                self.update()

    def update(self) -> None:
        """What is known of our network changed: see after all connections."""
        self._update(self._host.connections())

    def _update(self, connections: list[Connection]) -> None:
        own, networks, reached = set(interface_ips()), interface_networks(), set(self._reached())
        open_ip = _open_ip(self._nat(), reached)
        for connection in connections:
            remote = connection.remote_addr.ip()
            seen = None if connection.observed_addr is None else connection.observed_addr.without_peer()
            near = remote is None or any(remote in network for network in networks)
            free = seen is not None and seen.ip() in own and (seen in reached or seen.ip() == open_ip)
            connection.keep_up(
                keep_alive_seconds(
                    relayed=connection.path == "relay",
                    dialled=connection.direction == "outbound",
                    mapped=not (near or free),
                )
            )


def _open_ip(nat: NatBehaviour, reached: Collection[Multiaddr]) -> IpAddress | None:
    """The address of ours in front of which nothing filters, whatever the port.

    Filtering is looked at with new sockets, at ports for which nobody has made a rule. Only a server with two addresses
    can show that strangers get in there; with others, that a second port of theirs does, is taken for it when strangers
    do get in where we listen.
    """
    if nat.mapping is not Mapping.NONE or nat.mapped is None:
        return None
    ip = ipaddress.ip_address(nat.mapped[0])
    if nat.filtering is Filtering.ADDRESS_DEPENDENT:
        return ip if any(addr.ip() == ip for addr in reached) else None
    return ip if nat.filtering is Filtering.ENDPOINT_INDEPENDENT else None
