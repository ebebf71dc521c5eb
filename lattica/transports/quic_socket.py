"""A non-blocking UDP socket that moves many datagrams with one system call where the kernel can.

* UDP_SEGMENT (GSO) sends a run of datagrams of equal size as one buffer, UDP_GRO receives such runs; Linux only, and
  done without where it is refused.
* Path MTU discovery in "probe" mode: datagrams carry DF and are never fragmented, and the kernel's own idea of the
  path's MTU is ignored, since QUIC finds it out by itself (RFC 9000 section 14.3).
* Bound to a wildcard, a datagram's destination is kept (IP_PKTINFO) and answers leave from it: a machine with several
  addresses would otherwise answer from one that the peer never heard of.
* ICMP errors are kept with the datagram they are about (IP_RECVERR), so that dialling a port where nobody listens ends
  at once.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Final

import trio

from lattica.transports.quic_engine import Address

Datagrams = Sequence[tuple[bytes, Address]]
SendFailed = Callable[[Address, int, OSError], None]
"""Called with the address, the datagram's size and the error of a datagram that could not be sent."""

_LINUX: Final = sys.platform == "linux"

# Numbers of <linux/in.h>, <linux/in6.h> and <linux/udp.h> that Python's socket module does not name.
_IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE = 10, 3
_IPV6_MTU_DISCOVER, _IPV6_PMTUDISC_PROBE = 23, 3
_IP_PKTINFO = 8
_IPV6_RECVPKTINFO, _IPV6_PKTINFO = 49, 50
_IP_RECVERR, _IPV6_RECVERR, _MSG_ERRQUEUE = 11, 25, 0x2000
_EXTENDED_ERROR = struct.Struct("=IBBBx")
"""The beginning of sock_extended_err (linux/errqueue.h): errno, origin, ICMP type, ICMP code."""
_FROM_ICMP = (2, 3)
_SOL_UDP, _UDP_SEGMENT, _UDP_GRO = 17, 103, 104

_BUFFER_BYTES = 4 * 1024 * 1024
"""Asked of the kernel for either direction; it gives up to net.core.rmem_max. 40 ms at 100 MB/s."""
_MAX_BATCH_BYTES = 65_000
"""One sendmsg: the kernel builds one UDP packet of it first, which holds 65,507."""
_MAX_BATCH_DATAGRAMS = 64
"""UDP_MAX_SEGMENTS of Linux before 6.2; later ones take 128."""
_ANCILLARY_BYTES = 128
_QUOTED_BYTES = 256
"""Of a datagram that an ICMP error is about: enough for the header of QUIC."""
_ERRORS_AT_ONCE = 64


