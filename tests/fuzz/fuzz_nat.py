"""Seeds and drivers for the machines that deal with NATs: what arrives there comes from anybody who knows our port."""

from __future__ import annotations

import random

import fuzz_corpus as corpus
from fuzz_machines import Driver, Transcript

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import NAT_MAX_PROBES
from lattica_protocols.nat.behaviour import NatBehaviour
from lattica_protocols.nat.discovery import Discovery, Observer
from lattica_protocols.nat.guess import GuessExchange, GuessMessage, refusal
from lattica_protocols.nat.punch import Puncher, most_probes
from lattica_protocols.nat.punch_plan import PunchPlan, Side, Technique
from lattica_protocols.nat.report import NatReport
from lattica_protocols.nat.sampler import SAMPLES, SECONDS, PortSampler
from lattica_protocols.stun import (
    Attribute,
    MessageType,
    StunMessage,
    decode_message_untrusted,
    encode_address,
    encode_change_request,
    encode_error,
    encode_message,
    encode_response_port,
)
from lattica_protocols.stun_client import StunClient
from lattica_protocols.stun_server import MIN_ANSWER_BYTES, StunServer

SERVER = ("203.0.113.1", 3478)
OTHER = ("203.0.113.2", 3479)
CLIENT = ("198.51.100.7", 40000)


def addresses() -> list[bytes]:
    return [encode_address(CLIENT, None), encode_address(("2001:db8::1", 9), bytes(12))]


def stun_messages(*, fingerprint: bool = True) -> list[bytes]:
    plain = StunMessage(MessageType.REQUEST, bytes(12))
    asking = StunMessage(
        MessageType.REQUEST,
        bytes(12),
        (
            (Attribute.SOFTWARE, b"x" * 40),
            (Attribute.CHANGE_REQUEST, encode_change_request(ip=True, port=True)),
            (Attribute.RESPONSE_PORT, encode_response_port(9)),
        ),
    )
    answer = StunMessage(
        MessageType.SUCCESS, bytes(12), ((Attribute.XOR_MAPPED_ADDRESS, encode_address(CLIENT, bytes(12))),)
    )
    refusal = StunMessage(MessageType.ERROR, bytes(12), ((Attribute.ERROR_CODE, encode_error(420, "")),))
    messages = [encode_message(message, fingerprint=fingerprint) for message in (plain, asking, answer, refusal)]
    return [*messages, encode_message(answer, key=b"k", fingerprint=fingerprint)]


class StunClients(Driver):
    """Requests of strangers."""

    name = "stun.StunServer"
    covers = (StunServer,)

    def seeds(self) -> list[Transcript]:
        return [tuple(stun_messages())]

    def run(self, parts: list[bytes], rng: random.Random) -> None:
        server = StunServer()
        for part in parts:
            reply = server.receive_request(part, CLIENT, 0.0, origin=SERVER, other=rng.choice((None, OTHER)))
            if reply is not None:
                assert reply.to[0] == CLIENT[0]
                assert len(reply.data) <= max(MIN_ANSWER_BYTES, len(part))


class StunServers(Driver):
    """Answers from somebody who sees our requests: the transaction id is put right."""

    name = "stun.StunClient"
    covers = (StunClient,)

    def seeds(self) -> list[Transcript]:
        return [tuple(stun_messages(fingerprint=False))]

    def run(self, parts: list[bytes], rng: random.Random) -> None:
        client = StunClient(rng)
        client.request(0, SERVER, 0.0)
        (sent,) = client.poll_transmit()
        for part in parts:
            client.receive_datagram(0, part[:8] + sent.data[8:20] + part[20:], SERVER, 0.1)
            while client.next_event() is not None:
                client.request(0, SERVER, 0.1)
                (sent,) = client.poll_transmit()


class Observers(Driver):
    """Observers that answer with whatever they like."""

    name = "nat.Discovery"
    covers = (Discovery,)

    def seeds(self) -> list[Transcript]:
        return [tuple(stun_messages(fingerprint=False))]

    def run(self, parts: list[bytes], rng: random.Random) -> None:
        asked = [(f"203.0.113.{i}", 3478) for i in range(1, 10)]
        machine = Discovery([Observer(addr) for addr in asked], rng, 0.0, lifetimes=(1.0, 10.0, 30.0))
        sent, now = 0, 0.0
        while (due := machine.next_timeout()) is not None:
            now = max(now, due)
            machine.handle_timer(now)
            for datagram in machine.poll_transmit():
                sent += 1
                part = rng.choice(parts) if parts else b""
                source = rng.choice((datagram.to, (datagram.to[0], 3479), ("203.0.113.99", 3479)))
                machine.receive_datagram(datagram.socket, part[:8] + datagram.data[8:20] + part[20:], source, now)
            while (event := machine.next_event()) is not None:
                assert len(event.behaviour.evidence) == 2
        assert sent < 300


