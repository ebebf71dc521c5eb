"""Verdicts of `lattica doctor` from facts: each cause is named, with its evidence and what would help."""

from __future__ import annotations

import ipaddress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattica.nat.guesser import Guess
from lattica.punch import PunchReport
from lattica.transports.circuit import RelayTroubles
from lattica_daemon.doctor import machine, peer
from lattica_daemon.doctor.facts import Facts, Finding, Link, surroundings
from lattica_daemon.doctor.peer import PeerFacts
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.keys import PrivateKey
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.nat.behaviour import Allocation, Filtering, Mapping, NatBehaviour, Ports
from lattica_protocols.nat.punch_plan import Technique
from lattica_protocols.peer_id import PeerId

EIM, APDM = Mapping.ENDPOINT_INDEPENDENT, Mapping.ADDRESS_AND_PORT_DEPENDENT
EIF, APDF = Filtering.ENDPOINT_INDEPENDENT, Filtering.ADDRESS_AND_PORT_DEPENDENT
HOME = NatBehaviour(EIM, APDF, Allocation(Ports.PRESERVED), mapped=("1.2.3.4", 4101), seen=(("1.2.3.4", 4101),))
SYMMETRIC = NatBehaviour(APDM, APDF, Allocation(Ports.RANDOM), public_ip="1.2.3.4")
OPEN = NatBehaviour(Mapping.NONE, EIF, Allocation(Ports.PRESERVED), mapped=("1.2.3.4", 4101))
BLOCKED = NatBehaviour(udp_blocked=True, evidence=("no observer answered",))
LISTENING = tuple(Multiaddr.parse(text) for text in ("/ip4/192.168.1.5/tcp/4101", "/ip4/192.168.1.5/udp/4101/quic-v1"))
PEER = str(PeerId.from_public_key(PrivateKey.generate(bytes(32)).public_key))


def facts(behaviour: NatBehaviour, **more: object) -> Facts:
    observers = tuple((f"9.9.9.{i}", 4101) for i in range(3))
    return Facts(behaviour, observers, own_ips=(ipaddress.ip_address("192.168.1.5"),), listening=LISTENING, **more)  # type: ignore[arg-type]


def found(given_facts: Facts) -> dict[str, Finding]:
    return {f.check: f for check in machine.CHECKS if (f := check(given_facts)) is not None}


def problems(given_facts: Facts) -> set[str]:
    return {name for name, finding in found(given_facts).items() if finding.ok is False}


def link(path: str, addr: str, direction: str = "outbound") -> Link:
    return Link(path, direction, Multiaddr.parse(addr))


def test_a_public_host_has_no_problem() -> None:
    assert problems(facts(OPEN)) == set()
    assert found(facts(OPEN))["reachable"].ok


def test_a_home_router_is_a_problem_of_reachability_alone() -> None:
    known = found(facts(HOME, routers=("192.168.1.1", "9.1.1.1"), reservations={"R": []}, relays_wanted=2))
    assert {name for name, f in known.items() if f.ok is False} == {"reachable"}
    assert "TCP 4101 and UDP 4101" in known["reachable"].fix
    assert "hole punching" in known["reachable"].detail


def test_on_loopback_alone_nobody_reaches_us_whatever_the_nat_looks_like() -> None:
    here = tuple(Multiaddr.parse(text) for text in ("/ip4/127.0.0.1/tcp/4101", "/ip4/127.0.0.1/udp/4101/quic-v1"))
    for behaviour in (OPEN, HOME, NatBehaviour()):
        known = found(replace(facts(behaviour), listening=here, links=(link("tcp", str(here[0]), "inbound"),)))
        for check in ("reachable", "listen"):
            assert known[check].ok is False
            assert "loopback address only" in known[check].detail
            assert "listen.addrs" in known[check].fix


def test_blocked_udp_is_named_with_what_was_asked() -> None:
    known = found(facts(BLOCKED, links=(link("tcp", "/ip4/9.9.9.1/tcp/4101"),)))
    assert known["udp"].ok is False
    assert "9.9.9.0:4101" in known["udp"].evidence[0]
    assert "while TCP works" in known["udp"].detail
    assert known["nat"].ok is None
    assert known["reachable"].fix == known["udp"].fix
    assert "tcp-ports" not in known


def test_a_web_only_network_is_named() -> None:
    known = found(facts(BLOCKED, links=(link("tcp", "/ip4/9.9.9.1/tcp/443"),)))
    assert "TCP port 443" in known["tcp-ports"].evidence[0]


@pytest.mark.parametrize(
    ("allocation", "word"),
    [
        (Allocation(Ports.RANDOM), "many guesses"),
        (Allocation(Ports.SEQUENTIAL, step=1), "predicted"),
        (Allocation(Ports.BLOCK, 30000, 32047), "30000 to 32047"),
    ],
)
def test_a_symmetric_nat_is_named(allocation: Allocation, word: str) -> None:
    nat = found(facts(replace(SYMMETRIC, allocation=allocation)))["nat"]
    assert nat.ok is False
    assert "symmetric" in nat.detail
    assert word in nat.detail
    assert "UPnP" in nat.fix


