"""Datagram packetization layer path MTU discovery (RFC 8899), as a table of plausible sizes and a binary search.

Why it matters here: aioquic costs about 60 us a packet whatever its size, so the rate of a connection is proportional
to the size of its datagrams.

The search validates sizes that links really have. One probe is under way at a time: a packet of PING and PADDING that
nothing depends on. It starts with Ethernet's 1500 bytes, then tries the largest, because an interface that cannot
carry it says so at once without a packet leaving (EMSGSIZE); what is left is a binary search. A size counts as too
large after three lost probes. When large datagrams stop arriving (a black hole: the route changed and nobody sends
ICMP), the size falls back to the base and the search starts over.

Sizes are UDP payloads.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

BASE_BYTES = 1200
"""What every QUIC path carries (RFC 9000 section 14)."""

_IP_MTUS = (1280, 1320, 1360, 1400, 1420, 1440, 1450, 1460, 1480, 1492, 1500, 4352, 8000, 9000, 16384, 32768, 65535)
"""IPv6's minimum, tunnels (WireGuard 1420, VXLAN 1450, PPPoE 1492), Ethernet, FDDI, clouds' jumbo frames (8,000 to
9,000), and what only loopback carries."""

_FIRST_IP_MTU = 1500
_MAX_PROBES = 3
"""RFC 8899 section 5.1.2, MAX_PROBES."""
_RAISE_SECONDS = 600.0
"""RFC 8899 section 5.1.1, PMTU_RAISE_TIMER: paths also get better."""
_BLACK_HOLE_SECONDS = 30.0
"""How long to stay at the base size after a black hole: its cause, a route change, takes a while to settle."""


class PathMtuSearch:
    """Decides which size to probe next and which size to send.

    `overhead`: bytes of IP and UDP header (28 or 48). `maximum`: the largest datagram we would build and the peer would
    take.
    """

    def __init__(self, overhead: int, maximum: int) -> None:
        sizes = {mtu - overhead for mtu in _IP_MTUS} | {maximum}
        self._sizes = sorted(size for size in sizes if BASE_BYTES < size <= maximum)
        self._first = _FIRST_IP_MTU - overhead
        self.size = BASE_BYTES
        """The largest size that is known to arrive."""
        self._low = 0
        """Sizes below this index arrived."""
        self._high = len(self._sizes)
        """Sizes from this index on did not."""
        self._probing: int | None = None
        self._losses = 0
        self._not_before = 0.0

    def next_probe(self, now: float) -> int | None:
        """The size to probe now, `None` when one is under way or there is nothing to find out. Call `probe_*` next."""
        if self._probing is not None or now < self._not_before:
            return None
        if self._low >= self._high:
            if self._high == len(self._sizes):
                return None
            self._high = len(self._sizes)
        first = bisect_left(self._sizes, self._first)
        if self._low == 0 and first < self._high:
            index = first
        elif self._high == len(self._sizes):
            index = self._high - 1
        else:
            index = (self._low + self._high) // 2
        self._probing = self._sizes[index]
        self._losses = 0
        return self._probing

    def next_timeout(self) -> float | None:
        """When `next_probe` may have something again, if it has nothing now."""
        if self._probing is not None or (self._low >= self._high == len(self._sizes)):
            return None
        return self._not_before

    def retry(self) -> int | None:
        """The probe was lost: the size to send again, `None` when it was lost too often."""
        if self._probing is None:
            return None
        self._losses += 1
        if self._losses < _MAX_PROBES:
            return self._probing
        return None

    def probe_arrived(self, size: int, now: float) -> None:
        """The probe of `size` was acknowledged."""
        self._probing = None
        if size > self.size:
            self.size = size
        self._low = max(self._low, bisect_right(self._sizes, size))
        self._settle(now)

    def probe_failed(self, size: int, now: float) -> None:
        """The probe of `size` was lost too often, or the interface refused it."""
        self._probing = None
        self._high = min(self._high, bisect_left(self._sizes, size))
        self._settle(now)

    def black_hole(self, now: float) -> None:
        """Datagrams of `size` stopped arriving: back to the base, and search again later."""
        self.reset(now)
        self._not_before = now + _BLACK_HOLE_SECONDS

    def too_big(self, size: int, now: float) -> None:
        """The interface refused an ordinary datagram of `size`: the path has changed. Search again from the base."""
        self.reset(now)
        self._high = bisect_left(self._sizes, size)

    def reset(self, now: float) -> None:
        """The path is another one: nothing is known about it."""
        self.size = BASE_BYTES
        self._low, self._high = 0, len(self._sizes)
        self._probing = None
        self._not_before = now

    def _settle(self, now: float) -> None:
        if self._low >= self._high:
            self._not_before = now + _RAISE_SECONDS
