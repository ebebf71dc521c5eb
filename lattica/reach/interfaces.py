"""Notices that this machine's network changed: addresses that come and go, links that go up and down.

Linux says so on a netlink socket (RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR). Its messages only wake us: what
counts is whether `snapshot` differs from before, because interfaces have news about much else. Elsewhere, and where the
socket is not allowed, we look every few seconds.
"""

from __future__ import annotations

import logging
import socket
import struct
import sys
from collections.abc import Callable
from typing import Final, TypeAlias

import ifaddr
import trio

log = logging.getLogger("lattica.reach")

Snapshot: TypeAlias = frozenset[tuple[str, str]]
"""(interface, address) of each that is usable."""

POLL_SECONDS: Final = 5.0
"""Between two looks when nobody tells us."""
CHECK_SECONDS: Final = 60.0
"""The same with netlink, which loses messages when its buffer is full."""
SETTLE_SECONDS: Final = 0.5
"""After the first news: an interface gets its addresses one by one."""

_GROUPS: Final = 0x1 | 0x10 | 0x100
"""RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR of linux/rtnetlink.h."""
_READ_BYTES: Final = 65536
_SIOCGIFFLAGS: Final = 0x8913
_IFF_UP: Final = 0x1
_IFF_RUNNING: Final = 0x40
"""Of Linux: linux/sockios.h, linux/if.h."""


def snapshot() -> Snapshot:
    """The addresses of all interfaces whose link is up; link-local ones, which nobody is told of, left out."""
    found = set()
    for adapter in ifaddr.get_adapters():
        if _is_down(adapter.name):
            continue
        for ip in adapter.ips:
            text = ip.ip if isinstance(ip.ip, str) else ip.ip[0]
            if not text.startswith(("fe80:", "169.254.")):
                found.add((adapter.name, text))
    return frozenset(found)


def _is_down(name: str) -> bool:
    """Whether the link is known to be down. Asked of the kernel and not of /sys, which can show another namespace."""
    if sys.platform != "linux":
        return False
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, _SIOCGIFFLAGS, struct.pack("16sH14x", name.encode()[:15], 0))
        except OSError:
            return False  # an alias, or gone meanwhile
    (flags,) = struct.unpack_from("H", answer, 16)
    return not (flags & _IFF_UP and flags & _IFF_RUNNING)


class InterfaceWatch:
    """`run` in a task; `changed` is called after each change."""

    def __init__(self, changed: Callable[[], None], *, use_netlink: bool = True) -> None:
        self.changes = 0
        self.uses_netlink = False
        """Whether the system tells us, or we look."""
        self._changed = changed
        self._use_netlink = use_netlink

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        netlink = _open_netlink() if self._use_netlink else None
        self.uses_netlink = netlink is not None
        before = snapshot()
        task_status.started()
        try:
            while True:
                if await _news(netlink):
                    with trio.move_on_after(SETTLE_SECONDS):
                        while await _news(netlink):
                            pass
                now = snapshot()
                if now != before:
                    gone, new = before - now, now - before
                    log.info("interfaces_changed gone=%s new=%s", _text(gone), _text(new))
                    before = now
                    self.changes += 1
                    self._changed()
        finally:
            if netlink is not None:
                netlink.close()


def _open_netlink() -> trio.socket.SocketType | None:
    family = getattr(socket, "AF_NETLINK", None)
    if family is None:
        return None
    try:
        sock = socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)  # 0: NETLINK_ROUTE
    except OSError as error:
        log.debug("netlink_missing error=%s", error)
        return None
    try:
        sock.bind((0, _GROUPS))
    except OSError as error:
        log.debug("netlink_missing error=%s", error)
        sock.close()
        return None
    return trio.socket.from_stdlib_socket(sock)


async def _news(netlink: trio.socket.SocketType | None) -> bool:
    """Wait until there may be something new; whether somebody said so."""
    if netlink is None:
        await trio.sleep(POLL_SECONDS)
        return False
    with trio.move_on_after(CHECK_SECONDS):
        try:
            await netlink.recv(_READ_BYTES)
        except OSError:
            await trio.sleep(SETTLE_SECONDS)  # ENOBUFS: more happened than fits
        return True
    return False


def _text(entries: Snapshot) -> str:
    return ",".join(sorted(f"{name}:{ip}" for name, ip in entries)) or "none"
