"""One router, asked in three languages at once; our ports are kept mapped with the best that answers.

    PROBING   each protocol finds out whether the router speaks it; nothing is mapped
       | the first answers: `GRACE` seconds for a better one (PCP, then NAT-PMP, then UPnP), then map with it
    MAPPED    renewed at half of the lifetime, looked after every minute
       | it refuses every port, or falls silent: the next that answers, else WAITING
    WAITING   nobody mapped anything: again after `RETRY_SECONDS`, or when the router announces itself

All three mostly are one table in the router, so mapping the same port by two of them would have each end the other's.

    mapper.start(now)  .receive_datagram(channel, …)  .receive_announcement(…)  .receive_response(…)  .release(now)
    mapper.leases()    .reports()                     .next_event(): LeasesChanged
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import PORTMAP_MAX_PORTS
from lattica_protocols.portmap import natpmp, pcp
from lattica_protocols.portmap.control import ControlClient
from lattica_protocols.portmap.igd_client import IgdClient
from lattica_protocols.portmap.mapping import (
    LIFETIME,
    RETRY_SECONDS,
    HttpRequest,
    Lease,
    Outgoing,
    Port,
    ProtocolName,
    ProtocolReport,
)
from lattica_protocols.stun import SocketAddr

PROTOCOLS: Final[tuple[ProtocolName, ...]] = ("pcp", "nat-pmp", "upnp")
"""Best first: PCP has nonces and leases, NAT-PMP leases, UPnP neither everywhere."""
GRACE: Final = 0.1
"""Seconds: a router in the same network answers datagrams in a few milliseconds."""
ANNOUNCEMENT_PACE: Final = 5.0
"""At most one announcement is believed in so many seconds: they come from anybody in the local network."""

Client = ControlClient | IgdClient


@dataclass(frozen=True, slots=True)
class LeasesChanged:
    """`leases()` gives others than before."""

    leases: tuple[Lease, ...]


class GatewayMapper:
    """See the top of the file. `gateway` and `local_ip` are addresses of the same family, `lifetime` is in seconds."""

    def __init__(
        self,
        gateway: str,
        local_ip: str,
        ports: Iterable[Port],
        rng: random.Random,
        *,
        protocols: Sequence[ProtocolName] = PROTOCOLS,
        lifetime: float = LIFETIME,
    ) -> None:
        self.gateway = gateway
        self.local_ip = local_ip
        self.phase: Literal["idle", "probing", "mapped", "waiting", "released"] = "idle"
        self._ports = list(dict.fromkeys(ports))[:PORTMAP_MAX_PORTS]
        self._clients: dict[ProtocolName, Client] = {}
        for name in PROTOCOLS:
            if name not in protocols:
                continue
            if name == "upnp":
                self._clients[name] = IgdClient(gateway, local_ip, rng, lifetime=lifetime)
            else:
                codec = pcp.PcpCodec(local_ip, rng) if name == "pcp" else natpmp.NatPmpCodec()
                self._clients[name] = ControlClient(codec, gateway, lifetime=lifetime)
        self._active: Client | None = None
        self._choose_at: float | None = None
        self._retry_at: float | None = None
        self._announced_at = float("-inf")
        self._told: tuple[tuple[Port, str, int], ...] = ()
        self._events: list[LeasesChanged] = []

    # -- the application --------------------------------------------------------------------------------------------
    def start(self, now: float) -> None:
        """Begin, or begin again."""
        self.phase, self._choose_at, self._retry_at, self._active = "probing", None, None, None
        for client in self._clients.values():
            client.probe(now)
        self._look(now)

    def release(self, now: float) -> None:
        """End all mappings."""
        self.phase, self._choose_at, self._retry_at = "released", None, None
        for client in self._clients.values():
            client.release(now)
        self._look(now)

    def look(self, now: float) -> None:
        """Something changed around us: see whether the router still has our mappings, or whether it answers now."""
        if self.phase == "mapped" and self._active is not None:
            self._active.renew(now)
        elif self.phase == "waiting":
            self.start(now)
        self._look(now)

    @property
    def is_refused(self) -> bool:
        """Whether the router in use granted nothing so far and refused something."""
        return self._active is not None and not self.leases() and bool(self._active.report.error)

    @property
    def is_released(self) -> bool:
        return all(client.is_released for client in self._clients.values())

    def leases(self) -> tuple[Lease, ...]:
        """One for each port, of the protocol in use where there are several."""
        found: dict[Port, Lease] = {}
        clients = sorted(self._clients.values(), key=lambda client: client is self._active)
        for client in clients:
            found.update({lease.port: lease for lease in client.leases()})
        return tuple(found[port] for port in self._ports if port in found)

    def reports(self) -> tuple[ProtocolReport, ...]:
        """How it went, by protocol."""
        return tuple(client.report for client in self._clients.values())

    # -- the machine contract ---------------------------------------------------------------------------------------
    def receive_datagram(self, channel: ProtocolName, data: bytes, source: SocketAddr, now: float) -> None:
        """Something came to the socket of that name."""
        client = self._clients.get(channel)
        if client is not None:
            client.receive_datagram(data, source, now)
            self._look(now)

    def receive_announcement(self, data: bytes, source: SocketAddr, now: float) -> None:
        """Something came to port 5350, where routers announce themselves after a start."""
        if source[0] != self.gateway or now < self._announced_at + ANNOUNCEMENT_PACE or self.phase == "released":
            return
        if not _is_announcement(data):
            return
        self._announced_at = now
        self.look(now)  # what the router answers counts, not what somebody sends to everybody

    def receive_response(self, number: int, data: bytes, now: float) -> None:
        """See `IgdClient`."""
        client = self._clients.get("upnp")
        if isinstance(client, IgdClient):
            client.receive_response(number, data, now)
            self._look(now)

    def request_failed(self, number: int, why: str, now: float) -> None:
        """See `IgdClient`."""
        client = self._clients.get("upnp")
        if isinstance(client, IgdClient):
            client.request_failed(number, why, now)
            self._look(now)

    def handle_timer(self, now: float) -> None:
        for client in self._clients.values():
            client.handle_timer(now)
        if self._retry_at is not None and self._retry_at <= now:
            self.start(now)
        self._look(now)

    def next_timeout(self) -> float | None:
        times = [client.next_timeout() for client in self._clients.values()]
        return min((time for time in (*times, self._choose_at, self._retry_at) if time is not None), default=None)

    def poll_transmit(self) -> list[Outgoing | HttpRequest]:
        return [item for client in self._clients.values() for item in client.poll_transmit()]

    def next_event(self) -> LeasesChanged | None:
        return self._events.pop(0) if self._events else None

    # -- choosing ---------------------------------------------------------------------------------------------------
    def _look(self, now: float) -> None:
        """Go on from where the clients are."""
        if self.phase == "mapped" and self._active is not None and self._active.state == "failed":
            self._failed_over(now)
        if self.phase == "probing":
            self._choose(now)
        self._tell()

    def _failed_over(self, now: float) -> None:
        """The protocol in use refused all, or is silent: another one that answered, else all over again."""
        lost, self._active = self._active, None
        others = [client for client in self._clients.values() if client is not lost]
        if any(client.state in ("ready", "probing") for client in others):
            self.phase = "probing"
        else:
            self.phase, self._retry_at = "waiting", now + RETRY_SECONDS

    def _choose(self, now: float) -> None:
        for client in self._clients.values():  # best first
            if client.state == "ready":
                better_may_come = any(c.state == "probing" for c in self._better_than(client))
                if better_may_come and self._choose_at is None:
                    self._choose_at = now + GRACE
                if not better_may_come or (self._choose_at is not None and self._choose_at <= now):
                    self.phase, self._active, self._choose_at = "mapped", client, None
                    for other in self._clients.values():
                        if other is not client and other.leases():
                            other.abandon()
                    client.map(self._ports, now)
                return
        self._choose_at = None
        if all(client.state == "failed" for client in self._clients.values()):
            self.phase, self._retry_at = "waiting", now + RETRY_SECONDS

    def _better_than(self, client: Client) -> list[Client]:
        clients = list(self._clients.values())
        return clients[: clients.index(client)]

    def _tell(self) -> None:
        leases = self.leases()
        key = tuple((lease.port, lease.external_ip, lease.external_port) for lease in leases)
        if key != self._told:
            self._told = key
            self._events.append(LeasesChanged(leases))


def _is_announcement(data: bytes) -> bool:
    for decode in (pcp.decode_announcement_untrusted, natpmp.decode_announcement_untrusted):
        try:
            decode(data)
        except RemoteProtocolError:
            continue
        return True
    return False
