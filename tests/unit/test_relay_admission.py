"""Who gets a reservation or a circuit at a relay, and when there is no more room."""

import ipaddress

from lattica_protocols.limits import RELAY_REQUEST_BURST, RELAY_REQUESTS_PER_SECOND
from lattica_protocols.peer_id import PeerId
from lattica_protocols.relay.admission import Circuit, RelayLimits, RelayTable, address_range
from lattica_protocols.relay.messages import Limit, Status


def peer(n: int) -> PeerId:
    return PeerId.from_bytes_untrusted(bytes.fromhex("002408011220") + n.to_bytes(32, "big"))


def ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(text)


def reserve(table: RelayTable, n: int, where: str = "127.0.0.1", now: float = 0.0) -> Status | None:
    return table.reserve(peer(n), ip(where), relayed=False, now=now)


def connect(
    table: RelayTable, source: int, target: int, where: str = "127.0.0.1", now: float = 0.0
) -> Circuit | Status:
    return table.connect(peer(source), ip(where), peer(target), relayed=False, now=now)


def test_reservations_end_in_total_by_range_and_with_time() -> None:
    table = RelayTable(RelayLimits(reservations=4, reservations_per_range=2, reservation_seconds=100))
    assert reserve(table, 1, "8.8.8.1") is None
    assert reserve(table, 2, "8.8.8.2") is None
    assert reserve(table, 3, "8.8.8.3") is Status.RESERVATION_REFUSED
    assert reserve(table, 1, "8.8.8.1") is None  # a renewal
    assert reserve(table, 3, "8.8.9.3") is None
    assert reserve(table, 4, "2001:db8::1") is None
    assert reserve(table, 5, "9.9.9.9") is Status.RESERVATION_REFUSED
    assert table.has_reservation(peer(1), 99)
    assert not table.has_reservation(peer(1), 100)
    assert reserve(table, 5, "9.9.9.9", now=101) is None
    assert list(table.reservations()) == [peer(5)]


def test_a_reservation_ends_with_the_connection_and_moves_with_the_peer() -> None:
    table = RelayTable(RelayLimits(reservations_per_range=1))
    assert reserve(table, 1, "8.8.8.1") is None
    assert reserve(table, 1, "9.9.9.1") is None
    assert reserve(table, 2, "8.8.8.2") is None  # the range it left is free again
    table.peer_gone(peer(1))
    table.peer_gone(peer(1))
    assert not table.has_reservation(peer(1), 0)
    assert reserve(table, 3, "9.9.9.2") is None


def test_nothing_is_granted_over_another_relay() -> None:
    table = RelayTable()
    assert table.reserve(peer(1), None, relayed=True, now=0) is Status.PERMISSION_DENIED
    assert reserve(table, 1) is None
    assert table.connect(peer(2), None, peer(1), relayed=True, now=0) is Status.PERMISSION_DENIED
    assert connect(table, 1, 1) is Status.PERMISSION_DENIED
    assert table.refused == {Status.PERMISSION_DENIED: 3}


def test_circuits_end_by_source_target_range_and_in_total() -> None:
    table = RelayTable(RelayLimits(circuits=5, circuits_per_source=2, circuits_per_target=3, circuits_per_range=2))
    for n in (1, 2):
        assert reserve(table, n) is None
    assert connect(table, 9, 8) is Status.NO_RESERVATION
    first = connect(table, 9, 1)
    assert isinstance(first, Circuit)
    assert isinstance(connect(table, 9, 1), Circuit)
    assert connect(table, 9, 2) is Status.RESOURCE_LIMIT_EXCEEDED  # two of one source
    assert isinstance(connect(table, 10, 1), Circuit)
    assert connect(table, 11, 1) is Status.RESOURCE_LIMIT_EXCEEDED  # three of one target
    assert isinstance(connect(table, 12, 2, "8.8.8.1"), Circuit)
    assert isinstance(connect(table, 13, 2, "8.8.8.2"), Circuit)
    assert connect(table, 14, 2, "8.8.9.1") is Status.RESOURCE_LIMIT_EXCEEDED  # five in all
    table.circuit_over(first)
    table.circuit_over(first)
    assert connect(table, 14, 2, "8.8.8.3") is Status.RESOURCE_LIMIT_EXCEEDED  # two of one range
    assert isinstance(connect(table, 14, 1, "8.8.9.1"), Circuit)
    for circuit in list(table.circuits):
        table.circuit_over(circuit)
    assert not table._by_source
    assert not table._by_target
    assert not table._by_range


def test_who_asks_too_often_waits() -> None:
    table = RelayTable()
    answers = [reserve(table, 1) for _ in range(RELAY_REQUEST_BURST + 1)]
    assert answers == [None] * RELAY_REQUEST_BURST + [Status.RESOURCE_LIMIT_EXCEEDED]
    assert reserve(table, 1, now=1 / RELAY_REQUESTS_PER_SECOND) is None
    assert connect(table, 1, 2, now=1 / RELAY_REQUESTS_PER_SECOND) is Status.RESOURCE_LIMIT_EXCEEDED
    assert reserve(table, 2, now=1000) is None
    assert len(table._tokens) == 1  # peers that rest are forgotten


def test_ranges_and_limits_as_told() -> None:
    assert str(address_range(ip("8.8.8.200"))) == "8.8.8.0/24"
    assert str(address_range(ip("2001:db8:1:2::3"))) == "2001:db8:1::/48"
    assert address_range(ip("127.0.0.1")) is address_range(ip("::1")) is address_range(None) is None
    assert RelayLimits().message() is None
    assert RelayLimits(circuit_seconds=60).message() == Limit(duration=60, data=None)
    assert RelayLimits(circuit_bytes=7).message() == Limit(duration=None, data=7)
