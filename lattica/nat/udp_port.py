"""A further UDP socket: for answers from another port, for tests of a NAT, for a punch from a new port.

Light (no buffers of its own), because a birthday attempt has 256 of them for some seconds.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable

import trio

from lattica.transports.quic_engine import Address

OnDatagram = Callable[[bytes, Address], None]

_MAX_BYTES = 2048
"""Longer than anything these sockets are for."""
_READS_PER_TURN = 64
_PKTINFO = {socket.AF_INET: (socket.IPPROTO_IP, 8), socket.AF_INET6: (socket.IPPROTO_IPV6, 50)}
"""IP_PKTINFO and IPV6_PKTINFO of Linux, which Python's socket module does not name."""
_TTL = {socket.AF_INET: (socket.IPPROTO_IP, socket.IP_TTL), socket.AF_INET6: (socket.IPPROTO_IPV6, 52)}


class UdpPort:
    """`run` reads it; `on_datagram` must not raise. `OSError` when the address cannot be bound."""

    def __init__(self, family: socket.AddressFamily, host: str, port: int, on_datagram: OnDatagram) -> None:
        self.family = family
        self.on_datagram = on_datagram
        self._socket = socket.socket(family, socket.SOCK_DGRAM | getattr(socket, "SOCK_CLOEXEC", 0))
        try:
            self._socket.setblocking(False)
            if family == socket.AF_INET6:
                self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            self._socket.bind((host, port))
        except OSError:
            self._socket.close()
            raise
        self.address: Address = self._socket.getsockname()
        self._scope = trio.CancelScope()
        self._detached = False

    async def run(self) -> None:
        """Until `close`, or until cancelled."""
        try:
            with self._scope:
                while not self._detached:
                    await trio.lowlevel.wait_readable(self._socket)
                    self._read()
        finally:
            if not self._detached:
                self._socket.close()

    def close(self) -> None:
        self._scope.cancel()

    def detach(self) -> socket.socket:
        """End `run` and give the open socket away."""
        self._detached = True
        self._scope.cancel()
        return self._socket

    def send(self, data: bytes, addr: Address, *, source: bytes | None = None, ttl: int | None = None) -> None:
        """Lost silently, like any datagram. `source`: the packed IP address to send from; see `source_ip`.
        `ttl` in hops; `None`: the system's."""
        ancillary: list[tuple[int, int, bytes]] = []
        if source is not None:
            level, kind = _PKTINFO[self.family]
            info = struct.pack("=i4s4x", 0, source) if len(source) == 4 else source + bytes(4)
            ancillary.append((level, kind, info))
        if ttl is not None:
            ancillary.append((*_TTL[self.family], struct.pack("=i", ttl)))
        try:
            if ancillary:
                self._socket.sendmsg([data], ancillary, 0, addr)
            else:
                self._socket.sendto(data, addr)
        except OSError:
            pass

    def _read(self) -> None:
        for _ in range(_READS_PER_TURN):
            try:
                data, addr = self._socket.recvfrom(_MAX_BYTES)
            except BlockingIOError:
                return
            except OSError:
                continue  # an ICMP error of an earlier datagram
            self.on_datagram(data, addr)
            if self._detached:
                return
