"""The punching machine alone: what it sends, to whom, how much, and what a partner or stranger cannot make it do."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import (
    NAT_MAX_ANSWERS,
    NAT_MAX_PROBES,
    NAT_MAX_STRANGERS,
    NAT_MAX_TARGETS,
)
from lattica_protocols.nat.behaviour import Allocation, Filtering, Mapping, NatBehaviour, Ports
from lattica_protocols.nat.probe import decode_probe_untrusted, encode_probe, encode_probe_answer
from lattica_protocols.nat.punch import LINGER, PathFound, PunchEnded, Puncher, most_probes
from lattica_protocols.nat.punch_plan import (
    BIRTHDAY_SOCKETS,
    PREDICTED_PORTS,
    PunchPlan,
    Side,
    Technique,
    choose_technique,
    is_hopeless,
    plan_punch,
    search_range,
    should_open,
    techniques_to_try,
)
from lattica_protocols.stun import SocketAddr, encode_message
from lattica_protocols.stun_client import Datagram

KEY = b"k" * 32
PARTNER = ("203.0.113.5", 7000)
BIRTHDAY = Technique.BIRTHDAY
VICTIM = ("192.0.2.66", 53)

EASY = NatBehaviour(
    Mapping.ENDPOINT_INDEPENDENT, Filtering.ADDRESS_AND_PORT_DEPENDENT, Allocation(Ports.PRESERVED), PARTNER
)
HARD = NatBehaviour(
    Mapping.ADDRESS_AND_PORT_DEPENDENT,
    Filtering.ADDRESS_AND_PORT_DEPENDENT,
    Allocation(Ports.RANDOM, last=30000),
    public_ip=PARTNER[0],
)
COUNTING = NatBehaviour(
    Mapping.ADDRESS_AND_PORT_DEPENDENT,
    Filtering.ADDRESS_AND_PORT_DEPENDENT,
    Allocation(Ports.SEQUENTIAL, step=2, last=20000),
    public_ip=PARTNER[0],
)


def puncher(plan: PunchPlan, *, controlling: bool = True) -> Puncher:
    return Puncher(plan, KEY, controlling=controlling, rng=random.Random(1), now=0.0)


def simple(*targets: SocketAddr) -> PunchPlan:
    return PunchPlan(Technique.SIMPLE, frozenset({PARTNER[0]}), targets or (PARTNER,))


def run_out(machine: Puncher) -> list[tuple[float, Datagram]]:
    """Everything it sends when nobody answers."""
    sent = [(0.0, datagram) for datagram in machine.poll_transmit()]
    while (due := machine.next_timeout()) is not None:
        machine.handle_timer(due)
        sent += [(due, datagram) for datagram in machine.poll_transmit()]
    return sent


# -- plans ------------------------------------------------------------------------------------------------------------
def test_a_partner_cannot_name_a_victim() -> None:
    for peer in (EASY, HARD, COUNTING):
        for own in (EASY, HARD, COUNTING):
            side = Side(peer, (VICTIM, PARTNER))
            plan = plan_punch(Side.of(own), side, proven={PARTNER[0]})
            named = [addr[0] for addr in (*plan.targets, *([plan.open_towards] if plan.open_towards else []))]
            assert set(named) | ({plan.search_ip} - {None}) <= {PARTNER[0]}
    nobody = plan_punch(Side.of(EASY), Side(HARD, (VICTIM,)), proven=set())
    assert (nobody.targets, nobody.search_ip, nobody.open_towards) == ((), None, None)
    assert run_out(puncher(nobody)) == []


def test_a_partner_with_many_addresses() -> None:
    side = Side(EASY, tuple((PARTNER[0], port) for port in range(1, 1000)))
    assert len(plan_punch(Side.of(EASY), side, proven={PARTNER[0]}).targets) == NAT_MAX_TARGETS


def test_prediction_names_the_next_ports() -> None:
    plan = plan_punch(Side.of(EASY), Side.of(COUNTING), proven={PARTNER[0]})
    assert plan.technique is Technique.PREDICT
    assert [port for _, port in plan.targets] == [20000 + 2 * i for i in range(1, PREDICTED_PORTS + 1)]


@pytest.mark.parametrize(
    "allocation",
    [
        Allocation(Ports.BLOCK, 70000, 90000),
        Allocation(Ports.BLOCK, 9, 3),
        Allocation(Ports.BLOCK, -5, 1 << 40),
        Allocation(Ports.SEQUENTIAL, step=30000, last=60000),
        Allocation(Ports.SEQUENTIAL, step=-1 << 40, last=5),
    ],
)
def test_strange_claims_about_ports(allocation: Allocation) -> None:
    low, high = search_range(allocation)
    assert 1 <= low < high <= 65535
    assert all(0 < port <= 65535 for port in allocation.next_ports(100))


def test_techniques() -> None:
    unknown = NatBehaviour()
    blocked = NatBehaviour(udp_blocked=True)
    block = NatBehaviour(Mapping.ADDRESS_DEPENDENT, Filtering.ADDRESS_AND_PORT_DEPENDENT, Allocation(Ports.BLOCK))
    assert choose_technique(EASY, EASY) is Technique.SIMPLE
    assert choose_technique(EASY, unknown) is Technique.SIMPLE
    assert choose_technique(HARD, EASY) is choose_technique(EASY, block) is Technique.BIRTHDAY
    assert choose_technique(COUNTING, COUNTING) is choose_technique(EASY, COUNTING) is Technique.PREDICT
    assert choose_technique(HARD, COUNTING) is choose_technique(HARD, HARD) is Technique.NONE
    assert choose_technique(EASY, blocked) is Technique.NONE
    hopeless = plan_punch(Side.of(HARD), Side.of(HARD), proven={PARTNER[0]})
    assert hopeless.targets, "a verdict never excludes a try"


# -- what is sent -----------------------------------------------------------------------------------------------------
def test_a_simple_punch_is_paced_and_ends() -> None:
    machine = puncher(simple())
    sent = run_out(machine)
    assert 38 <= len(sent) <= 42
    assert {datagram.to for _, datagram in sent} == {PARTNER}
    assert sent[-1][0] <= 2.0
    assert machine.next_event() == PunchEnded(False, len(sent))
    assert machine.next_event() is None


def test_the_search_of_a_birthday() -> None:
    plan = plan_punch(Side.of(EASY), Side.of(HARD), proven={PARTNER[0]})
    sent = run_out(puncher(plan))
    ports = [datagram.to[1] for _, datagram in sent]
    assert len(ports) == len(set(ports)) <= NAT_MAX_PROBES
    assert {datagram.to[0] for _, datagram in sent} == {PARTNER[0]}
    assert {datagram.socket for _, datagram in sent} == {0}
    for start in range(30):
        assert sum(start <= at < start + 1 for at, _ in sent) <= 101
    assert sent[-1][0] <= 30.0


def test_a_search_in_a_known_range_goes_on_outside_of_it() -> None:
    block = Allocation(Ports.BLOCK, 30000, 30999)
    plan = plan_punch(Side.of(EASY), Side.of(replace(HARD, allocation=replace(block, last=30000))), proven={PARTNER[0]})
    ports = [datagram.to[1] for _, datagram in run_out(puncher(plan))]
    assert sorted(ports[:1000]) == list(range(30000, 31000))
    assert len(set(ports)) == len(ports) > 2000
    spread = Allocation(Ports.RANDOM, 32768, 60999, last=40000)
    plan = plan_punch(Side.of(EASY), Side.of(replace(HARD, allocation=spread)), proven={PARTNER[0]})
    assert all(32768 <= datagram.to[1] <= 60999 for _, datagram in run_out(puncher(plan)))


def test_a_process_that_was_held_up_sends_no_burst() -> None:
    machine = puncher(plan_punch(Side.of(EASY), Side.of(HARD), proven={PARTNER[0]}))
    machine.poll_transmit()
    machine.handle_timer(5.0)
    assert len(machine.poll_transmit()) <= 11


def test_what_is_sent_is_known_before() -> None:
    for own, peer in ((EASY, EASY), (EASY, HARD), (HARD, EASY), (EASY, COUNTING), (COUNTING, COUNTING)):
        for wait in (0.0, 0.15):
            plan = plan_punch(Side.of(own), Side.of(peer), proven={PARTNER[0]}, opener_ttl=2, opener_wait=wait)
            assert len(run_out(puncher(plan))) <= most_probes(plan)


def test_ports_that_are_predicted_are_those_of_a_new_socket() -> None:
    counting = plan_punch(Side.of(COUNTING), Side.of(EASY), proven={PARTNER[0]})
    easy = plan_punch(Side.of(EASY), Side.of(COUNTING), proven={PARTNER[0]})
    assert {datagram.socket for _, datagram in run_out(puncher(counting))} == {1}
    assert {datagram.socket for _, datagram in run_out(puncher(easy))} == {0}


def test_one_of_the_two_opens_the_sockets() -> None:
    unknown = NatBehaviour()
    for a, b in itertools.product((EASY, HARD, unknown), repeat=2):
        opens = should_open(a, b, initiator=True)
        assert opens != should_open(b, a, initiator=False)
        plans = [
            plan_punch(Side(x, (PARTNER,)), Side(y, (PARTNER,)), proven={PARTNER[0]}, technique=BIRTHDAY, opens=o)
            for x, y, o in ((a, b, opens), (b, a, not opens))
        ]
        assert sorted(plan.open_sockets for plan in plans) == [0, BIRTHDAY_SOCKETS]
        assert sorted(plan.search_ip is None for plan in plans) == [False, True]
    assert should_open(HARD, EASY, initiator=False)


@pytest.mark.parametrize("a", [EASY, HARD, COUNTING, NatBehaviour()])
def test_no_technique_is_excluded(a: NatBehaviour) -> None:
    """A verdict may be wrong: a birthday follows wherever one side may be an easy one."""
    for b in (EASY, HARD, NatBehaviour()):
        assert techniques_to_try(a, b) == techniques_to_try(b, a)
        assert BIRTHDAY in techniques_to_try(a, b)


def test_what_is_certain_to_be_in_vain_is_not_tried_for_long() -> None:
    sure = replace(HARD, certain=True)
    blocked = NatBehaviour(udp_blocked=True, certain=True)
    for a, b in ((sure, sure), (blocked, sure), (blocked, EASY), (blocked, NatBehaviour())):
        assert is_hopeless(a, b)
        assert is_hopeless(b, a)
        assert techniques_to_try(a, b) == (Technique.SIMPLE,)
    for a, b in (
        (sure, HARD),  # one liar may have said so
        (sure, replace(sure, filtering=Filtering.UNKNOWN)),
        (sure, replace(sure, filtering=Filtering.ENDPOINT_INDEPENDENT)),
        (sure, replace(EASY, certain=True)),
        (sure, NatBehaviour()),
        (NatBehaviour(udp_blocked=True), sure),
    ):
        assert not is_hopeless(a, b)
        assert not is_hopeless(b, a)
        assert BIRTHDAY in techniques_to_try(a, b)


@pytest.mark.parametrize(("measured", "second"), [(False, 3), (True, 2)])
def test_the_sockets_of_a_birthday(measured: bool, second: int) -> None:
    plan = plan_punch(Side.of(HARD), Side.of(EASY), proven={PARTNER[0]}, opener_ttl=2, opener_measured=measured)
    sent = run_out(puncher(plan))
    assert len(sent) == most_probes(plan) == 3 * BIRTHDAY_SOCKETS
    assert {datagram.to for _, datagram in sent} == {PARTNER}
    assert sorted({datagram.socket for _, datagram in sent}) == list(range(1, BIRTHDAY_SOCKETS + 1))
    first, again, last = (sent[i * BIRTHDAY_SOCKETS : (i + 1) * BIRTHDAY_SOCKETS] for i in range(3))
    assert [{datagram.ttl for _, datagram in part} for part in (first, again, last)] == [{2}, {second}, {None}]
    assert first[-1][0] < 3.0 <= 7.9 < again[0][0]
    assert again[-1][0] < 11.0 <= 17.9 < last[0][0]


# -- strangers and partners that play tricks ----------------------------------------------------------------------
def test_without_the_key_nothing_happens() -> None:
    machine = puncher(simple(), controlling=False)
    machine.poll_transmit()
    probe = encode_probe(b"x" * 32, bytes(12), chosen=True)
    assert not machine.receive_datagram(0, probe, PARTNER, 0.1)
    assert not machine.receive_datagram(0, b"\x00\x01" + bytes(40), PARTNER, 0.1)
    assert machine.poll_transmit() == []
    assert machine.next_event() is None


def test_an_answer_must_come_from_where_we_asked() -> None:
    machine = puncher(simple())
    (sent,) = machine.poll_transmit()
    transaction_id = decode_probe_untrusted(sent.data, KEY).transaction_id
    answer = encode_probe_answer(KEY, transaction_id, ("198.51.100.1", 1))
    assert machine.receive_datagram(0, encode_probe_answer(KEY, bytes(12), PARTNER), PARTNER, 0.1)
    assert machine.next_event() is None, "nothing of ours"
    assert machine.receive_datagram(0, answer, VICTIM, 0.1)
    assert machine.next_event() is None, "from elsewhere"


def test_the_controlling_side_settles_and_tells() -> None:
    machine = puncher(simple())
    (sent,) = machine.poll_transmit()
    transaction_id = decode_probe_untrusted(sent.data, KEY).transaction_id
    machine.receive_datagram(0, encode_probe_answer(KEY, transaction_id, PARTNER), PARTNER, 0.04)
    found = machine.next_event()
    assert isinstance(found, PathFound)
    assert (found.socket, found.remote) == (0, PARTNER)
    (chosen,) = machine.poll_transmit()
    assert encode_probe(KEY, decode_probe_untrusted(chosen.data, KEY).transaction_id, chosen=True) == chosen.data
    rest = run_out(machine)
    assert len(rest) > 10, "until that is answered"
    assert rest[-1][0] <= 0.04 + LINGER
    assert machine.next_event() == PunchEnded(True, 2 + len(rest))


def test_the_other_side_settles_when_it_is_told_and_goes_on_answering() -> None:
    machine = puncher(simple(), controlling=False)
    machine.poll_transmit()
    machine.receive_datagram(0, encode_probe(KEY, bytes(12)), PARTNER, 0.05)
    assert machine.next_event() is None
    machine.receive_datagram(0, encode_probe(KEY, bytes(12), chosen=True), PARTNER, 0.06)
    assert isinstance(machine.next_event(), PathFound)
    machine.poll_transmit()
    machine.receive_datagram(0, encode_probe(KEY, bytes(12), chosen=True), PARTNER, 0.5)
    assert len(machine.poll_transmit()) == 1
    machine.handle_timer(0.06 + LINGER)
    assert isinstance(machine.next_event(), PunchEnded)
    machine.receive_datagram(0, encode_probe(KEY, bytes(12)), PARTNER, 1.0)
    assert machine.poll_transmit() == []


def test_forged_sources_get_little() -> None:
    """A partner forges a victim's address on 2,000 signed probes, from as many ports."""
    machine = puncher(simple())
    machine.poll_transmit()
    received = 0
    for port in range(1, 2001):
        probe = encode_probe(KEY, port.to_bytes(12, "big"))
        received += len(probe)
        machine.receive_datagram(0, probe, (VICTIM[0], port), 0.01)
    machine.handle_timer(0.05)
    hits = [datagram for _, datagram in run_out(machine) if datagram.to[0] == VICTIM[0]]
    assert len(hits) == NAT_MAX_ANSWERS + NAT_MAX_STRANGERS
    assert sum(len(datagram.data) for datagram in hits) < received


@pytest.mark.parametrize("source", [PARTNER, ("2001:db8::5", 7000)])
def test_an_answer_is_not_longer_than_its_probe(source: SocketAddr) -> None:
    assert len(encode_probe_answer(KEY, bytes(12), source)) <= len(encode_probe(KEY, bytes(12)))


def test_only_probes_are_probes() -> None:
    for data in (b"", encode_probe(KEY, bytes(12))[:-1], encode_probe(b"x", bytes(12))):
        with pytest.raises(RemoteProtocolError):
            decode_probe_untrusted(data, KEY)
    unsigned = encode_message(decode_probe_untrusted(encode_probe(KEY, bytes(12)), KEY), fingerprint=False)
    assert decode_probe_untrusted(unsigned, KEY)
