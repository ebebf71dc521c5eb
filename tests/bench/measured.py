"""What every scenario needs: rows of the table, and the processes that are measured."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "interop"))

from driven import Driven, driven  # noqa: E402
from install_peers import install_rust_lattica  # noqa: E402
from rust_peer import RustPeer, running_rust_peer  # noqa: E402

from lattica_cli.launch import ChildDaemon  # noqa: E402

MIB = 1 << 20
TCP, QUIC = ["/ip4/127.0.0.1/tcp/0"], ["/ip4/127.0.0.1/udp/0/quic-v1"]


@dataclass
class Figure:
    """One row: our values, what they are compared with, and which way is better.

    Without `against` the bar and the aim are for our value itself, in `unit`. Without a bar or an aim nothing is asked.
    """

    name: str
    unit: str
    against: str
    bar: float | None
    aim: float | None
    lower_is_better: bool = False
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        ours = statistics.median(self.ours)
        theirs = statistics.median(self.theirs) if self.against else None
        ratio = ours / theirs if theirs else None
        judged = ours if ratio is None else ratio

        def met(bound: float | None) -> bool:
            return bound is not None and (judged <= bound if self.lower_is_better else judged >= bound)

        short = "" if self.bar is None else "below"
        verdict = "aim" if met(self.aim) else "bar" if met(self.bar) else short
        return {
            "figure": self.name,
            "unit": self.unit,
            "ours": ours,
            "against": self.against,
            "theirs": theirs,
            "ratio": ratio,
            "bar": self.bar,
            "aim": self.aim,
            "verdict": verdict,
            "samples": {"ours": self.ours, "theirs": self.theirs},
        }


class Bench:
    """The processes that are measured, started when a figure first needs them."""

    def __init__(self, stack: ExitStack, folder: Path, quick: bool) -> None:
        self.stack = stack
        self.folder = folder
        self.rounds = 1 if quick else 3
        self.scale = 4 if quick else 1
        self._made: dict[str, Any] = {}

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    # -- ours ---------------------------------------------------------------------------------------------
    def node(self, name: str, listen: list[str]) -> Driven:
        settings = {"listen": listen, "home": str(self.folder / name)}
        return self.once(
            f"node {name}",
            lambda: self.stack.enter_context(
                driven(sys.executable, HERE / "ours_node.py", settings, log=self.folder / f"{name}.log")
            ),
        )

    def pair(self, transport: str) -> tuple[Driven, str]:
        """A calling node, and the peer id of the one it is connected with over `transport` only."""
        listen = TCP if transport == "tcp" else QUIC
        server = self.node(f"{transport}-server", listen)
        client = self.node(f"{transport}-client", listen)
        path = self.once(f"connected {transport}", lambda: client.do("connect", server.hello["addrs"][0]))
        assert path == transport, path
        return client, server.hello["peer_id"]

    def daemon(self, name: str, *arguments: str) -> ChildDaemon:
        """A `latticad` that listens on loopback TCP."""

        def make() -> ChildDaemon:
            child = ChildDaemon(self.folder / name, ["--listen", TCP[0], *arguments])
            self.stack.callback(child.stop)
            child.wait_ready()
            return child

        return self.once(f"daemon {name}", make)

    def workers(self) -> tuple[Driven, str]:
        """A calling process beside one daemon, and the peer id of another daemon with a serving worker beside it."""
        far = self.daemon("far")
        near = self.daemon("near", "--bootstrap", f"{far.addrs[0]}/p2p/{far.peer_id}")

        def worker(daemon: ChildDaemon, serve: bool) -> Driven:
            settings = {"home": str(daemon.home), "serve": serve}
            log = self.folder / "workers.log"
            return self.stack.enter_context(driven(sys.executable, HERE / "our_worker.py", settings, log=log))

        self.once("serving worker", lambda: worker(far, True))
        return self.once("calling worker", lambda: worker(near, False)), far.peer_id

    # -- peers --------------------------------------------------------------------------------------------
    def rust_pair(self, transport: str) -> tuple[RustPeer, str]:
        python = self.once("rust", install_rust_lattica)

        def make() -> tuple[RustPeer, str]:
            server = self.stack.enter_context(running_rust_peer(python, transports=[transport]))
            addr = f"{server.tcp if transport == 'tcp' else server.quic}/p2p/{server.peer_id}"
            client = self.stack.enter_context(running_rust_peer(python, transports=[transport], bootstraps=[addr]))
            for _ in range(1000):
                if str(server.peer_id) in client.do("get_all_peers"):
                    return client, str(server.peer_id)
            raise RuntimeError("the Rust peers did not connect")

        return self.once(f"rust {transport}", make)

    def grpc(self) -> Driven:
        def make() -> Driven:
            script = HERE / "grpc_peer.py"
            log = self.folder / "grpc.log"
            server = self.stack.enter_context(driven(sys.executable, script, {"role": "server"}, log=log))
            settings = {"role": "client", "port": server.hello["port"]}
            return self.stack.enter_context(driven(sys.executable, script, settings, log=log))

        return self.once("grpc", make)

    def ceiling(self, total: int, cipher: str | None) -> float:
        """Bytes per second of trio over TCP, encrypted (see `ceilings.CIPHERS`) or not."""
        settings = {"role": "receive", "bytes": total, "cipher": cipher}
        with driven(sys.executable, HERE / "ceilings.py", settings) as receiver:
            sender = settings | {"role": "send", "port": receiver.hello["port"]}
            done = subprocess.run(
                [sys.executable, str(HERE / "ceilings.py"), json.dumps(sender)],
                capture_output=True, text=True, check=True, timeout=120,
            )  # fmt: skip
        return float(json.loads(done.stdout)["bytes_per_second"])


def make_file(path: Path, size: int) -> Path:
    """`size` random bytes: nothing that could be compressed, deduplicated or sparse."""
    with path.open("wb") as file:
        block = os.urandom(16 * MIB)
        for number in range(size // len(block)):
            file.write(number.to_bytes(8, "big") + block[8:])
        file.flush()
        os.fsync(file.fileno())  # now, and not by the kernel while something is measured
    return path


def resident(pid: int) -> float:
    """Resident MiB of a process now."""
    return _status_mib(pid, "VmRSS")


@contextmanager
def peak_resident(pid: int) -> Iterator[Callable[[], float]]:
    """In the block: what to call for the most MiB that the process had resident since its beginning."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak counts from now on
    yield lambda: _status_mib(pid, "VmHWM")


def _status_mib(pid: int, name: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise LookupError(f"process {pid} is gone")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
