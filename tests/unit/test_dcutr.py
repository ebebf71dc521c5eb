"""DCUtR without a network: the three messages, and to whom probes are sent and how many."""

import ipaddress
import random
from pathlib import Path

import pytest

from lattica_protocols import limits
from lattica_protocols.dcutr import (
    PROBE_BYTES,
    PROBE_FIRST_BYTE,
    PunchBudget,
    PunchExchange,
    PunchMessage,
    Target,
    choose_targets,
    encode_probe,
    is_local,
    probe_delay,
    probe_token_untrusted,
)
from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.nat.behaviour import Allocation, Filtering, Mapping, NatBehaviour, Ports
from lattica_protocols.nat.punch_plan import Technique

UDP = Multiaddr.parse("/ip4/203.0.113.7/udp/4101/quic-v1")
TCP = Multiaddr.parse("/ip4/203.0.113.7/tcp/4101")
RNG = random.Random(7)


def ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(text)


def networks(*texts: str) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    return [ipaddress.ip_network(text) for text in texts]


def pair(now: float = 100.0) -> tuple[PunchExchange, PunchExchange]:
    b = PunchExchange(initiator=True, addrs=[UDP, TCP], token=b"b" * 16, now=now)
    a = PunchExchange(initiator=False, addrs=[TCP], token=b"a" * 16, now=now)
    return b, a


def test_the_wire_is_that_of_the_specification() -> None:
    assert PunchMessage(type=100).encode() == bytes.fromhex("0864")
    assert PunchMessage(type=300).encode() == bytes.fromhex("08ac02")
    assert PunchMessage(type=100, addrs=(b"\x01\x02",)).encode() == bytes.fromhex("0864 12020102")


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.3])
def test_both_punch_at_the_same_moment(delay: float) -> None:
    b, a = pair()
    connect = b.poll_transmit()
    assert connect is not None
    a.receive_untrusted(connect, 100 + delay)
    assert a.partner is not None
    assert (a.partner.addrs, a.partner.token) == ((UDP, TCP), b"b" * 16)
    assert a.punch_at is None
    answer = a.poll_transmit()
    assert answer is not None
    assert a.poll_transmit() is None
    b.receive_untrusted(answer, 100 + 2 * delay)
    sync = b.poll_transmit()
    assert sync is not None
    a.receive_untrusted(sync, 100 + 3 * delay)
    assert b.punch_at == pytest.approx(a.punch_at)
    assert b.round_trip == pytest.approx(2 * delay)


def test_a_partner_without_our_extension_and_with_circuits_among_its_addresses() -> None:
    circuit = UDP.encapsulate(f"/p2p/{'12D3KooWGRUVh7qTjmPpe9ugBnUnGT8LDKVdDyvRZSuUVvDFxbmg'}/p2p-circuit")
    message = PunchMessage(type=100, addrs=(circuit.to_bytes(), b"\xff", UDP.to_bytes(), UDP.to_bytes()))
    a = PunchExchange(initiator=False, addrs=[], token=bytes(16), now=0)
    a.receive_untrusted(message.encode(), 0.1)
    assert a.partner is not None
    assert (a.partner.addrs, a.partner.token) == ((UDP,), None)


@pytest.mark.parametrize(
    "messages",
    [
        [PunchMessage(type=300)],
        [PunchMessage()],
        [PunchMessage(type=100), PunchMessage(type=100)],
        [PunchMessage(type=100), PunchMessage(type=300), PunchMessage(type=300)],
        [PunchMessage(type=100, token=bytes(17))],
    ],
)
def test_messages_out_of_order_are_refused(messages: list[PunchMessage]) -> None:
    a = PunchExchange(initiator=False, addrs=[], token=bytes(16), now=0)
    *fine, wrong = messages
    for message in fine:
        a.receive_untrusted(message.encode(), 0.1)
    with pytest.raises(RemoteProtocolError):
        a.receive_untrusted(wrong.encode(), 0.1)


