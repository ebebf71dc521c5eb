"""A Rust peer: the `lattica` wheel in a process of its own, driven by JSON lines."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from driven import Driven, driven

from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId


def free_port() -> int:
    """A port that was free a moment ago. The wheel cannot tell which one it got, so it has to be told."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RustPeer:
    """A running Rust peer. `do("get_all_peers")` calls the method of that name of its `Lattica` object."""

    def __init__(self, process: Driven, port: int, ip: str = "127.0.0.1") -> None:
        self.do = process.do
        self.process = process.process
        self.peer_id = PeerId.parse(process.hello["peer_id"])
        self.tcp = Multiaddr.parse(f"/ip4/{ip}/tcp/{port}")
        self.quic = Multiaddr.parse(f"/ip4/{ip}/udp/{port}/quic-v1")


@contextmanager
def running_rust_peer(
    python: Path,
    *,
    bootstraps: Sequence[str] = (),
    relays: Sequence[str] = (),
    protocol: str | None = None,
    transports: Sequence[str] = ("tcp", "quic"),
    autonat: bool = False,
    ip: str = "127.0.0.1",
) -> Iterator[RustPeer]:
    """Start a Rust peer on loopback and end it afterwards. `protocol` names its Kademlia; default `/lattica/1.0.0`.
    `relays`: where it takes a place."""
    port = free_port() if ip == "127.0.0.1" else 4001
    known = {"tcp": f"/ip4/{ip}/tcp/{port}", "quic": f"/ip4/{ip}/udp/{port}/quic-v1"}
    listen = [known[t] for t in transports]
    settings = {
        "listen": listen,
        "bootstraps": list(bootstraps),
        "relays": list(relays),
        "protocol": protocol,
        "autonat": autonat,
    }
    with driven(python, Path(__file__).with_name("rust_worker.py"), settings) as process:
        yield RustPeer(process, port, ip)
