"""STUN requests of ours that wait for their answer, from any number of sockets.

    client.request(0, ("203.0.113.1", 3478), now)       -> a number for this request
    for datagram in client.poll_transmit(): …           datagram.socket, .to, .data
    client.receive_datagram(0, data, source, now)       -> whether it was an answer to us
    client.next_event()                                 Answered or Failed

An answer counts when its transaction id (96 bits of `rng`, which must be unguessable) is one of ours that still waits,
when it arrives on the socket where it is expected, and from where it is expected: exactly the address that was asked,
or, where the request asks for another one, one that differs in just that. Everything else is ignored: whoever does not
see our packets cannot end, answer or delay a request. An answer proves nothing about the truth of what it says: that is
for `nat.discovery`, which asks several.

Requests are sent again after 0.25, 0.5, 1, … s, not after RFC 8489's 0.5 s for 39.5 s: a candidate that answers later
than in 4 s is of no use.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from typing import Final

from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.limits import STUN_MAX_TRANSACTIONS
from lattica_protocols.stun import (
    TRANSACTION_ID_BYTES,
    Attribute,
    MessageType,
    SocketAddr,
    StunMessage,
    decode_error_untrusted,
    decode_message_untrusted,
    encode_change_request,
    encode_message,
    encode_response_port,
)

FIRST_TIMEOUT: Final = 0.25
"""Seconds until the first repetition: above nearly every round trip inside a continent."""
ATTEMPTS: Final = 4
"""Sendings of one request: 0, 0.25, 0.75, 1.75 s; given up at 3.75 s. Enough for 20 % loss: 98 %."""
_PADDING = b"lattica".ljust(52)
"""Makes a request 100 bytes long, so that an answer with three IPv6 addresses is not longer than it."""


@dataclass(frozen=True, slots=True)
class Datagram:
    """To be sent from the socket of that number; `ttl` `None`: the usual one."""

    socket: int
    to: SocketAddr
    data: bytes
    ttl: int | None = None


@dataclass(frozen=True, slots=True)
class Answered:
    """The request `number` was answered."""

    number: int
    mapped: SocketAddr
    """The address of ours that the other side says it saw."""
    source: SocketAddr
    """Where the answer came from."""
    other: SocketAddr | None
    """The other address and port that the other side says it can answer from."""
    rtt: float | None
    """Seconds; `None` when the request was sent more than once."""
    first_sent: float = 0.0


@dataclass(frozen=True, slots=True)
class Failed:
    """The request `number` was refused (`code`), or not answered at all (`None`)."""

    number: int
    code: int | None


@dataclass(slots=True)
class _Transaction:
    number: int
    to: SocketAddr
    socket: int
    answer_on: int
    change: tuple[bool, bool]
    data: bytes
    left: int
    timeout: float
    due: float
    first_sent: float | None = None
    again: bool = False


class StunClient:
    """See the top of the file."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._waiting: dict[bytes, _Transaction] = {}
        self._events: deque[Answered | Failed] = deque()
        self._count = 0
        self._now = 0.0

    def request(
        self,
        socket: int,
        to: SocketAddr,
        now: float,
        *,
        change_ip: bool = False,
        change_port: bool = False,
        response_port: int | None = None,
        answer_on: int | None = None,
        attempts: int = ATTEMPTS,
        delay: float = 0.0,
    ) -> int:
        """Send a request at the next `poll_transmit`, or `delay` seconds later. Returns the number of its event.

        `response_port` asks for the answer at that port of our public address, which is expected on socket `answer_on`.
        """
        if len(self._waiting) >= STUN_MAX_TRANSACTIONS:
            raise LocalProtocolError("too many STUN requests at once")
        transaction_id = self._rng.randbytes(TRANSACTION_ID_BYTES)
        attributes: list[tuple[int, bytes]] = [(Attribute.SOFTWARE, _PADDING)]
        if change_ip or change_port:
            attributes.append((Attribute.CHANGE_REQUEST, encode_change_request(ip=change_ip, port=change_port)))
        if response_port is not None:
            attributes.append((Attribute.RESPONSE_PORT, encode_response_port(response_port)))
        self._count += 1
        self._waiting[transaction_id] = _Transaction(
            number=self._count,
            to=to,
            socket=socket,
            answer_on=socket if answer_on is None else answer_on,
            change=(change_ip, change_port),
            data=encode_message(StunMessage(MessageType.REQUEST, transaction_id, tuple(attributes))),
            left=attempts,
            timeout=FIRST_TIMEOUT,
            due=now + delay,
        )
        self._now = max(self._now, now)
        return self._count

    def is_waiting_for(self, data: bytes) -> bool:
        """Whether `data` carries the transaction id of a request of ours: our own request coming back, for example."""
        return len(data) >= 20 and data[8:20] in self._waiting

    def forget(self, number: int) -> None:
        """Wait no longer for the answer of request `number`; there will be no event."""
        for transaction_id, transaction in list(self._waiting.items()):
            if transaction.number == number:
                del self._waiting[transaction_id]

    def receive_datagram(self, socket: int, data: bytes, source: SocketAddr, now: float) -> bool:
        """Whether the datagram was the answer to a request of ours."""
        self._now = max(self._now, now)
        if not self.is_waiting_for(data):
            return False
        transaction = self._waiting[data[8:20]]
        try:
            message = decode_message_untrusted(data)
            if not _is_expected(transaction, message, socket, source):
                return False
            event = _event_untrusted(message, transaction, source, now)
        except RemoteProtocolError:
            return False
        if event is None:
            return False
        del self._waiting[data[8:20]]
        self._events.append(event)
        return True

    def handle_timer(self, now: float) -> None:
        self._now = max(self._now, now)
        for transaction_id, transaction in list(self._waiting.items()):
            if transaction.due <= now and not transaction.left:
                del self._waiting[transaction_id]
                self._events.append(Failed(transaction.number, None))

    def next_timeout(self) -> float | None:
        return min((transaction.due for transaction in self._waiting.values()), default=None)

    def poll_transmit(self) -> list[Datagram]:
        """What is to be sent now, in the order of the requests."""
        ready = []
        for transaction in self._waiting.values():
            if transaction.due <= self._now and transaction.left:
                transaction.again = transaction.first_sent is not None
                if transaction.first_sent is None:
                    transaction.first_sent = self._now
                transaction.left -= 1
                transaction.due = self._now + transaction.timeout
                transaction.timeout *= 2
                ready.append(Datagram(transaction.socket, transaction.to, transaction.data))
        return ready

    def next_event(self) -> Answered | Failed | None:
        return self._events.popleft() if self._events else None


def _is_expected(transaction: _Transaction, message: StunMessage, socket: int, source: SocketAddr) -> bool:
    """Whether the answer came in where and from where it should. A refusal comes from the address that was asked."""
    if message.type is MessageType.ERROR:
        return socket == transaction.socket and source == transaction.to
    ip, port = transaction.change
    if socket != transaction.answer_on:
        return False
    return (source[0] != transaction.to[0]) == ip and (source[1] != transaction.to[1]) == port


def _event_untrusted(
    message: StunMessage, transaction: _Transaction, source: SocketAddr, now: float
) -> Answered | Failed | None:
    if message.type is MessageType.ERROR:
        value = message.get(Attribute.ERROR_CODE)
        return None if value is None else Failed(transaction.number, decode_error_untrusted(value))
    mapped = message.mapped_untrusted
    sent = transaction.first_sent
    if sent is None or message.type is not MessageType.SUCCESS or mapped is None or not mapped[1] or message.unknown:
        return None
    return Answered(
        transaction.number,
        mapped,
        source,
        message.address_untrusted(Attribute.OTHER_ADDRESS),
        None if transaction.again else now - sent,
        sent,
    )