class Partner(Driver):
    """A partner of a punch: the mutated message is signed with the key, which it has."""

    name = "nat.Puncher"
    covers = (Puncher,)

    def seeds(self) -> list[Transcript]:
        return [tuple(stun_messages(fingerprint=False))]

    def run(self, parts: list[bytes], rng: random.Random) -> None:
        key = bytes(32)
        plan = PunchPlan(Technique.SIMPLE, frozenset({CLIENT[0]}), (CLIENT,))
        machine = Puncher(plan, key, controlling=rng.random() < 0.5, rng=rng, now=0.0)
        waiting = [datagram.data[8:20] for datagram in machine.poll_transmit()]
        now, sent = 0.0, 0
        for part in parts:
            data = part
            if rng.random() < 0.8:
                try:
                    message = decode_message_untrusted(part)
                except RemoteProtocolError:
                    continue
                transaction_id = rng.choice([message.transaction_id, *waiting])
                rest = tuple(a for a in message.attributes if a[0] != Attribute.MESSAGE_INTEGRITY)
                data = encode_message(StunMessage(message.type, transaction_id, rest), key=key)
            now += rng.choice((0.0, 0.01, 1.0))
            machine.receive_datagram(0, data, rng.choice((CLIENT, SERVER, (CLIENT[0], rng.randrange(1, 65536)))), now)
            machine.handle_timer(now)
            sent += len(machine.poll_transmit())
            while machine.next_event() is not None:
                pass
        assert sent <= 20 * len(parts) + 40


class Sampled(Driver):
    """Observers that answer the questions right before a punch with whatever they like."""

    name = "nat.PortSampler"
    covers = (PortSampler,)

    def seeds(self) -> list[Transcript]:
        return [tuple(stun_messages(fingerprint=False))]

    def run(self, parts: list[bytes], rng: random.Random) -> None:
        machine = PortSampler([(f"203.0.113.{i}", 3478) for i in range(1, 5)], rng, 0.0)
        sent, now = 0, 0.0
        while (due := machine.next_timeout()) is not None:
            now = max(now, due)
            for datagram in machine.poll_transmit():
                sent += 1
                part = rng.choice(parts) if parts else b""
                data = part[:8] + datagram.data[8:20] + part[20:]
                machine.receive_datagram(datagram.socket, data, datagram.to, now)
            machine.handle_timer(now)
        assert now <= SECONDS
        assert sent <= 2 * (SAMPLES + 3)
        sampled = machine.next_event()
        assert sampled is not None
        assert 0 < sampled.allocation.low < sampled.allocation.high <= 65535


class Guesser(Driver):
    """A partner with whom ports are to be guessed, then what its claims make us send."""

    name = "nat.GuessExchange"
    covers = (GuessExchange,)

    def seeds(self) -> list[Transcript]:
        addrs = (corpus.ADDRS[0].to_bytes(),)
        block = NatReport(mapping=4, filtering=3, ports=4, low=30000, high=32047)
        counting = NatReport(mapping=4, filtering=3, ports=2, low=1024, high=65535, step=1, last=20007)
        return [
            (
                GuessMessage(type=1, key=bytes(16), nat=nat, addrs=addrs).encode(),
                GuessMessage(type=2, technique=technique, opens=True).encode(),
            )
            for nat, technique in ((block, 3), (counting, 2))
        ] + [(refusal(),)]

    def generate(self, rng: random.Random) -> list[bytes]:  # type: ignore[override]
        return [corpus.random_message(GuessMessage, rng).encode() for _ in range(rng.choice((1, 2, 3)))]

    def run(self, parts: list[bytes], rng: random.Random) -> None:
        exchange = GuessExchange(initiator=rng.random() < 0.5)
        own = Side(NatBehaviour(), (CLIENT,))
        proven = {str(addr.ip()) for addr in corpus.ADDRS[:1]}
        if exchange.initiator:
            exchange.offer(own, bytes(16), 0.0)
        for i, part in enumerate(parts):
            exchange.receive_untrusted(part, rng.choice((0.0, 0.1, 9.0)))
            if not exchange.initiator and i == 0:
                exchange.offer(own, bytes(16), 0.1)
        if exchange.technique is not None:
            plan = exchange.plan(proven, opener_ttl=2, opener_wait=0.1)
            machine = Puncher(plan, exchange.key, controlling=exchange.initiator, rng=rng, now=0.0)
            assert {datagram.to[0] for datagram in machine.poll_transmit()} <= proven
            assert most_probes(plan) <= NAT_MAX_PROBES


DRIVERS: list[Driver] = [StunClients(), StunServers(), Observers(), Partner(), Sampled(), Guesser()]
