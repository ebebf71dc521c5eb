"""The verbs of the daemon's own service, the same for both clients.

Each is one call (`daemon`) or the last item of one stream (`daemon_last`). In the sync client a verb returns its
result, in the async client it returns an awaitable of it. Results are plain dicts and lists; their fields are those of
the command line's `--json` output.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from lattica_protocols.cid import Cid
    from lattica_protocols.multiaddr import Multiaddr
    from lattica_protocols.peer_id import PeerId

    Peer: TypeAlias = str | PeerId
    Content: TypeAlias = str | Cid
    Address: TypeAlias = str | Multiaddr

OnProgress: TypeAlias = Callable[[dict[str, Any]], None]
"""Called with each progress item: `state` and counts of bytes."""


class DaemonVerbs(ABC):
    """Mixed into both clients. Errors of all: those of the daemon, as classes of `lattica.errors`,
    `DaemonNotRunning`, `ConnectionLost`, and `DeadlineExceeded` after `timeout` seconds."""

    @abstractmethod
    def daemon(self, method: str, /, *args: object, timeout: float | None = None) -> Any:
        """Call a method of the daemon's own service."""

    @abstractmethod
    def daemon_stream(self, method: str, /, *args: object, timeout: float | None = None) -> Any:
        """Iterate over what a method of the daemon's own service yields."""

    @abstractmethod
    def _daemon_last(
        self, method: str, args: Sequence[object], timeout: float | None, progress: OnProgress | None
    ) -> Any:
        """The item with `state == "done"` of a method that reports its progress, without that field."""

    @abstractmethod
    def _daemon_list(self, method: str, args: Sequence[object], timeout: float | None) -> Any:
        """All that a method yields."""

    # -- content ------------------------------------------------------------------------------------------
    def share_details(self, path: str | os.PathLike[str], *, progress: OnProgress | None = None) -> Any:
        """Add a file or folder to the store and announce it: `cid`, `bytes`, `chunks`, `seconds`, …"""
        return self._daemon_last("share", (os.path.abspath(path),), None, progress)

    def fetch(
        self,
        cid: Content,
        path: str | os.PathLike[str],
        *,
        sources: Sequence[Peer] = (),
        timeout: float | None = None,
        progress: OnProgress | None = None,
    ) -> Any:
        """Fetch a content id to `path` from whoever has it, and from `sources`: `bytes`, `seconds`, `sources`,
        `fetched_bytes`, `reused_bytes`. Verified, atomic; goes on where an earlier attempt stopped."""
        args = (str(cid), os.path.abspath(path), [str(peer) for peer in sources], timeout)
        return self._daemon_last("fetch", args, None, progress)

    def providers(self, cid: Content, *, timeout: float | None = 30.0) -> Any:
        """Who has it, from the network: a list of `peer_id`, `addrs`."""
        return self.daemon("providers", str(cid), timeout=timeout)

    def blobs_list(self) -> Any:
        """What the store holds: a list of `cid`, `bytes`, `complete`, `pinned`."""
        return self.daemon("blobs_list")

    def blobs_pin(self, cid: Content) -> Any:
        """Keep a blob through `blobs_gc`."""
        return self.daemon("blobs_pin", str(cid))

    def blobs_unpin(self, cid: Content) -> Any:
        """Let `blobs_gc` remove a blob."""
        return self.daemon("blobs_unpin", str(cid))

    def blobs_remove(self, cid: Content) -> Any:
        """Remove a blob from the store."""
        return self.daemon("blobs_remove", str(cid))

    def blobs_verify(self, *, progress: OnProgress | None = None) -> Any:
        """Read and hash all that is stored; corrupt chunks are dropped."""
        return self._daemon_last("blobs_verify", (), None, progress)

    def blobs_gc(self) -> Any:
        """Remove what is neither pinned nor being fetched: `blobs`, `bytes`."""
        return self.daemon("blobs_gc")

    # -- peers --------------------------------------------------------------------------------------------
    def id(self) -> Any:
        """This peer's `peer_id` and `addrs`."""
        return self.daemon("id")

    def status(self) -> Any:
        """Identity, uptime, reachability, connections, traffic, store."""
        return self.daemon("status")

    def peers(self) -> Any:
        """Connected peers: a list of `peer_id`, `path`, `addr`, `rtt_ms`, …"""
        return self.daemon("peers")

    def connect_peer(self, address: Address | Peer, *, timeout: float | None = 20.0) -> Any:
        """Connect to a multiaddr with `/p2p/`, or to a peer id that is looked up: `peer_id`, `path`, `addr`."""
        return self.daemon("connect", str(address), timeout=timeout)

    def disconnect(self, peer: Peer) -> Any:
        """Close all connections with a peer: `closed`."""
        return self.daemon("disconnect", str(peer))

    def find_peer(self, peer: Peer, *, timeout: float | None = 30.0) -> Any:
        """Where a peer is, from the network: `peer_id`, `addrs`."""
        return self.daemon("find_peer", str(peer), timeout=timeout)

    def ping(self, peer: Peer, count: int = 1, *, timeout: float = 10.0) -> Any:
        """Round trips: a list of `rtt_ms`, `path`. `timeout` is for each."""
        return self._daemon_list("ping", (str(peer), count, timeout), None)

    def bench(self, peer: Peer, seconds: float = 2.0) -> Any:
        """What the path to a peer carries; `seconds` for each measurement."""
        return self.daemon("bench", str(peer), seconds, timeout=seconds * 5 + 30)

    def services(self, peer: Peer, *, timeout: float | None = 30.0) -> Any:
        """What a peer offers: a list of `name`, `methods`."""
        return self.daemon("services", str(peer), timeout=timeout)

    # -- small values -------------------------------------------------------------------------------------
    def dht_put(self, key: str, value: str, *, ttl: float | None = None, timeout: float | None = 30.0) -> Any:
        """Store a value under this peer's key, signed; `ttl` in seconds."""
        return self.daemon("dht_put", key, value, ttl, timeout=timeout)

    def dht_get(self, key: str, *, timeout: float | None = 30.0) -> Any:
        """The newest valid value under `key` (one's own) or `PEER/key`: `value`, `publisher`."""
        return self.daemon("dht_get", key, timeout=timeout)

    def dht_info(self) -> Any:
        """The routing table: `peers`, `buckets`."""
        return self.daemon("dht_info")

    # -- spaces -------------------------------------------------------------------------------------------
    def create_space(
        self, name: str, *, writers: Sequence[Peer] = (), quorum: int = 0, signers: Sequence[Peer] = ()
    ) -> Any:
        """A new space that this peer owns: `space`, its id. `writers` may write, too. With a `quorum` (more than half
        of `signers`), checkpoints need that many signatures of them instead of the owner's."""
        who, trusted = [str(peer) for peer in writers], [str(peer) for peer in signers]
        return self.daemon("space_create", name, who, quorum, trusted)

    def join_space(self, space: str, *, peers: Sequence[Peer] = (), timeout: float = 30.0) -> Any:
        """Hold a replica of a space, found through the network or at `peers`: `space`, `name`, `synced`."""
        return self.daemon("space_join", space, [str(peer) for peer in peers], timeout, timeout=timeout + 30)

    def spaces(self) -> Any:
        """The spaces here: a list of `space`, `name`, `operations`, `writers`, `owners`, …"""
        return self.daemon("space_list")

    # -- the daemon ---------------------------------------------------------------------------------------
    def config(self) -> Any:
        """The settings in force and where each came from."""
        return self.daemon("config")

    def shutdown(self) -> Any:
        """Ask the daemon to finish what runs and end."""
        return self.daemon("shutdown")
