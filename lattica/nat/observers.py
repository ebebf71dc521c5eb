"""Who can tell us how we look from outside: peers we are connected with, and servers that the user configured."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

import trio

from lattica.nat.runner import plain_address
from lattica_protocols.nat.discovery import Observer

if TYPE_CHECKING:
    from lattica.host import Host
    from lattica.interfaces import Connection
    from lattica_protocols.multiaddr import Multiaddr
    from lattica_protocols.stun import SocketAddr

log = logging.getLogger("lattica.nat")

_RESOLVE_SECONDS = 3.0


def peer_observers(host: Host) -> list[Observer]:
    """Directly connected peers that speak QUIC, IPv4 ones first: NATs stand there. Those in our own network, which see
    another address of ours than the world does, only when there are no others."""
    found = [addr for connection in host.connections() if (addr := _quic_addr(host, connection)) is not None]
    outside = [addr for addr in found if not ipaddress.ip_address(addr[0]).is_private] or found
    return [Observer(addr) for addr in sorted(dict.fromkeys(outside), key=lambda addr: ":" in addr[0])]


async def resolve_servers(servers: Sequence[str]) -> list[Observer]:
    """The configured ones, by their IPv4 address; what cannot be resolved is left out."""
    found: list[Observer] = []
    for text in servers:
        name, _, port = text.rpartition(":")
        with trio.move_on_after(_RESOLVE_SECONDS) as scope:
            try:
                answers = await trio.socket.getaddrinfo(name, int(port), family=socket.AF_INET, type=socket.SOCK_DGRAM)
            except (OSError, ValueError) as error:
                log.warning("stun_server_unknown addr=%s error=%s", text, error)
                continue
            found.append(Observer(plain_address(answers[0][4]), trusted=True))  # type: ignore[arg-type]
        if scope.cancelled_caught:
            log.warning("stun_server_unknown addr=%s error=%s", text, "timeout")
    return found


def _quic_addr(host: Host, connection: Connection) -> SocketAddr | None:
    """Where the peer answers STUN: the other end of a QUIC connection; of a TCP one, the UDP port that it advertises
    for the same IP address."""
    remote = connection.remote_addr.host_port()
    if connection.path not in ("quic", "tcp") or remote is None:
        return None
    if connection.path == "quic":
        return plain_address((remote[1], remote[2]))
    for addr in host.peerstore.addrs(connection.peer_id):
        target = _udp_target(addr)
        if target is not None and target[0] == remote[1]:
            return target
    return None


def _udp_target(addr: Multiaddr) -> SocketAddr | None:
    target = addr.host_port()
    return (target[1], target[2]) if target is not None and target[0] == "udp" else None
