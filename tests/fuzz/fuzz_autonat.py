"""Drivers of AutoNAT: both sides of a version 2 request, and what version 1 and the dial-back parse."""

from __future__ import annotations

import contextlib
import ipaddress
import random

import fuzz_corpus as corpus
from fuzz_machines import Driver, Transcript

from lattica_protocols.autonat.admission import dial_reason
from lattica_protocols.autonat.exchange import AskedRequest, ServedRequest
from lattica_protocols.autonat.messages import (
    AutonatMessage,
    DialBack,
    DialBackResponse,
    DialDataRequest,
    DialDataResponse,
    DialRequest,
    DialResponse,
    V1Dial,
    V1Message,
    V1Peer,
    V1Status,
    v1_addrs_untrusted,
    v1_response,
)
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import AUTONAT_MAX_DIAL_DATA, AUTONAT_MIN_DIAL_DATA
from lattica_protocols.peer_id import PeerId

_ADDRS = tuple(addr.to_bytes() for addr in corpus.ADDRS)
_DATA = AutonatMessage(data_response=DialDataResponse(data=bytes(4096))).encode()


def v1_request(peer: PeerId | None) -> bytes:
    return V1Message(type=0, dial=V1Dial(peer=V1Peer(id=peer and peer.to_bytes(), addrs=_ADDRS))).encode()


class AutonatRequest(Driver):
    name = "autonat.exchange"
    covers = (ServedRequest, AskedRequest)

    def seeds(self) -> list[Transcript]:
        request = AutonatMessage(dial_request=DialRequest(addrs=_ADDRS, nonce=7)).encode()
        answer = AutonatMessage(dial_response=DialResponse(status=200, dial_status=200)).encode()
        wanted = AutonatMessage(data_request=DialDataRequest(num_bytes=50_000)).encode()
        return [(request, *[_DATA] * 25), (wanted, answer), (answer,)]

    def generate(self, rng: random.Random) -> list[bytes]:  # type: ignore[override]
        return [corpus.random_message(AutonatMessage, rng).encode() for _ in range(rng.choice((1, 2, 3)))]

    def run(self, parts: list[bytes], rng: random.Random) -> None:
        observed = ipaddress.ip_address(rng.choice(("1.2.3.4", "198.18.0.1", "10.0.0.1")))
        served = ServedRequest(lambda addr: dial_reason(addr, observed, []) is None, lambda: True, observed, rng)
        with contextlib.suppress(RemoteProtocolError):
            for part in parts:
                while served.poll_transmit() is not None:
                    pass
                served.receive_untrusted(part)
        if served.dial is not None and served.dial.addr.ip() != observed:
            assert served.received_bytes >= AUTONAT_MIN_DIAL_DATA
        asked = AskedRequest(corpus.ADDRS[0], 7)
        try:
            for part in parts:
                while asked.poll_transmit() is not None:
                    pass
                asked.receive_untrusted(part)
        finally:
            assert asked.paid_bytes <= AUTONAT_MAX_DIAL_DATA


class AutonatOthers(Driver):
    name = "autonat.messages"

    def seeds(self) -> list[Transcript]:
        answer = v1_response(V1Status.OK, "text", corpus.ADDRS[0])
        return [(v1_request(corpus.PEER), answer), (DialBack(nonce=9).encode(), b"\x08\x00")]

    def run(self, parts: list[bytes], rng: random.Random) -> None:
        for part in parts:
            with contextlib.suppress(RemoteProtocolError):
                v1_addrs_untrusted(part, corpus.PEER)
            with contextlib.suppress(RemoteProtocolError):
                DialBack.decode_untrusted(part)
            DialBackResponse.decode_untrusted(part)


DRIVERS: list[Driver] = [AutonatRequest(), AutonatOthers()]
