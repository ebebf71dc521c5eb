"""The key space: 256 bits, the position of a key or peer is the SHA-256 of its bytes, distance is XOR.

Peers choose their keys but not their positions, except by trying: the hash is what makes an id near a target cost work.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

from kademlia.node import Node

from lattica_protocols.peer_id import PeerId

BITS = 256


@lru_cache(maxsize=8192)
def position(key: bytes) -> int:
    """Where `key` (a peer id's bytes, a multihash, a record key) lies: 0 .. 2**256 - 1."""
    return int.from_bytes(hashlib.sha256(key).digest(), "big")


def shared_bits(a: int, b: int) -> int:
    """Length of the common prefix of two positions, 256 for equal ones."""
    return BITS - (a ^ b).bit_length()


class Place(Node):  # type: ignore[misc]  # the package has no type information
    """A `kademlia` node at the position of `key`: what lookups measure distances from."""

    id: bytes
    long_id: int

    def __init__(self, key: bytes) -> None:
        # Not super().__init__: it would take the bytes themselves for the position.
        self.id = key
        self.long_id = position(key)

    def distance_to(self, node: Place) -> int:
        return self.long_id ^ node.long_id

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.long_id >> 224:08x}>"


class PeerPlace(Place):
    """The place of a peer."""

    peer: PeerId

    def __init__(self, peer: PeerId) -> None:
        super().__init__(peer.to_bytes())
        self.peer = peer

    def __lt__(self, other: PeerPlace) -> bool:
        """Breaks ties in heaps of (distance, place)."""
        return self.id < other.id
