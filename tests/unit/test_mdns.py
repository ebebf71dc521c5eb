"""mDNS in libp2p's format: packets, who is told of whom, and what a hostile neighbour can do."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.keys import PrivateKey
from lattica_protocols.limits import MDNS_MAX_ADDRS, MDNS_MAX_PEERS
from lattica_protocols.mdns.discovery import ANSWER_PACE, SERVICE, Mdns, PeerFound
from lattica_protocols.mdns.dns import PTR, TXT, decode_packet_untrusted, encode_answer, encode_query
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId

PEERS = [PeerId.from_public_key(PrivateKey.generate(bytes([i]) * 32).public_key) for i in range(100)]
ADDRS = [Multiaddr.parse("/ip4/192.168.1.5/tcp/4101"), Multiaddr.parse("/ip4/192.168.1.5/udp/4101/quic-v1")]


def machine(number: int = 0) -> Mdns:
    made = Mdns(PEERS[number], random.Random(number), 0.0)
    made.set_addrs(ADDRS, 0.0)
    return made


def exchange(machines: list[Mdns], until: float) -> dict[int, list[PeerFound]]:
    """Everything that one sends reaches the others."""
    found: dict[int, list[PeerFound]] = {i: [] for i in range(len(machines))}
    while (now := min(m.next_timeout() for m in machines)) < until:
        for sender in machines:
            sender.handle_timer(now)
            for data in sender.poll_transmit():
                for other in machines:  # multicast comes back to the sender, too
                    other.receive_datagram(data, now)
        for i, each in enumerate(machines):
            while (event := each.next_event()) is not None:
                found[i].append(event)
    return found


def test_two_find_each_other_within_a_moment() -> None:
    found = exchange([machine(0), machine(1)], 0.5)
    assert found == {0: [PeerFound(PEERS[1], tuple(ADDRS))], 1: [PeerFound(PEERS[0], tuple(ADDRS))]}


def test_packets_survive_the_wire() -> None:
    packet = decode_packet_untrusted(encode_query(SERVICE))
    assert packet.questions == ((SERVICE, PTR),)
    assert not packet.is_response
    packet = decode_packet_untrusted(encode_answer(SERVICE, "x." + SERVICE, [b"dnsaddr=a", b"dnsaddr=b"], 120))
    assert [(r.name, r.type, r.target, r.texts) for r in packet.records] == [
        (SERVICE, PTR, "x." + SERVICE, ()),
        ("x." + SERVICE, TXT, "", (b"dnsaddr=a", b"dnsaddr=b")),
    ]


def test_a_compressed_answer_as_others_send_it() -> None:
    name = b"\x04_p2p\x04_udp\x05local\x00"
    instance = b"\x03abc\xc0\x0c"
    text = f"dnsaddr={ADDRS[0]}/p2p/{PEERS[5]}".encode()
    data = bytes([len(text)]) + text
    packet = struct.pack("!HHHHHH", 0, 0x8400, 0, 1, 0, 1)
    packet += name + struct.pack("!HHIH", PTR, 1, 120, len(instance)) + instance
    packet += struct.pack("!HHHIH", 0xC000 | (12 + len(name) + 10), TXT, 0x8001, 120, len(data)) + data
    made = machine()
    made.receive_datagram(packet, 0.0)
    assert made.next_event() == PeerFound(PEERS[5], (ADDRS[0],))


def test_who_is_asked_all_the_time_answers_once_a_second() -> None:
    made, sent = machine(), 0
    for step in range(1000):
        now = step / 100
        made.receive_datagram(encode_query(SERVICE), now)
        made.handle_timer(now)
        sent += sum(data[2:4] == b"\x84\x00" for data in made.poll_transmit())
    assert sent <= 10 / ANSWER_PACE + 1


@pytest.mark.parametrize("text", [b"dnsaddr=/ip4/1.2.3.4/tcp/5", b"dnsaddr=x", b"other=1", b"", b"dnsaddr=\xff",
                                  f"dnsaddr=/ip4/1.2.3.4/tcp/5/p2p/{PEERS[0]}".encode()])  # fmt: skip
def test_what_is_no_address_of_another_peer_is_left_out(text: bytes) -> None:
    made = machine()
    made.receive_datagram(encode_answer(SERVICE, "x." + SERVICE, [text], 120), 0.0)
    assert made.next_event() is None


def test_a_flood_of_peers_and_addresses_is_bounded() -> None:
    made, told = machine(), []
    for peer in PEERS[1:]:
        texts = [f"dnsaddr=/ip4/10.0.0.{i}/tcp/1/p2p/{peer}".encode() for i in range(40)]
        made.receive_datagram(encode_answer(SERVICE, "x." + SERVICE, texts, 120), 0.0)
        while (event := made.next_event()) is not None:
            told.append(event)
    assert len(told) == MDNS_MAX_PEERS
    assert all(len(event.addrs) == MDNS_MAX_ADDRS for event in told)


def test_names_that_point_at_themselves_end() -> None:
    loop = struct.pack("!HHHHHH", 0, 0, 1, 0, 0, 0) + b"\xc0\x0c\x00\x0c\x00\x01"
    with pytest.raises(RemoteProtocolError, match="forwards"):
        decode_packet_untrusted(loop)


@given(st.binary(max_size=200), st.integers(0, 0xFFFF), st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_garbage(data: bytes, flags: int, counts: list[int]) -> None:
    made = machine()
    for packet in (data, struct.pack("!HHHHHH", 0, flags, *counts) + data):
        try:
            decode_packet_untrusted(packet)
        except RemoteProtocolError:
            pass
        made.receive_datagram(packet, 0.0)


@given(st.data())
def test_damaged_answers(draw: st.DataObject) -> None:
    texts = [f"dnsaddr={addr}/p2p/{PEERS[3]}".encode() for addr in ADDRS]
    packet = bytearray(encode_answer(SERVICE, "x." + SERVICE, texts, 120))
    for _ in range(draw.draw(st.integers(1, 4))):
        packet[draw.draw(st.integers(0, len(packet) - 1))] = draw.draw(st.integers(0, 255))
    made = machine()
    made.receive_datagram(bytes(packet), 0.0)
    while (event := made.next_event()) is not None:
        assert len(event.addrs) <= MDNS_MAX_ADDRS
