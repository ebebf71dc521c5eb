"""Agreeing on a punch with guessed ports: the messages, the moment, and what a partner can claim."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from lattica.nat.watch import both_heard, own_routers, sees_out
from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.limits import GUESS_MAX_MESSAGE_BYTES, NAT_MAX_REPORT_BYTES
from lattica_protocols.nat.behaviour import Allocation, Filtering, Mapping, NatBehaviour, Ports
from lattica_protocols.nat.guess import GuessExchange, GuessMessage, GuessType, refusal
from lattica_protocols.nat.punch_plan import Side, Technique
from lattica_protocols.nat.report import NatReport
from lattica_protocols.nat.sampler import MAIN, SAMPLES, SECONDS, PortSampler
from lattica_protocols.stun import Attribute, MessageType, SocketAddr, StunMessage, encode_address, encode_message
from lattica_protocols.stun_client import Datagram

EASY = NatBehaviour(Mapping.ENDPOINT_INDEPENDENT, Filtering.ADDRESS_AND_PORT_DEPENDENT, Allocation(Ports.PRESERVED))
HARD = NatBehaviour(
    Mapping.ADDRESS_AND_PORT_DEPENDENT,
    Filtering.ADDRESS_DEPENDENT,
    Allocation(Ports.SEQUENTIAL, step=-2, last=20000),
)
HALF = bytes(range(16))
ADDR = ("203.0.113.7", 4101)
OBSERVERS = [(f"198.51.100.{i}", 3478) for i in range(1, 5)]


def pair(delay: float = 0.02, busy: float = 0.3) -> tuple[GuessExchange, GuessExchange]:
    """B and A until both offers are exchanged; one way takes `delay`, A's samples `busy`."""
    b, a = GuessExchange(initiator=True), GuessExchange(initiator=False)
    b.offer(Side(HARD, (ADDR,)), HALF, 100.0)
    a.receive_untrusted(b.poll_transmit() or b"", 100.0 + delay)
    a.offer(Side(EASY, (ADDR,)), HALF[::-1], 100.0 + delay + busy)
    b.receive_untrusted(a.poll_transmit() or b"", 100.0 + 2 * delay + busy)
    return b, a


# -- the wire ---------------------------------------------------------------------------------------------------------
def test_vectors() -> None:
    """Those of protocols/specs/punching.md."""
    report = NatReport.of(HARD)
    assert report.encode() == bytes.fromhex("0804 1002 1802 208008 28ffff03 30feffffffffffffffff01 38a09c01")
    b = GuessExchange(initiator=True)
    b.offer(Side(EASY, (ADDR,)), HALF, 0.0)
    assert b.poll_transmit() == bytes.fromhex(
        "0801 1210000102030405060708090a0b0c0d0e0f 1a0d08021003180120800828ffff03 220904cb00710791021005"
    )
    assert GuessMessage(type=GuessType.GO, technique=3, opens=True).encode() == bytes.fromhex("0802 3003 3801")
    assert refusal() == bytes.fromhex("0803")
    page = (Path(__file__).parents[2] / "protocols" / "specs" / "punching.md").read_text().replace(" ", "")
    for data in (report.encode(), refusal(), GuessMessage(type=GuessType.GO, technique=3, opens=True).encode()):
        assert f"`{data.hex()}`" in page
    b = GuessExchange(initiator=True)
    b.offer(Side(EASY, (ADDR,)), HALF, 0.0)
    assert f"`{(b.poll_transmit() or b'').hex()}`" in page


def test_a_report_says_what_was_found() -> None:
    for known in (EASY, HARD, NatBehaviour(), NatBehaviour(udp_blocked=True)):
        report = NatReport.of(known)
        assert len(report.encode()) <= NAT_MAX_REPORT_BYTES
        assert NatReport.decode_untrusted(report.encode()).behaviour() == known


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (NatReport(mapping=9, filtering=-1, ports=1 << 40), Allocation()),
        (NatReport(low=0, high=70000, last=0), Allocation()),
        (NatReport(low=5, high=4), Allocation()),
        (NatReport(ports=2, step=17, last=65536), Allocation(Ports.SEQUENTIAL)),
        (NatReport(ports=2, step=-16, last=65535), Allocation(Ports.SEQUENTIAL, step=-16, last=65535)),
    ],
)
def test_strange_reports(report: NatReport, expected: Allocation) -> None:
    known = NatReport.decode_untrusted(report.encode()).behaviour()
    assert known == NatBehaviour(allocation=expected)