EASY = NatBehaviour(Mapping.ENDPOINT_INDEPENDENT, Filtering.ADDRESS_AND_PORT_DEPENDENT)
HARD = NatBehaviour(Mapping.ADDRESS_AND_PORT_DEPENDENT, Filtering.ADDRESS_AND_PORT_DEPENDENT, Allocation(Ports.RANDOM))
COUNTING = NatBehaviour(
    Mapping.ADDRESS_AND_PORT_DEPENDENT, Filtering.ADDRESS_AND_PORT_DEPENDENT, Allocation(Ports.SEQUENTIAL, step=1)
)


@pytest.mark.parametrize(
    ("b_nat", "a_nat", "may_guess", "guess"),
    [
        (EASY, HARD, True, Technique.BIRTHDAY),
        (COUNTING, EASY, True, Technique.PREDICT),
        (EASY, EASY, True, None),
        (HARD, HARD, True, None),
        (EASY, HARD, False, None),
        (EASY, None, True, None),
        (None, HARD, True, None),
    ],
)
def test_both_know_when_ports_are_guessed_instead(
    b_nat: NatBehaviour | None, a_nat: NatBehaviour | None, may_guess: bool, guess: Technique | None
) -> None:
    b = PunchExchange(initiator=True, addrs=[UDP], token=bytes(16), now=0, nat=b_nat, may_guess=may_guess)
    a = PunchExchange(initiator=False, addrs=[UDP], token=bytes(16), now=0, nat=a_nat)
    for sender, receiver in ((b, a), (a, b), (b, a)):
        receiver.receive_untrusted(sender.poll_transmit() or b"", 0.1)
    assert a.punch_at is not None
    assert b.punch_at is not None
    assert (a.guess, b.guess) == (guess, guess)
    assert a.partner is not None
    assert a.partner.nat == b_nat


def test_a_guess_that_nobody_knows_is_none() -> None:
    for number in (0, 1, 4, -1, 1 << 40):
        a = PunchExchange(initiator=False, addrs=[], token=bytes(16), now=0, nat=EASY)
        a.receive_untrusted(PunchMessage(type=100).encode(), 0.1)
        a.receive_untrusted(PunchMessage(type=300, guess=number).encode(), 0.1)
        assert a.guess is None


def test_a_budget_in_whole_attempts() -> None:
    budget = PunchBudget(100, 10)
    assert budget.take(ip("203.0.113.7"), 0.0, 80)
    assert not budget.take(ip("203.0.113.7"), 0.0, 30)
    assert budget.take(ip("203.0.113.8"), 0.0, 30), "another one's"
    budget.give_back(ip("203.0.113.7"), 0.0, 10)
    assert budget.take(ip("203.0.113.7"), 0.0, 30)
    assert not budget.take(ip("203.0.113.7"), 5.0, 51)
    assert budget.take(ip("203.0.113.7"), 5.0, 50)


def test_a_stalled_path_is_not_measured() -> None:
    b = PunchExchange(initiator=True, addrs=[], token=bytes(16), now=0)
    with pytest.raises(RemoteProtocolError, match=r"took 6\.0 s"):
        b.receive_untrusted(PunchMessage(type=100).encode(), 6.0)
    with pytest.raises(LocalProtocolError):
        PunchExchange(initiator=True, addrs=[], token=b"short", now=0)


def test_probes_are_told_from_stun_and_quic_and_carry_the_token() -> None:
    token = bytes(range(16))
    probe = encode_probe(token, RNG)
    assert (len(probe), probe[0]) == (PROBE_BYTES, PROBE_FIRST_BYTE)
    assert probe_token_untrusted(probe) == token
    for _ in range(50):
        noise = encode_probe(None, RNG)
        assert 3 < noise[0] < 0x40
        assert noise[0] != PROBE_FIRST_BYTE
        assert probe_token_untrusted(noise) is None
    assert probe_token_untrusted(probe[:-1]) is None
    delays = [probe_delay(n, RNG) for n in range(limits.PUNCH_PROBES)]
    assert delays[0] <= 0.02
    assert 1 < sum(delays) < 5


