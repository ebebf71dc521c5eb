"""A driver of mDNS: packets of anybody in the local network."""

from __future__ import annotations

import random

import fuzz_corpus as corpus
from fuzz_machines import Driver, Transcript

from lattica_protocols.limits import MDNS_MAX_ADDRS
from lattica_protocols.mdns.discovery import SERVICE, Mdns
from lattica_protocols.mdns.dns import encode_answer, encode_query


class Neighbours(Driver):
    name = "mdns.Mdns"
    covers = (Mdns,)

    def seeds(self) -> list[Transcript]:
        texts = [f"dnsaddr=/ip4/192.168.1.5/tcp/9/p2p/{corpus.OTHER}".encode()] * 2
        return [(encode_query(SERVICE), encode_answer(SERVICE, "x." + SERVICE, texts, 120))]

    def run(self, parts: list[bytes], rng: random.Random) -> None:
        machine, now, sent = Mdns(corpus.PEER, rng, 0.0), 0.0, 0
        machine.set_addrs(corpus.ADDRS[:1], now)
        for part in parts:
            machine.receive_datagram(part, now)
            now += rng.choice((0.0, 0.1, 1.0))
            machine.handle_timer(now)
            sent += len(machine.poll_transmit())
            while (event := machine.next_event()) is not None:
                assert len(event.addrs) <= MDNS_MAX_ADDRS
        assert sent <= 2 * len(parts)


DRIVERS: list[Driver] = [Neighbours()]
