"""Seeds and drivers for the machines that deal with NATs: what arrives there comes from anybody who knows our port."""

from __future__ import annotations

import random

from fuzz_machines import Driver, Transcript

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.nat.discovery import Discovery, Observer
from lattica_protocols.nat.punch import Puncher
from lattica_protocols.nat.punch_plan import PunchPlan, Technique
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


DRIVERS: list[Driver] = [StunClients(), StunServers(), Observers(), Partner()]
