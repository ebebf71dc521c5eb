"""AutoNAT: whatever a client or server says, an exchange ends or is refused, and nobody else is dialled for nothing."""

from __future__ import annotations

import ipaddress
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattica_protocols import limits
from lattica_protocols.autonat.admission import DialBudget, dial_reason
from lattica_protocols.autonat.exchange import AskedRequest, ServedRequest
from lattica_protocols.autonat.messages import (
    AutonatMessage,
    DialDataRequest,
    DialDataResponse,
    DialRequest,
    DialResponse,
    DialStatus,
    ResponseStatus,
    V1Dial,
    V1Message,
    V1Peer,
    v1_addrs_untrusted,
)
from lattica_protocols.autonat.reach import MARGIN, Outcome, ReachTracker
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.keys import PrivateKey
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.nat.scope import IpAddress, is_local
from lattica_protocols.peer_id import PeerId

OURS = Multiaddr.parse("/ip4/198.18.1.1/tcp/4101")
OTHER = Multiaddr.parse("/ip4/198.18.1.1/udp/4101/quic-v1")
PEERS = [PeerId.from_public_key(PrivateKey.generate(bytes([i]) * 32).public_key) for i in range(8)]

ips = st.ip_addresses()
addrs = st.builds(
    lambda ip, port, kind: Multiaddr.parse(f"/ip{ip.version}/{ip}/{kind.format(port)}"),
    ips,
    st.integers(0, 65535),
    st.sampled_from(["tcp/{}", "udp/{}/quic-v1", "udp/{}", "tcp/{}/ws"]),
)
raw_addrs = st.lists(st.binary(max_size=30) | addrs.map(Multiaddr.to_bytes), max_size=8).map(tuple)
nonces = st.none() | st.integers(0, 2**64 - 1)
small = st.none() | st.integers(0, 200_000)
statuses = st.none() | st.sampled_from([0, 100, 101, 200, 7])
messages = st.builds(
    AutonatMessage,
    dial_request=st.none() | st.builds(DialRequest, addrs=raw_addrs, nonce=nonces),
    dial_response=st.none() | st.builds(DialResponse, status=statuses, addr_index=small, dial_status=statuses),
    data_request=st.none() | st.builds(DialDataRequest, addr_index=small, num_bytes=small),
    data_response=st.none() | st.builds(DialDataResponse, data=st.none() | st.binary(max_size=5000)),
).map(AutonatMessage.encode)
received = st.lists(st.binary(max_size=60) | messages, max_size=40)


def reason(addr: str, observed: str, own: tuple[str, ...] = ()) -> str | None:
    return dial_reason(
        Multiaddr.parse(addr), ipaddress.ip_address(observed), [ipaddress.ip_address(each) for each in own]
    )


@given(received, ips, st.randoms(use_true_random=False), st.booleans(), st.booleans())
def test_a_server_dials_no_stranger_for_free(
    data: list[bytes], observed: IpAddress, rng: random.Random, room: bool, admitted: bool
) -> None:
    served = ServedRequest(
        lambda addr: dial_reason(addr, observed, []) is None, lambda: room, observed, rng, admitted=admitted
    )
    try:
        for message in data:
            while served.poll_transmit() is not None:
                pass
            served.receive_untrusted(message)
            if served.dial is not None:
                served.dialled(DialStatus.OK)
    except RemoteProtocolError:
        pass
    if served.dial is None:
        return
    ip = served.dial.addr.ip()
    assert ip is not None
    assert admitted
    if ip != observed:
        assert room
        assert served.received_bytes >= limits.AUTONAT_MIN_DIAL_DATA
        assert not is_local(ip)
        assert not is_local(observed)


@given(received)
def test_a_client_pays_no_more_than_the_most(data: list[bytes]) -> None:
    asked = AskedRequest(OURS, 7)
    sent = 0
    try:
        for message in data:
            while (out := asked.poll_transmit()) is not None:
                sent += len(out)
            asked.receive_untrusted(message)
    except RemoteProtocolError:
        pass
    while (out := asked.poll_transmit()) is not None:
        sent += len(out)
    assert asked.paid_bytes <= limits.AUTONAT_MAX_DIAL_DATA
    assert sent < 1.02 * limits.AUTONAT_MAX_DIAL_DATA + 200


@given(st.integers(0, 2**32))
def test_both_sides_together(seed: int) -> None:
    rng = random.Random(seed)
    elsewhere = rng.random() < 0.5
    observed = ipaddress.ip_address("198.18.7.7" if elsewhere else "198.18.1.1")
    served = ServedRequest(lambda addr: dial_reason(addr, observed, []) is None, lambda: True, observed, rng)
    asked = AskedRequest(OURS, seed)
    while asked.answer is None:
        while (message := asked.poll_transmit()) is not None:
            assert len(message) <= limits.AUTONAT_MAX_MESSAGE_BYTES
            served.receive_untrusted(message)
        if served.dial is not None and not served.finished:
            assert (served.dial.addr, served.dial.nonce) == (OURS, seed)
            served.dialled(DialStatus.DIAL_ERROR)
        while (message := served.poll_transmit()) is not None:
            asked.receive_untrusted(message)
    assert (asked.answer.status, asked.answer.dial_status) == (ResponseStatus.OK, DialStatus.DIAL_ERROR)
    assert served.finished
    assert (asked.paid_bytes >= limits.AUTONAT_MIN_DIAL_DATA) == elsewhere
    assert asked.paid_bytes == served.received_bytes


