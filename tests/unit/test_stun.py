"""STUN, by the vectors of RFC 5769: messages, the server that answers strangers, and the client."""

import json
import random
from hashlib import md5
from pathlib import Path

import pytest

from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.limits import STUN_MAX_SOURCES, STUN_REQUEST_BURST, STUN_REQUESTS_PER_SECOND
from lattica_protocols.stun import (
    Attribute,
    MessageType,
    StunMessage,
    decode_address_untrusted,
    decode_error_untrusted,
    decode_message_untrusted,
    encode_address,
    encode_change_request,
    encode_message,
    is_stun,
)
from lattica_protocols.stun_client import ATTEMPTS, Answered, Failed, StunClient
from lattica_protocols.stun_server import MIN_ANSWER_BYTES, StunServer

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "stun-rfc5769.json").read_text())
KEY = VECTORS["password"].encode()
SERVER = ("203.0.113.1", 3478)
OTHER = ("203.0.113.2", 3479)
CLIENT = ("198.51.100.7", 40000)


def vector(name: str) -> bytes:
    return bytes.fromhex(VECTORS[name])


# -- messages ---------------------------------------------------------------------------------------------------------
def test_the_sample_request_of_rfc_5769() -> None:
    message = decode_message_untrusted(vector("request"))
    assert message.type is MessageType.REQUEST
    assert message.transaction_id.hex() == "b7e7a701bc34d686fa87dfae"
    assert message.get(Attribute.SOFTWARE) == b"STUN test client"
    assert message.get(Attribute.USERNAME) == b"evtj:h6vY"
    assert message.get(Attribute.PRIORITY) == bytes.fromhex("6e0001ff")
    assert message.is_signed_by(KEY)
    assert not message.is_signed_by(KEY + b"x")
    assert message.unknown == []


@pytest.mark.parametrize(
    ("name", "mapped"),
    [
        ("ipv4_response", ("192.0.2.1", 32853)),
        ("ipv6_response", ("2001:db8:1234:5678:11:2233:4455:6677", 32853)),
    ],
)
def test_the_sample_responses_of_rfc_5769(name: str, mapped: tuple[str, int]) -> None:
    message = decode_message_untrusted(vector(name))
    assert message.type is MessageType.SUCCESS
    assert message.mapped_untrusted == mapped
    assert message.is_signed_by(KEY)
    rest = StunMessage(message.type, message.transaction_id, message.attributes[:-1])
    ours = encode_message(rest, key=KEY)
    # The samples fill attributes up with spaces, we do with zeros: all else is equal.
    assert len(ours) == len(vector(name))
    again = decode_message_untrusted(ours)
    assert again.mapped_untrusted == mapped
    assert again.is_signed_by(KEY)
    assert encode_address(mapped, message.transaction_id) == message.get(Attribute.XOR_MAPPED_ADDRESS)


def test_the_long_term_request_of_rfc_5769() -> None:
    message = decode_message_untrusted(vector("long_term_request"))
    key = md5("マトリックス:example.org:TheMatrIX".encode(), usedforsecurity=False).digest()
    assert message.is_signed_by(key)
    assert message.unknown == [0x15, 0x14]
    rest = StunMessage(message.type, message.transaction_id, message.attributes[:-1])
    assert encode_message(rest, key=key, fingerprint=False) == vector("long_term_request")


@pytest.mark.parametrize("at", range(0, 100, 5))
def test_a_changed_byte_is_found(at: int) -> None:
    data = bytearray(vector("request"))
    data[at] ^= 0x11
    with pytest.raises(RemoteProtocolError):
        decode_message_untrusted(bytes(data))


def test_what_follows_the_integrity_does_not_count() -> None:
    signed = encode_message(StunMessage(MessageType.REQUEST, bytes(12)), key=KEY, fingerprint=False)
    extra = bytes.fromhex("00250000")
    data = signed[:2] + (len(signed) - 20 + len(extra)).to_bytes(2, "big") + signed[4:] + extra
    message = decode_message_untrusted(data)
    assert message.is_signed_by(KEY)
    assert message.get(Attribute.USE_CANDIDATE) is None


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a STUN"),
        (b"\x40" + vector("ipv4_response")[1:], "not a STUN"),
        (vector("ipv4_response")[:-4], "length"),
        (b"\x00\x03" + vector("ipv4_response")[2:], "type 0x0003"),
        (bytes.fromhex("000100042112a442") + bytes(12) + bytes.fromhex("80220005"), "cut off"),
        (bytes.fromhex("000100082112a442") + bytes(12) + bytes.fromhex("80280004") + bytes(4), "fingerprint"),
        (bytes.fromhex("000100082112a442") + bytes(12) + bytes.fromhex("00080004") + bytes(4), "integrity"),
        (bytes.fromhex("000100902112a442") + bytes(12) + bytes.fromhex("80220000") * 36, "too many"),
        (bytes.fromhex("000105fc2112a442") + bytes(12) + bytes(0x5FC), "1552 bytes"),
    ],
)
def test_broken_messages(data: bytes, reason: str) -> None:
    with pytest.raises(RemoteProtocolError, match=reason):
        decode_message_untrusted(data)


