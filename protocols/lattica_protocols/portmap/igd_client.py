"""The client side of UPnP-IGD, with the same verbs as `control.ControlClient`.

    search (SSDP) -> description (HTTP) -> GetExternalIPAddress of each WAN service until one has an address -> ready
    per port: AddPortMapping
        718, 729 conflict    AddAnyPortMapping (version 2), else another external port
        725, 402             again with a permanent lease, which is renewed all the same and deleted at the end
    every minute: GetSpecificPortMappingEntry; 714, or somebody else's: asked for again

One call at a time: cheap routers serve no more. Nothing is asked but the router's own address.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import UPNP_MAX_LOCATIONS
from lattica_protocols.portmap import igd
from lattica_protocols.portmap.control import State
from lattica_protocols.portmap.http import decode_response_untrusted, encode_get
from lattica_protocols.portmap.leases import LeaseTable
from lattica_protocols.portmap.mapping import (
    CHECK_SECONDS,
    LIFETIME,
    HttpRequest,
    Lease,
    Outgoing,
    Port,
    ProtocolReport,
)
from lattica_protocols.portmap.ssdp import MULTICAST, SSDP_PORT, Url, decode_answer_untrusted, encode_searches
from lattica_protocols.stun import SocketAddr

SEARCHES: Final = 3
SEARCH_INTERVAL: Final = 0.7
SEARCH_SECONDS: Final = 3.0
"""Devices answer within the second that the search gives them, and datagrams are lost."""
PORT_ATTEMPTS: Final = 4
"""External ports tried when another machine has the one we would like."""
_EPHEMERAL: Final = (20000, 60000)

Then = Callable[[Mapping[str, str] | igd.Fault], None]


@dataclass(slots=True)
class _Call:
    """One HTTP exchange. `action` empty: the description."""

    action: str
    request: HttpRequest
    then: Then
    failed: Callable[[str], None]


class IgdClient:
    """See the top of the file."""

    def __init__(self, gateway: str, local_ip: str, rng: random.Random, *, lifetime: float = LIFETIME) -> None:
        self.state: State = "idle"
        self.report = ProtocolReport("upnp")
        self.is_released = True
        self._gateway = gateway
        self._local_ip = local_ip
        self._rng = rng
        self._lifetime = int(lifetime)
        self._permanent = False
        self._releasing = False
        self._leases = LeaseTable("upnp")
        self._locations: dict[Url, None] = {}
        self._services: deque[igd.Service] = deque()
        self._service: igd.Service | None = None
        self._is_trying = False
        self._calls: deque[_Call] = deque()
        self._running: _Call | None = None
        self._count = 0
        self._searches_left = 0
        self._search_at = self._search_ends = float("inf")
        self._check_at = float("inf")
        self._now = 0.0
        self._datagrams: list[Outgoing] = []

    # -- the application --------------------------------------------------------------------------------------------
    def probe(self, now: float) -> None:
        """Find the router's WAN service."""
        self._now = now
        self.state, self.report.tried, self.report.error = "probing", True, ""
        self._releasing = False
        self._locations.clear()
        self._services.clear()
        self._is_trying = False
        self._calls.clear()
        self._searches_left = SEARCHES
        self._search_at, self._search_ends = now, now + SEARCH_SECONDS
        self._search()

    def map(self, ports: Iterable[Port], now: float) -> None:
        """Keep `ports` mapped from now on."""
        self._now = now
        self._leases.want(ports, now)
        self._check_at = now + CHECK_SECONDS
        self._ask_due()

    def renew(self, now: float) -> None:
        """Look now whether the router still has our mappings."""
        self._now = now
        self._call("GetExternalIPAddress", [], self._looked, lambda why: None)
        for lease in self._leases.leases():
            self._check(lease)

    def abandon(self) -> None:
        """Keep nothing mapped any more, without a word to the router: another protocol goes on."""
        self._leases.clear()
        self._calls.clear()
        self._check_at = self._search_at = self._search_ends = float("inf")
        if self.state == "probing":
            self.state = "failed"
        self._update()

    def release(self, now: float) -> None:
        """End what is held."""
        self._now = now
        leases = self._leases.leases()
        self._leases.clear()
        self._calls.clear()
        self._releasing = True
        self._search_at = self._search_ends = self._check_at = float("inf")
        for lease in leases:
            self._delete(lease.port, lease.external_port)
        self._update()

    def leases(self) -> tuple[Lease, ...]:
        return self._leases.leases()

    # -- the machine contract ---------------------------------------------------------------------------------------
    def receive_datagram(self, data: bytes, source: SocketAddr, now: float) -> None:
        """Something came to the socket from which we searched."""
        self._now = now
        if source[0] != self._gateway:
            self.report.ignore(f"an answer from {source[0]}, who is not the router")
            return
        try:
            location = decode_answer_untrusted(data, self._gateway)
        except RemoteProtocolError as error:
            self.report.garble(str(error))
            return
        self.report.answered = True
        if self.state != "probing" or location in self._locations or len(self._locations) >= UPNP_MAX_LOCATIONS:
            return
        self._locations[location] = None
        self._search_at = self._search_ends = float("inf")
        request = self._http(location, encode_get(location.host, location.port, location.path))
        self._queue(_Call("", request, lambda answer: None, self._gave_up))

    def receive_response(self, number: int, data: bytes, now: float) -> None:
        """All that came over the connection of request `number` until its end."""
        self._now = now
        call = self._running
        if call is None or call.request.number != number:
            return
        self._running = None
        try:
            response = decode_response_untrusted(data, closed=True)
            assert response is not None
            if call.action:
                call.then(igd.decode_answer_untrusted(response, call.action))
            else:
                self._described(igd.decode_description_untrusted(response.body, _url(call.request)))
        except RemoteProtocolError as error:
            self.report.garble(str(error))
            call.failed(str(error))
        self._ask_due()
        self._update()

    def request_failed(self, number: int, why: str, now: float) -> None:
        """No connection, or no answer in time."""
        self._now = now
        call = self._running
        if call is None or call.request.number != number:
            return
        self._running = None
        call.failed(why)
        self._update()

    def handle_timer(self, now: float) -> None:
        self._now = now
        self._search()
        if self._leases.expire(now):
            self._update()
        self._ask_due()
        if self._check_at <= now:
            self._check_at = now + CHECK_SECONDS
            self.renew(now)

    def next_timeout(self) -> float | None:
        due = min(self._search_at, self._search_ends, self._check_at, self._leases.next_timeout() or float("inf"))
        return None if due == float("inf") else due

    def poll_transmit(self) -> list[Outgoing | HttpRequest]:
        ready: list[Outgoing | HttpRequest] = [*self._datagrams]
        self._datagrams.clear()
        if self._running is None and self._calls:
            self._running = self._calls.popleft()
            ready.append(self._running.request)
        return ready

    # -- finding ----------------------------------------------------------------------------------------------------
    def _search(self) -> None:
        if self._search_ends <= self._now:
            self._search_at = self._search_ends = float("inf")
            self._gave_up("no answer")
        elif self._search_at <= self._now:
            self._searches_left -= 1
            self._search_at = self._now + SEARCH_INTERVAL if self._searches_left else float("inf")
            for target in ((self._gateway, SSDP_PORT), MULTICAST):
                self._datagrams += [Outgoing("upnp", target, data) for data in encode_searches(*target)]

    def _described(self, services: list[igd.Service]) -> None:
        if self.state != "probing":
            return
        self._services.extend(services)
        if not self._is_trying:
            self._try_service("the router's description names no service")

    def _try_service(self, why: str) -> None:
        """Ask the next service for its address; some routers describe one that is not in use."""
        self._is_trying = bool(self._services)
        if not self._services:
            self._service = None
            self._gave_up(why)
            return
        self._service = self._services.popleft()
        self._call("GetExternalIPAddress", [], self._has_address, self._try_service)

    def _has_address(self, answer: Mapping[str, str] | igd.Fault) -> None:
        if isinstance(answer, igd.Fault):
            self._try_service(str(answer))
            return
        ip = igd.external_ip_untrusted(answer)
        if ip is None:
            self._try_service("the router has no address outside: it has no connection, or stands behind another NAT")
            return
        self._is_at(ip)
        if self.state == "probing":
            self.state = "ready"

    def _is_at(self, external_ip: str) -> None:
        if self.report.external_ip not in (None, external_ip):
            self._leases.moved(external_ip)
        self.report.external_ip = external_ip

    def _gave_up(self, why: str) -> None:
        if self.state == "probing" and not self._calls:
            self.state, self.report.error = "failed", why

    # -- mapping ----------------------------------------------------------------------------------------------------
    def _ask_due(self) -> None:
        if self._service is None:
            return
        for port in self._leases.take_due(self._now):
            held = self._leases.lease(port)
            self._add(port, port.number if held is None else held.external_port, PORT_ATTEMPTS)

    def _add(self, port: Port, external: int, attempts: int) -> None:
        lifetime = 0 if self._permanent else self._lifetime

        def answered(answer: Mapping[str, str] | igd.Fault) -> None:
            if not isinstance(answer, igd.Fault):
                self._granted(port, external, lifetime)
            elif attempts <= 1:
                self._refused(port, str(answer))
            elif answer.code in (igd.ONLY_PERMANENT, igd.INVALID_ARGUMENTS) and not self._permanent:
                self._permanent = True
                self._add(port, external, attempts - 1)
            elif answer.code in (igd.CONFLICT, igd.CONFLICT_ELSEWHERE):
                self._add_elsewhere(port, attempts - 1)
            else:
                self._refused(port, str(answer))

        arguments = igd.adding(port, external, self._local_ip, lifetime)
        self._call("AddPortMapping", arguments, answered, lambda why: self._refused(port, why))

    def _add_elsewhere(self, port: Port, attempts: int) -> None:
        """The external port is taken: let the router choose, or guess."""
        other = self._rng.randrange(*_EPHEMERAL)
        if self._service is None or self._service.version < 2:
            self._add(port, other, attempts)
            return
        lifetime = 0 if self._permanent else self._lifetime

        def answered(answer: Mapping[str, str] | igd.Fault) -> None:
            if isinstance(answer, igd.Fault):
                self._add(port, other, attempts)  # not every version 2 has it
            else:
                self._granted(port, igd.reserved_port_untrusted(answer), lifetime)

        arguments = igd.adding(port, port.number, self._local_ip, lifetime)
        self._call("AddAnyPortMapping", arguments, answered, lambda why: self._refused(port, why))

    def _granted(self, port: Port, external: int, lifetime: int) -> None:
        assert self.report.external_ip is not None
        if self._releasing:  # asked for before
            self._delete(port, external)
            return
        self.report.error = ""
        self._leases.granted(port, self.report.external_ip, external, lifetime or float("inf"), self._now)

    def _delete(self, port: Port, external: int) -> None:
        self._call("DeletePortMapping", igd.naming(port, external), lambda answer: None, lambda why: None)

    def _refused(self, port: Port, why: str) -> None:
        self.report.error = f"{port}: {why}"
        self._leases.refused(port, self._now)

    def _looked(self, answer: Mapping[str, str] | igd.Fault) -> None:
        ip = None if isinstance(answer, igd.Fault) else igd.external_ip_untrusted(answer)
        if ip is not None:
            self._is_at(ip)

    def _check(self, lease: Lease) -> None:
        def answered(answer: Mapping[str, str] | igd.Fault) -> None:
            gone = isinstance(answer, igd.Fault) and answer.code == igd.NO_SUCH_ENTRY
            taken = not isinstance(answer, igd.Fault) and answer.get("NewInternalClient") != self._local_ip
            if gone or taken:
                self.report.restarts += 1
                self._leases.restarted(self._now)
                self._ask_due()

        def failed(why: str) -> None:
            self.report.error, self.state = f"the router does not answer any more: {why}", "failed"

        arguments = igd.naming(lease.port, lease.external_port)
        self._call("GetSpecificPortMappingEntry", arguments, answered, failed)

    # -- calls ------------------------------------------------------------------------------------------------------
    def _call(self, action: str, arguments: list[tuple[str, str]], then: Then, failed: Callable[[str], None]) -> None:
        if self._service is None:
            failed("the router's service is not known any more")
            return
        request = self._http(self._service.control, igd.encode_call(self._service, action, arguments))
        self._queue(_Call(action, request, then, failed))

    def _http(self, url: Url, data: bytes) -> HttpRequest:
        self._count += 1
        return HttpRequest(self._count, url.host, url.port, data)

    def _queue(self, call: _Call) -> None:
        self._calls.append(call)
        self.is_released = False

    def _update(self) -> None:
        self.report.leases = self._leases.leases()
        self.is_released = self._running is None and not self._calls
        if self._leases.all_refused:
            self.state = "failed"


def _url(request: HttpRequest) -> Url:
    return Url(request.host, request.port, "/")
