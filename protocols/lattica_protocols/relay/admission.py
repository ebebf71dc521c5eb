"""What a relay grants to whom: reservations and circuits, bounded by peer, by address range and in total.

    table = RelayTable(limits)
    refusal = table.reserve(peer, ip, relayed=False, now=now)        None: granted until now + reservation_seconds
    circuit = table.connect(source, ip, target, relayed=False, now=now)      a Circuit or a Status
    table.circuit_over(circuit)
    table.peer_gone(peer)                                            its reservation ends with its connection

Address ranges are what one operator has cheaply: an IPv4 /24 and an IPv6 /48. Loopback is exempt, everybody there has
the machine anyway. A reservation that is renewed keeps its place whatever the limits say now.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypeAlias, TypeVar

from lattica_protocols import limits
from lattica_protocols.peer_id import PeerId
from lattica_protocols.relay.messages import Limit, Status

T = TypeVar("T")
IpAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
_Range: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network | None

_IDLE_ACCOUNT_SECONDS: Final = limits.RELAY_REQUEST_BURST / limits.RELAY_REQUESTS_PER_SECOND
"""After so long without a request an account is full again, and forgotten."""


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """What a relay gives. The defaults are the product's; 0 for `circuit_seconds` or `circuit_bytes`: no limit."""

    reservations: int = limits.RELAY_MAX_RESERVATIONS
    reservations_per_range: int = limits.RELAY_MAX_RESERVATIONS_PER_RANGE
    reservation_seconds: float = limits.RELAY_RESERVATION_SECONDS
    circuits: int = limits.RELAY_MAX_CIRCUITS
    circuits_per_source: int = limits.RELAY_MAX_CIRCUITS_PER_SOURCE
    circuits_per_target: int = limits.RELAY_MAX_CIRCUITS_PER_TARGET
    circuits_per_range: int = limits.RELAY_MAX_CIRCUITS_PER_RANGE
    circuit_seconds: int = 0
    """A circuit is ended after so long. Unlimited: we share bandwidth fairly instead of cutting what is in use."""
    circuit_bytes: int = 0
    """Each way."""

    def message(self) -> Limit | None:
        """As it is told to both ends; `None` when there is none."""
        if not self.circuit_seconds and not self.circuit_bytes:
            return None
        return Limit(duration=self.circuit_seconds or None, data=self.circuit_bytes or None)


@dataclass(eq=False, slots=True)
class Circuit:
    """One circuit from its CONNECT on. Compared by identity."""

    source: PeerId
    target: PeerId
    range: _Range
    over: bool = False


@dataclass(slots=True)
class _Held:
    expires: float
    range: _Range


