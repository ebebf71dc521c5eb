"""Drivers of the relay's and the hole punch's messages: both ends of hop and stop, and both sides of DCUtR."""

from __future__ import annotations

import contextlib
import random

import fuzz_corpus as corpus
from fuzz_machines import Driver, Transcript

from lattica_protocols.dcutr import PunchExchange, PunchMessage, choose_targets
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import PUNCH_MAX_TARGETS, PUNCH_MAX_UNPROVEN
from lattica_protocols.relay.messages import (
    HopMessage,
    HopType,
    RelayPeer,
    Reservation,
    Status,
    StopMessage,
    hop_status,
    peer_untrusted,
    stop_status,
)
from lattica_protocols.relay.voucher import Voucher


class RelayMessages(Driver):
    name = "relay.messages"

    def seeds(self) -> list[Transcript]:
        peer = RelayPeer.make(corpus.OTHER, corpus.ADDRS[:2])
        voucher = Voucher(corpus.PEER, corpus.OTHER, 1_800_000_000).seal(corpus.KEY)
        granted = Reservation(expire=1_800_000_000, addrs=(corpus.ADDRS[0].to_bytes(),), voucher=voucher)
        return [
            (HopMessage(type=HopType.RESERVE).encode(), HopMessage(type=HopType.CONNECT, peer=peer).encode()),
            (HopMessage(type=HopType.STATUS, reservation=granted, status=Status.OK).encode(), hop_status(Status.OK)),
            (StopMessage(type=0, peer=peer).encode(), stop_status(Status.OK), voucher),
        ]

    def run(self, parts: list[bytes], rng: random.Random) -> None:
        for part in parts:
            for kind in (HopMessage, StopMessage):
                with contextlib.suppress(RemoteProtocolError):
                    message = kind.decode_untrusted(part)
                    peer_untrusted(message.peer)
            with contextlib.suppress(RemoteProtocolError):
                voucher = HopMessage.decode_untrusted(part).reservation
                if voucher is not None and voucher.voucher:
                    Voucher.open_untrusted(voucher.voucher)
            Voucher.open_untrusted(part)


class PunchPartner(Driver):
    name = "dcutr.PunchExchange"
    covers = (PunchExchange,)

    def seeds(self) -> list[Transcript]:
        addrs = tuple(addr.to_bytes() for addr in corpus.ADDRS)
        connect = PunchMessage(type=100, addrs=addrs, token=bytes(16)).encode()
        return [(connect,), (connect, PunchMessage(type=300).encode())]

    def generate(self, rng: random.Random) -> list[bytes]:  # type: ignore[override]
        return [corpus.random_message(PunchMessage, rng).encode() for _ in range(rng.choice((1, 2, 3)))]

    def run(self, parts: list[bytes], rng: random.Random) -> None:
        exchange = PunchExchange(initiator=rng.random() < 0.5, addrs=corpus.ADDRS, token=bytes(16), now=0.0)
        for part in parts:
            while exchange.poll_transmit() is not None:
                pass
            exchange.receive_untrusted(part, rng.choice((0.0, 0.1, 9.0)))
            if exchange.partner is not None:
                proven = {ip for addr in corpus.ADDRS[:1] if (ip := addr.ip()) is not None}
                targets = choose_targets(exchange.partner.addrs, proven=proven, own_networks=[], own_public=[])
                assert len(targets) <= PUNCH_MAX_TARGETS + PUNCH_MAX_UNPROVEN


DRIVERS: list[Driver] = [RelayMessages(), PunchPartner()]
