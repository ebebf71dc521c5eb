"""Fetching a checkpoint, one at a time: piece by piece, from a neighbour that says it has it.

Whoever does not deliver what it pretends to have, delivers something else, or is slow while others wait for their turn,
is left out for a while. Nothing that a neighbour does makes another one's checkpoint a bad one.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import REPLICA_MAX_CHECKPOINT_BYTES
from lattica_protocols.replica.checkpoint import Checkpoint, Head, Rank, ranks_above
from lattica_protocols.replica.replica import Replica

CHUNK = 512 << 10
"""Bytes of a checkpoint in one message."""
STALLED = 10.0
"""Seconds for the next piece."""
BLAME = (10.0, 600.0)
"""Seconds in which no checkpoint is fetched from a neighbour that failed to deliver one: doubling from the first to the
second."""
SLOW = 30.0
"""Seconds for a checkpoint after which another neighbour that has one gets its turn. Whoever was too slow has twice as
long the next time, so that slow ones come to an end, and one that is slow on purpose holds nobody up for hours."""
_BAD_KEPT = 4096

Peer = TypeVar("Peer", bound=Hashable)


@dataclass(slots=True)
class _Download(Generic[Peer]):
    """A checkpoint on its way."""

    peer: Peer
    id: bytes
    data: bytearray
    asked_at: float
    started_at: float
    total: int = 0
    signed: bool = False
    """Its head came, and is signed by those who may."""


class Downloads(Generic[Peer]):
    """Those of one replica."""

    def __init__(self, replica: Replica, counters: Counter[str]) -> None:
        self.replica = replica
        self._counters = counters
        self._current: _Download[Peer] | None = None
        self._bad: OrderedDict[bytes, None] = OrderedDict()
        self._blamed: dict[Peer, tuple[float, float]] = {}
        """When to fetch from a neighbour again, and the pause before."""

    def is_wanted(self, rank: Rank) -> bool:
        """Whether a checkpoint of this rank is to be taken instead of ours."""
        return rank[2] not in self._bad and ranks_above(rank, self.replica.rank())

    def start(self, peer: Peer, checkpoint: bytes, now: float) -> bool:
        """Whether to ask `peer` for the first piece of its checkpoint."""
        if now < self._blamed.get(peer, (0.0, 0.0))[0]:
            return False
        current = self._current
        if current is not None and current.peer != peer:
            _, pause = self._blamed.get(current.peer, (0.0, 0.0))
            if now - current.started_at > max(SLOW, 2 * pause):
                self._blame(current.peer, now)
        if self._current is not None:
            return False
        self._current = _Download(peer, checkpoint, bytearray(), now, now)
        return True

    def receive_untrusted(
        self, peer: Peer, checkpoint: bytes, offset: int, total: int, data: bytes, now: float
    ) -> tuple[int | None, bool]:
        """A piece: from where on to ask for the next one (None: not at all), and whether a checkpoint was taken."""
        current = self._current
        if current is None or (current.peer, current.id) != (peer, checkpoint) or offset != len(current.data):
            return None, False
        current.total = current.total or total
        expected = min(CHUNK, current.total - offset)
        if total != current.total or total > REPLICA_MAX_CHECKPOINT_BYTES or len(data) != expected or not data:
            self._blame(peer, now)
            return None, False
        current.data += data
        current.asked_at = now
        if not self._check_head(current, now):
            return None, False
        if len(current.data) < total:
            return len(current.data), False
        self._current = None
        try:
            return None, self.replica.receive_checkpoint(bytes(current.data))
        except RemoteProtocolError:
            self._blame(peer, now)
            return None, False

    def _check_head(self, download: _Download[Peer], now: float) -> bool:
        """Whether to go on: nobody makes us fetch 100 MB that those who may did not sign."""
        if download.signed:
            return True
        replica = self.replica
        owners = replica.graph.membership().owners
        head = Checkpoint.check_head_untrusted(bytes(download.data), download.id, replica.genesis, owners)
        if head == Head.UNSIGNED:
            self._bad[download.id] = None
            if len(self._bad) > _BAD_KEPT:
                self._bad.popitem(last=False)
        if head in (Head.UNSIGNED, Head.WRONG):
            self._blame(download.peer, now)
            return False
        download.signed = head == Head.SIGNED
        return True

    def forget(self, peer: Peer) -> None:
        """A neighbour is gone."""
        if self._current is not None and self._current.peer == peer:
            self._current = None

    def forget_old(self, now: float) -> None:
        """Give up what stalled, and forget who was blamed long ago."""
        if self._current is not None and now - self._current.asked_at > STALLED:
            self._blame(self._current.peer, now)
        self._blamed = {peer: row for peer, row in self._blamed.items() if now - row[0] < BLAME[1]}

    def _blame(self, peer: Peer, now: float) -> None:
        """A neighbour did not deliver a checkpoint that it has or pretends to: others first, for a while. What it sent
        says nothing about the checkpoint, which may be a good one."""
        self._counters["refused_checkpoints"] += 1
        _, pause = self._blamed.get(peer, (0.0, BLAME[0] / 2))
        pause = min(2 * pause, BLAME[1])
        self._blamed[peer] = (now + pause, pause)
        self._current = None
