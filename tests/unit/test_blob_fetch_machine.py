"""The scheduler of chunk requests: one situation a test."""

from __future__ import annotations

import random

import pytest

from lattica_protocols.blobs.chunk_set import ChunkSet
from lattica_protocols.blobs.fetch import (
    DROP_SECONDS,
    MAX_COPIES,
    STALL_SECONDS,
    CancelChunks,
    Completed,
    Fetch,
    RequestChunks,
    SourceDropped,
    Starved,
)
from lattica_protocols.errors import LocalProtocolError
from lattica_protocols.limits import CHUNK_BYTES, MAX_CHUNKS_IN_FLIGHT


def machine(count: int, **options: object) -> Fetch[str]:
    return Fetch(count, rng=random.Random(7), **options)  # type: ignore[arg-type]


def full(count: int) -> ChunkSet:
    return ChunkSet(count, full=True)


def part(count: int, *indices: int) -> ChunkSet:
    out = ChunkSet(count)
    for index in indices:
        out.add(index)
    return out


def requested(fetch: Fetch[str]) -> list[tuple[str, int]]:
    return [
        (command.source, index)
        for command in fetch.poll_commands()
        if isinstance(command, RequestChunks)
        for first, count in command.ranges
        for index in range(first, first + count)
    ]


def give(fetch: Fetch[str], source: str, index: int, now: float) -> None:
    assert fetch.receive_chunk(source, index, CHUNK_BYTES, now)
    fetch.chunk_verified(index, now)


def test_one_source_gives_everything_and_every_chunk_is_asked_once() -> None:
    fetch = machine(20)
    fetch.add_source("a", full(20), 0.0)
    asked: list[int] = []
    now = 0.0
    while not fetch.complete:
        batch = [index for _, index in requested(fetch)]
        assert batch
        asked += batch
        for index in batch:
            now += 0.01
            give(fetch, "a", index, now)
    assert sorted(asked) == list(range(20))
    assert fetch.next_event() == Completed()
    assert fetch.next_timeout() is None


def test_nothing_is_missing() -> None:
    assert machine(0).next_event() == Completed()
    assert machine(3, have=[0, 1, 2]).next_event() == Completed()
    assert machine(3, wanted=[]).next_event() == Completed()


def test_only_what_is_wanted_and_missing_is_asked_for() -> None:
    fetch = machine(10, have=[3], wanted=[2, 3, 4])
    assert fetch.chunks_left == 2
    fetch.add_source("a", full(10), 0.0)
    assert sorted(index for _, index in requested(fetch)) == [2, 4]


def test_the_window_grows_with_the_rate_until_the_path_is_full() -> None:
    fetch = machine(5000)
    fetch.add_source("a", full(5000), 0.0)
    queue = [index for _, index in requested(fetch)]
    start = fetch.window("a")
    now = 0.2  # round trip; then a chunk every 2 ms
    while len(queue) and now < 3.0:
        now += 0.002
        give(fetch, "a", queue.pop(0), now)
        queue += [index for _, index in requested(fetch)]
    assert start < fetch.window("a") == MAX_CHUNKS_IN_FLIGHT


def test_a_slow_source_holds_few_chunks() -> None:
    fetch = machine(1000)
    fetch.add_source("a", full(1000), 0.0)
    queue = [index for _, index in requested(fetch)]
    for step in range(1, 6):
        give(fetch, "a", queue.pop(0), step * 4.0)
    assert fetch.window("a") <= 35  # the first answer looked like a round trip of 4 s
    for step in range(6, 9):
        give(fetch, "a", queue.pop(0), step * 4.0)


def test_partial_holders_are_asked_only_for_what_they_have_and_the_rarest_first() -> None:
    fetch = machine(8)
    fetch.add_source("a", part(8, 0, 1, 2), 0.0)
    assert {index for _, index in requested(fetch)} == {0, 1, 2}
    fetch.add_source("b", part(8, 2, 3), 0.0)
    assert [(s, i) for s, i in requested(fetch)] == [("b", 3)]
    fetch.receive_more("b", [(4, 1)], 0.0)
    give(fetch, "b", 3, 0.1)
    assert ("b", 4) in requested(fetch)
    fetch = machine(100)
    fetch.add_source("common", part(100, *range(50)), 0.0)
    requested(fetch)
    fetch.add_source("c", full(100), 0.0)
    assert all(index >= 50 for _, index in requested(fetch))


def test_a_partial_source_that_becomes_complete_counts_no_more() -> None:
    fetch = machine(3, have=[0])
    fetch.add_source("a", part(3, 0, 1), 0.0)
    fetch.receive_more("a", [(2, 1)], 0.0)
    fetch.receive_more("a", [(0, 3)], 0.0)
    fetch.remove_source("a", 0.0)
    assert fetch._partial_sources == 0
    assert set(fetch._partial_holders) == {0}


def test_no_source_has_the_rest() -> None:
    fetch = machine(4)
    fetch.add_source("a", part(4, 0), 0.0)
    assert requested(fetch) == [("a", 0)]
    assert fetch.next_event() is None
    give(fetch, "a", 0, 0.1)
    assert fetch.next_event() == Starved()
    assert fetch.starved
    fetch.receive_more("a", [(1, 1)], 0.2)
    assert not fetch.starved
    assert requested(fetch) == [("a", 1)]


