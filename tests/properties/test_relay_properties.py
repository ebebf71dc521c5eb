"""Whatever the bytes: a message or RemoteProtocolError. Whatever the order of requests: the limits hold."""

from __future__ import annotations

import contextlib
import ipaddress
import random

from hypothesis import given
from hypothesis import strategies as st

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.keys import PrivateKey
from lattica_protocols.peer_id import PeerId
from lattica_protocols.relay.admission import Circuit, RelayLimits, RelayTable
from lattica_protocols.relay.keeper import Release, ReservationKeeper, Reserve, Search
from lattica_protocols.relay.messages import HopMessage, Limit, RelayPeer, Reservation, StopMessage, peer_untrusted
from lattica_protocols.relay.voucher import Voucher

STEPS = ["reserve", "connect", "over", "gone", "wait"]
KEY = PrivateKey.generate(b"k" * 32)
KEY_ID = PeerId.from_public_key(KEY.public_key)


def peer(n: int) -> PeerId:
    return PeerId.from_bytes_untrusted(bytes.fromhex("002408011220") + n.to_bytes(32, "big"))


numbers = st.none() | st.integers(0, 2**64 - 1)
enums = st.none() | st.integers(-(2**31), 2**31 - 1)
peers = st.none() | st.builds(
    RelayPeer, id=st.none() | st.binary(max_size=60), addrs=st.lists(st.binary(max_size=40), max_size=5).map(tuple)
)
limits = st.none() | st.builds(Limit, duration=numbers, data=numbers)
reservations = st.none() | st.builds(Reservation, expire=numbers, voucher=st.none() | st.binary(max_size=50))
hops = st.builds(HopMessage, type=enums, peer=peers, reservation=reservations, limit=limits, status=enums)
stops = st.builds(StopMessage, type=enums, peer=peers, limit=limits, status=enums)


@given(hops, stops)
def test_messages_come_back_as_they_were(hop: HopMessage, stop: StopMessage) -> None:
    assert HopMessage.decode_untrusted(hop.encode()) == hop
    assert StopMessage.decode_untrusted(stop.encode()) == stop


@given(st.binary(max_size=300) | hops.map(HopMessage.encode) | stops.map(StopMessage.encode))
def test_garbage_is_refused_in_one_way(data: bytes) -> None:
    for message in (HopMessage, StopMessage):
        with contextlib.suppress(RemoteProtocolError):
            peer_untrusted(message.decode_untrusted(data).peer)
    with contextlib.suppress(RemoteProtocolError):
        Voucher.open_untrusted(data)


@given(st.integers(0, 2**63), st.integers(0, 400), st.integers(1, 255))
def test_a_changed_voucher_is_refused(expiration: int, at: int, change: int) -> None:
    sealed = bytearray(Voucher(KEY_ID, peer(1), expiration).seal(KEY))
    sealed[at % len(sealed)] ^= change
    with contextlib.suppress(RemoteProtocolError):
        assert Voucher.open_untrusted(bytes(sealed)) == Voucher(KEY_ID, peer(1), expiration)


@given(
    st.lists(
        st.tuples(st.sampled_from(STEPS), st.integers(0, 7), st.integers(0, 7)),
        max_size=120,
    )
)
def test_the_table_never_grants_more_than_its_limits(steps: list[tuple[str, int, int]]) -> None:
    allowed = RelayLimits(
        reservations=4, reservations_per_range=2, circuits=5, circuits_per_source=2, circuits_per_target=2,
        circuits_per_range=3, reservation_seconds=50,
    )  # fmt: skip
    table = RelayTable(allowed)
    now = 0.0
    for what, a, b in steps:
        ip = ipaddress.ip_address(f"8.8.{a // 3}.{a}")
        if what == "reserve":
            table.reserve(peer(a), ip, relayed=False, now=now)
        elif what == "connect":
            circuit = table.connect(peer(a), ip, peer(b), relayed=False, now=now)
            assert not isinstance(circuit, Circuit) or table.has_reservation(peer(b), now)
        elif what == "over" and table.circuits:
            table.circuit_over(sorted(table.circuits, key=lambda c: (c.source, c.target))[0])
        elif what == "gone":
            table.peer_gone(peer(a))
        else:
            now += 7.0 * a
        live = [p for p in table.reservations() if table.has_reservation(p, now)]
        assert len(live) <= 4
        assert len(table.circuits) <= 5
        for n in range(8):
            assert sum(c.source == peer(n) for c in table.circuits) <= 2
            assert sum(c.target == peer(n) for c in table.circuits) <= 2
        for part in range(3):
            assert sum(c.range == ipaddress.ip_network(f"8.8.{part}.0/24") for c in table.circuits) <= 3
    for circuit in list(table.circuits):
        table.circuit_over(circuit)
    assert not table._by_source | table._by_target
    assert not table._by_range


@given(
    st.integers(0, 2**32),
    st.lists(st.tuples(st.sampled_from("owgrlst"), st.integers(0, 5), st.floats(0, 400)), max_size=80),
)
def test_the_keeper_asks_within_bounds_and_never_twice_at_once(seed: int, steps: list[tuple[str, int, float]]) -> None:
    keeper = ReservationKeeper(random.Random(seed))
    asked: set[PeerId] = set()
    searching = False
    now = 0.0
    for what, n, seconds in steps:
        now += seconds
        if what == "o":
            keeper.offer(peer(n), float(n), now)
        elif what == "w":
            keeper.set_wanted(n % 3, now)
        elif what == "g":
            asked.discard(peer(n))
            keeper.granted(peer(n), seconds * 10, now)
        elif what == "r":
            asked.discard(peer(n))
            keeper.refused(peer(n), now)
        elif what == "l":
            keeper.lost(peer(n), now)
        elif what == "s" and searching:
            searching = False
            keeper.search_over(now)
        keeper.handle_timer(now)
        while (event := keeper.next_event()) is not None:
            if isinstance(event, Search):
                assert not searching
                searching = True
            elif isinstance(event, Release):
                asked.discard(event.peer)
            elif isinstance(event, Reserve):
                asked.add(event.peer)
        assert len(keeper.held()) <= 2
