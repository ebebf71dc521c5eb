"""The first routers on the way out: datagrams that die early, and who reports their death (ICMP time exceeded).

Linux hands ICMP errors to the socket that caused them (IP_RECVERR), so this needs no privilege. IPv4 only: NATs stand
there. Elsewhere nothing is found.
"""

from __future__ import annotations

import socket
import struct
import sys
from typing import Final

import trio

from lattica_protocols.stun import SocketAddr

MAX_HOPS: Final = 4
"""A home router, a carrier's, and what stands between."""
SECONDS: Final = 0.7
"""A router answers within some milliseconds, or it never does; a satellite takes 0.6 s."""
_IP_RECVERR: Final = 11
_ORIGIN_ICMP: Final = 2
_TIME_EXCEEDED: Final = 11
_ERROR: Final = struct.Struct("=IBBBBII")
"""struct sock_extended_err; the router's sockaddr_in follows."""


async def trace_routers(target: SocketAddr) -> list[str | None]:
    """The addresses of the first routers on the way to `target`, nearest first; `None`: one that kept silent.

    Trailing silent ones are left out. Nothing but a byte is sent, and it reaches the target only when that is near.
    """
    found: list[str | None] = [None] * MAX_HOPS
    if sys.platform != "linux" or ":" in target[0]:
        await trio.lowlevel.checkpoint()
        return []

    async def ask(hops: int) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, hops)
            try:
                sock.sendto(b"\0", target)
            except OSError:
                return  # no route
            while found[hops - 1] is None:
                await trio.lowlevel.wait_readable(sock)
                try:
                    _, ancillary, _, _ = sock.recvmsg(64, 512, socket.MSG_ERRQUEUE)
                except OSError:
                    return  # woken by an answer of the target itself
                found[hops - 1] = _router_in(ancillary)

    with trio.move_on_after(SECONDS):
        async with trio.open_nursery() as nursery:
            for hops in range(1, MAX_HOPS + 1):
                nursery.start_soon(ask, hops)
    while found and found[-1] is None:
        found.pop()
    return found


def _router_in(ancillary: list[tuple[int, int, bytes]]) -> str | None:
    for level, kind, data in ancillary:
        if (level, kind) == (socket.IPPROTO_IP, _IP_RECVERR) and len(data) >= _ERROR.size + 8:
            _, origin, icmp_type, *_ = _ERROR.unpack_from(data)
            if (origin, icmp_type) == (_ORIGIN_ICMP, _TIME_EXCEEDED):
                return socket.inet_ntoa(data[_ERROR.size + 4 : _ERROR.size + 8])
    return None