class UdpSocket:
    """`OSError` when the address cannot be bound. `bound`: a socket that is bound already, to be used instead."""

    def __init__(
        self, family: socket.AddressFamily, host: str, port: int, *, bound: socket.socket | None = None
    ) -> None:
        self.family = family
        self._socket = bound or socket.socket(family, socket.SOCK_DGRAM | getattr(socket, "SOCK_CLOEXEC", 0))
        try:
            self._socket.setblocking(False)
            if family == socket.AF_INET6 and bound is None:
                self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                self._socket.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
            if bound is None:
                self._socket.bind((host, port))
            self._gso = self._pktinfo = False
            if _LINUX:
                self._set_linux_options()
        except OSError:
            self._socket.close()
            raise
        self.address: Address = self._socket.getsockname()
        self._buffer = bytearray(65536)
        self._view = memoryview(self._buffer)

    def close(self) -> None:
        self._socket.close()

    async def wait_readable(self) -> None:
        await trio.lowlevel.wait_readable(self._socket)

    async def wait_writable(self) -> None:
        await trio.lowlevel.wait_writable(self._socket)

    @property
    def is_wildcard(self) -> bool:
        return self.address[0] in ("0.0.0.0", "::")

    def receive(self) -> tuple[list[bytes], Address, bytes | None] | None:
        """Some datagrams of one sender, its address, and what `send` needs to answer from the same address.

        `None` when nothing has arrived.
        """
        try:
            count, ancillary, _, addr = self._socket.recvmsg_into([self._buffer], _ANCILLARY_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            return [], self.address, None  # an ICMP error of an earlier datagram: `receive_errors` has the details
        segment = count
        source = None
        for level, kind, data in ancillary:
            if level == _SOL_UDP and kind == _UDP_GRO:
                segment = int.from_bytes(data[:4], sys.byteorder)
            elif level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
                source = struct.pack("=i4s4x", 0, data[4:8])
            elif level == socket.IPPROTO_IPV6 and kind == _IPV6_PKTINFO:
                source = data[:16] + bytes(4)
        if segment >= count or not segment:
            return [bytes(self._view[:count])], addr, source
        return [bytes(self._view[at : min(at + segment, count)]) for at in range(0, count, segment)], addr, source

    def receive_errors(self) -> list[tuple[bytes, Address, OSError]]:
        """ICMP errors since the last time: the beginning of the datagram, where it went, and what was said."""
        errors: list[tuple[bytes, Address, OSError]] = []
        if not _LINUX:
            return errors
        for _ in range(_ERRORS_AT_ONCE):
            try:
                quoted, ancillary, _, addr = self._socket.recvmsg(_QUOTED_BYTES, 512, _MSG_ERRQUEUE)
            except OSError:
                break
            for level, kind, data in ancillary:
                ours = (level, kind) in ((socket.IPPROTO_IP, _IP_RECVERR), (socket.IPPROTO_IPV6, _IPV6_RECVERR))
                if ours and len(data) >= _EXTENDED_ERROR.size:
                    number, origin, _, _ = _EXTENDED_ERROR.unpack_from(data)
                    if origin in _FROM_ICMP:
                        errors.append((quoted, addr, OSError(number, os.strerror(number))))
        return errors

    def send(self, datagrams: Datagrams, source: bytes | None, failed: SendFailed) -> Datagrams:
        """Send in order, in as few calls as possible. Returns what did not fit into the socket's buffer."""
        done = 0
        retried = False
        while done < len(datagrams):
            count = self._run_length(datagrams, done) if self._gso else 1
            try:
                self._send_run(datagrams[done : done + count], source)
            except BlockingIOError:
                return datagrams[done:]
            except OSError as error:
                if error.errno != errno.EMSGSIZE and not retried:
                    retried = True  # perhaps it was about an earlier datagram, to somebody else
                    continue
                if count > 1 and error.errno != errno.EMSGSIZE:
                    self._gso = False  # the interface cannot: go on without
                elif count > 1:
                    for datagram in datagrams[done : done + count]:
                        failed(datagram[1], len(datagram[0]), error)
                    done += count
                else:
                    failed(datagrams[done][1], len(datagrams[done][0]), error)
                    done += 1
                continue
            done += count
            retried = False
        return ()

    def send_short_lived(self, data: bytes, addr: Address, hops: int) -> None:
        """One datagram with a hop limit of `hops`. Errors are those of any datagram that gets lost."""
        if self.family == socket.AF_INET6:
            option = socket.IPPROTO_IPV6, socket.IPV6_HOPLIMIT, struct.pack("=i", hops)
        else:
            option = socket.IPPROTO_IP, socket.IP_TTL, struct.pack("=i", hops)
        for _ in range(2):  # the first may report an ICMP error of an earlier datagram instead of sending
            try:
                self._socket.sendmsg([data], [option], 0, addr)
                return
            except OSError:
                continue  # also where the system knows no such option for single datagrams

    def _send_run(self, run: Datagrams, source: bytes | None) -> None:
        data, addr = run[0]
        ancillary: list[tuple[int, int, bytes]] = []
        if source is not None and self._pktinfo:
            if self.family == socket.AF_INET6:
                ancillary.append((socket.IPPROTO_IPV6, _IPV6_PKTINFO, source))
            else:
                ancillary.append((socket.IPPROTO_IP, _IP_PKTINFO, source))
        if len(run) > 1:
            ancillary.append((_SOL_UDP, _UDP_SEGMENT, struct.pack("=H", len(data))))
            self._socket.sendmsg([data for data, _ in run], ancillary, 0, addr)
        elif ancillary:
            self._socket.sendmsg([data], ancillary, 0, addr)
        else:
            self._socket.sendto(data, addr)

    @staticmethod
    def _run_length(datagrams: Datagrams, start: int) -> int:
        """How many datagrams from `start` on fit into one call: one receiver, equal sizes, the last may be shorter."""
        data, addr = datagrams[start]
        size = len(data)
        most = min(_MAX_BATCH_DATAGRAMS, _MAX_BATCH_BYTES // size)
        count = 1
        for data, other in datagrams[start + 1 : start + most]:
            if other != addr or len(data) > size:
                break
            count += 1
            if len(data) < size:
                break
        return count

    def _set_linux_options(self) -> None:
        sock, ipv6 = self._socket, self.family == socket.AF_INET6
        if ipv6:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _IPV6_PMTUDISC_PROBE)
        else:
            sock.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
            sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE)
        if sock.getsockname()[0] in ("0.0.0.0", "::"):
            if ipv6:
                sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)
            else:
                sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
            self._pktinfo = True
        try:
            sock.setsockopt(_SOL_UDP, _UDP_GRO, 1)
            sock.setsockopt(_SOL_UDP, _UDP_SEGMENT, 0)
            self._gso = True
        except OSError:
            pass  # a kernel before 5.0: one datagram a call
