"""Tell systemd how it goes: the sd_notify protocol, one datagram of `KEY=value` lines to `$NOTIFY_SOCKET`."""

from __future__ import annotations

import os
import socket


def notify(**fields: str) -> bool:
    """Send e.g. `notify(READY="1", STATUS="peer 12D3…")`. False when no service manager listens."""
    target = os.environ.get("NOTIFY_SOCKET")
    if not target:
        return False
    address = "\0" + target[1:] if target.startswith("@") else target
    message = "\n".join(f"{key}={value}" for key, value in fields.items()).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | getattr(socket, "SOCK_CLOEXEC", 0)) as sock:
        try:
            sock.sendto(message, address)
        except OSError:
            return False  # the manager is gone; the daemon works without it
    return True
