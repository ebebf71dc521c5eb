"""Reservations kept, renewed and replaced, on a clock of the test's own."""

import random

from lattica_protocols.limits import RELAY_MAX_CANDIDATES
from lattica_protocols.peer_id import PeerId
from lattica_protocols.relay.keeper import Release, ReservationKeeper, Reserve, Search


def peer(n: int) -> PeerId:
    return PeerId.from_bytes_untrusted(bytes.fromhex("002408011220") + n.to_bytes(32, "big"))


def events(keeper: ReservationKeeper) -> list[object]:
    out: list[object] = []
    while (event := keeper.next_event()) is not None:
        out.append(event)
    return out


def holding(*peers: int) -> ReservationKeeper:
    keeper = ReservationKeeper(random.Random(1))
    for n in peers:
        keeper.offer(peer(n), float(n), 0.0)
    keeper.set_wanted(len(peers), 0.0)
    events(keeper)
    for n in peers:
        keeper.granted(peer(n), 3600, 0.0)
    assert keeper.held() == [peer(n) for n in peers]
    return keeper


def test_nothing_is_asked_before_it_is_wanted() -> None:
    keeper = ReservationKeeper(random.Random(1))
    keeper.offer(peer(1), 1.0, 0.0)
    assert events(keeper) == []
    assert keeper.next_timeout() is None
    keeper.set_wanted(1, 0.0)
    assert events(keeper) == [Reserve(peer(1))]


def test_the_best_are_asked_and_a_search_runs_only_while_something_is_missing() -> None:
    keeper = ReservationKeeper(random.Random(1))
    keeper.set_wanted(2, 0.0)
    assert events(keeper) == [Search()]
    for n in (3, 1, 2):
        keeper.offer(peer(n), float(n), 1.0)
    assert events(keeper) == [Reserve(peer(3)), Reserve(peer(1))]
    keeper.search_over(1.0)
    keeper.refused(peer(3), 2.0)
    assert events(keeper) == [Reserve(peer(2))]
    for n in (1, 2):
        keeper.granted(peer(n), 3600, 2.0)
    timeout = keeper.next_timeout()
    assert timeout is not None
    assert 2.0 + 3600 * 0.6 < timeout <= 2.0 + 3600 * 0.75
    keeper.handle_timer(1000.0)
    assert events(keeper) == []


def test_a_reservation_is_renewed_before_it_expires() -> None:
    keeper = holding(1)
    renew = keeper.next_timeout()
    assert renew is not None
    keeper.handle_timer(renew)
    assert events(keeper) == [Reserve(peer(1))]
    assert keeper.held() == [peer(1)]  # it is still good
    keeper.granted(peer(1), 3600, renew)
    later = keeper.next_timeout()
    assert later is not None
    assert later > renew + 2000


def test_a_lost_one_is_replaced_at_once_and_asked_again_later() -> None:
    keeper = holding(1)
    keeper.offer(peer(2), 2.0, 10.0)
    assert events(keeper) == []
    keeper.lost(peer(1), 20.0)
    assert events(keeper) == [Reserve(peer(2))]
    keeper.refused(peer(2), 21.0)
    assert events(keeper) == [Search()]
    asked: list[object] = []
    now = 21.0
    while len(asked) < 6:
        timeout = keeper.next_timeout()
        assert timeout is not None
        now = max(now, timeout)
        keeper.handle_timer(now)
        for event in events(keeper):
            if isinstance(event, Reserve):
                asked.append(event.peer)
                keeper.refused(event.peer, now)
            elif isinstance(event, Search):
                keeper.search_over(now)
    assert set(asked) == {peer(1), peer(2)}
    assert now > 40  # the pauses grow


def test_a_renewal_that_is_not_answered_ends_with_the_reservation() -> None:
    keeper = holding(1)
    keeper.handle_timer(3000.0)
    assert events(keeper) == [Reserve(peer(1))]
    keeper.handle_timer(3601.0)
    assert keeper.held() == []
    assert Reserve(peer(1)) in events(keeper)


def test_what_is_not_needed_any_more_is_released() -> None:
    keeper = holding(1, 2)
    keeper.set_wanted(1, 5.0)
    assert events(keeper) == [Release(peer(2))]
    keeper.set_wanted(0, 6.0)
    assert events(keeper) == [Release(peer(1))]
    assert keeper.next_timeout() is None


def test_lies_about_time_and_answers_nobody_asked_for() -> None:
    keeper = holding(1)
    keeper.granted(peer(9), 3600, 0.0)
    assert keeper.held() == [peer(1)]
    keeper.handle_timer(3000.0)
    keeper.granted(peer(1), -1e9, 3000.0)
    timeout = keeper.next_timeout()
    assert timeout is not None
    assert timeout > 3030
    keeper.handle_timer(3100.0)
    events(keeper)
    keeper.granted(peer(1), 1e18, 3100.0)
    timeout = keeper.next_timeout()
    assert timeout is not None
    assert timeout < 3100 + 24 * 3600


def test_candidates_are_bounded_and_those_in_use_are_kept() -> None:
    keeper = holding(1)
    for n in range(2, 3 * RELAY_MAX_CANDIDATES):
        keeper.offer(peer(n), float(-n), 1.0)
    assert len(keeper._candidates) == RELAY_MAX_CANDIDATES
    assert keeper.held() == [peer(1)]
    keeper.withdraw(peer(1), 2.0)
    assert events(keeper) == [Reserve(peer(3 * RELAY_MAX_CANDIDATES - 1))]
