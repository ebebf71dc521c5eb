"""The two sides of one version 2 request; `messages.py` has the order of messages.

served = ServedRequest(may_dial, may_take_data, observed, rng)
served.receive_untrusted(message)
served.poll_transmit()            a message to send, without its length prefix
served.dial                       set when it is time to dial
served.dialled(status)            how that went
served.finished                   after the last message was taken by poll_transmit

asked = AskedRequest(addr, nonce)
asked.receive_untrusted(message)
asked.poll_transmit()             as above; the data is made as it is taken
asked.answer                      set by the server's answer
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from lattica_protocols import limits
from lattica_protocols.autonat.messages import (
    AutonatMessage,
    DialDataRequest,
    DialDataResponse,
    DialRequest,
    DialResponse,
    DialStatus,
    ResponseStatus,
)
from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.nat.scope import IpAddress
from lattica_protocols.peer_record import decode_addrs_untrusted

FOREIGN_WAIT: Final = 3.0
"""Seconds at most that a dial to another IP address than the client's waits, at random: servers that were all asked at
once to dial one victim do not do it at once. As go-libp2p."""
_SMALLEST_DATA: Final = 100
"""Bytes in each message of data but the last: many tiny ones would cost us more than the client. As go-libp2p."""


@dataclass(frozen=True, slots=True)
class Dial:
    """What the server is to do."""

    addr: Multiaddr
    nonce: int
    wait: float
    """Seconds before it."""


class ServedRequest:
    """The server's side."""

    def __init__(
        self,
        may_dial: Callable[[Multiaddr], bool],
        may_take_data: Callable[[], bool],
        observed: IpAddress,
        rng: random.Random,
        *,
        admitted: bool = True,
    ) -> None:
        """`may_dial`: whether an address is one that we dial for this client, which is seen at `observed`;
        `may_take_data`: whether the budget has room for a dial elsewhere; `admitted`: whether the client may ask."""
        self.dial: Dial | None = None
        self.received_bytes = 0
        """Of data."""
        self._may_dial = may_dial
        self._may_take_data = may_take_data
        self._observed = observed
        self._rng = rng
        self._admitted = admitted
        self._chosen: tuple[int, Multiaddr, int] | None = None
        self._data_due = 0
        self._answered = False
        self._out: deque[AutonatMessage] = deque()

    @property
    def finished(self) -> bool:
        return self._answered and not self._out

    def poll_transmit(self) -> bytes | None:
        """The next message to send, `None`: nothing now."""
        return self._out.popleft().encode() if self._out else None

    def receive_untrusted(self, data: bytes) -> None:
        """One message of the client."""
        message = AutonatMessage.decode_untrusted(data)
        if self._answered or self.dial is not None:
            raise RemoteProtocolError("a message after everything was said")
        if self._chosen is None:
            if message.dial_request is None:
                raise RemoteProtocolError("the first message has to be a DialRequest")
            self._requested(message.dial_request)
        elif message.data_response is None:
            raise RemoteProtocolError("expected data")
        else:
            self._paid(len(message.data_response.data or b""))

    def dialled(self, status: DialStatus) -> None:
        """The dial is over."""
        if self.dial is None or self._answered:
            raise LocalProtocolError("no dial was to be made")
        self._answer(ResponseStatus.OK, status)

    def _requested(self, request: DialRequest) -> None:
        if request.nonce is None or not request.addrs:
            raise RemoteProtocolError("a DialRequest needs addresses and a nonce")
        if not self._admitted:
            self._answer(ResponseStatus.REJECTED)
            return
        for index, raw in enumerate(request.addrs):
            found = decode_addrs_untrusted([raw])
            if found and self._may_dial(found[0]):
                self._choose(index, found[0], request.nonce)
                return
        self._answer(ResponseStatus.DIAL_REFUSED)

    def _choose(self, index: int, addr: Multiaddr, nonce: int) -> None:
        self._chosen = index, addr, nonce
        if addr.ip() == self._observed:
            self.dial = Dial(addr, nonce, 0.0)
        elif not self._may_take_data():
            self._answer(ResponseStatus.REJECTED)
        else:
            self._data_due = self._rng.randint(limits.AUTONAT_MIN_DIAL_DATA, limits.AUTONAT_MAX_DIAL_DATA)
            self._out.append(AutonatMessage(data_request=DialDataRequest(addr_index=index, num_bytes=self._data_due)))

    def _paid(self, size: int) -> None:
        left = self._data_due - self.received_bytes
        if size < min(_SMALLEST_DATA, left):
            raise RemoteProtocolError(f"{size} bytes of data in one message")
        self.received_bytes += size
        if self.received_bytes >= self._data_due:
            assert self._chosen is not None
            _, addr, nonce = self._chosen
            self.dial = Dial(addr, nonce, self._rng.uniform(0, FOREIGN_WAIT))

    def _answer(self, status: ResponseStatus, dial_status: DialStatus | None = None) -> None:
        self._answered = True
        index = None if self._chosen is None or dial_status is None else self._chosen[0]
        response = DialResponse(status=status, addr_index=index, dial_status=dial_status)
        self._out.append(AutonatMessage(dial_response=response))


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server said."""

    status: ResponseStatus
    dial_status: DialStatus


class AskedRequest:
    """The client's side: one address at a time, so that an answer is about exactly that."""

    def __init__(self, addr: Multiaddr, nonce: int) -> None:
        self.answer: Answer | None = None
        self.paid_bytes = 0
        self._due = 0
        self._out: AutonatMessage | None = AutonatMessage(
            dial_request=DialRequest(addrs=(addr.to_bytes(),), nonce=nonce)
        )

    def poll_transmit(self) -> bytes | None:
        """The next message to send, `None`: nothing now."""
        if self._out is not None:
            message, self._out = self._out, None
            return message.encode()
        if self._due:
            size = min(self._due, limits.AUTONAT_MAX_DATA_BYTES)
            self._due -= size
            self.paid_bytes += size
            return AutonatMessage(data_response=DialDataResponse(data=bytes(size))).encode()
        return None

    def receive_untrusted(self, data: bytes) -> None:
        """One message of the server."""
        message = AutonatMessage.decode_untrusted(data)
        if self.answer is not None:
            raise RemoteProtocolError("a message after the answer")
        if message.dial_response is not None:
            self._answered(message.dial_response)
        elif message.data_request is not None:
            self._asked_for_data(message.data_request)
        else:
            raise RemoteProtocolError("neither an answer nor a request for data")

    def _answered(self, response: DialResponse) -> None:
        if response.addr_index:
            raise RemoteProtocolError("the answer is about an address that was not asked about")
        try:
            status = ResponseStatus(response.status or 0)
            dial_status = DialStatus(response.dial_status or 0)
        except ValueError:
            raise RemoteProtocolError("unknown status") from None
        self.answer = Answer(status, dial_status)

    def _asked_for_data(self, request: DialDataRequest) -> None:
        if self._due or self.paid_bytes:
            raise RemoteProtocolError("asks for data twice")
        if request.addr_index or not 0 < (request.num_bytes or 0) <= limits.AUTONAT_MAX_DIAL_DATA:
            raise RemoteProtocolError(f"asks for {request.num_bytes} bytes of data")
        self._due = request.num_bytes or 0
