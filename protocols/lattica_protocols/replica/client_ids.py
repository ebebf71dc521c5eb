"""The client ids under which yrs names items, and chains that *collide*: several with one id.

A chain's id is a hash of its author and instance, so that nobody writes under another's. But a writer who looks for two
chains with one id finds them in 2^27 tries, for one with the id of a given chain in 2^53. Refusing the one that comes
second would part replicas for ever. So the items of chains that count and collide get a client id of their operation's
instead: which ones these are follows from the operations that count, so equal roots have equal documents. Nobody is
excluded for it, as the one it was aimed at did nothing: it goes on in another instance.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from blake3 import blake3

if TYPE_CHECKING:
    from lattica_protocols.replica.graph import Branch, Chain, Entry, Past

CLIENT_BITS = 53
"""Of a chain's client id: what yrs takes. Tests of collisions have fewer."""


def client_id(author: bytes, instance: int) -> int:
    """The yrs client id of a chain: 53 bits of a hash, not 0."""
    digest = blake3(b"lattica-replica-client" + author + instance.to_bytes(4, "big")).digest()
    return (int.from_bytes(digest[:8], "big") >> (64 - CLIENT_BITS)) or 1


def forked_client(operation: bytes) -> int:
    """The client id that the items of an operation get whose own names mean others, too."""
    return (int.from_bytes(blake3(b"lattica-replica-forked" + operation).digest()[:8], "big") >> 11) or 1


class ClientIds:
    """Which branches have a client id, and which ids collide."""

    def __init__(self, floor: Iterable[Chain]) -> None:
        """`floor`: the chains that the checkpoint has."""
        self.collided: set[int] = set()
        """Ids of several chains that count, or that the checkpoint has: their items are renamed."""
        self.shared: set[int] = set()
        """Ids of several chains, whether they count or not."""
        self.floor: dict[int, Chain] = {}
        self._floor_collided: set[int] = set()
        self._branches: dict[int, list[Branch]] = {}
        for chain in floor:
            client = client_id(*chain)
            if self.floor.setdefault(client, chain) != chain:
                self._floor_collided.add(client)
        self.forget_counted()

    def branches(self, client: int) -> list[Branch]:
        """The branches with this id: those of one chain, but for collisions."""
        return self._branches.get(client, _NONE)

    def may_rename(self, client: int) -> bool:
        """Whether operations of such a chain have, or may get, another client id."""
        return client in self.shared or client in self.collided

    def is_taken(self, chain: Chain) -> bool:
        """Whether another chain has the id of this one."""
        client = client_id(*chain)
        others = any(branch.chain != chain for branch in self.branches(client))
        return others or client in self._floor_collided or self.floor.get(client, chain) != chain

    def shows(self, branch: Branch, past: Past) -> bool:
        """Whether somebody with this past knows that the branch's chain shares its id."""
        return branch.client in self._floor_collided or any(
            other.chain != branch.chain and other in past for other in self.branches(branch.client)
        )

    def add(self, branch: Branch) -> list[Entry]:
        """Note a branch. The operations that may be renamed since then."""
        sharing = self._branches.setdefault(branch.client, [])
        sharing.append(branch)
        if branch.client in self.shared or sharing[0].chain == branch.chain:
            return []
        self.shared.add(branch.client)
        return [entry for other in sharing for entry in other.entries]

    def cut(self, client: int) -> None:
        """Forget branches that are empty."""
        left = [branch for branch in self._branches.pop(client) if branch.entries]
        if left:
            self._branches[client] = left
        if len({branch.chain for branch in left}) < 2:
            self.shared.discard(client)

    def forget_counted(self) -> None:
        """What counts is decided anew."""
        self.collided = set(self._floor_collided)

    def note_counted(self, counted: Iterable[Entry]) -> bool:
        """Look for chains that collide since these count; whether there are any."""
        if not self.shared:
            return False
        found = False
        for client in {entry.branch.client for entry in counted} & (self.shared - self.collided):
            # The first operation of a branch is in the past of its others.
            if len({each.chain for each in self.branches(client) if each.entries and each.entries[0].counted}) > 1:
                self.collided.add(client)
                found = True
        return found


_NONE: list[Branch] = []
