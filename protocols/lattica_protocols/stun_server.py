"""Answers to STUN Binding requests of strangers, so that a network of daemons needs no other servers.

An answer goes to the address that the request came from (or another port of it, RESPONSE-PORT), and is no longer than
`MIN_ANSWER_BYTES` or the request, whichever is more: what does not fit of RESPONSE-ORIGIN, OTHER-ADDRESS and
FINGERPRINT is left out. So nobody gets more out of us than he puts in, and nothing goes to a third party; what a forged
source can make us send is bounded for each address and in total.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import (
    STUN_MAX_SOURCES,
    STUN_REQUEST_BURST,
    STUN_REQUESTS_PER_SECOND,
    STUN_TOTAL_PER_SECOND,
)
from lattica_protocols.stun import (
    HEADER_BYTES,
    Attribute,
    MessageType,
    SocketAddr,
    StunMessage,
    decode_change_request_untrusted,
    decode_message_untrusted,
    decode_response_port_untrusted,
    encode_address,
    encode_error,
    encode_message,
)

MIN_ANSWER_BYTES: Final = 44
"""An answer with nothing but an IPv6 XOR-MAPPED-ADDRESS. A bare request has 20 bytes, 48 with its IP and UDP headers;
the answer has 92 then, and 60 over IPv4."""
_FINGERPRINT_BYTES = 8
_UNKNOWN_ATTRIBUTE = 420


@dataclass(frozen=True, slots=True)
class StunReply:
    """Send `data` to `to`, from the other address and port that `other_ip` and `other_port` ask for."""

    data: bytes
    to: SocketAddr
    other_ip: bool = False
    other_port: bool = False


@dataclass(slots=True)
class _Budget:
    tokens: float
    updated: float

    def take(self, now: float, rate: float, burst: float) -> bool:
        self.tokens = min(burst, self.tokens + max(0.0, now - self.updated) * rate)
        self.updated = now
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


class StunServer:
    """One for all sockets of a node."""

    def __init__(self, *, rate: float = STUN_REQUESTS_PER_SECOND, burst: float = STUN_REQUEST_BURST) -> None:
        self._rate = rate
        self._burst = burst
        self._sources: OrderedDict[str, _Budget] = OrderedDict()
        self._total = _Budget(STUN_TOTAL_PER_SECOND, 0.0)
        self.answered = 0
        self.refused = 0
        """Requests over a budget."""

    def receive_request(
        self,
        data: bytes,
        source: SocketAddr,
        now: float,
        *,
        origin: SocketAddr | None = None,
        other: SocketAddr | None = None,
    ) -> StunReply | None:
        """The answer to a datagram from `source`, `None` when there is to be none.

        `origin`: the address it arrived at, where that is known. `other`: an address of ours with another port, and
        another IP where we have two; answers can be sent from each combination of the two. `None` when there is none.
        """
        try:
            request = decode_message_untrusted(data)
            if request.type is not MessageType.REQUEST or not self._admit(source, now):
                return None
            return self._answer(request, len(data), source, origin, other)
        except RemoteProtocolError:
            return None

    def _answer(
        self,
        request: StunMessage,
        request_bytes: int,
        source: SocketAddr,
        origin: SocketAddr | None,
        other: SocketAddr | None,
    ) -> StunReply | None:
        to = source
        change = request.get(Attribute.CHANGE_REQUEST)
        other_ip, other_port = (False, False) if change is None else decode_change_request_untrusted(change)
        port = request.get(Attribute.RESPONSE_PORT)
        if port is not None:
            to = (source[0], decode_response_port_untrusted(port))
        unknown = request.unknown
        if (other_ip and (other is None or origin is None or other[0] == origin[0])) or (other_port and other is None):
            unknown.append(Attribute.CHANGE_REQUEST)
        self.answered += 1
        most = max(MIN_ANSWER_BYTES, request_bytes)
        if unknown:
            return StunReply(_refusal(request, unknown, most), source)
        if origin is not None and other is not None:
            origin = (other[0] if other_ip else origin[0], other[1] if other_port else origin[1])
        answer = _success(request, source, most, origin, other)
        return StunReply(answer, to, other_ip, other_port)

    def _admit(self, source: SocketAddr, now: float) -> bool:
        network = source_network(source[0])
        budget = self._sources.pop(network, None) or _Budget(self._burst, now)
        self._sources[network] = budget  # the end of the order: asked last
        if len(self._sources) > STUN_MAX_SOURCES:
            self._sources.popitem(last=False)
        ok = budget.take(now, self._rate, self._burst)
        ok = ok and self._total.take(now, STUN_TOTAL_PER_SECOND, STUN_TOTAL_PER_SECOND)
        self.refused += not ok
        return ok


def source_network(host: str) -> str:
    """What counts as one stranger: an IPv4 address, or the /64 that one IPv6 customer has to himself."""
    ip = ipaddress.ip_address(host.partition("%")[0])
    return str(ip) if ip.version == 4 else str(ipaddress.IPv6Network((ip, 64), strict=False))


def _success(
    request: StunMessage, source: SocketAddr, most: int, origin: SocketAddr | None, other: SocketAddr | None
) -> bytes:
    attributes = [(int(Attribute.XOR_MAPPED_ADDRESS), encode_address(source, request.transaction_id))]
    size = HEADER_BYTES + 4 + len(attributes[0][1])
    for number, addr in ((Attribute.OTHER_ADDRESS, other), (Attribute.RESPONSE_ORIGIN, origin)):
        value = b"" if addr is None else encode_address(addr, None)
        if value and size + 4 + len(value) <= most:
            attributes.append((int(number), value))
            size += 4 + len(value)
    message = StunMessage(MessageType.SUCCESS, request.transaction_id, tuple(attributes))
    return encode_message(message, fingerprint=size + _FINGERPRINT_BYTES <= most)


def _refusal(request: StunMessage, unknown: list[int], most: int) -> bytes:
    error = (int(Attribute.ERROR_CODE), encode_error(_UNKNOWN_ATTRIBUTE, ""))
    room = (most - HEADER_BYTES - 4 - len(error[1]) - 4) // 4 * 4
    numbers = b"".join(number.to_bytes(2, "big") for number in unknown)[:room]
    message = StunMessage(
        MessageType.ERROR, request.transaction_id, (error, (int(Attribute.UNKNOWN_ATTRIBUTES), numbers))
    )
    return encode_message(message, fingerprint=False)