# -- the exchange -----------------------------------------------------------------------------------------------------
def test_both_begin_at_the_same_moment_with_the_same_key() -> None:
    b, a = pair()
    assert b.round_trip == pytest.approx(0.04), "without the time that A's samples took"
    assert (a.partner, b.partner) == (Side(HARD, (ADDR,)), Side(EASY, (ADDR,)))
    b.go(Technique.BIRTHDAY, 100.34, opens=True)
    go = b.poll_transmit()
    assert go is not None
    assert len(go) < GUESS_MAX_MESSAGE_BYTES
    a.receive_untrusted(go, 100.36)
    assert a.start_at == pytest.approx(b.start_at)
    assert a.key == b.key == HALF + HALF[::-1]
    assert (b.opens, a.opens) == (True, False)
    plans = [x.plan({ADDR[0]}, opener_ttl=None, opener_wait=0.0) for x in (b, a)]
    assert plans[0].open_towards == ADDR
    assert plans[1].search_ip == ADDR[0]


def test_a_partner_that_lies_about_its_time_moves_its_own_start_only() -> None:
    b = GuessExchange(initiator=True)
    b.offer(Side(EASY, ()), HALF, 0.0)
    b.receive_untrusted(GuessMessage(type=1, key=HALF, took=1 << 60).encode(), 0.1)
    assert b.round_trip == 0.0


def test_nothing_is_planned_for_addresses_that_are_not_proven() -> None:
    b, _ = pair()
    for technique in (Technique.SIMPLE, Technique.PREDICT, Technique.BIRTHDAY):
        b.technique = technique
        plan = b.plan({"192.0.2.1"}, opener_ttl=2, opener_wait=0.1)
        assert (plan.targets, plan.search_ip, plan.open_towards, plan.open_sockets) == ((), None, None, 0)


def test_a_refusal() -> None:
    b = GuessExchange(initiator=True)
    b.offer(Side(EASY, (ADDR,)), HALF, 0.0)
    b.receive_untrusted(refusal(), 0.1)
    assert b.refused
    with pytest.raises(RemoteProtocolError):
        b.receive_untrusted(refusal(), 0.1)
    with pytest.raises(LocalProtocolError):
        b.go(Technique.PREDICT, 0.1)


OFFER = GuessMessage(type=1, key=HALF).encode()
GO = GuessMessage(type=2, technique=2).encode()


@pytest.mark.parametrize(
    ("initiator", "messages"),
    [
        (False, [GO]),
        (False, [OFFER, OFFER]),
        (False, [OFFER, refusal()]),
        (False, [OFFER, GuessMessage(type=2, technique=4).encode()]),
        (False, [OFFER, GuessMessage(type=2).encode()]),
        (False, [OFFER, GO, GO]),
        (False, [GuessMessage(type=1, key=HALF[:-1]).encode()]),
        (False, [GuessMessage(type=1, key=HALF + b"x").encode()]),
        (False, [GuessMessage(type=1, key=HALF, addrs=(b"",) * 5).encode()]),
        (True, [GO]),
        (True, [OFFER, OFFER]),
    ],
)
def test_messages_out_of_order_are_refused(initiator: bool, messages: list[bytes]) -> None:
    exchange = GuessExchange(initiator=initiator)
    if initiator:
        exchange.offer(Side(EASY, ()), HALF, 0.0)
    *fine, wrong = messages
    for message in fine:
        exchange.receive_untrusted(message, 0.1)
        if not initiator and exchange.start_at is None:
            exchange.offer(Side(EASY, ()), HALF, 0.1)
    with pytest.raises(RemoteProtocolError):
        exchange.receive_untrusted(wrong, 0.2)


def test_a_stalled_path_is_not_measured() -> None:
    b = GuessExchange(initiator=True)
    b.offer(Side(EASY, ()), HALF, 0.0)
    with pytest.raises(RemoteProtocolError, match=r"took 6\.0 s"):
        b.receive_untrusted(OFFER, 6.0)


