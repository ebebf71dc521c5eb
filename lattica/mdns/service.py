"""Multicast DNS on the interfaces of this machine: neighbours are connected with as soon as they are heard of.

What anybody in the network says counts as far as it leads to an address in a network that we are in ourselves,
and the handshake proves who is there; so a liar can have us dial its own neighbours, a bounded number of times.
"""

from __future__ import annotations

import logging
import random
import socket
from typing import TYPE_CHECKING, Final

import trio

from lattica.errors import LatticaError
from lattica.host import SelfChanged
from lattica.listen_addrs import interface_ips, interface_networks
from lattica_protocols.mdns.discovery import GROUP, Mdns, PeerFound

if TYPE_CHECKING:
    from lattica.host import Host
    from lattica_protocols.multiaddr import Multiaddr

log = logging.getLogger("lattica.mdns")

AGAIN_SECONDS: Final = 60.0
"""Until the socket is tried again where there was no network to use."""
ADDRS_FOR: Final = 600.0
"""Seconds that a neighbour's addresses are remembered: two rounds of questions."""
CONNECT_SECONDS: Final = 10.0
_DIALS: Final = 4
_MULTICAST_TTL: Final = 255
"""RFC 6762, section 11; no router passes it on all the same."""
_MAX_DATAGRAM: Final = 9001
_PAUSE: Final = 0.005
"""Seconds after a datagram: two hundred in a second are read, the rest of a flood is lost."""


class MdnsService:
    """One for each node. `run` in a task."""

    def __init__(self, host: Host) -> None:
        self.found = 0
        """How often a neighbour was heard of."""
        self._host = host
        self._machine: Mdns | None = None
        self._wakeup = trio.Event()
        self._moved = trio.Event()
        self._dials = trio.Semaphore(_DIALS)

    def network_changed(self) -> None:
        """Our interfaces are others than before."""
        self._moved.set()
        self._moved = trio.Event()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            moved = self._moved
            interfaces = self._interfaces()
            sock = _open_socket(interfaces) if interfaces else None
            with trio.move_on_after(float("inf") if sock is not None else AGAIN_SECONDS):
                async with trio.open_nursery() as nursery:
                    if sock is not None:
                        nursery.start_soon(self._use, sock, interfaces)
                    await moved.wait()
                    nursery.cancel_scope.cancel()

    # -- where ----------------------------------------------------------------------------------------------------
    def _interfaces(self) -> list[str]:
        """IPv4 addresses of ours at which neighbours can reach us."""
        ours = {str(ip) for ip in interface_ips() if ip.version == 4 and not ip.is_loopback}
        return sorted(ours & {str(addr.ip()) for addr in self._addrs()})

    def _addrs(self) -> list[Multiaddr]:
        found = []
        for addr in self._host.listen_addrs():
            ip = addr.ip()
            if ip is not None and not ip.is_loopback and not addr.is_circuit:
                found.append(addr)
        return found

    # -- work -----------------------------------------------------------------------------------------------------
    async def _use(self, sock: trio.socket.SocketType, interfaces: list[str]) -> None:
        now = trio.current_time()
        machine = self._machine = Mdns(self._host.peer_id, random.Random(self._host.rng.getrandbits(64)), now)
        machine.set_addrs(self._addrs(), now)
        with sock:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read, sock, machine)
                nursery.start_soon(self._follow, machine)
                while True:
                    self._wakeup = trio.Event()
                    machine.handle_timer(trio.current_time())
                    for data in machine.poll_transmit():
                        await _send(sock, data, interfaces)
                    while (event := machine.next_event()) is not None:
                        nursery.start_soon(self._meet, event)
                    with trio.move_on_at(machine.next_timeout()):
                        await self._wakeup.wait()

    async def _follow(self, machine: Mdns) -> None:
        with self._host.subscribe() as events:  # this ends with the network, and not with the host
            async for event in events:
                if isinstance(event, SelfChanged):
                    machine.set_addrs(self._addrs(), trio.current_time())
                    self._wakeup.set()

    async def _read(self, sock: trio.socket.SocketType, machine: Mdns) -> None:
        while True:
            try:
                data, _ = await sock.recvfrom(_MAX_DATAGRAM)
            except OSError:
                data = b""  # an interface went down
            if data:
                machine.receive_datagram(data, trio.current_time())
                self._wakeup.set()
            await trio.sleep(_PAUSE)

    async def _meet(self, event: PeerFound) -> None:
        networks = [network for network in interface_networks() if not network.is_loopback]
        near = [addr for addr in event.addrs if (ip := addr.ip()) is not None and any(ip in net for net in networks)]
        if not near:
            return
        self.found += 1
        peer = event.peer
        self._host.peerstore.add_addrs(peer, near, ADDRS_FOR)
        if self._host.connections(peer):
            return
        log.info("neighbour_found peer=%s count=%d", peer.short(), len(near))
        async with self._dials:
            with trio.move_on_after(CONNECT_SECONDS):
                try:
                    await self._host.connect(peer, near)
                except LatticaError as error:
                    log.debug("neighbour_not_reached peer=%s error=%s", peer.short(), error)


async def _send(sock: trio.socket.SocketType, data: bytes, interfaces: list[str]) -> None:
    for ip in interfaces:
        try:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(ip))
            await sock.sendto(data, GROUP)
        except OSError as error:
            log.debug("mdns_not_sent interface=%s error=%s", ip, error)


def _open_socket(interfaces: list[str]) -> trio.socket.SocketType | None:
    """A socket in the group on each interface; `None` where multicast does not work."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, _MULTICAST_TTL)
        sock.bind(("", GROUP[1]))
        joined = [ip for ip in interfaces if _join(sock, ip)]
    except OSError as error:
        log.info("mdns_off error=%s", error)
        sock.close()
        return None
    if not joined:
        log.info("mdns_off error=%s", "no interface takes part in multicast")
        sock.close()
        return None
    return trio.socket.from_stdlib_socket(sock)


def _join(sock: socket.socket, ip: str) -> bool:
    membership = socket.inet_aton(GROUP[0]) + socket.inet_aton(ip)
    try:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
    except OSError as error:
        log.debug("mdns_not_joined interface=%s error=%s", ip, error)
        return False
    return True
