"""Network namespaces by name, entered from Python: a whole lab in one process, and any program in any host of it."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_CLONE_NEWNET = 0x40000000
_NETLINK_NETFILTER = 12
_CT_DELETE = 1 << 8 | 2
"""NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_DELETE; naming no connection deletes all."""
_REQUEST, _ACK = 1, 4
_libc = ctypes.CDLL(None, use_errno=True)


def _setns(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


class Netns:
    """One namespace. Everything opened or started inside `entered()` belongs to it."""

    def __init__(self, name: str) -> None:
        self.name = name
        _run(["ip", "netns", "add", name])
        self._fd = os.open(f"/run/netns/{name}", os.O_RDONLY)
        self.ip("link set lo up")

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread is in the namespace. Nothing may be awaited inside."""
        home = os.open("/proc/self/ns/net", os.O_RDONLY)
        _setns(self._fd)
        try:
            yield
        finally:
            _setns(home)
            os.close(home)

    def ip(self, *commands: str) -> None:
        """Each one command of `ip`."""
        _run(["ip", "-n", self.name, "-batch", "-"], "\n".join(commands) + "\n")

    def nft(self, rules: str) -> None:
        """Load a ruleset."""
        with self.entered():
            _run(["nft", "-f", "-"], rules)

    def sysctl(self, **values: int) -> None:
        """`net__ipv4__ip_forward=1`. A key that this kernel does not have is left out."""
        with self.entered():
            for key, value in values.items():
                try:
                    with open("/proc/sys/" + key.replace("__", "/"), "w") as file:
                        file.write(str(value))
                except FileNotFoundError:
                    pass

    def forget_flows(self) -> None:
        """Empty the table of connections: NAT mappings are gone, as after a restart of the box."""
        with self.entered(), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as netlink:
            head = struct.pack("=IHHII", 20, _CT_DELETE, _REQUEST | _ACK, 1, 0)
            netlink.send(head + struct.pack("=BBH", socket.AF_UNSPEC, 0, 0))
            error: int = struct.unpack_from("=i", netlink.recv(4096), 16)[0]
        if error:
            raise OSError(-error, os.strerror(-error))

    def run(self, command: Sequence[str], *, seconds: float = 30.0) -> subprocess.CompletedProcess[str]:
        with self.entered():
            return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        with self.entered():
            return subprocess.Popen(command, **options)


def _run(command: Sequence[str], stdin: str | None = None) -> None:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}\n{stdin or ''}")
