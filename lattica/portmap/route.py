"""Which router leads to the internet, and by which address of ours it knows us."""

from __future__ import annotations

import ipaddress
import socket
import struct
import subprocess
import sys
from dataclasses import dataclass
from typing import Final

_ROUTES: Final = ("/proc/thread-self/net/route", "/proc/net/route")
"""Of the thread first: its network can be another one than that of the process."""
_RTF_UP: Final = 0x1
_RTF_GATEWAY: Final = 0x2
"""linux/route.h."""
_COMMAND_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class Route:
    """The default route."""

    gateway: str
    local_ip: str
    """Of the interface that leads there."""


def default_route() -> Route | None:
    """The IPv4 router that is used when nothing else is known; `None` without one. Runs a command except on Linux."""
    gateway = _linux_gateway() if sys.platform == "linux" else _bsd_gateway()
    if gateway is None:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((gateway, 9))  # sends nothing
        except OSError:
            return None
        return Route(gateway, str(probe.getsockname()[0]))


def _linux_gateway() -> str | None:
    for path in _ROUTES:
        try:
            with open(path, encoding="ascii") as file:
                return parse_routes(file.read())
        except OSError:
            continue
    return None


def parse_routes(text: str) -> str | None:
    """The gateway with the best metric in what /proc/net/route shows."""
    found: list[tuple[int, str]] = []
    for line in text.splitlines()[1:]:
        words = line.split()
        if len(words) < 8:
            continue
        _, destination, gateway, flags, _, _, metric, mask = words[:8]
        wanted = _RTF_UP | _RTF_GATEWAY
        if int(destination, 16) == int(mask, 16) == 0 and int(flags, 16) & wanted == wanted:
            found.append((int(metric), str(ipaddress.IPv4Address(struct.pack("=I", int(gateway, 16))))))
    return min(found)[1] if found else None


def _bsd_gateway() -> str | None:
    """macOS and its relatives."""
    try:
        done = subprocess.run(
            ["route", "-n", "get", "default"],
            capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    for line in done.stdout.splitlines():
        name, _, value = line.strip().partition(": ")
        if name == "gateway":
            try:
                return str(ipaddress.IPv4Address(value.strip()))
            except ValueError:
                return None
    return None