@pytest.mark.parametrize(
    ("routers", "word"),
    [(("192.168.1.1", "100.64.0.1"), "CGN"), (("192.168.1.1", None, "10.0.0.1"), "two NATs")],
)
def test_a_second_nat_is_named(routers: tuple[str | None, ...], word: str) -> None:
    double = found(facts(HOME, routers=routers))["double-nat"]
    assert double.ok is False
    assert word in double.detail
    assert "router 1: 192.168.1.1" in double.evidence


def test_one_router_is_one_nat() -> None:
    assert found(facts(HOME, routers=("192.168.1.1", "62.1.1.1")))["double-nat"].ok


def test_a_firewall_at_a_public_address_is_named() -> None:
    known = found(facts(replace(OPEN, filtering=APDF)))
    assert known["firewall"].ok is False
    assert known["reachable"].fix == known["firewall"].fix


def test_ipv6_without_a_hole_in_the_firewall_is_told() -> None:
    six = ipaddress.ip_address("2a00:1450::5")
    listening = (*LISTENING, Multiaddr.parse("/ip6/2a00:1450::5/tcp/4101"))
    unsure = facts(HOME)
    unsure.own_ips, unsure.listening = (six,), listening
    assert found(unsure)["ipv6"].ok is None
    assert "firewall" in found(unsure)["ipv6"].fix
    unsure.links = (link("tcp", "/ip6/2a00:1451::9/tcp/7", "inbound"),)
    assert found(unsure)["ipv6"].ok
    unsure.listening = LISTENING
    assert found(unsure)["ipv6"].ok is False


def test_wsl_is_known_by_its_kernel() -> None:
    assert surroundings("5.15.90.1-microsoft-standard-WSL2") == "wsl"
    assert problems(facts(HOME, surroundings="wsl")) >= {"wsl"}
    assert "mirrored" in found(facts(HOME, surroundings="wsl"))["wsl"].fix


def test_relays_that_do_not_answer_are_none() -> None:
    errors = {"R": "it does not answer any more"}
    known = {"reservations": {"R": [], "S": []}, "relays_wanted": 2, "relay_errors": errors}
    one = found(facts(HOME, silent_relays=frozenset({"R"}), **known))["relays"]
    assert one.ok
    assert "1 relay" in one.detail
    assert "R: it does not answer any more" in one.evidence
    both = found(facts(HOME, silent_relays=frozenset({"R", "S"}), **known))["relays"]
    assert both.ok is False
    assert "nobody can begin a connection" in both.detail
    assert both.fix


def test_relays_that_refuse_are_told() -> None:
    relays = found(facts(HOME, relays_wanted=2, relay_errors={"R": "no room"}))["relays"]
    assert relays.ok is False
    assert "R: no room" in relays.evidence


def test_relays_that_meddle_are_told() -> None:
    assert "relayed-paths" not in found(facts(HOME))
    silent = found(facts(HOME, relay_troubles={"R": RelayTroubles(silent=2, last="no answer")}))["relayed-paths"]
    assert (silent.ok, "fell silent" in silent.detail, "R" in silent.evidence[0]) == (False, True, True)
    both = {"R": RelayTroubles(silent=2), "S": RelayTroubles(altered=1, last="does not decrypt")}
    altered = found(facts(HOME, relay_troubles=both))["relayed-paths"]
    assert "through S did not arrive as it was sent" in altered.detail
    assert "relay.relays" in altered.fix
    assert len(altered.evidence) == 2


def test_nobody_to_ask_is_a_problem() -> None:
    alone = Facts(listening=LISTENING)
    assert found(alone)["observers"].ok is False
    assert found(alone)["reachable"].ok is None


# -- one peer ----------------------------------------------------------------------------------------------------------
RELAYED = link("relay", f"/ip4/9.9.9.1/tcp/443/p2p/{PEER}/p2p-circuit")


def test_what_others_tried_counts_more_than_what_the_nat_looks_like() -> None:
    public, closed = Multiaddr.parse("/ip4/1.2.3.4/tcp/4101"), Multiaddr.parse("/ip4/1.2.3.4/udp/4101/quic-v1")
    reached = found(facts(HOME, verdicts={public: "public", closed: "private"}, reachability="public"))["reachable"]
    assert reached.ok
    assert "1.2.3.4:4101" in reached.detail
    assert reached.evidence == (f"{public}: public", f"{closed}: private")
    unknown = NatBehaviour()
    refused = found(facts(unknown, verdicts={public: "private"}, reachability="private"))["reachable"]
    assert refused.ok is False
    assert refused.evidence == (f"{public}: private",)


