"""Reservations kept, renewed and replaced, on a clock of the test's own."""

import itertools
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


def test_a_silent_relay_is_replaced_before_it_is_lost() -> None:
    keeper = holding(1, 2)
    keeper.offer(peer(3), 3.0, 10.0)
    keeper.silent(peer(1), 20.0)
    keeper.silent(peer(1), 21.0)
    assert events(keeper) == [Reserve(peer(3))]
    keeper.granted(peer(3), 3600, 22.0)
    assert events(keeper) == []  # nothing is given up on suspicion
    assert keeper.held() == [peer(1), peer(2), peer(3)]
    keeper.lost(peer(1), 30.0)
    assert events(keeper) == []
    assert keeper.held() == [peer(2), peer(3)]


def test_a_relay_that_was_only_slow_stays_and_its_replacement_goes() -> None:
    keeper = holding(1, 2)
    keeper.offer(peer(3), 3.0, 10.0)
    keeper.silent(peer(1), 20.0)
    keeper.granted(peer(3), 3600, 22.0)
    events(keeper)
    keeper.heard(peer(1))
    assert events(keeper) == [Release(peer(3))]
    assert keeper.held() == [peer(1), peer(2)]


def test_when_all_relays_are_silent_others_are_searched_as_if_there_were_none() -> None:
    keeper = holding(1)
    keeper.silent(peer(1), 1000.0)
    found = searches(keeper, 1000.0, 1300.0)
    assert found[0] == 1000.0
    assert max(later - before for before, later in itertools.pairwise(found)) <= 75


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


def searches(keeper: ReservationKeeper, now: float, until: float) -> list[float]:
    """When it searches, in vain, from `now` on."""
    found: list[float] = []
    while now < until:
        for event in events(keeper):
            if isinstance(event, Search):
                found.append(now)
                keeper.search_over(now)
            elif isinstance(event, Reserve):
                keeper.refused(event.peer, now)
        timeout = keeper.next_timeout()
        now = until if timeout is None else max(now, timeout)
        keeper.handle_timer(now)
    return found


def test_searches_in_vain_become_rare_and_a_loss_starts_one_at_once() -> None:
    keeper = ReservationKeeper(random.Random(3))
    keeper.offer(peer(1), 1.0, 0.0)
    keeper.set_wanted(2, 0.0)
    assert events(keeper) == [Reserve(peer(1)), Search()]
    keeper.granted(peer(1), 1e9, 0.0)
    keeper.search_over(0.0)
    in_vain = searches(keeper, 0.0, 20_000.0)
    assert in_vain[0] < 7
    gaps = [later - before for before, later in itertools.pairwise(in_vain)]
    assert max(gaps) <= 750
    assert min(gaps[8:]) >= 450  # a spare one is not worth more
    keeper.lost(peer(1), 20_000.0)
    alone = searches(keeper, 20_000.0, 21_000.0)
    assert alone[0] == 20_000.0
    gaps = [later - before for before, later in itertools.pairwise(alone)]
    assert max(gaps) <= 75  # nobody reaches us meanwhile
    assert 3.75 <= min(gaps) < 7


def test_a_relay_that_comes_and_goes_does_not_make_us_search_all_the_time() -> None:
    keeper = ReservationKeeper(random.Random(4))
    keeper.offer(peer(1), 1.0, 0.0)
    keeper.set_wanted(1, 0.0)
    now, found, asked = 0.0, 0, 0
    while now < 600.0:
        for event in events(keeper):
            if isinstance(event, Search):
                found += 1
                keeper.search_over(now)
            elif isinstance(event, Reserve):
                asked += 1
                keeper.granted(peer(1), 3600, now)
                keeper.lost(peer(1), now)
        timeout = keeper.next_timeout()
        assert timeout is not None
        now = max(now, timeout)
        keeper.handle_timer(now)
    assert found <= 600 / 5 + 1
    assert asked <= 600 / 3.75 + 1


def test_a_relay_that_served_well_is_asked_again_soon() -> None:
    """Its process was restarted, or our address is another one."""
    keeper = holding(1)
    keeper.lost(peer(1), 1000.0)
    assert events(keeper) == [Search()]
    keeper.search_over(1000.1)
    keeper.handle_timer(1001.3)
    assert events(keeper) == [Reserve(peer(1))]


def test_one_that_does_not_answer_keeps_nobody_else_out() -> None:
    keeper = ReservationKeeper(random.Random(5))
    keeper.offer(peer(1), 1.0, 0.0)
    keeper.set_wanted(1, 0.0)
    assert events(keeper) == [Reserve(peer(1))]
    keeper.offer(peer(2), 2.0, 1.0)
    assert events(keeper) == []  # one is enough, and it may still answer
    assert keeper.next_timeout() == 3.0
    keeper.handle_timer(3.0)
    assert events(keeper) == [Reserve(peer(2))]
    keeper.granted(peer(2), 3600, 3.5)
    assert keeper.held() == [peer(2)]
    keeper.granted(peer(1), 3600, 4.0)  # too many now: the better one stays
    assert keeper.held() == [peer(1)]
    assert events(keeper) == [Release(peer(2))]
