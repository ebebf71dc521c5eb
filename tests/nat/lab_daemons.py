"""`latticad` processes on hosts of the lab, forked from a process that has loaded everything: a fifth of the time."""

from __future__ import annotations

import json
import os
import selectors
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from nat_lab import LabHost

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

from daemon_processes import READY_TIMEOUT, Process, clean_environment
from waiting import stays as stays  # for everything that runs in the lab
from waiting import wait_until as wait_until

import lattica_daemon.run  # noqa: F401  # loaded before the fork
from lattica_daemon.main import main

LISTEN = ("--listen", "/ip4/0.0.0.0/tcp/4101", "--listen", "/ip4/0.0.0.0/udp/4101/quic-v1")


class _Child:
    """What `Process` needs of a `Popen`."""

    def __init__(self, pid: int, stdout: int) -> None:
        self.pid = pid
        self.stdout = os.fdopen(stdout, "rb")

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, seconds: float) -> int:
        return os.waitpid(self.pid, 0)[1]


class ForkedProcess(Process):
    """A daemon as a process, in the network namespace of the thread that starts it."""

    def start(self, *arguments: str, listen: tuple[str, ...] = LISTEN) -> ForkedProcess:
        command = ["--home", str(self.home), "--json", *listen, *arguments]
        read, write = os.pipe()
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            self._be_daemon(command, write)
        os.close(write)
        child = _Child(pid, read)
        self.child = child  # type: ignore[assignment]
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            assert selector.select(READY_TIMEOUT), self.log()
            line = child.stdout.readline()
        assert line, self.log()
        self.ready = json.loads(line)
        self.ready_seconds = time.monotonic() - started
        return self

    def _be_daemon(self, command: list[str], stdout: int) -> None:
        """The rest of the child's life."""
        code = 1
        try:
            log = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(stdout, 1)
            os.dup2(log, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            environment = clean_environment()
            os.environ.clear()
            os.environ.update(environment)
            code = main(command)
        except BaseException:
            traceback.print_exc()  # `os._exit` prints none
            sys.stderr.flush()
        finally:
            os._exit(code)


class LabDaemon:
    """One daemon. `home` is made when it starts."""

    def __init__(
        self, host: LabHost, home: Path, *arguments: str, listen: tuple[str, ...] = LISTEN, settings: str = ""
    ) -> None:
        self.host = host
        self.known_at = ""
        """The address by which others in a test are told of it."""
        self.process = ForkedProcess(home)
        if settings:
            home.mkdir(mode=0o700)
            (home / "config.toml").write_text(settings)
        with host.netns.entered():
            self.process.start(*arguments, listen=listen)

    @property
    def peer_id(self) -> str:
        return self.process.peer_id

    def address(self, kind: str = "tcp") -> str:
        """Its public address, with `/p2p`."""
        addrs = [a for a in self.process.ready["addrs"] if f"/{self.host.address}/" in a and f"/{kind}/" in a]
        return f"{addrs[0]}/p2p/{self.peer_id}"

    def json(self, *arguments: str) -> Any:
        return self.process.json(*arguments)

    def wait_reserved(self, count: int = 1, seconds: float = 20.0) -> None:
        """Until it holds places at so many relays."""

        def relays() -> int:
            addrs = self.json("id")["addrs"]
            return len({a.split("/p2p/")[1].partition("/")[0] for a in addrs if "/p2p-circuit" in a})

        wait_until(lambda: relays() >= count, seconds, self.process.log)

    def paths(self, other: LabDaemon) -> set[str]:
        """Of its connections with `other`."""
        return {peer["path"] for peer in self.json("peers") if peer["peer_id"] == other.peer_id}

    def stop(self) -> None:
        self.process.stop()
