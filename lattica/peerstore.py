"""What we know of other peers: where they may be, what they speak, what they say of themselves.

Everything in here came from the network, so every count has a bound and every address a time to live. Signed
values and provider records live in the datastore; this is the volatile part.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lattica_protocols.limits import MAX_ADDRS_PER_PEER, MAX_PEERSTORE_PEERS, MAX_PROTOCOLS_PER_PEER

if TYPE_CHECKING:
    from lattica_protocols.multiaddr import Multiaddr
    from lattica_protocols.peer_id import PeerId

CONNECTED_TTL = 1800.0
"""Seconds that an address is kept after a connection over it: as long as Kademlia keeps provider addresses."""
FOUND_TTL = 600.0
"""Seconds for addresses that others told and nobody has tried."""
PERMANENT = float("inf")


@dataclass(slots=True)
class PeerInfo:
    """What a peer said about itself by identify."""

    agent: str = ""
    protocol_version: str = ""
    protocols: frozenset[str] = frozenset()
    observed_addr: Multiaddr | None = None


@dataclass(slots=True)
class _Entry:
    addrs: dict[Multiaddr, float] = field(default_factory=dict)  # address -> time it expires
    info: PeerInfo | None = None


class Peerstore:
    """Addresses and properties of peers, least recently touched peers dropped first.

    `clock` gives seconds on any monotonic origin.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._entries: OrderedDict[PeerId, _Entry] = OrderedDict()
        self._pinned: set[PeerId] = set()

    def _touch(self, peer: PeerId) -> _Entry:
        entry = self._entries.get(peer)
        if entry is None:
            if len(self._entries) >= MAX_PEERSTORE_PEERS:
                self._drop_one()
            entry = self._entries[peer] = _Entry()
        self._entries.move_to_end(peer)
        return entry

    def _drop_one(self) -> None:
        """The one that was touched least recently; none when all of them are pinned."""
        oldest = next((peer for peer in self._entries if peer not in self._pinned), None)
        if oldest is not None:
            del self._entries[oldest]

    def pin(self, peer: PeerId) -> None:
        """Never drop this peer (a connected one, a bootstrap peer)."""
        self._pinned.add(peer)

    def unpin(self, peer: PeerId) -> None:
        self._pinned.discard(peer)

    def add_addrs(self, peer: PeerId, addrs: Iterable[Multiaddr], ttl_seconds: float) -> None:
        """Learn addresses (without or with a trailing `/p2p`). A longer time to live wins over a shorter one."""
        expires = self._clock() + ttl_seconds
        entry = self._touch(peer)
        for addr in addrs:
            bare = addr.without_peer()
            entry.addrs[bare] = max(expires, entry.addrs.get(bare, 0.0))
        while len(entry.addrs) > MAX_ADDRS_PER_PEER:
            del entry.addrs[min(entry.addrs, key=lambda a: entry.addrs[a])]

    def remove_addr(self, peer: PeerId, addr: Multiaddr) -> None:
        """Forget an address that turned out to be wrong."""
        entry = self._entries.get(peer)
        if entry is not None:
            entry.addrs.pop(addr.without_peer(), None)

    def addrs(self, peer: PeerId) -> list[Multiaddr]:
        """Addresses that have not expired, without `/p2p`."""
        entry = self._entries.get(peer)
        if entry is None:
            return []
        now = self._clock()
        for addr in [a for a, expires in entry.addrs.items() if expires < now]:
            del entry.addrs[addr]
        return list(entry.addrs)

    def set_info(self, peer: PeerId, info: PeerInfo) -> None:
        if len(info.protocols) > MAX_PROTOCOLS_PER_PEER:
            info.protocols = frozenset(sorted(info.protocols)[:MAX_PROTOCOLS_PER_PEER])
        self._touch(peer).info = info

    def info(self, peer: PeerId) -> PeerInfo | None:
        """What identify told, `None` before it did."""
        entry = self._entries.get(peer)
        return None if entry is None else entry.info

    def protocols(self, peer: PeerId) -> frozenset[str]:
        """Protocols the peer says it speaks; empty before identify."""
        info = self.info(peer)
        return frozenset() if info is None else info.protocols

    def peers(self) -> list[PeerId]:
        return list(self._entries)
