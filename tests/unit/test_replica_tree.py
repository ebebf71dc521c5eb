"""The Merkle tree: its root against the definition of RFC 6962, however the ids came in."""

from __future__ import annotations

import random

import pytest
from blake3 import blake3

from lattica_protocols.replica.tree import MerkleTree, follow_path_untrusted


def rfc_6962(ids: list[bytes]) -> bytes:
    """MTH of section 2.1, with the hash of ours."""
    if len(ids) == 1:
        return blake3(b"\x00" + ids[0]).digest()
    split = 1
    while split * 2 < len(ids):
        split *= 2
    return blake3(b"\x01" + rfc_6962(ids[:split]) + rfc_6962(ids[split:])).digest()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9, 31, 33, 100])
def test_a_slot_is_the_tree_of_rfc_6962_in_whatever_order_its_ids_came(count: int) -> None:
    rng = random.Random(count)
    ids = [b"\x12\x30" + rng.randbytes(30) for _ in range(count)]
    tree = MerkleTree()
    for key in ids:
        tree.add(key)
        if rng.random() < 0.3:
            tree.root()  # in between, as somebody asks
    assert tree.root() == MerkleTree(sorted(ids)).root()
    assert tree._nodes[4096 + 0x123] == rfc_6962(sorted(ids))
    for key in ids:
        assert follow_path_untrusted(key, tree.path(key)) == tree.root()
    with pytest.raises(KeyError):
        tree.path(bytes(32))
