"""Shares of a bandwidth, on a simulated clock: what each circuit gets in the long run."""

import pytest

from lattica_protocols.relay.fairness import TICK_SECONDS, FairShares, Share

RATE = 10_000_000.0


def run(shares: FairShares, demands: dict[Share, float], seconds: float, chunk: int = 65_536) -> dict[Share, float]:
    """Bytes a second that each circuit gets when it wants `demands` bytes a second."""
    carried, credit = dict.fromkeys(demands, 0), dict.fromkeys(demands, 0.0)
    now, step = 0.0, TICK_SECONDS / 5
    while now < seconds:
        now += step
        shares.handle_timer(now)
        for share, demand in demands.items():
            credit[share] = min(credit[share] + demand * step, 4 * chunk)
            while credit[share] >= chunk and not share.stopped:
                credit[share] -= chunk
                carried[share] += chunk
                shares.spend(share, chunk)
    return {share: count / seconds for share, count in carried.items()}


def test_no_rate_no_stop() -> None:
    shares = FairShares(None, 0.0)
    share = shares.join()
    assert all(shares.spend(share, 1 << 30) for _ in range(10))
    assert shares.next_timeout() is None
    assert shares.handle_timer(1.0) == []


def test_greedy_circuits_get_the_same_and_all_of_it() -> None:
    shares = FairShares(RATE, 0.0)
    members = [shares.join() for _ in range(8)]
    got = run(shares, dict.fromkeys(members, 10 * RATE), 20.0)
    assert sum(got.values()) == pytest.approx(RATE, rel=0.05)
    assert all(rate == pytest.approx(RATE / 8, rel=0.1) for rate in got.values())


def test_what_one_leaves_over_the_others_get() -> None:
    shares = FairShares(RATE, 0.0)
    modest, *greedy = (shares.join() for _ in range(5))
    got = run(shares, {modest: RATE / 20} | dict.fromkeys(greedy, 10 * RATE), 20.0)
    assert got[modest] == pytest.approx(RATE / 20, rel=0.1)
    assert sum(got.values()) == pytest.approx(RATE, rel=0.1)
    assert max(got[s] for s in greedy) < 1.2 * min(got[s] for s in greedy)


def test_one_alone_gets_everything_and_a_departure_frees_its_part() -> None:
    shares = FairShares(RATE, 0.0)
    stays, goes = shares.join(), shares.join()
    assert run(shares, {stays: 10 * RATE, goes: 10 * RATE}, 5.0)[stays] == pytest.approx(RATE / 2, rel=0.1)
    shares.leave(goes)
    shares.leave(goes)
    shares._filled_at = 0.0
    assert run(shares, {stays: 10 * RATE}, 5.0)[stays] == pytest.approx(RATE, rel=0.1)


def test_a_window_that_was_on_its_way_is_paid_back() -> None:
    shares = FairShares(RATE, 0.0)
    share = shares.join()
    assert not shares.spend(share, int(RATE))  # a second's worth
    assert shares.next_timeout() == TICK_SECONDS
    now = 0.0
    while not shares.handle_timer(now):
        now += TICK_SECONDS
    assert 0.9 < now < 1.1
