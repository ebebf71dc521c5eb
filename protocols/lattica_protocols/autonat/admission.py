"""Whom a server dials, and how often: it must be of no use for attacking or scanning others.

dial_reason(addr, observed, own)     None: may be dialled for a client seen at `observed`, else why not
budget.take(peer, observed, now)     whether one more request is served
budget.take_data(now)                whether one more dial to another IP address than the client's is made
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Hashable
from typing import Final

from lattica_protocols import limits
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.nat.scope import IpAddress, is_local, voice_of
from lattica_protocols.peer_id import PeerId

_TRANSLATED: Final = (
    ipaddress.IPv6Network("64:ff9b::/96"),  # RFC 6052: NAT64
    ipaddress.IPv6Network("64:ff9b:1::/48"),  # RFC 8215
    ipaddress.IPv6Network("2002::/16"),  # 6to4
    ipaddress.IPv6Network("2001::/32"),  # Teredo
)
"""IPv6 addresses with an IPv4 address inside, which may be one of our own network."""


def dial_reason(addr: Multiaddr, observed: IpAddress, own: Collection[IpAddress]) -> str | None:
    """Why `addr` is not dialled for a client that we see at `observed`; `None`: it is. `own`: our own addresses."""
    bare = addr.without_peer()
    ip, target = bare.ip(), bare.host_port()
    if ip is None or target is None or bare.names()[1:] not in (("tcp",), ("udp", "quic-v1")):
        return "not an IP address with TCP or QUIC"
    if target[2] == 0:
        return "no port"
    if bare.names()[0] == "ip6" and ip.version == 4:
        return "an IPv4 address in disguise"
    if ip.version == 6 and any(ip in network for network in _TRANSLATED):
        return "translated to IPv4 on its way"
    if ip == observed:
        return None
    if is_local(observed):
        return "the client is in a network of ours, so we cannot tell what others reach"
    if is_local(ip) or (ip.version == 4 and ip.is_reserved):
        return "not on the internet"
    return "an address of ours" if ip in own else None


class _Bucket:
    """Tokens by key, each key with its own; at most `tracked` keys."""

    def __init__(self, per_minute: float, burst: float, tracked: int) -> None:
        self._rate = per_minute / 60
        self._burst = burst
        self._tracked = tracked
        self._accounts: dict[Hashable, tuple[float, float]] = {}

    def has(self, key: Hashable, now: float) -> bool:
        if key not in self._accounts and len(self._accounts) >= self._tracked:
            self._sweep(now)
        return (key in self._accounts or len(self._accounts) < self._tracked) and self._tokens(key, now) >= 1

    def take(self, key: Hashable, now: float) -> None:
        self._accounts[key] = (self._tokens(key, now) - 1, now)

    def _tokens(self, key: Hashable, now: float) -> float:
        tokens, at = self._accounts.get(key, (self._burst, now))
        return min(self._burst, tokens + (now - at) * self._rate)

    def _sweep(self, now: float) -> None:
        for key in [key for key in self._accounts if self._tokens(key, now) >= self._burst]:
            del self._accounts[key]


class DialBudget:
    """Of one server, for both versions together."""

    def __init__(self) -> None:
        total, peer, crowd = limits.AUTONAT_PER_MINUTE, limits.AUTONAT_PEER_PER_MINUTE, limits.AUTONAT_RANGE_PER_MINUTE
        self._total = _Bucket(total, total / 4, 1)
        self._peers = _Bucket(peer, peer, limits.AUTONAT_TRACKED)
        self._ranges = _Bucket(crowd, crowd, limits.AUTONAT_TRACKED)
        self._data = _Bucket(limits.AUTONAT_DATA_PER_MINUTE, limits.AUTONAT_DATA_PER_MINUTE / 2, 1)
        self.refused = 0

    def take(self, peer: PeerId, observed: IpAddress, now: float) -> bool:
        """One request of `peer`, which is connected from `observed`. A refused one costs nothing."""
        accounts: list[tuple[_Bucket, Hashable]] = [(self._peers, peer), (self._total, None)]
        if not observed.is_loopback:  # everybody there has the machine anyway
            accounts.append((self._ranges, voice_of(observed)))
        return self._take(accounts, now)

    def take_data(self, now: float) -> bool:
        """One dial to an address that is not the client's own."""
        return self._take([(self._data, None)], now)

    def _take(self, accounts: list[tuple[_Bucket, Hashable]], now: float) -> bool:
        if not all(bucket.has(key, now) for bucket, key in accounts):
            self.refused += 1
            return False
        for bucket, key in accounts:
            bucket.take(key, now)
        return True
