"""When each port has to be asked for: at once, at half of its lifetime, again after a refusal or a restart.

ASKED --granted--> HELD --half of the lifetime--> due again --> ASKED …
  |--refused / no answer--> due again later; a lease that is held goes on until it expires
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lattica_protocols.portmap.mapping import (
    MAX_LIFETIME,
    MIN_RENEWAL,
    RETRY_SECONDS,
    Lease,
    Port,
    ProtocolName,
)

_RENEW_AGAIN = 0.5
"""Part of the remaining time until a renewal that failed is tried again: RFC 6887, section 11.2.1, in its spirit."""


@dataclass(slots=True)
class _Entry:
    due: float
    asked: bool = False
    again: bool = False
    """What was asked may be answered by a router that has forgotten it since."""
    lease: Lease | None = None
    refused: bool = False


class LeaseTable:
    """The ports that are wanted, none at first."""

    def __init__(self, via: ProtocolName) -> None:
        self._via = via
        self._entries: dict[Port, _Entry] = {}

    def want(self, ports: Iterable[Port], now: float) -> None:
        """Ask for these from `now` on."""
        for port in ports:
            self._entries.setdefault(port, _Entry(now))

    def clear(self) -> None:
        """Want nothing any more."""
        self._entries.clear()

    def leases(self) -> tuple[Lease, ...]:
        return tuple(entry.lease for entry in self._entries.values() if entry.lease is not None)

    def lease(self, port: Port) -> Lease | None:
        entry = self._entries.get(port)
        return None if entry is None else entry.lease

    @property
    def all_refused(self) -> bool:
        """Whether every port was refused and none is held."""
        entries = self._entries.values()
        return bool(entries) and all(entry.refused and entry.lease is None for entry in entries)

    def take_due(self, now: float) -> list[Port]:
        """Ports to ask for now; each has to be granted or refused before it is due again."""
        found = [port for port, entry in self._entries.items() if not entry.asked and entry.due <= now]
        for port in found:
            self._entries[port].asked = True
        return found

    def granted(self, port: Port, external_ip: str, external_port: int, lifetime: float, now: float) -> None:
        """`lifetime` seconds; infinite: for ever."""
        entry = self._entries.get(port)
        if entry is None:
            return
        lifetime = lifetime if lifetime == float("inf") else min(lifetime, MAX_LIFETIME)
        entry.lease = Lease(port, external_ip, external_port, lifetime, now, self._via)
        entry.asked, entry.refused = False, False
        entry.due = now if entry.again else now + max(MIN_RENEWAL, min(lifetime, MAX_LIFETIME) / 2)
        entry.again = False

    def refused(self, port: Port, now: float, wait: float = RETRY_SECONDS, *, ended: bool = False) -> None:
        """Ask again later; sooner while a lease runs out. `ended`: the lease is no more."""
        entry = self._entries.get(port)
        if entry is None:
            return
        entry.asked, entry.refused, entry.again = False, True, False
        if ended:
            entry.lease = None
        entry.due = now + wait
        if entry.lease is not None:
            entry.due = min(entry.due, now + max(MIN_RENEWAL, (entry.lease.expires_at - now) * _RENEW_AGAIN))

    def moved(self, external_ip: str) -> None:
        """The router has another address now."""
        for entry in self._entries.values():
            if entry.lease is not None:
                old = entry.lease
                entry.lease = Lease(old.port, external_ip, old.external_port, old.lifetime, old.granted_at, old.via)

    def restarted(self, now: float, answering: Port | None = None) -> None:
        """The router forgot everything: ask for all of it again, what is being asked for as well when it is answered:
        that may be from before. `answering`: the port whose answer told of the restart."""
        for port, entry in self._entries.items():
            if not entry.asked:
                entry.due = now
            elif port != answering:
                entry.again = True

    def expire(self, now: float) -> bool:
        """Drop leases that ran out; whether there were any."""
        found = False
        for entry in self._entries.values():
            if entry.lease is not None and entry.lease.expires_at <= now:
                entry.lease, found = None, True
        return found

    def next_timeout(self) -> float | None:
        times = [entry.due for entry in self._entries.values() if not entry.asked]
        times += [entry.lease.expires_at for entry in self._entries.values() if entry.lease is not None]
        return min(times, default=None)
