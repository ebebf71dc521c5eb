"""Drives one `GatewayMapper`: a UDP socket for each protocol, one for announcements, a TCP connection for each request.

The tasks live in a nursery that ends after the services, so that mappings can still be ended while everything closes.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Final

import trio

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.portmap.gateway import PROTOCOLS, GatewayMapper
from lattica_protocols.portmap.http import ResponseReader
from lattica_protocols.portmap.mapping import HttpRequest, Lease, Outgoing, ProtocolName

log = logging.getLogger("lattica.portmap")

HTTP_SECONDS: Final = 5.0
"""For one request and its whole answer, however slowly it trickles: a router needs some milliseconds."""
ANNOUNCEMENT_PORT: Final = 5350
"""RFC 6886, section 3.2.1; RFC 6887, section 14.1."""
_MULTICAST_TTL: Final = 2
"""UPnP Device Architecture 1.1, section 1.3.2."""
_READ_BYTES: Final = 16384
_MAX_DATAGRAM: Final = 8192
_PAUSE: Final = 0.01
"""Seconds after a datagram: whoever floods us with answers gets a hundred of them in a second, the rest is lost."""


class MapperRun:
    """`run` in a task until `close`; `released` is set when `release` has done its work."""

    def __init__(self, mapper: GatewayMapper, on_leases: Callable[[tuple[Lease, ...]], None]) -> None:
        self.mapper = mapper
        self.released = trio.Event()
        self._on_leases = on_leases
        self._wakeup = trio.Event()
        self._scope = trio.CancelScope()
        self._sockets: dict[ProtocolName, trio.socket.SocketType] = {}

    async def run(self) -> None:
        """Until `close`, or cancelled."""
        announcements: trio.socket.SocketType | None = None
        with self._scope:
            try:
                self._sockets = {name: self._open_socket() for name in PROTOCOLS}
                announcements = _open_announcements()
                async with trio.open_nursery() as nursery:
                    for name, sock in self._sockets.items():
                        nursery.start_soon(self._read, name, sock)
                    if announcements is not None:
                        nursery.start_soon(self._read, None, announcements)
                    self.mapper.start(trio.current_time())
                    await self._drive(nursery)
            except OSError as error:
                log.warning("portmap_socket_missing error=%s", error)
            finally:
                self.released.set()
                for sock in self._sockets.values():
                    sock.close()
                if announcements is not None:
                    announcements.close()

    def network_checked(self) -> None:
        """Something changed, but not the router: look whether it still has our mappings."""
        self.mapper.look(trio.current_time())
        self._wakeup.set()

    def release(self) -> None:
        """End the mappings; `released` tells when that is done."""
        self.mapper.release(trio.current_time())
        if self.mapper.is_released:
            self.released.set()
        self._wakeup.set()

    def close(self) -> None:
        self._scope.cancel()

    # -- the loop ---------------------------------------------------------------------------------------------------
    async def _drive(self, nursery: trio.Nursery) -> None:
        mapper = self.mapper
        while True:
            self._wakeup = trio.Event()
            for item in mapper.poll_transmit():
                if isinstance(item, Outgoing):
                    await self._send(item)
                else:
                    nursery.start_soon(self._ask, item)
            while (event := mapper.next_event()) is not None:
                self._on_leases(event.leases)
            if mapper.phase == "released" and mapper.is_released:
                self.released.set()
            due = mapper.next_timeout()
            with trio.move_on_at(float("inf") if due is None else due):
                await self._wakeup.wait()
                continue
            mapper.handle_timer(trio.current_time())

    async def _send(self, item: Outgoing) -> None:
        try:
            await self._sockets[item.channel].sendto(item.data, item.to)
        except OSError as error:
            log.debug("portmap_not_sent to=%s error=%s", item.to[0], error)

    async def _read(self, name: ProtocolName | None, sock: trio.socket.SocketType) -> None:
        while True:
            try:
                data, source = await sock.recvfrom(_MAX_DATAGRAM)
            except OSError:
                data, source = b"", ("", 0)  # an ICMP error of an earlier datagram
            if data:
                now = trio.current_time()
                if name is None:
                    self.mapper.receive_announcement(data, source[:2], now)
                else:
                    self.mapper.receive_datagram(name, data, source[:2], now)
                self._wakeup.set()
            await trio.sleep(_PAUSE)

    def _open_socket(self) -> trio.socket.SocketType:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            ip = self.mapper.local_ip
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(ip))
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, _MULTICAST_TTL)
            sock.bind((ip, 0))
        except OSError:
            sock.close()
            raise
        return trio.socket.from_stdlib_socket(sock)

    # -- HTTP -------------------------------------------------------------------------------------------------------
    async def _ask(self, request: HttpRequest) -> None:
        why = "no complete answer in time"
        reader = ResponseReader()
        answered = False
        with trio.move_on_after(HTTP_SECONDS):
            try:
                async with await trio.open_tcp_stream(request.host, request.port) as stream:
                    await stream.send_all(request.data)
                    while not reader.is_complete:
                        piece = await stream.receive_some(_READ_BYTES)
                        if not piece:
                            break
                        reader.receive_untrusted(piece)
                    answered = True
            except (OSError, trio.BrokenResourceError) as error:
                why = f"no connection with {request.host}:{request.port}: {_reason(error)}"
            except RemoteProtocolError as error:
                why = str(error)
        now = trio.current_time()
        if answered:
            self.mapper.receive_response(request.number, bytes(reader.data), now)
        else:
            self.mapper.request_failed(request.number, why, now)
        self._wakeup.set()


def _open_announcements() -> trio.socket.SocketType | None:
    """Where routers tell that they were restarted; several programs of a machine can listen. `None`: not allowed."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("", ANNOUNCEMENT_PORT))
    except OSError as error:
        log.debug("portmap_announcements_missing error=%s", error)
        sock.close()
        return None
    return trio.socket.from_stdlib_socket(sock)


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    return (cause.strerror if isinstance(cause, OSError) else None) or str(cause) or type(cause).__name__
