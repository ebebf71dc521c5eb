"""Who takes how much of a store that is full: entries by *origin*, the network that they came from.

Peer ids cost nothing, networks do. A full store therefore takes a new entry of an origin that has little in the place
of the oldest one of the origin that has most. So whoever fills a store from one network gets others' entries out only
while those have more than he has, and keeps nobody from getting in.
"""

from __future__ import annotations

import heapq
import ipaddress
from collections import OrderedDict
from typing import Generic, TypeVar

from lattica_protocols.multiaddr import Multiaddr

E = TypeVar("E")

UNKNOWN = ""
"""The origin of what was stored by ourselves, or before a restart."""


def origin_of(remote: Multiaddr | None) -> str:
    """The network of the address that a peer is connected from: an IPv4 /24 or IPv6 /48, as far as one operator usually
    goes; of a private or loopback address that alone. A relayed peer counts for its relay."""
    ip = None if remote is None else remote.ip()
    if remote is None or ip is None:
        return UNKNOWN
    if not remote.is_global:
        return str(ip)
    return str(ipaddress.ip_network((int(ip), 24 if ip.version == 4 else 48), strict=False))


class Shares(Generic[E]):
    """The entries of a store by origin, oldest first. An entry has a weight, what it takes of the store."""

    def __init__(self) -> None:
        self._entries: dict[str, OrderedDict[E, int]] = {}
        self._weights: dict[str, int] = {}
        self._heap: list[tuple[int, str]] = []
        """(-weight, origin), the heaviest first. Old weights stay in until they come to the top."""

    def put(self, origin: str, entry: E, weight: int = 1) -> None:
        """A new entry, the newest of its origin."""
        self._entries.setdefault(origin, OrderedDict())[entry] = weight
        self._change(origin, weight)

    def drop(self, origin: str, entry: E) -> None:
        """An entry is gone."""
        entries = self._entries[origin]
        weight = entries.pop(entry)
        if not entries:
            del self._entries[origin]
        self._change(origin, -weight)

    def displaced_by(self, origin: str, weight: int = 1) -> E | None:
        """Which entry makes room for one of `origin`: the oldest of the origin that has most. None: it has no less."""
        while self._heap and self._weights.get(self._heap[0][1]) != -self._heap[0][0]:
            heapq.heappop(self._heap)
        if not self._heap:
            return None
        most, heaviest = self._heap[0]
        if self._weights.get(origin, 0) + weight >= -most:
            return None
        return next(iter(self._entries[heaviest]))

    def _change(self, origin: str, by: int) -> None:
        weight = self._weights.get(origin, 0) + by
        if weight:
            self._weights[origin] = weight
            heapq.heappush(self._heap, (-weight, origin))
        else:
            del self._weights[origin]
        if len(self._heap) > 64 + 2 * len(self._weights):
            self._heap = [(-weight, origin) for origin, weight in self._weights.items()]
            heapq.heapify(self._heap)
