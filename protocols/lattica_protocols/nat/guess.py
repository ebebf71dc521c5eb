"""Two peers agree, over a relayed connection, on a punch for which ports have to be guessed. Without I/O.

`/lattica/punch/1`, each message `uvarint(length) || protobuf`:

    GuessMessage { Type type = 1 (OFFER 1, GO 2, REFUSED 3); bytes key = 2; NatReport nat = 3 (`report.py`);
                   repeated bytes addrs = 4; uint32 took = 5 (ms); Technique technique = 6; bool opens = 7; }

      technique   1 simple, 2 predict, 3 birthday (`punch_plan.py`)

    B, who accepted the relayed connection         A, who opened it
      samples its NAT's ports
      OFFER(key, nat, addrs)   ------------------->   samples its own
                               <-------------------   OFFER(key, nat, addrs, took)       or REFUSED
      chooses the technique
      GO(technique, opens)     ------------------->   A begins at once
      B begins after half of the measured round trip

`key`: 16 bytes of each side, B's before A's the key of the probes (`probe.py`). `addrs`: where observers see the socket
from which it will send. `took`: how long A was busy with its samples, which is not the path's. `opens`: that B is the
side that opens many sockets (birthday), and A the one that tries ports. Probes that get through then settle on a path
(`punch.py`), B being the controlling side, and A dials QUIC over it.

All of it is the partner's claim. Ports may be claimed at will; probes go to IP addresses that are proven, in a number
that the plan bounds, or not at all.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from lattica_protocols import limits
from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.nat.probe import KEY_BYTES
from lattica_protocols.nat.punch_plan import PunchPlan, Side, Technique, plan_punch
from lattica_protocols.nat.report import NatReport
from lattica_protocols.peer_record import decode_addrs_untrusted
from lattica_protocols.protobuf import Kind, Message, optional, repeated
from lattica_protocols.stun import SocketAddr

PROTOCOL_ID: Final = "/lattica/punch/1"
HALF_KEY_BYTES: Final = KEY_BYTES // 2
MAX_ROUND_TRIP: Final = 5.0
"""Seconds, as for DCUtR."""


class GuessType(enum.IntEnum):
    """OFFER from each side, then GO from the initiator; REFUSED instead of either."""

    OFFER = 1
    GO = 2
    REFUSED = 3


TECHNIQUES: Final = {1: Technique.SIMPLE, 2: Technique.PREDICT, 3: Technique.BIRTHDAY}
_NUMBERS: Final = {technique: number for number, technique in TECHNIQUES.items()}


@dataclass(frozen=True, slots=True)
class GuessMessage(Message):
    """Any of them; which fields belong to which stands at the top."""

    type: int | None = optional(1, Kind.ENUM)
    key: bytes | None = optional(2, Kind.BYTES, max_bytes=HALF_KEY_BYTES)
    nat: NatReport | None = optional(3, NatReport, max_bytes=limits.NAT_MAX_REPORT_BYTES)
    addrs: Sequence[bytes] = repeated(4, Kind.BYTES, max_count=limits.GUESS_MAX_ADDRS)
    took: int | None = optional(5, Kind.UINT)
    technique: int | None = optional(6, Kind.ENUM)
    opens: bool | None = optional(7, Kind.BOOL)


class GuessExchange:
    """Either side's part.

    exchange = GuessExchange(initiator)
    exchange.offer(own, half_key, now)       the initiator first, the other one when `partner` is set
    exchange.go(technique, opens, now)       the initiator, when `partner` is set
    exchange.poll_transmit()                 a message to send, without its length prefix
    exchange.receive_untrusted(message, now)
    exchange.start_at                        set at the end: when to begin, on the clock of `now`
    exchange.plan(…)                         what to do then
    """

    def __init__(self, *, initiator: bool) -> None:
        self.initiator = initiator
        self.partner: Side | None = None
        self.technique: Technique | None = None
        self.opens = False
        """Whether it is us who open many sockets."""
        self.start_at: float | None = None
        self.round_trip: float | None = None
        """Seconds over the relay, measured by the initiator."""
        self.refused = False
        """The partner has too much of this to do just now: later."""
        self._own: Side | None = None
        self._half = self._other_half = b""
        self._since = 0.0
        self._out: list[bytes] = []

    @property
    def key(self) -> bytes:
        """Of the probes."""
        return self._half + self._other_half if self.initiator else self._other_half + self._half

    def offer(self, own: Side, half_key: bytes, now: float) -> None:
        """Say what our NAT does."""
        if len(half_key) != HALF_KEY_BYTES or self._own is not None or (not self.initiator and self.partner is None):
            raise LocalProtocolError(f"one offer, the initiator's first, with {HALF_KEY_BYTES} bytes of the key")
        self._own, self._half = own, half_key
        message = GuessMessage(
            type=GuessType.OFFER,
            key=half_key,
            nat=NatReport.of(own.behaviour),
            addrs=tuple(_to_bytes(addr) for addr in own.candidates[: limits.GUESS_MAX_ADDRS]),
            took=None if self.initiator else max(0, round((now - self._since) * 1000)),
        )
        if self.initiator:
            self._since = now
        self._out.append(message.encode())

    def go(self, technique: Technique, now: float, *, opens: bool = False) -> None:
        """The initiator's choice."""
        if not self.initiator or self.partner is None or self.start_at is not None or self.round_trip is None:
            raise LocalProtocolError("the initiator chooses, once, when it knows the partner's offer")
        self.technique, self.opens = technique, opens
        message = GuessMessage(type=GuessType.GO, technique=_NUMBERS[technique], opens=opens or None)
        self._out.append(message.encode())
        self.start_at = now + self.round_trip / 2

    def poll_transmit(self) -> bytes | None:
        """The next message to send, `None`: nothing now."""
        return self._out.pop(0) if self._out else None

    def receive_untrusted(self, data: bytes, now: float) -> None:
        """One message of the partner."""
        message = GuessMessage.decode_untrusted(data)
        if self.refused:
            raise RemoteProtocolError("a message after the refusal")
        if message.type == GuessType.REFUSED and self.initiator and self._own is not None and self.partner is None:
            self.refused = True
        elif self.partner is None and (self._own is not None or not self.initiator):
            self._offered(message, now)
        elif not self.initiator and self._own is not None and self.start_at is None:
            technique = TECHNIQUES.get(message.technique or 0)
            if message.type != GuessType.GO or technique is None:
                raise RemoteProtocolError("expected GO with a technique that we know")
            self.technique, self.opens = technique, not message.opens
            self.start_at = now
        else:
            raise RemoteProtocolError("a message at the wrong moment")

    def _offered(self, message: GuessMessage, now: float) -> None:
        if message.type != GuessType.OFFER or message.key is None or len(message.key) != HALF_KEY_BYTES:
            raise RemoteProtocolError(f"expected OFFER with {HALF_KEY_BYTES} bytes of the key")
        found = [addr.host_port() for addr in decode_addrs_untrusted(message.addrs) if addr.ip() is not None]
        candidates = [(place[1], place[2]) for place in found if place is not None and place[0] == "udp" and place[2]]
        self.partner = Side((message.nat or NatReport()).behaviour(), tuple(candidates))
        self._other_half = message.key
        if self.initiator:
            elapsed = now - self._since
            if not 0 <= elapsed <= MAX_ROUND_TRIP:
                raise RemoteProtocolError(f"the answer took {elapsed:.1f} s")
            self.round_trip = elapsed - min(elapsed, (message.took or 0) / 1000)
        else:
            self._since = now

    def plan(
        self, proven: Collection[str], *, opener_ttl: int | None, opener_wait: float, opener_measured: bool = False
    ) -> PunchPlan:
        """What our side does from `start_at` on."""
        if self._own is None or self.partner is None or self.technique is None:
            raise LocalProtocolError("the exchange is not over")
        return plan_punch(
            self._own,
            self.partner,
            proven=proven,
            technique=self.technique,
            opens=self.opens,
            opener_ttl=opener_ttl,
            opener_wait=opener_wait,
            opener_measured=opener_measured,
        )


def refusal() -> bytes:
    """Instead of an offer."""
    return GuessMessage(type=GuessType.REFUSED).encode()


def _to_bytes(addr: SocketAddr) -> bytes:
    return Multiaddr.parse(f"/{'ip6' if ':' in addr[0] else 'ip4'}/{addr[0]}/udp/{addr[1]}").to_bytes()
