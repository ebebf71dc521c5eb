"""Datagrams that belong to no connection: whom to let in, and what to answer everybody else.

Read from the version-independent part of the header (RFC 8999) and, for Initial packets of version 1, the token:

    long:   1xxxxxxx | version (4) | length, destination id | length, source id | …
    short:  01xxxxxx | destination id (8, as we issue them) | …

A stranger costs nothing until its Initial is admitted. From `QUIC_RETRY_THRESHOLD` half-open handshakes on it has to
return a token first (Retry, RFC 9000 section 8.1.2), which proves that its address is not made up; the number of
half-open handshakes is bounded, in total and for each address.
"""

from __future__ import annotations

import ipaddress
import os
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from aioquic._buffer import Buffer
from aioquic.quic.packet import (
    QuicProtocolVersion,
    encode_quic_retry,
    encode_quic_version_negotiation,
    pull_quic_header,
)
from aioquic.quic.retry import QuicRetryTokenHandler

from lattica.transports.quic_bulk import CONNECTION_ID_BYTES
from lattica.transports.quic_engine import RESET_TOKEN_BYTES, Address, Credentials
from lattica_protocols.limits import (
    MAX_QUIC_HALF_OPEN,
    MAX_QUIC_HALF_OPEN_PER_IP,
    MAX_QUIC_RESETS_PER_SECOND,
    QUIC_RETRY_THRESHOLD,
)
from lattica_protocols.nat.scope import customer_of

if TYPE_CHECKING:
    from lattica.transports.quic_connection import QuicLink

_VERSION: Final = QuicProtocolVersion.VERSION_1
_MIN_INITIAL_BYTES = 1200
_MIN_INITIAL_ID_BYTES = 8
_MAX_ID_BYTES = 20
_MIN_RESET_BYTES = 43
"""Shorter datagrams are not answered with a reset, so that two nodes do not reset each other for ever."""


@dataclass(frozen=True)
class Admitted:
    """A new inbound connection may be made with these arguments of `Engine`."""

    destination_id: bytes
    original_destination_id: bytes
    retry_source_id: bytes | None


@dataclass(frozen=True)
class Answer:
    """Send this back."""

    data: bytes


class Admission:
    """Judges datagrams of strangers. One for all sockets of a node."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._tokens = QuicRetryTokenHandler()
        self._half_open: dict[QuicLink, str] = {}
        self._by_network: Counter[str] = Counter()
        self._answers_left = float(MAX_QUIC_RESETS_PER_SECOND)
        self._answers_at = 0.0

    @property
    def half_open(self) -> int:
        """Inbound handshakes under way."""
        return len(self._half_open)

    def opened(self, link: QuicLink, addr: Address) -> None:
        """`link` was made for an admitted Initial."""
        network = _customer(addr)
        self._half_open[link] = network
        self._by_network[network] += 1

    def settled(self, link: QuicLink) -> None:
        """The handshake is over, one way or the other. Safe to call again, and for outbound links."""
        network = self._half_open.pop(link, None)
        if network is not None:
            self._by_network[network] -= 1
            if not self._by_network[network]:
                del self._by_network[network]

    def judge(self, data: bytes, addr: Address, accepting: bool, now: float) -> Admitted | Answer | None:
        """What to do with a QUIC datagram of unknown destination id. `None`: nothing."""
        if not data[0] & 0x80:
            return self._stateless_reset(data, now)
        ids = _connection_ids(data)
        if ids is None or len(data) < _MIN_INITIAL_BYTES or not accepting:
            return None
        destination_id, source_id = ids
        version = int.from_bytes(data[1:5], "big")
        if version == QuicProtocolVersion.NEGOTIATION:
            return None
        if version != _VERSION:
            if not self.may_answer(now):
                return None
            return Answer(encode_quic_version_negotiation(destination_id, source_id, [_VERSION]))
        if data[0] & 0x30 or len(destination_id) < _MIN_INITIAL_ID_BYTES:
            return None
        return self._judge_initial(data, destination_id, source_id, addr, now)

    def may_answer(self, now: float) -> bool:
        """Whether the budget for work on behalf of strangers is not spent."""
        self._answers_left = min(
            float(MAX_QUIC_RESETS_PER_SECOND),
            self._answers_left + (now - self._answers_at) * MAX_QUIC_RESETS_PER_SECOND,
        )
        self._answers_at = now
        if self._answers_left < 1:
            return False
        self._answers_left -= 1
        return True

    def _judge_initial(
        self, data: bytes, destination_id: bytes, source_id: bytes, addr: Address, now: float
    ) -> Admitted | Answer | None:
        try:
            token = pull_quic_header(Buffer(data=data), host_cid_length=CONNECTION_ID_BYTES).token
        except ValueError:
            return None
        if self.half_open >= MAX_QUIC_HALF_OPEN:
            return None
        if self._by_network[_customer(addr)] >= MAX_QUIC_HALF_OPEN_PER_IP:
            return None
        if token:
            try:
                original = self._tokens.validate_token(
                    address=addr, destination_cid=destination_id, token=token, now=now
                )
            except ValueError:
                pass  # of an earlier run of ours, or made up: as if there were none
            else:
                return Admitted(destination_id, original, destination_id)
        if self.half_open < QUIC_RETRY_THRESHOLD:
            return Admitted(destination_id, destination_id, None)
        retry_id = os.urandom(CONNECTION_ID_BYTES)
        new_token = self._tokens.create_token(
            address=addr,
            original_destination_connection_id=destination_id,
            retry_source_connection_id=retry_id,
            now=now,
        )
        return Answer(
            encode_quic_retry(
                version=_VERSION,
                source_cid=retry_id,
                destination_cid=source_id,
                original_destination_cid=destination_id,
                retry_token=new_token,
            )
        )

    def _stateless_reset(self, data: bytes, now: float) -> Answer | None:
        """The peer has a connection that we do not know, probably since before we were restarted: tell it."""
        if len(data) < _MIN_RESET_BYTES or not self.may_answer(now):
            return None
        token = self._credentials.reset_token(data[1 : 1 + CONNECTION_ID_BYTES])
        noise = bytearray(os.urandom(_MIN_RESET_BYTES - 1 - RESET_TOKEN_BYTES))
        noise[0] = noise[0] & 0x3F | 0x40
        return Answer(bytes(noise) + token)


def destination_id(data: bytes) -> bytes | None:
    """The destination connection id of a QUIC datagram, `None` when it is too short to have one."""
    if data[0] & 0x80:
        ids = _connection_ids(data)
        return None if ids is None else ids[0]
    if len(data) < 1 + CONNECTION_ID_BYTES:
        return None
    return data[1 : 1 + CONNECTION_ID_BYTES]


def source_id(data: bytes) -> bytes | None:
    """The source connection id of a QUIC datagram with a long header, `None` for any other or a cut-off one."""
    if not data or not data[0] & 0x80:
        return None
    ids = _connection_ids(data)
    return None if ids is None else ids[1]


def _connection_ids(data: bytes) -> tuple[bytes, bytes] | None:
    """(destination, source) of a long header."""
    if len(data) < 7:
        return None
    end = 6 + data[5]
    if data[5] > _MAX_ID_BYTES or len(data) <= end:
        return None
    source_end = end + 1 + data[end]
    if data[end] > _MAX_ID_BYTES or len(data) < source_end:
        return None
    return data[6:end], data[end + 1 : source_end]


def _customer(addr: Address) -> str:
    return str(customer_of(ipaddress.ip_address(addr[0].partition("%")[0])))