class RelayTable:
    """Reservations, circuits, and how often peers ask."""

    def __init__(self, relay_limits: RelayLimits | None = None) -> None:
        self.limits = relay_limits or RelayLimits()
        self.circuits: set[Circuit] = set()
        self.refused: Counter[Status] = Counter()
        self._reservations: dict[PeerId, _Held] = {}
        self._reserved_by_range: Counter[_Range] = Counter()
        self._by_source: Counter[PeerId] = Counter()
        self._by_target: Counter[PeerId] = Counter()
        self._by_range: Counter[_Range] = Counter()
        self._tokens: dict[PeerId, tuple[float, float]] = {}
        self._swept = 0.0

    # -- reservations -------------------------------------------------------------------------------------
    def reserve(self, peer: PeerId, ip: IpAddress | None, *, relayed: bool, now: float) -> Status | None:
        """A RESERVE of `peer`, which is connected from `ip`: `None` when granted, else what to answer.

        `relayed`: the request came through another relay, which is not allowed.
        """
        self.handle_timer(now)
        if relayed:
            return self._refuse(Status.PERMISSION_DENIED)
        if not self._may_ask(peer, now):
            return self._refuse(Status.RESOURCE_LIMIT_EXCEEDED)
        range_ = address_range(ip)
        held = self._reservations.get(peer)
        if held is None:
            full = len(self._reservations) >= self.limits.reservations
            range_full = self._reserved_by_range[range_] >= self.limits.reservations_per_range
            if full or (range_ is not None and range_full):
                return self._refuse(Status.RESERVATION_REFUSED)
        else:
            self._drop(peer, held)
        self._reservations[peer] = _Held(now + self.limits.reservation_seconds, range_)
        if range_ is not None:
            self._reserved_by_range[range_] += 1
        return None

    def has_reservation(self, peer: PeerId, now: float) -> bool:
        held = self._reservations.get(peer)
        return held is not None and held.expires > now

    def reservations(self) -> Iterable[PeerId]:
        """Who has one, expired ones that nobody asked about since among them."""
        return self._reservations.keys()

    def peer_gone(self, peer: PeerId) -> None:
        """The last connection with `peer` is gone, and its reservation with it."""
        held = self._reservations.get(peer)
        if held is not None:
            self._drop(peer, held)

    def _drop(self, peer: PeerId, held: _Held) -> None:
        del self._reservations[peer]
        _lower(self._reserved_by_range, held.range)

    # -- circuits -----------------------------------------------------------------------------------------
    def connect(
        self, source: PeerId, ip: IpAddress | None, target: PeerId, *, relayed: bool, now: float
    ) -> Circuit | Status:
        """A CONNECT of `source`, connected from `ip`, to `target`. A circuit counts until `circuit_over`."""
        self.handle_timer(now)
        if relayed or source == target:
            return self._refuse(Status.PERMISSION_DENIED)
        if not self._may_ask(source, now):
            return self._refuse(Status.RESOURCE_LIMIT_EXCEEDED)
        if not self.has_reservation(target, now):
            return self._refuse(Status.NO_RESERVATION)
        allowed, range_ = self.limits, address_range(ip)
        if (
            len(self.circuits) >= allowed.circuits
            or self._by_source[source] >= allowed.circuits_per_source
            or self._by_target[target] >= allowed.circuits_per_target
            or (range_ is not None and self._by_range[range_] >= allowed.circuits_per_range)
        ):
            return self._refuse(Status.RESOURCE_LIMIT_EXCEEDED)
        circuit = Circuit(source, target, range_)
        self.circuits.add(circuit)
        self._by_source[source] += 1
        self._by_target[target] += 1
        if range_ is not None:
            self._by_range[range_] += 1
        return circuit

    def circuit_over(self, circuit: Circuit) -> None:
        """Give its places back. Safe to call twice."""
        if circuit.over:
            return
        circuit.over = True
        self.circuits.discard(circuit)
        _lower(self._by_source, circuit.source)
        _lower(self._by_target, circuit.target)
        _lower(self._by_range, circuit.range)

    # -- time ---------------------------------------------------------------------------------------------
    def handle_timer(self, now: float) -> None:
        """Drop what has expired. Called with each request, so nobody else needs to."""
        if now - self._swept < _IDLE_ACCOUNT_SECONDS:
            return
        self._swept = now
        for peer, held in list(self._reservations.items()):
            if held.expires <= now:
                self._drop(peer, held)
        for peer, (_, at) in list(self._tokens.items()):
            if now - at > _IDLE_ACCOUNT_SECONDS:
                del self._tokens[peer]

    def _may_ask(self, peer: PeerId, now: float) -> bool:
        tokens, at = self._tokens.get(peer, (float(limits.RELAY_REQUEST_BURST), now))
        tokens = min(limits.RELAY_REQUEST_BURST, tokens + (now - at) * limits.RELAY_REQUESTS_PER_SECOND)
        allowed = tokens >= 1
        self._tokens[peer] = (tokens - 1 if allowed else tokens, now)
        return allowed

    def _refuse(self, status: Status) -> Status:
        self.refused[status] += 1
        return status


def address_range(ip: IpAddress | None) -> _Range:
    """The /24 or /48 that `ip` is in; `None` for loopback and for peers without an IP address."""
    if ip is None or ip.is_loopback:
        return None
    return ipaddress.ip_network((ip, 24 if ip.version == 4 else 48), strict=False)


def _lower(counter: Counter[T], key: T) -> None:
    counter[key] -= 1
    if counter[key] <= 0:
        del counter[key]