@pytest.mark.parametrize("value", ["", "0001", "000304d20a000001", "00010000", "000204d20a000001"])
def test_broken_addresses(value: str) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_address_untrusted(bytes.fromhex(value), None)


def test_quic_is_not_stun() -> None:
    assert not is_stun(b"\xc0" + bytes(40))
    assert is_stun(vector("request"))


# -- the server -------------------------------------------------------------------------------------------------------
def request(*attributes: tuple[int, bytes], fingerprint: bool = False) -> bytes:
    return encode_message(StunMessage(MessageType.REQUEST, b"t" * 12, attributes), fingerprint=fingerprint)


def test_the_server_says_what_it_sees() -> None:
    data = request((Attribute.SOFTWARE, bytes(60)))
    reply = StunServer().receive_request(data, CLIENT, 0.0, origin=SERVER, other=OTHER)
    assert reply is not None
    assert (reply.to, reply.other_ip, reply.other_port) == (CLIENT, False, False)
    answer = decode_message_untrusted(reply.data)
    assert answer.mapped_untrusted == CLIENT
    assert answer.address_untrusted(Attribute.RESPONSE_ORIGIN) == SERVER
    assert answer.address_untrusted(Attribute.OTHER_ADDRESS) == OTHER
    assert answer.transaction_id == b"t" * 12


@pytest.mark.parametrize("source", [CLIENT, ("2001:db8::7", 1)])
@pytest.mark.parametrize("padding", range(0, 101, 4))
def test_an_answer_is_not_longer_than_its_request(source: tuple[str, int], padding: int) -> None:
    data = request((Attribute.SOFTWARE, bytes(padding)), (Attribute.CHANGE_REQUEST, bytes(4)))
    for more in (b"", bytes.fromhex("7fff0000") * 8):
        long = data[:2] + (len(data) + len(more) - 20).to_bytes(2, "big") + data[4:] + more
        reply = StunServer().receive_request(long, source, 0.0, origin=SERVER, other=OTHER)
        assert reply is not None
        assert len(reply.data) <= max(MIN_ANSWER_BYTES, len(long))
        kind = decode_message_untrusted(reply.data).type
        assert kind is (MessageType.ERROR if more else MessageType.SUCCESS)


def test_the_server_changes_address_only_where_it_has_another() -> None:
    server = StunServer()
    both = request((Attribute.CHANGE_REQUEST, encode_change_request(ip=True, port=True)), fingerprint=True)
    reply = server.receive_request(both, CLIENT, 0.0, origin=SERVER, other=OTHER)
    assert reply is not None
    assert (reply.other_ip, reply.other_port) == (True, True)
    for other in (None, (SERVER[0], 1)):
        reply = server.receive_request(both, CLIENT, 0.0, origin=SERVER, other=other)
        assert reply is not None
        answer = decode_message_untrusted(reply.data)
        assert decode_error_untrusted(answer.get(Attribute.ERROR_CODE) or b"") == 420
        assert not reply.other_ip


def test_the_server_answers_to_the_asking_address_only() -> None:
    reply = StunServer().receive_request(request((Attribute.RESPONSE_PORT, bytes.fromhex("1f900000"))), CLIENT, 0.0)
    assert reply is not None
    assert reply.to == (CLIENT[0], 8080)
    assert decode_message_untrusted(reply.data).mapped_untrusted == CLIENT


def test_the_server_ignores_everything_but_requests() -> None:
    server = StunServer()
    for kind in (MessageType.SUCCESS, MessageType.ERROR, MessageType.INDICATION):
        assert server.receive_request(encode_message(StunMessage(kind, bytes(12))), CLIENT, 0.0) is None
    assert server.receive_request(b"\x00\x01garbage", CLIENT, 0.0) is None
    assert server.receive_request(request((Attribute.RESPONSE_PORT, bytes(4))), CLIENT, 0.0) is None
    assert server.answered == 0


def test_the_budget_of_an_address() -> None:
    server = StunServer()
    data = request()
    answered = [server.receive_request(data, (CLIENT[0], port), 0.0) for port in range(1, 1001)]
    assert sum(reply is not None for reply in answered) == STUN_REQUEST_BURST
    assert server.receive_request(data, ("198.51.100.8", 1), 0.0) is not None
    assert server.receive_request(data, CLIENT, 2 / STUN_REQUESTS_PER_SECOND) is not None
    same_customer = [server.receive_request(data, (f"2001:db8::{i:x}", 1), 0.0) for i in range(1, 1001)]
    assert sum(reply is not None for reply in same_customer) == STUN_REQUEST_BURST