def test_wrong_bytes_end_a_source_for_good() -> None:
    fetch = machine(4)
    fetch.add_source("liar", full(4), 0.0)
    asked = requested(fetch)
    assert len(asked) == 4
    assert fetch.receive_chunk("liar", 2, CHUNK_BYTES, 0.1)
    fetch.add_source("b", full(4), 0.1)
    fetch.chunk_corrupt("liar", 2, 0.1)
    event = fetch.next_event()
    assert isinstance(event, SourceDropped)
    assert (event.source, event.liar) == ("liar", True)
    assert sorted(requested(fetch)) == [("b", index) for index in range(4)]
    fetch.add_source("liar", full(4), 0.2)
    assert fetch.sources() == ["b"]
    assert fetch.is_liar("liar")


def test_a_source_that_vanishes_gives_its_chunks_to_others() -> None:
    fetch = machine(6)
    fetch.add_source("a", full(6), 0.0)
    fetch.add_source("b", part(6, 5), 0.0)
    requested(fetch)
    fetch.remove_source("a", 0.1)
    fetch.remove_source("a", 0.1)
    fetch.add_source("c", full(6), 0.2)
    assert sorted(requested(fetch)) == [("b", 5), *(("c", index) for index in range(5))]


def test_a_stalled_source_loses_its_chunks_and_may_come_back() -> None:
    fetch = machine(4)
    fetch.add_source("a", full(4), 0.0)
    requested(fetch)
    assert fetch.next_timeout() == STALL_SECONDS
    fetch.handle_timer(STALL_SECONDS)
    fetch.add_source("b", full(4), STALL_SECONDS)
    taken = requested(fetch)
    assert sorted(taken) == [("b", index) for index in range(4)]
    # It was only slow: its chunk is welcome, and the other is told so.
    assert fetch.receive_chunk("a", 0, CHUNK_BYTES, STALL_SECONDS + 1)
    fetch.chunk_verified(0, STALL_SECONDS + 1)
    assert CancelChunks("b", [(0, 1)]) in fetch.poll_commands()


def test_a_stalled_source_that_goes_on_is_not_asked_again_for_the_same() -> None:
    fetch = machine(4)
    fetch.add_source("a", full(4), 0.0)
    requested(fetch)
    fetch.handle_timer(STALL_SECONDS)
    fetch.receive_progress("a", STALL_SECONDS + 1)
    assert requested(fetch) == []
    for index in range(4):
        give(fetch, "a", index, STALL_SECONDS + 2)
    assert fetch.complete


def test_a_source_that_stays_silent_is_dropped() -> None:
    fetch = machine(4)
    fetch.add_source("a", full(4), 0.0)
    fetch.handle_timer(STALL_SECONDS)
    assert fetch.next_timeout() == DROP_SECONDS
    fetch.handle_timer(DROP_SECONDS)
    event = fetch.next_event()
    assert isinstance(event, SourceDropped)
    assert not event.liar
    assert fetch.sources() == []


def test_end_game_takes_the_last_chunk_of_the_slowest_and_cancels_the_loser() -> None:
    fetch = machine(20)
    fetch.add_source("slow", full(20), 0.0)
    slow = [index for _, index in requested(fetch)]
    give(fetch, "slow", slow.pop(0), 2.0)
    slow += [i for _, i in requested(fetch)]
    fetch.add_source("fast", full(20), 2.0)
    now, copies = 2.0, 0
    queue = requested(fetch)
    while queue:
        source, index = queue.pop(0)
        if source == "slow":
            slow.append(index)
            continue
        now += 0.01
        copies += index in slow
        give(fetch, "fast", index, now)
        for command in fetch.poll_commands():
            for first, count in command.ranges:
                if isinstance(command, RequestChunks):
                    queue += [(command.source, i) for i in range(first, first + count)]
                else:
                    assert command.source == "slow"
                    slow.remove(first)
    assert fetch.complete
    assert copies > 0
    assert slow == []
    assert MAX_COPIES == 2


def test_a_chunk_that_is_gone_is_asked_of_another() -> None:
    fetch = machine(2)
    fetch.add_source("a", full(2), 0.0)
    requested(fetch)
    fetch.add_source("b", part(2, 1), 0.0)
    fetch.receive_gone("a", 1, 0.1)
    assert requested(fetch) == [("b", 1)]
    fetch.receive_gone("b", 1, 0.2)
    give(fetch, "a", 0, 0.3)
    assert fetch.next_event() == Starved()


def test_a_chunk_that_could_not_be_kept_is_asked_again() -> None:
    fetch = machine(1)
    fetch.add_source("a", full(1), 0.0)
    requested(fetch)
    assert fetch.receive_chunk("a", 0, CHUNK_BYTES, 0.1)
    assert requested(fetch) == []
    fetch.chunk_lost(0, 0.2)
    assert requested(fetch) == [("a", 0)]


def test_a_second_copy_is_not_needed() -> None:
    fetch = machine(1)
    fetch.add_source("a", full(1), 0.0)
    requested(fetch)
    give(fetch, "a", 0, 0.1)
    assert not fetch.receive_chunk("a", 0, CHUNK_BYTES, 0.2)
    fetch.chunk_verified(0, 0.2)
    assert fetch.chunks_left == 0


def test_what_we_may_not_do() -> None:
    fetch = machine(3)
    with pytest.raises(LocalProtocolError):
        fetch.add_source("a", full(4), 0.0)
    fetch.add_source("a", full(3), 0.0)
    with pytest.raises(LocalProtocolError):
        fetch.add_source("a", full(3), 0.0)
