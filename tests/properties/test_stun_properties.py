"""STUN over made-up messages: what is sent is what is read, and garbage is refused and nothing else."""

import ipaddress

from hypothesis import given
from hypothesis import strategies as st

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import STUN_MAX_ATTRIBUTES
from lattica_protocols.stun import (
    HEADER_BYTES,
    MAGIC_COOKIE,
    Attribute,
    MessageType,
    StunMessage,
    decode_address_untrusted,
    decode_change_request_untrusted,
    decode_error_untrusted,
    decode_message_untrusted,
    decode_response_port_untrusted,
    encode_address,
    encode_message,
)
from lattica_protocols.stun_server import MIN_ANSWER_BYTES, StunServer

addresses = st.tuples(st.ip_addresses().map(str), st.integers(1, 65535))
ids = st.binary(min_size=12, max_size=12)
numbers = st.one_of(st.sampled_from([int(a) for a in Attribute]), st.integers(0, 0xFFFF)).filter(
    lambda number: number not in (Attribute.FINGERPRINT, Attribute.MESSAGE_INTEGRITY)
)
attributes = st.lists(st.tuples(numbers, st.binary(max_size=24)), max_size=STUN_MAX_ATTRIBUTES - 1).map(tuple)


@given(st.sampled_from(MessageType), ids, attributes, st.none() | st.binary(min_size=1, max_size=32), st.booleans())
def test_messages_come_back(
    kind: MessageType, transaction_id: bytes, attrs: tuple[tuple[int, bytes], ...], key: bytes | None, crc: bool
) -> None:
    message = StunMessage(kind, transaction_id, attrs)
    again = decode_message_untrusted(encode_message(message, key=key, fingerprint=crc))
    assert (again.type, again.transaction_id) == (kind, transaction_id)
    assert again.attributes[: len(attrs)] == attrs
    assert again.is_signed_by(key or b"none") == (key is not None)


@given(addresses, st.none() | ids)
def test_addresses_come_back(addr: tuple[str, int], transaction_id: bytes | None) -> None:
    host, port = decode_address_untrusted(encode_address(addr, transaction_id), transaction_id)
    assert (ipaddress.ip_address(host), port) == (ipaddress.ip_address(addr[0].partition("%")[0]), addr[1])


def stun_shaped(body: bytes) -> bytes:
    body += bytes(-len(body) % 4)
    return b"\x00\x01" + len(body).to_bytes(2, "big") + MAGIC_COOKIE.to_bytes(4, "big") + bytes(12) + body


@given(st.binary(max_size=200) | st.binary(max_size=200).map(stun_shaped))
def test_garbage_is_refused_or_understood(data: bytes) -> None:
    try:
        message = decode_message_untrusted(data)
        assert len(data) >= HEADER_BYTES
        assert message.get(Attribute.FINGERPRINT) is None
        assert message.mapped_untrusted is None or message.mapped_untrusted[1] <= 0xFFFF
        message.address_untrusted(Attribute.OTHER_ADDRESS)
    except RemoteProtocolError:
        pass


@given(st.binary(max_size=24))
def test_garbage_in_attributes(value: bytes) -> None:
    for parse in (decode_change_request_untrusted, decode_response_port_untrusted, decode_error_untrusted):
        try:
            parse(value)
        except RemoteProtocolError:
            pass


@given(st.binary(max_size=200).map(stun_shaped), addresses, addresses, addresses)
def test_the_server_never_sends_more_than_it_gets(
    data: bytes, source: tuple[str, int], origin: tuple[str, int], other: tuple[str, int]
) -> None:
    reply = StunServer().receive_request(data, source, 0.0, origin=origin, other=other)
    if reply is not None:
        assert reply.to[0] == source[0]
        assert len(reply.data) <= max(MIN_ANSWER_BYTES, len(data))
        decode_message_untrusted(reply.data)