def test_crumbs_of_data_are_refused() -> None:
    observed = ipaddress.ip_address("198.18.7.7")
    served = ServedRequest(lambda addr: True, lambda: True, observed, random.Random(1))
    served.receive_untrusted(AutonatMessage(dial_request=DialRequest(addrs=(OURS.to_bytes(),), nonce=1)).encode())
    with pytest.raises(RemoteProtocolError, match="1 bytes of data"):
        served.receive_untrusted(AutonatMessage(data_response=DialDataResponse(data=b"x")).encode())


@pytest.mark.parametrize(
    ("addr", "observed"),
    [
        ("/ip4/192.168.1.1/tcp/80", "198.18.1.1"),
        ("/ip4/127.0.0.1/tcp/80", "198.18.1.1"),
        ("/ip4/100.64.0.1/tcp/80", "198.18.1.1"),
        ("/ip4/169.254.169.254/tcp/80", "198.18.1.1"),
        ("/ip4/255.255.255.255/tcp/80", "198.18.1.1"),
        ("/ip4/224.0.0.1/udp/80/quic-v1", "198.18.1.1"),
        ("/ip4/0.0.0.0/tcp/80", "198.18.1.1"),
        ("/ip6/::1/tcp/80", "198.18.1.1"),
        ("/ip6/fc00::1/tcp/80", "2600::1"),
        ("/ip6/::ffff:198.18.1.1/tcp/80", "198.18.1.1"),
        ("/ip6/::ffff:10.0.0.1/tcp/80", "198.18.1.1"),
        ("/ip6/64:ff9b::a00:1/tcp/80", "2600::1"),
        ("/ip6/2002:a00:1::1/tcp/80", "2600::1"),
        ("/ip4/198.18.1.1/tcp/0", "198.18.1.1"),
        ("/ip4/198.18.1.1/tcp/80/ws", "198.18.1.1"),
        ("/dns4/example.org/tcp/80", "198.18.1.1"),
        ("/ip4/198.18.9.9/tcp/80", "198.18.1.1"),
        ("/ip4/198.18.5.5/tcp/80", "10.0.0.1"),
        ("/ip4/10.0.0.2/tcp/80", "10.0.0.1"),
    ],
)
def test_what_is_never_dialled(addr: str, observed: str) -> None:
    assert reason(addr, observed, ("198.18.9.9",)) is not None


def test_what_is_dialled() -> None:
    assert reason("/ip4/198.18.1.1/tcp/80", "198.18.1.1") is None
    assert reason("/ip4/198.18.5.5/udp/80/quic-v1", "198.18.1.1") is None
    assert reason("/ip4/10.0.0.1/tcp/80", "10.0.0.1") is None, "its own address, where we see it"


def test_budgets_by_peer_range_and_in_all() -> None:
    budget = DialBudget()
    here = ipaddress.ip_address("198.18.1.1")
    assert sum(budget.take(PEERS[0], here, 0.0) for _ in range(100)) == limits.AUTONAT_PEER_PER_MINUTE
    assert sum(budget.take(peer, here, 0.0) for peer in PEERS for _ in range(5)) < limits.AUTONAT_RANGE_PER_MINUTE
    elsewhere = [ipaddress.ip_address(f"198.18.{i}.1") for i in range(2, 200)]
    assert sum(budget.take(PEERS[1], ip, 0.0) for ip in elsewhere) <= limits.AUTONAT_PER_MINUTE / 4
    taken = sum(budget.take(PEERS[i % 8], elsewhere[i % 150], i / 1000) for i in range(0, 600_000, 10))
    assert taken <= 10 * limits.AUTONAT_PER_MINUTE
    assert sum(budget.take_data(700.0) for _ in range(100)) <= limits.AUTONAT_DATA_PER_MINUTE


@given(st.binary(max_size=200))
def test_version_1_requests(data: bytes) -> None:
    try:
        v1_addrs_untrusted(data, PEERS[0])
    except RemoteProtocolError:
        pass


def test_version_1_only_about_oneself() -> None:
    def request(peer: PeerId) -> bytes:
        return V1Message(type=0, dial=V1Dial(peer=V1Peer(id=peer.to_bytes(), addrs=(OURS.to_bytes(), b"?")))).encode()

    assert v1_addrs_untrusted(request(PEERS[0]), PEERS[0]) == (OURS,)
    with pytest.raises(RemoteProtocolError, match="another peer"):
        v1_addrs_untrusted(request(PEERS[1]), PEERS[0])


