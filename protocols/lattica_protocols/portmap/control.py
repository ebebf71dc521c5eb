"""The client side of PCP and NAT-PMP: questions over UDP, sent again until they are answered.

    client.probe(now)          is anybody there?         -> `state` becomes "ready" or "failed"
    client.map(ports, now)     keep these mapped         -> `leases()`, renewed at half of their lifetime
    client.release(now)        end the mappings          -> `is_released`

Only what comes from the router's address and port, answers a question that waits, and (PCP) carries our nonce counts;
everything else is counted in the report. Requests are sent again after 0.25, 0.5, 1 and 2 s, as RFC 6886 has it, and
given up after 8 s, not after its 128: a router that answers later is as good as none, and asked again some time later.
RFC 6887 begins with 3 s, which would be too late for whoever waits for our address.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.portmap.epoch import Epoch
from lattica_protocols.portmap.leases import LeaseTable
from lattica_protocols.portmap.mapping import (
    CHECK_SECONDS,
    LIFETIME,
    MAX_RETRY,
    MIN_LIFETIME,
    MIN_RETRY,
    RETRY_SECONDS,
    HttpRequest,
    Lease,
    Outgoing,
    Port,
    ProtocolReport,
)
from lattica_protocols.portmap.natpmp import NatPmpCodec
from lattica_protocols.portmap.pcp import PcpCodec
from lattica_protocols.portmap.reply import Reply
from lattica_protocols.stun import SocketAddr

SERVER_PORT: Final = 5351
FIRST_TIMEOUT: Final = 0.25
ATTEMPTS: Final = 5
RELEASE_ATTEMPTS: Final = 2
"""Somebody waits for us to end."""

State: TypeAlias = Literal["idle", "probing", "ready", "failed"]


@dataclass(slots=True)
class _Waiting:
    data: bytes
    left: int
    due: float
    timeout: float = FIRST_TIMEOUT
    deletes: bool = False


class ControlClient:
    """See the top of the file."""

    def __init__(self, codec: PcpCodec | NatPmpCodec, gateway: str, *, lifetime: float = LIFETIME) -> None:
        self.state: State = "idle"
        self.report = ProtocolReport(codec.name)
        self._codec = codec
        self._server = (gateway, SERVER_PORT)
        self._lifetime = int(lifetime)
        self._leases = LeaseTable(codec.name)
        self._waiting: dict[Port | None, _Waiting] = {}  # None: the check
        self._epoch = Epoch()
        self._check_at: float | None = None
        self._now = 0.0

    # -- the application --------------------------------------------------------------------------------------------
    def probe(self, now: float) -> None:
        """Find out whether the router speaks this protocol."""
        self._now = now
        self.state, self.report.tried, self.report.error = "probing", True, ""
        self._ask(None, self._codec.encode_check())

    def map(self, ports: Iterable[Port], now: float) -> None:
        """Keep `ports` mapped from now on."""
        self._now = now
        self._leases.want(ports, now)
        self._check_at = now + CHECK_SECONDS
        self._ask_due()

    def renew(self, now: float) -> None:
        """Ask for all mappings again: the router may have been restarted, within seconds its clock does not show it."""
        self._now = now
        self._leases.restarted(now)
        self._ask_due()

    def release(self, now: float) -> None:
        """End what is held."""
        self._now = now
        self._check_at = None
        ports = dict.fromkeys([lease.port for lease in self._leases.leases()] + [p for p in self._waiting if p])
        self._leases.clear()
        self._waiting.clear()
        for port in ports:  # also what was asked for just now: it may be granted still
            self._ask(port, self._codec.encode_map(port, 0, None, 0), RELEASE_ATTEMPTS, deletes=True)
        self._update()

    def abandon(self) -> None:
        """Keep nothing mapped any more, without a word to the router: another protocol goes on."""
        self._leases.clear()
        self._waiting.clear()
        self._check_at = None
        if self.state == "probing":
            self.state = "failed"
        self._update()

    @property
    def is_released(self) -> bool:
        return not self._waiting

    def leases(self) -> tuple[Lease, ...]:
        return self._leases.leases()

    # -- the machine contract ---------------------------------------------------------------------------------------
    def receive_datagram(self, data: bytes, source: SocketAddr, now: float) -> None:
        """Something came to our socket."""
        self._now = now
        if source != self._server:
            self.report.ignore(f"an answer from {source[0]}, who is not the router")
            return
        try:
            reply = self._codec.decode_untrusted(data)
        except RemoteProtocolError as error:
            self.report.garble(str(error))
            return
        if reply.unsupported:
            self._is_unsupported(reply)
            return
        key = reply.port if reply.kind == "map" else None
        waiting = self._waiting.pop(key, None)
        if waiting is None:
            self.report.ignore("an answer to nothing we had asked")
            return
        self.report.answered = True
        if waiting.deletes:
            if reply.lifetime and not reply.error:
                self._waiting[key] = waiting  # the answer to what we had asked for before
            return
        if reply.epoch is not None and self._epoch.restarted(reply.epoch, now):
            self.report.restarts += 1
            self._leases.restarted(now, reply.port)
        if reply.kind == "check":
            self._checked(reply)
        else:
            self._mapped(reply)
        self._ask_due()
        self._update()

    def handle_timer(self, now: float) -> None:
        self._now = now
        for key, waiting in list(self._waiting.items()):
            if waiting.due <= now and not waiting.left:
                del self._waiting[key]
                if not waiting.deletes:
                    self._unanswered(key)
        self._leases.expire(now)
        self._ask_due()
        if self._check_at is not None and self._check_at <= now:
            self._check_at = now + CHECK_SECONDS
            self._ask(None, self._codec.encode_check())
        self._update()

    def next_timeout(self) -> float | None:
        times = [waiting.due for waiting in self._waiting.values()]
        times += [time for time in (self._check_at, self._leases.next_timeout()) if time is not None]
        return min(times, default=None)

    def poll_transmit(self) -> list[Outgoing | HttpRequest]:
        ready: list[Outgoing | HttpRequest] = []
        for waiting in self._waiting.values():
            if waiting.due <= self._now and waiting.left:
                waiting.left -= 1
                waiting.due = self._now + waiting.timeout
                waiting.timeout *= 2
                ready.append(Outgoing(self._codec.name, self._server, waiting.data))
        return ready

    # -- asking -----------------------------------------------------------------------------------------------------
    def _ask(self, key: Port | None, data: bytes, attempts: int = ATTEMPTS, *, deletes: bool = False) -> None:
        self._waiting[key] = _Waiting(data, attempts, self._now, deletes=deletes)

    def _ask_due(self) -> None:
        for port in self._leases.take_due(self._now):
            held = self._leases.lease(port)
            external = port.number if held is None else held.external_port
            ip = None if held is None else held.external_ip
            self._ask(port, self._codec.encode_map(port, external, ip, self._lifetime))

    # -- answers ----------------------------------------------------------------------------------------------------
    def _checked(self, reply: Reply) -> None:
        if reply.error:
            self.report.error = reply.error
        if reply.external_ip is not None:
            if self.report.external_ip not in (None, reply.external_ip):
                self._leases.moved(reply.external_ip)
            self.report.external_ip = reply.external_ip
        if self.state == "probing":
            self.state = "failed" if reply.error else "ready"

    def _mapped(self, reply: Reply) -> None:
        assert reply.port is not None
        ip = reply.external_ip or self.report.external_ip
        useful = reply.lifetime >= MIN_LIFETIME and reply.external_port and ip not in (None, "0.0.0.0", "::")
        if not reply.error and useful:
            assert ip is not None
            self.report.external_ip, self.report.error = ip, ""
            self._leases.granted(reply.port, ip, reply.external_port, reply.lifetime, self._now)
            return
        self.report.error = f"{reply.port}: {reply.error or _useless(reply, ip)}"
        told = bool(reply.error and reply.lifetime)
        wait = min(max(float(reply.lifetime), MIN_RETRY), MAX_RETRY) if told else RETRY_SECONDS
        self._leases.refused(reply.port, self._now, wait, ended=True)

    def _unanswered(self, port: Port | None) -> None:
        """The router keeps silent. What it granted is held until it expires."""
        if port is None:
            self.report.error = "no answer" if self.state == "probing" else "the router does not answer any more"
        else:
            self.report.error = f"{port}: no answer"
            self._leases.refused(port, self._now)
        self.state = "failed"

    def _is_unsupported(self, reply: Reply) -> None:
        self.report.answered, self.report.error = True, reply.error
        self.state = "failed"
        self._waiting.clear()
        self._leases.clear()
        self._check_at = None
        self._update()

    def _update(self) -> None:
        self.report.leases = self._leases.leases()
        if self._leases.all_refused:
            self.state = "failed"


def _useless(reply: Reply, ip: str | None) -> str:
    """What is wrong with a mapping that was granted."""
    if not reply.external_port:
        return "the router agreed, but named no port"
    if reply.lifetime < MIN_LIFETIME:
        return f"the router agreed, but for {reply.lifetime} s only"
    return f"the router agreed, but has no address outside ({ip})"
