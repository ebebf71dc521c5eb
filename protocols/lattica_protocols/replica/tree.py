"""The Merkle tree behind the root: over the ids of the operations that count, whatever their order.

    slot      4,096 of them, by the first 12 bits of the id
    leaf      BLAKE3(00 || id)
    node      BLAKE3(01 || left || right)
    slot hash of no id: 32 zero bytes; else the tree of RFC 6962 over its sorted ids
    tree      a complete binary tree of 12 levels over the slots' hashes

Adding an id only notes it; `root` hashes the slots that got some and their paths.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from blake3 import blake3

from lattica_protocols.errors import RemoteProtocolError

LEVELS = 12
SLOTS = 1 << LEVELS
EMPTY = bytes(32)
MAX_PATH = LEVELS + 40
"""Steps of a path: 12 levels above the slot, and a slot of up to 2**40 ids."""


def _node(left: bytes, right: bytes) -> bytes:
    return blake3(b"\x01" + left + right).digest()


def _leaf(key: bytes) -> bytes:
    return blake3(b"\x00" + key).digest()


def _empty_levels() -> list[bytes]:
    levels = [EMPTY]
    for _ in range(LEVELS):
        levels.append(_node(levels[-1], levels[-1]))
    return levels


_EMPTY_LEVELS = _empty_levels()


def slot_of(key: bytes) -> int:
    """The slot of an id."""
    return key[0] << 4 | key[1] >> 4


class MerkleTree:
    """A set of 32-byte ids with a root."""

    def __init__(self, keys: Iterable[bytes] = ()) -> None:
        self._slots: dict[int, tuple[list[bytes], list[bytes]]] = {}
        """Ids, sorted, and their leaves. Those leaves are half of what `root` would hash."""
        self._new: dict[int, list[bytes]] = {}
        """Ids that came since the last `root`, by slot."""
        self._nodes: dict[int, bytes] = {}  # heap numbering: 1 is the root, SLOTS + n is slot n
        self._size = 0
        for key in keys:
            self.add(key)

    def __len__(self) -> int:
        return self._size

    def add(self, key: bytes) -> None:
        """Put in an id that is not in it yet."""
        slot = slot_of(key)
        new = self._new.get(slot)
        if new is None:
            self._new[slot] = [key]
        else:
            new.append(key)
        self._size += 1

    def root(self) -> bytes:
        """The hash of the whole set. Costs about 10 µs for each slot that changed since the last call."""
        level = set()
        for slot, new in self._new.items():
            keys, leaves = self._slots.setdefault(slot, ([], []))
            for key in new:
                at = bisect_left(keys, key)
                keys.insert(at, key)
                leaves.insert(at, _leaf(key))
            self._nodes[SLOTS + slot] = _subtree(leaves)
            level.add((SLOTS + slot) >> 1)
        self._new.clear()
        height = 0
        while level:
            for number in level:
                self._nodes[number] = _node(self._at(2 * number, height), self._at(2 * number + 1, height))
            level = {number >> 1 for number in level if number > 1}
            height += 1
        return self._at(1, LEVELS)

    def _at(self, number: int, height: int) -> bytes:
        return self._nodes.get(number, _EMPTY_LEVELS[height])

    def path(self, key: bytes) -> list[tuple[bool, bytes]]:
        """What leads from the leaf of `key` to the root: (whether the other one stands left, its hash). `KeyError`."""
        self.root()
        slot = slot_of(key)
        keys, leaves = self._slots.get(slot, ([], []))
        index = bisect_left(keys, key)
        if index == len(keys) or keys[index] != key:
            raise KeyError(key)
        steps = _subpath(leaves, index)
        number, height = SLOTS + slot, 0
        while number > 1:
            steps.append((bool(number & 1), self._at(number ^ 1, height)))
            number >>= 1
            height += 1
        return steps


def follow_path_untrusted(key: bytes, steps: Sequence[tuple[bool, bytes]]) -> bytes:
    """The root that a path claims for `key`. The last 12 steps have to lead through the slot of `key`."""
    if not LEVELS <= len(steps) <= MAX_PATH:
        raise RemoteProtocolError(f"a Merkle path of {len(steps)} steps")
    slot = slot_of(key)
    for height, (left, _) in enumerate(steps[-LEVELS:]):
        if left != bool(slot >> height & 1):
            raise RemoteProtocolError("a Merkle path through another slot")
    digest = _leaf(key)
    for left, other in steps:
        digest = _node(other, digest) if left else _node(digest, other)
    return digest


def _split(count: int) -> int:
    """The largest power of two below `count`."""
    return 1 << (count - 1).bit_length() - 1


def _subtree(leaves: Sequence[bytes]) -> bytes:
    """By levels: neighbours are paired, and one without goes up as it is, which gives the tree of RFC 6962."""
    while len(leaves) > 1:
        level = [_node(leaves[at], leaves[at + 1]) for at in range(0, len(leaves) - 1, 2)]
        if len(leaves) & 1:
            level.append(leaves[-1])
        leaves = level
    return leaves[0]


def _subpath(leaves: Sequence[bytes], index: int) -> list[tuple[bool, bytes]]:
    if len(leaves) == 1:
        return []
    middle = _split(len(leaves))
    if index < middle:
        return [*_subpath(leaves[:middle], index), (False, _subtree(leaves[middle:]))]
    return [*_subpath(leaves[middle:], index - middle), (True, _subtree(leaves[:middle]))]
