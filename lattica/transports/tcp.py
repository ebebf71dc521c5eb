"""TCP: dialling and listening, for `/ip4|ip6|dns|dns4|dns6/…/tcp/PORT`.

Sockets are plain non-blocking ones, driven with `trio.lowlevel`. Options: TCP_NODELAY, as we gather writes
ourselves; TCP_NOTSENT_LOWAT, so that the kernel holds little that was not sent yet and a small call overtakes
bulk in our queues, not behind 4 MB of it in the kernel's.

Listening sockets are bound without SO_REUSEPORT, so a second daemon on the same port fails, and get it right
afterwards: then hole punching can dial from the port we listen on.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import socket
from collections import Counter
from collections.abc import Callable
from typing import Final

import trio

from lattica.errors import DialError, LatticaError, WrongPeer
from lattica.interfaces import Listener, OnConnection, Transport
from lattica.transports.channel import SocketChannel
from lattica.transports.muxed import MuxedConnection
from lattica.transports.upgrade import ConnectionFacts, Upgrader
from lattica_protocols.keys import PrivateKey
from lattica_protocols.limits import MAX_UNFINISHED_HANDSHAKES, MAX_UNFINISHED_HANDSHAKES_PER_IP
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.nat.scope import customer_of
from lattica_protocols.paths.heartbeat import USUAL, Pace
from lattica_protocols.peer_id import PeerId

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT: Final = 10.0
"""Seconds for name resolution and the TCP handshake: three lost SYNs."""
NOTSENT_LOWAT: Final = 128 * 1024
BACKLOG: Final = 256
PUNCH_SILENCE: Final = 0.15
"""Seconds without a byte after which an accepted connection of a punching partner is taken for the punched one. Who
dials in order sends its first bytes with the end of the TCP handshake, so this is all jitter."""
ACCEPT_PAUSE: Final = 0.1
"""Seconds without accepting when the process is out of file descriptors."""

_FAMILIES: Final = {
    "ip4": socket.AF_INET,
    "ip6": socket.AF_INET6,
    "dns": socket.AF_UNSPEC,
    "dns4": socket.AF_INET,
    "dns6": socket.AF_INET6,
}
_OUT_OF_RESOURCES: Final = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class TcpTransport(Transport):
    """TCP with Noise and yamux. Connections and listeners run in `nursery`."""

    def __init__(
        self,
        key: PrivateKey,
        nursery: trio.Nursery,
        *,
        entropy: Callable[[int], bytes] = os.urandom,
        pace: Pace = USUAL,
        upgrader: Upgrader | None = None,
    ) -> None:
        self.upgrader = upgrader or Upgrader(key, entropy, pace=pace)
        """Also upgrades relayed circuits."""
        self.source_port: Callable[[PeerId | None, Multiaddr], int | None] = lambda peer, addr: None
        """The local port to dial a peer from: one we listen on, so that it sees the NAT's mapping of that."""
        self.punching: Counter[str] = Counter()
        """IP addresses of partners with which a hole is being punched, in which we take the dialler's part."""
        self._nursery = nursery
        self._unfinished: Counter[str] = Counter()

    def can_dial(self, addr: Multiaddr) -> bool:
        names = _names(addr.without_peer())
        return len(names) == 2 and names[0] in _FAMILIES and names[1] == "tcp"

    def can_listen(self, addr: Multiaddr) -> bool:
        names = addr.names()
        return len(names) == 2 and names[0] in ("ip4", "ip6") and names[1] == "tcp"

    async def dial(
        self,
        addr: Multiaddr,
        expected: PeerId | None,
        *,
        bind_port: int | None = None,
        initiator: bool = True,
    ) -> MuxedConnection:
        """As `Transport.dial`. For hole punching: `bind_port` is the local port to dial from (one we listen
        on), and `initiator=False` takes the listener's part in the handshake."""
        expected = expected or addr.peer_id()
        try:
            preferred = None if bind_port is not None else self.source_port(expected, addr)
            try:
                sock = await self._connect(addr, bind_port or preferred)
            except DialError:
                if preferred is None:
                    raise
                sock = await self._connect(addr, None)  # that port has a connection with this peer already
            connection = await self.upgrader.upgrade(
                SocketChannel(sock),
                ConnectionFacts(_local_addr(sock), _remote_addr(sock), "outbound", "tcp"),
                expected,
                initiator=initiator,
            )
        except WrongPeer as error:
            raise WrongPeer(f"{addr}: {error}") from None
        except DialError as error:
            raise DialError(f"{addr}: {error}") from None
        self._nursery.start_soon(connection.run)
        return connection

    async def _connect(self, addr: Multiaddr, bind_port: int | None) -> socket.socket:
        if not self.can_dial(addr):
            raise DialError("not a TCP address")
        errors: list[str] = []
        try:
            with trio.fail_after(CONNECT_TIMEOUT):
                for family, sockaddr in await _resolve(addr):
                    try:
                        return await _connect_one(family, sockaddr, bind_port)
                    except OSError as error:
                        errors.append(_reason(error))
        except trio.TooSlowError:
            raise DialError(f"no answer within {CONNECT_TIMEOUT:g} s") from None
        raise DialError("; ".join(dict.fromkeys(errors)))

    async def listen(self, addr: Multiaddr, on_connection: OnConnection) -> TcpListener:
        """As `Transport.listen`. `DialError` is not among its errors: `OSError` when the port is taken."""
        await trio.lowlevel.checkpoint()
        found = addr.host_port()
        if found is None or not self.can_listen(addr):
            raise ValueError(f"{addr}: TCP listens on /ip4/…/tcp/… and /ip6/…/tcp/…")
        sock = socket.socket(_FAMILIES[addr.names()[0]], socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if sock.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((found[1], found[2]))
            sock.listen(BACKLOG)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        except OSError as error:
            sock.close()
            raise OSError(error.errno, f"cannot listen on {addr}: {error.strerror}") from None
        listener = TcpListener(self, sock, on_connection)
        self._nursery.start_soon(listener.run)
        return listener

    def adopt(self, connection: MuxedConnection) -> None:
        """Run a connection that `upgrader` made."""
        self._nursery.start_soon(connection.run)

    def serve_inbound(self, sock: socket.socket, ip: str, on_connection: OnConnection) -> None:
        """Shake hands with whoever dialled us, unless too many are at it already."""
        unfinished = self._unfinished
        customer = str(customer_of(ipaddress.ip_address(ip.partition("%")[0])))
        if unfinished.total() >= MAX_UNFINISHED_HANDSHAKES or unfinished[customer] >= MAX_UNFINISHED_HANDSHAKES_PER_IP:
            sock.close()
            return
        unfinished[customer] += 1
        self._nursery.start_soon(self._serve_inbound, sock, ip, customer, on_connection)

    async def _serve_inbound(self, sock: socket.socket, ip: str, customer: str, on_connection: OnConnection) -> None:
        try:
            _prepare(sock)
            facts = ConnectionFacts(_local_addr(sock), _remote_addr(sock), "inbound", "tcp")
            initiator = self.punching[ip] > 0 and not await _speaks_first(sock)
            connection = await self.upgrader.upgrade(SocketChannel(sock), facts, None, initiator=initiator)
        except (OSError, LatticaError) as error:
            logger.debug("inbound_failed ip=%s error=%s", ip, error)
            sock.close()
            return
        finally:
            self._unfinished[customer] -= 1
            if not self._unfinished[customer]:
                del self._unfinished[customer]
        self.adopt(connection)
        await on_connection(connection)


class TcpListener(Listener):
    """One listening socket."""

    def __init__(self, transport: TcpTransport, sock: socket.socket, on_connection: OnConnection) -> None:
        self.addrs = [_local_addr(sock)]
        self._transport = transport
        self._socket = sock
        self._on_connection = on_connection
        self._scope = trio.CancelScope()

    async def aclose(self) -> None:
        self._scope.cancel()
        self._close()
        await trio.lowlevel.checkpoint()

    def _close(self) -> None:
        if self._socket.fileno() != -1:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()

    async def run(self) -> None:
        """Accept until it is closed."""
        try:
            with self._scope, contextlib.suppress(trio.ClosedResourceError):
                while self._socket.fileno() != -1:
                    await self._accept()
        finally:
            self._close()

    async def _accept(self) -> None:
        await trio.lowlevel.wait_readable(self._socket)
        try:
            sock, sockaddr = self._socket.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # Linux hands errors of the new connection out here; only lack of resources is ours, and passes.
            if error.errno in _OUT_OF_RESOURCES:
                logger.warning("accept_failed addr=%s error=%s", self.addrs[0], error.strerror)
                await trio.sleep(ACCEPT_PAUSE)
            return
        self._transport.serve_inbound(sock, str(sockaddr[0]), self._on_connection)


def _names(addr: Multiaddr) -> tuple[str, ...]:
    """Its protocols without the zone of a link-local address, which `host_port` puts into the host."""
    names = addr.names()
    return names[1:] if names[:1] == ("ip6zone",) else names


# -- sockets -------------------------------------------------------------------------------------------------
async def _resolve(addr: Multiaddr) -> list[tuple[int, tuple[str, int]]]:
    """Where the address leads, in the system's order of preference. `DialError` when the name is unknown."""
    found = addr.host_port()
    assert found is not None
    _, host, port = found
    name = _names(addr)[0]
    if not name.startswith("dns"):
        return [(_FAMILIES[name], (host, port))]
    try:
        infos = await trio.socket.getaddrinfo(host, port, _FAMILIES[name], socket.SOCK_STREAM)
    except OSError as error:
        raise DialError(f"cannot resolve {host}: {error.strerror}") from None
    return list(dict.fromkeys((info[0], (str(info[4][0]), port)) for info in infos))


async def _connect_one(family: int, sockaddr: tuple[str, int], bind_port: int | None) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        _prepare(sock)
        if bind_port is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", bind_port))
        try:
            sock.connect(sockaddr)
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise OSError(error, os.strerror(error)) from None
    except BaseException:  # most often cancelled, as another address was quicker; raised again
        sock.close()
        raise
    return sock


async def _speaks_first(sock: socket.socket) -> bool:
    """Whether the dialler begins the handshake. If not, it punches a hole and waits for us to begin."""
    with trio.move_on_after(PUNCH_SILENCE):
        await trio.lowlevel.wait_readable(sock)
        return True
    return False


def _prepare(sock: socket.socket) -> None:
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOTSENT_LOWAT)


def _reason(error: OSError) -> str:
    if error.errno == errno.ECONNREFUSED:
        return "connection refused, nobody listens there"
    return error.strerror or str(error)


def _local_addr(sock: socket.socket) -> Multiaddr:
    return _multiaddr(sock.getsockname())


def _remote_addr(sock: socket.socket) -> Multiaddr:
    return _multiaddr(sock.getpeername())


def _multiaddr(sockaddr: tuple[str, int]) -> Multiaddr:
    return Multiaddr.tcp(sockaddr[0].partition("%")[0], sockaddr[1])  # a zone has no place in an address for others
