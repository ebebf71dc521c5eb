"""coturn on a public host of a lab: a STUN server (RFC 5780) that is not ours."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nat_lab import Lab, LabHost
from stun_lab import PORTS


def coturn_missing() -> str | None:
    """Why there is none here, `None` when there is."""
    if shutil.which("turnserver") and shutil.which("turnutils_natdiscovery"):
        return None
    return "coturn is missing (Debian: apt install coturn)"


@contextmanager
def running_coturn(lab: Lab, folder: Path) -> Iterator[LabHost]:
    """Two addresses and two ports, and nothing but STUN."""
    host = lab.public_host(2)
    command = ["turnserver", "-n", "--no-tls", "--no-dtls", "--no-cli", "--no-auth", "--stun-only"]
    command += ["-L", host.address, "-L", host.more[0], "-p", str(PORTS[0]), "--alt-listening-port", str(PORTS[1])]
    command += ["--log-file", str(folder / "log"), "--pidfile", str(folder / "pid"), "--simple-log"]
    process = host.netns.start(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)
    try:
        for _ in range(10):  # the tool waits for an answer itself
            if "RFC 5780" in host.netns.run(["turnutils_natdiscovery", "-m", host.address], seconds=20).stdout:
                break
        else:
            raise RuntimeError("coturn does not start")
        yield host
    finally:
        process.kill()
        process.wait()