@pytest.mark.parametrize(("verdict", "ok"), [("public", True), ("private", False), ("unknown", None)])
def test_ipv6_is_judged_by_those_who_tried_it(verdict: str, ok: bool | None) -> None:
    ip, addr = ipaddress.ip_address("2a01:4f8::5"), Multiaddr.parse("/ip6/2a01:4f8::5/tcp/4101")
    given_facts = replace(facts(HOME), own_ips=(ip,), listening=(addr,), verdicts={addr: verdict})
    finding = machine.check_ipv6(given_facts)
    assert finding is not None
    assert finding.ok is ok
    assert (ok is False) == ("could not connect" in finding.detail)


def told(own: NatBehaviour, theirs: NatBehaviour | None, **more: object) -> dict[str, Finding]:
    about = PeerFacts(facts(own), PEER, links=(RELAYED,), theirs=theirs, **more)  # type: ignore[arg-type]
    return {f.check: f for check in peer.CHECKS if (f := check(about)) is not None}


@pytest.mark.parametrize(
    ("own", "theirs", "word"),
    [
        (HOME, BLOCKED, "UDP is blocked where the peer is"),
        (BLOCKED, BLOCKED, "UDP is blocked where we are and the peer is"),
        (SYMMETRIC, HOME, "has to be guessed"),
        (SYMMETRIC, SYMMETRIC, "behind a symmetric NAT: we are and the peer is"),
        (replace(SYMMETRIC, allocation=Allocation(Ports.SEQUENTIAL, step=1)), HOME, "predicted"),
        (HOME, HOME, "can be punched"),
        (HOME, None, "does not tell"),
    ],
)
def test_the_cause_of_a_relayed_path(own: NatBehaviour, theirs: NatBehaviour | None, word: str) -> None:
    cause = told(own, theirs)["cause"]
    assert word in cause.detail
    assert cause.fix
    assert cause.ok is (None if theirs is None else False)


def test_attempts_are_told_with_their_results() -> None:
    report = PunchReport(PeerId.parse(PEER), 0.0, 3, ["/ip4/1.1.1.1/udp/4101/quic-v1"], ["refused"])
    attempts = told(HOME, HOME, report=report)["attempts"]
    assert attempts.ok is False
    assert attempts.detail.startswith("3 attempts")
    assert attempts.evidence == ("tried /ip4/1.1.1.1/udp/4101/quic-v1", "failed: refused")
    report.result, report.seconds = "quic", 0.2
    direct = PeerFacts(facts(HOME), PEER, links=(link("quic", "/ip4/1.1.1.1/udp/4101/quic-v1"),), report=report)
    assert peer.check_path(direct).ok
    assert peer.check_cause(direct) is None
    assert "over quic after 0.20 s" in (peer.check_attempts(direct) or Finding("", False, "")).detail


def test_addresses_that_nobody_proves_are_told() -> None:
    report = PunchReport(PeerId.parse(PEER), 0.0, 1)
    assert "claims" not in told(HOME, HOME, report=report)
    report.unproven = ["/ip4/203.0.113.9/udp/53/quic-v1"]
    claims = told(HOME, HOME, report=report)["claims"]
    assert claims.ok is None
    assert "perhaps somebody else's" in claims.detail
    assert claims.evidence == ("named /ip4/203.0.113.9/udp/53/quic-v1",)


def test_guesses_are_told_with_their_results() -> None:
    report = PunchReport(PeerId.parse(PEER), 0.0, 1)
    report.guesses.append(Guess(Technique.BIRTHDAY, True, 256, 28.04, False, error="nothing got through"))
    attempts = told(HOME, SYMMETRIC, report=report)["attempts"]
    assert attempts.evidence == ("guessed ports: birthday, many sockets: 256 probes, 28.0 s: nothing got through",)
    assert str(Guess(Technique.BIRTHDAY)) == "birthday, many ports: 0 probes, 0.0 s: running"
    report.guesses.append(Guess(Technique.PREDICT, probes=16, seconds=0.31, running=False, direct=True))
    report.result, report.technique, report.seconds = "quic", "predict", 0.31
    attempts = told(HOME, SYMMETRIC, report=report)["attempts"]
    assert attempts.detail.startswith("a direct path over quic through a predicted port after 0.31 s")
    assert attempts.evidence[1] == "guessed ports: predict: 16 probes, 0.3 s: direct"


@pytest.mark.parametrize("known", [HOME, SYMMETRIC, OPEN, BLOCKED])
def test_what_peers_tell_of_their_nats_survives_the_wire(known: NatBehaviour) -> None:
    read = peer.behaviour_untrusted(peer.behaviour_to_plain(known))
    assert (read.mapping, read.filtering, read.udp_blocked) == (known.mapping, known.filtering, known.udp_blocked)
    assert read.allocation.ports is known.allocation.ports


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(("mapping", "filtering", "ports")), inner),
)


@given(PLAIN)
def test_garbage_from_a_peer_is_refused(value: object) -> None:
    try:
        peer.behaviour_untrusted(value)
    except RemoteProtocolError:
        pass