def test_a_flood_of_forged_addresses_is_bounded_in_memory_and_answers() -> None:
    server = StunServer()
    data = request()
    for i in range(3 * STUN_MAX_SOURCES):
        server.receive_request(data, (f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}", 1), 0.0)
    assert len(server._sources) == STUN_MAX_SOURCES
    assert server.answered <= 2001


# -- the client -------------------------------------------------------------------------------------------------------
def ask(client: StunClient, now: float = 0.0, **options: object) -> tuple[int, bytes]:
    number = client.request(0, SERVER, now, **options)  # type: ignore[arg-type]
    (datagram,) = client.poll_transmit()
    assert (datagram.socket, datagram.to) == (0, SERVER)
    return number, datagram.data


def answer_to(data: bytes, mapped: tuple[str, int] = CLIENT, **options: object) -> bytes:
    reply = StunServer().receive_request(data, mapped, 0.0, **options)  # type: ignore[arg-type]
    assert reply is not None
    return reply.data


def test_a_request_and_its_answer() -> None:
    client = StunClient(random.Random(1))
    number, data = ask(client, 1.0)
    assert client.receive_datagram(0, answer_to(data, origin=SERVER, other=OTHER), SERVER, 1.04)
    event = client.next_event()
    assert isinstance(event, Answered)
    assert (event.number, event.mapped, event.source, event.other) == (number, CLIENT, SERVER, OTHER)
    assert event.rtt == pytest.approx(0.04)
    assert client.next_timeout() is None


def test_requests_are_repeated_and_given_up() -> None:
    client = StunClient(random.Random(1))
    number, data = ask(client)
    sent = []
    while (due := client.next_timeout()) is not None:
        client.handle_timer(due)
        for datagram in client.poll_transmit():
            assert datagram.data == data
            sent.append(due)
    assert sent == [0.25, 0.75, 1.75]
    assert ATTEMPTS == 4
    assert client.next_event() == Failed(number, None)
    assert not client.receive_datagram(0, answer_to(data), SERVER, 5.0)


@pytest.mark.parametrize("seed", range(5))
def test_forged_answers_are_ignored(seed: int) -> None:
    rng = random.Random(seed)
    client = StunClient(rng)
    _, data = ask(client)
    good = answer_to(data)
    forged = bytearray(good)
    forged[8 + rng.randrange(12)] ^= 1 << rng.randrange(8)
    assert not client.receive_datagram(0, bytes(forged), SERVER, 0.1), "a transaction id that is not ours"
    assert not client.receive_datagram(1, good, SERVER, 0.1), "another socket"
    assert not client.receive_datagram(0, good, (SERVER[0], 1), 0.1), "another port"
    assert not client.receive_datagram(0, good, ("203.0.113.9", SERVER[1]), 0.1), "another address"
    assert not client.receive_datagram(0, data, SERVER, 0.1), "our own request"
    unknown = StunMessage(MessageType.SUCCESS, data[8:20], ((0x7FFF, b""),))
    assert not client.receive_datagram(0, encode_message(unknown), SERVER, 0.1), "without an address"
    assert client.next_event() is None
    assert client.receive_datagram(0, good, SERVER, 0.1)
    assert not client.receive_datagram(0, good, SERVER, 0.2), "twice"


def test_an_answer_from_the_other_address_must_come_from_there() -> None:
    client = StunClient(random.Random(1))
    _, data = ask(client, change_ip=True, change_port=True)
    good = answer_to(data, origin=SERVER, other=OTHER)
    for source in (SERVER, (SERVER[0], 3479), ("203.0.113.2", SERVER[1])):
        assert not client.receive_datagram(0, good, source, 0.1)
    assert client.receive_datagram(0, good, OTHER, 0.1)


def test_a_refusal() -> None:
    client = StunClient(random.Random(1))
    number, data = ask(client, change_port=True)
    refusal = answer_to(data)
    assert not client.receive_datagram(0, refusal, OTHER, 0.1)
    assert client.receive_datagram(0, refusal, SERVER, 0.1)
    assert client.next_event() == Failed(number, 420)
    number, data = ask(client)
    error = StunMessage(MessageType.ERROR, data[8:20], ((Attribute.ERROR_CODE, bytes.fromhex("00000414")),))
    assert client.receive_datagram(0, encode_message(error), SERVER, 0.1)
    assert client.next_event() == Failed(number, 420)


def test_too_many_requests_are_a_bug_of_ours() -> None:
    client = StunClient(random.Random(1))
    for _ in range(512):
        client.request(0, SERVER, 0.0)
    with pytest.raises(LocalProtocolError):
        client.request(0, SERVER, 0.0)
