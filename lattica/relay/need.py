"""Whether this peer needs relays to be reached."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lattica.host import PeerDisconnected, PeerIdentified, SelfChanged
from lattica.listen_addrs import interface_ips
from lattica_protocols.relay.keeper import WANTED_RESERVATIONS

if TYPE_CHECKING:
    from lattica.host import Host
    from lattica.relay.client import RelayClient


async def watch_need(host: Host, client: RelayClient, always: bool) -> None:
    """Tell `client` how many reservations to keep, until cancelled: some with `always`, else while we are behind a
    NAT as far as we can see, or listen nowhere."""
    events = host.subscribe()
    client.want(WANTED_RESERVATIONS if always or needs_relays(host) else 0)
    async for event in events:
        if not always and isinstance(event, PeerIdentified | PeerDisconnected | SelfChanged):
            client.want(WANTED_RESERVATIONS if needs_relays(host) else 0)


def needs_relays(host: Host) -> bool:
    """Whether strangers do not reach us, as others have tried; before they have, whether it looks like that."""
    if host.reachability == "unknown":
        return is_behind_nat(host)
    return host.reachability == "private"


def is_behind_nat(host: Host) -> bool:
    """Whether somebody sees us at an address that no interface of ours has, or we accept connections nowhere."""
    if not any(not addr.is_circuit for addr in host.advertised_addrs()):
        return True
    if host.announce:
        return False
    seen = set()
    for connection in host.connections():
        observed = connection.observed_addr
        ip = None if observed is None or observed.is_circuit or connection.path == "relay" else observed.ip()
        if ip is not None:
            seen.add(ip)
    return bool(seen) and not seen <= set(interface_ips())