def test_only_proven_addresses_get_more_than_a_taste() -> None:
    claimed = [
        Multiaddr.parse(f"/ip4/{host}/{transport}")
        for host in ("198.51.100.1", "198.51.100.2", "198.51.100.3", "203.0.113.7", "0.0.0.0", "224.0.0.1", "127.0.0.1")
        for transport in ("udp/4101/quic-v1", "tcp/4101", "udp/53")
    ]
    targets = choose_targets(claimed, proven={ip("203.0.113.7")}, own_networks=[], own_public=[])
    assert targets[:2] == [Target(UDP, True), Target(TCP, True)]
    assert len(targets) == 2 + limits.PUNCH_MAX_UNPROVEN
    assert all(not target.proven and target.probes * PROBE_BYTES <= 256 for target in targets[2:])
    many = [Multiaddr.parse(f"/ip4/203.0.113.7/tcp/{port}") for port in range(1, 60)]
    assert len(choose_targets(many, proven={ip("203.0.113.7")}, own_networks=[], own_public=[])) == 6


def test_local_addresses_are_tried_where_they_can_be_the_partners() -> None:
    lan = Multiaddr.parse("/ip4/192.168.7.2/tcp/1")
    v6 = Multiaddr.parse("/ip6/fd00::2/tcp/1")
    seen = {ip("203.0.113.7")}
    assert choose_targets([lan, v6], proven=seen, own_networks=networks("10.0.0.0/8"), own_public=[]) == []
    same_lan = choose_targets([UDP, lan], proven=seen, own_networks=networks("192.168.7.0/24"), own_public=[])
    assert [target.addr for target in same_lan] == [lan, UDP]
    same_nat = choose_targets([v6, lan], proven=seen, own_networks=[], own_public=seen)
    assert {target.addr for target in same_nat} == {lan, v6}
    home = Multiaddr.parse("/ip4/127.0.0.1/tcp/1")
    assert choose_targets([home], proven=seen, own_networks=networks("127.0.0.0/8"), own_public=seen) == []
    assert choose_targets([home], proven={ip("127.0.0.1")}, own_networks=[], own_public=[]) == [Target(home, True)]
    assert is_local(ip("100.64.0.1"))
    assert not is_local(ip("203.0.113.7"))


def test_many_partners_together_send_no_more_to_one_address() -> None:
    budget, victim = PunchBudget(), ip("198.51.100.1")
    now = 5.0
    sent = sum(budget.take(victim, now) for _ in range(10_000))
    assert sent == limits.PUNCH_PER_IP_BURST
    assert sum(budget.take(victim, now + 10) for _ in range(10_000)) == 10 * limits.PUNCH_PER_IP_PER_SECOND
    assert budget.take(ip("198.51.100.2"), now)
    others = [ip(f"10.{n // 256}.{n % 256}.1") for n in range(2 * limits.PUNCH_TRACKED_IPS)]
    assert sum(budget.take(other, now + 10) for other in others) <= limits.PUNCH_TRACKED_IPS
    assert budget.take(others[-1], now + 1000)  # old accounts make room


def test_vectors_of_the_specification() -> None:
    addr = Multiaddr.parse("/ip4/1.2.3.4/udp/9/quic-v1")
    message = PunchMessage(type=100, addrs=(addr.to_bytes(),), token=bytes(range(16)))
    written = "0864 120b 0401020304910200 09cd03 8201 10 000102030405060708090a0b0c0d0e0f"
    assert message.encode() == bytes.fromhex(written)
    page = (Path(__file__).parents[2] / "protocols" / "specs" / "punching.md").read_text()
    assert written in page