# -- samples ----------------------------------------------------------------------------------------------------------
def answer(request: Datagram, mapped: SocketAddr) -> bytes:
    transaction_id = request.data[8:20]
    attribute = (int(Attribute.XOR_MAPPED_ADDRESS), encode_address(mapped, transaction_id))
    return encode_message(StunMessage(MessageType.SUCCESS, transaction_id, (attribute,)))


def test_samples_come_from_new_sockets_in_turn() -> None:
    sampler = PortSampler(OBSERVERS, random.Random(1), 0.0)
    sent = sampler.poll_transmit()
    assert [datagram.socket for datagram in sent] == [MAIN] * 3 + list(range(1, SAMPLES + 1))
    assert {datagram.to for datagram in sent} == set(OBSERVERS[:3])
    port = 30000
    for datagram in sent:
        if datagram.socket == MAIN:
            mapped = ADDR
        else:
            port += 3
            mapped = (ADDR[0], port)
        assert sampler.next_event() is None
        assert sampler.receive_datagram(datagram.socket, answer(datagram, mapped), datagram.to, 0.02)
    sampled = sampler.next_event()
    assert sampled is not None
    assert sampled.seen == (ADDR,)
    assert sampled.newest == (ADDR[0], port)
    assert sampled.allocation == Allocation(Ports.SEQUENTIAL, step=3, last=port)
    assert sampler.next_timeout() is None


def test_an_observer_that_is_silent_holds_nothing_up() -> None:
    sampler = PortSampler(OBSERVERS, random.Random(1), 0.0)
    for datagram in sampler.poll_transmit():
        if datagram.to != OBSERVERS[0] and datagram.socket == MAIN:
            sampler.receive_datagram(MAIN, answer(datagram, ADDR), datagram.to, 0.02)
    now = 0.0
    while (due := sampler.next_timeout()) is not None:
        now = due
        sampler.handle_timer(now)
        sampler.poll_transmit()
    sampled = sampler.next_event()
    assert now == SECONDS
    assert sampled is not None
    assert (sampled.seen, sampled.newest, sampled.allocation) == ((ADDR,), None, Allocation())


def test_nobody_to_ask() -> None:
    sampler = PortSampler([], random.Random(1), 0.0)
    assert sampler.next_event() is not None
    assert sampler.next_timeout() is None
    assert sampler.poll_transmit() == []


def test_a_random_range_is_learnt() -> None:
    sampler = PortSampler(OBSERVERS, random.Random(1), 0.0)
    rng = random.Random(2)
    for datagram in sampler.poll_transmit():
        mapped = (ADDR[0], rng.randint(32768, 60999))
        sampler.receive_datagram(datagram.socket, answer(datagram, mapped), datagram.to, 0.02)
    sampled = sampler.next_event()
    assert sampled is not None
    assert sampled.allocation.ports is Ports.RANDOM
    assert sampled.allocation.low > 28000
    assert replace(sampled.allocation, low=1024, high=65535) != sampled.allocation


# -- how far openers go -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("routers", "own"),
    [
        ([], 0),
        (["192.168.1.1", "203.0.113.1"], 1),
        (["10.0.0.1", "100.64.0.1", "203.0.113.1"], 2),
        ([None, "100.64.0.1", "203.0.113.1"], 2),
        ([None, "203.0.113.1", "10.0.0.1"], 0),
        (["192.168.1.1", None, "203.0.113.1"], 1),
    ],
)
def test_routers_of_our_own(routers: list[str | None], own: int) -> None:
    assert own_routers(routers) == own


@pytest.mark.parametrize(
    ("routers", "known"),
    [
        ([], False),
        (["192.168.1.1"], False),
        (["192.168.1.1", "203.0.113.1"], True),
        (["192.168.1.1", None, "203.0.113.1"], False),
        (["10.0.0.1", "100.64.0.1", None, None], False),
        ([None, "100.64.0.1", "203.0.113.1"], True),
    ],
)
def test_only_a_router_that_answers_right_behind_ours_says_that_there_are_no_more(
    routers: list[str | None], known: bool
) -> None:
    assert sees_out(routers) == known


def test_traces_add_up() -> None:
    assert both_heard([None, "203.0.113.1"], ["192.168.1.1"]) == ["192.168.1.1", "203.0.113.1"]
    assert both_heard([], [None, "100.64.0.1"]) == [None, "100.64.0.1"]
    assert both_heard(["192.168.1.1"], ["192.168.7.1", None]) == ["192.168.7.1", None]
