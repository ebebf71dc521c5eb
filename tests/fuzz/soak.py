"""Garbage on every port of a running daemon, for as long as one likes: `python tests/fuzz/soak.py --seconds 600`.

TCP: random bytes, and beginnings of multistream and Noise with random bytes behind. UDP: random datagrams, and ones
that look like QUIC. The Unix socket: random bytes. Meanwhile an honest peer calls the daemon every second over each
transport. Fails when a call fails, when the daemon is gone, or when its memory or its descriptors keep growing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import trio

import lattica
from lattica_cli.launch import ChildDaemon
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.multistream import encode_message
from lattica_protocols.peer_id import PeerId

ELSEWHERE = "127.0.0.2"
"""Where garbage comes from: bounds that count by address must not hit the honest peer."""
OPENINGS = [
    b"",
    encode_message("/multistream/1.0.0"),
    encode_message("/multistream/1.0.0") + encode_message("/noise"),
    encode_message("/multistream/1.0.0") + encode_message("/noise") + b"\x00\x20",
    b"GET / HTTP/1.1\r\n",
    b"\x16\x03\x01",
]
GROWTH = 96 << 20
"""Bytes of resident memory that the daemon may gain."""
CALL_SECONDS = 10.0
UNIX_PAUSE = 0.01
BURST_PAUSE = 0.02
"""Seconds between bursts of 50 datagrams, or the kernel would drop most of them."""
HONEST_PAUSE = 1.0


class Soak:
    def __init__(self, daemon: ChildDaemon, seed: int) -> None:
        self.daemon = daemon
        self.peer = PeerId.parse(daemon.peer_id)
        self.addrs = [Multiaddr.parse(text) for text in daemon.addrs]
        self.rng = random.Random(seed)
        self.counts: Counter[str] = Counter()

    def port(self, transport: str) -> int:
        return next(found[2] for addr in self.addrs if (found := addr.host_port()) and found[0] == transport)

    async def tcp(self) -> None:
        while True:
            sock = trio.socket.socket()
            await sock.bind((ELSEWHERE, 0))
            await sock.connect(("127.0.0.1", self.port("tcp")))
            async with trio.SocketStream(sock) as stream:
                await self._speak(stream, self.rng.choice(OPENINGS))
            self.counts["TCP connections"] += 1

    async def unix(self) -> None:
        while True:
            async with await trio.open_unix_socket(str(self.daemon.home / "lattica.sock")) as stream:
                await self._speak(stream, b"")
            self.counts["Unix connections"] += 1
            await trio.sleep(UNIX_PAUSE)

    async def _speak(self, stream: trio.SocketStream, opening: bytes) -> None:
        with contextlib.suppress(trio.BrokenResourceError), trio.move_on_after(self.rng.uniform(0.1, 12)):
            await stream.send_all(opening + self.rng.randbytes(self.rng.choice((1, 30, 1000, 70_000))))
            while await stream.receive_some(65536):
                pass

    async def udp(self) -> None:
        target = ("127.0.0.1", self.port("udp"))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((ELSEWHERE, 0))
            while True:
                for _ in range(50):
                    sock.sendto(self._datagram(), target)
                self.counts["datagrams"] += 50
                await trio.sleep(BURST_PAUSE)

    def _datagram(self) -> bytes:
        data = bytearray(self.rng.randbytes(self.rng.choice((1, 20, 100, 1200, 1472, 9000))))
        if self.rng.random() < 0.3 and len(data) >= 20:
            data[0] = 0xC0 | data[0] & 0x3F
            data[1:5] = self.rng.choice((b"\x00\x00\x00\x01", b"\x0a\x0a\x0a\x0a", b"\x00\x00\x00\x00"))
            data[5] = 8
        return bytes(data)

    async def honest(self) -> None:
        while True:
            for addr in self.addrs:
                async with lattica.open_node(lattica.NodeConfig(listen=[])) as node:
                    with trio.fail_after(CALL_SECONDS):
                        await node.host.connect(self.peer, [addr])
                        data = os.urandom(1000)
                        assert await node.rpc.call(self.peer, "bench.echo", data, timeout=CALL_SECONDS) == data
                self.counts["honest calls"] += 1
            await trio.sleep(HONEST_PAUSE)

    def resident(self) -> int:
        text = Path(f"/proc/{self.daemon.process.pid}/statm").read_text()
        return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.daemon.process.pid}/fd"))

    async def run(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(self.tcp)
                for _ in range(4):
                    nursery.start_soon(self.unix)
                nursery.start_soon(self.udp)
                nursery.start_soon(self.honest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4)))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="lattica-soak-", dir="/tmp") as folder:
        listen = ("--listen", "/ip4/127.0.0.1/tcp/0", "--listen", "/ip4/127.0.0.1/udp/0/quic-v1")
        daemon = ChildDaemon(Path(folder) / "home", listen)
        try:
            daemon.wait_ready()
            soak = Soak(daemon, options.seed)
            trio.run(soak.run, min(5.0, options.seconds / 4))  # what is loaded on first use does not count
            resident, descriptors = soak.resident(), soak.descriptors()
            started = time.monotonic()
            trio.run(soak.run, options.seconds)
            grown, left = soak.resident() - resident, soak.descriptors() - descriptors
            told = ", ".join(f"{count} {name}" for name, count in sorted(soak.counts.items()))
            print(f"{time.monotonic() - started:.0f} s: {told}; memory {grown / 2**20:+.1f} MiB, descriptors {left:+d}")
            assert daemon.process.poll() is None, "the daemon is gone"
            assert grown < GROWTH, "the daemon's memory grows"
            log = daemon.log_path.read_text("utf-8", "replace")
            if "Traceback" in log:
                sys.exit("the daemon's log has a traceback:\n" + log[log.index("Traceback") - 500 :][:3000])
        finally:
            daemon.stop()


if __name__ == "__main__":
    main()