# -- what is believed --------------------------------------------------------------------------------------------
def servers(count: int, *, same_range: bool = False) -> dict[PeerId, IpAddress]:
    return {PEERS[i]: ipaddress.ip_address(f"198.18.{5 if same_range else i}.{i + 1}") for i in range(count)}


def ask_for(tracker: ReachTracker, until: float, answers: dict[PeerId, Outcome], start: float = 0.0) -> int:
    """Ask as the tracker wants to; how many questions that took."""
    now, asked = start, 0
    while now <= until:
        while (question := tracker.next_question(now)) is not None:
            asked += 1
            tracker.answered(question, answers[question.server], now)
        now = max(now + 0.01, tracker.next_timeout() or until + 1)
    return asked


@given(st.integers(0, 2**32), st.booleans())
def test_one_liar_among_four_is_outvoted(seed: int, truth: bool) -> None:
    tracker = ReachTracker(random.Random(seed))
    tracker.set_addrs([OURS, OTHER], 0.0)
    tracker.set_servers(servers(4), 0.0)
    honest, lie = (Outcome.REACHED, Outcome.UNREACHED) if truth else (Outcome.UNREACHED, Outcome.REACHED)
    answers = dict.fromkeys(PEERS[:4], honest) | {PEERS[0]: lie}
    ask_for(tracker, 20_000.0, answers)
    assert tracker.overall() == ("public" if truth else "private")


@given(st.integers(0, 2**32), st.sampled_from([Outcome.REACHED, Outcome.UNREACHED]))
def test_one_server_or_one_range_is_not_enough(seed: int, outcome: Outcome) -> None:
    for known in (servers(1), servers(8, same_range=True)):
        tracker = ReachTracker(random.Random(seed))
        tracker.set_addrs([OURS], 0.0)
        tracker.set_servers(known, 0.0)
        assert ask_for(tracker, 1000.0, dict.fromkeys(PEERS, outcome)) < 12
        assert tracker.overall() == "unknown"


@given(st.integers(0, 2**32))
def test_who_cannot_settle_it_is_asked_ever_more_rarely(seed: int) -> None:
    tracker = ReachTracker(random.Random(seed))
    tracker.set_addrs([OURS], 0.0)
    tracker.set_servers(servers(1), 0.0)
    reached = dict.fromkeys(PEERS, Outcome.REACHED)
    assert ask_for(tracker, 86_400.0, reached) < 60  # a day; every two minutes that would be 720
    tracker.set_servers(servers(2), 86_400.0)
    assert ask_for(tracker, 86_402.0, reached, 86_400.0) >= 1  # somebody new
    assert tracker.overall() == "unknown" or tracker.known(OURS) == "public"
    ask_for(tracker, 86_400.0 + 300.0, reached, 86_402.0)
    assert tracker.known(OURS) == "public"


def test_a_change_is_noticed_and_a_single_contradiction_is_not_one() -> None:
    tracker = ReachTracker(random.Random(3))
    tracker.set_addrs([OURS], 0.0)
    tracker.set_servers(servers(4), 0.0)
    ask_for(tracker, 100.0, dict.fromkeys(PEERS, Outcome.REACHED))
    assert tracker.known(OURS) == "public"
    ask_for(tracker, 5000.0, dict.fromkeys(PEERS, Outcome.REACHED) | {PEERS[1]: Outcome.UNREACHED}, 100.0)
    assert tracker.known(OURS) == "public"
    ask_for(tracker, 9000.0, dict.fromkeys(PEERS, Outcome.UNREACHED), 5000.0)
    assert tracker.known(OURS) == "private"
    tracker.reset(9000.0)
    assert tracker.overall() == "unknown"


@given(
    st.integers(0, 2**32),
    st.lists(
        st.tuples(st.sampled_from(["addrs", "servers", "ask", "answer", "reset"]), st.integers(0, 8)), max_size=80
    ),
)
def test_whatever_happens_questions_stay_few(seed: int, steps: list[tuple[str, int]]) -> None:
    rng = random.Random(seed)
    tracker = ReachTracker(rng)
    running = []
    for now, (what, number) in enumerate(steps):
        if what == "addrs":
            tracker.set_addrs([Multiaddr.tcp(f"198.18.1.{i}", 1) for i in range(number * 3)], now)
        elif what == "servers":
            tracker.set_servers(servers(number), now)
        elif what == "reset":
            tracker.reset(now)
        elif what == "ask" and (question := tracker.next_question(now)) is not None:
            running.append(question)
        elif what == "answer" and running:
            tracker.answered(running.pop(), rng.choice(list(Outcome)), now)
        assert len(tracker.verdicts()) <= limits.AUTONAT_MAX_ASKED_ADDRS
    assert MARGIN >= 2
