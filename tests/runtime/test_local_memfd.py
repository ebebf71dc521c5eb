"""Long tails as shared memory: what is refused, what is used again, what is given back."""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
import struct
from collections.abc import Iterator

import numpy as np
import pytest

from lattica.local import received, segment
from lattica.local.memfd import LentSegments, SegmentPool
from lattica.local.received import ReceivedSegments
from lattica.local.segment import HEADER_BYTES
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import LOCAL_MAX_LENT

pytestmark = pytest.mark.skipif(not segment.AVAILABLE, reason="this system has no memfd")

SHRINK = fcntl.F_SEAL_SHRINK if segment.AVAILABLE else 0
LENGTH = 2 << 20


@pytest.fixture
def pool() -> Iterator[SegmentPool]:
    pool = SegmentPool()
    yield pool
    pool.close()


def open_fds() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def make_memfd(size: int, length: int, seals: int = SHRINK) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    os.pwrite(fd, struct.pack("=QB", length, 0)[: size or 0], 0)
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


class Sender:
    closed = False


SENDER = Sender()


def map_tail_untrusted(fd: int) -> memoryview | bytearray:
    return ReceivedSegments().map_untrusted(fd, SENDER)


def mapped_segments() -> int:
    gc.collect()
    with open("/proc/self/maps") as maps:
        return sum("memfd:lattica-tail" in line for line in maps)


def test_a_tail_arrives_as_it_was_stored(pool: SegmentPool) -> None:
    parts = [b"a" * 100, bytearray(b"b" * LENGTH), memoryview(b"c" * 7), b""]
    segment = pool.store(parts, LENGTH + 107)
    view = map_tail_untrusted(segment.fd)
    assert bytes(view) == b"".join(parts)
    del view
    segment.close()


def test_many_small_buffers_go_in_several_writes(pool: SegmentPool) -> None:
    parts = [bytes([i % 256]) * 3 for i in range(3000)]
    segment = pool.store(parts, 9000)
    assert bytes(map_tail_untrusted(segment.fd)) == b"".join(parts)
    segment.close()


def test_a_segment_is_used_again_only_after_the_release(pool: SegmentPool) -> None:
    lent = LentSegments()
    first = pool.store([b"1" * LENGTH], LENGTH)
    lent.add(first)
    view = map_tail_untrusted(first.fd)
    lent.collect()
    second = pool.store([b"2" * LENGTH], LENGTH)
    lent.add(second)
    assert second is not first
    assert view[:1] == b"1"
    part = view[10:20]
    del view
    lent.collect()
    assert pool.store([b"3" * LENGTH], LENGTH) is not first, "a part of the tail is still looked at"
    assert part[:1] == b"1"
    del part
    lent.collect()
    assert pool.store([b"4" * LENGTH], LENGTH) is first
    lent.close()


def test_what_the_network_filled_is_not_copied(pool: SegmentPool) -> None:
    buffer = pool.allocate_tail(LENGTH)
    assert isinstance(buffer, memoryview)
    buffer[:3] = b"abc"
    segment = pool.store([buffer], LENGTH)
    view = map_tail_untrusted(segment.fd)
    buffer[3:4] = b"d"
    assert view[:4] == b"abcd"
    assert len(view) == LENGTH
    view.release()
    gc.collect()
    assert not segment.released(), "we may still look at it ourselves"
    del buffer
    assert segment.released()
    segment.close()


def test_an_allocated_tail_that_is_not_sent_goes_back(pool: SegmentPool) -> None:
    before = open_fds()
    for _ in range(100):
        buffer = pool.allocate_tail(LENGTH)
        del buffer
    assert open_fds() <= before + 2  # the segment and the mapping of it
    assert mapped_segments() == 1
    pool.trim(0.0)
    assert not pool.trim(1000.0)
    assert open_fds() == before


def test_what_was_mapped_once_stays_mapped_for_the_next_tail(pool: SegmentPool) -> None:
    ours, lent = ReceivedSegments(), LentSegments()
    for length in (LENGTH - 5, LENGTH, LENGTH // 2):
        for byte in (b"1", b"2"):
            owned = pool.store([byte * length], length)
            lent.add(owned)
            view = ours.map_untrusted(owned.fd, SENDER)
            assert bytes(view) == byte * length
            assert not owned.released()
            del view
            assert owned.released()
            lent.collect()
            assert mapped_segments() == 1
    assert ours.trim(0.0)
    assert not ours.trim(1000.0)
    assert mapped_segments() == 0
    lent.close()


def test_a_view_tells_once_when_nothing_over_it_is_left() -> None:
    mapping, gone = mmap.mmap(-1, HEADER_BYTES + 100), []
    mapping[HEADER_BYTES : HEADER_BYTES + 3] = b"abc"
    view = segment.watched_view(mapping, 100, lambda: gone.append(1))
    assert (view.format, view.ndim, view.readonly, len(view)) == ("B", 1, False, 100)
    assert len(view.obj) == 100
    array = np.frombuffer(view[1:3], np.uint8)
    del view
    assert bytes(array) == b"bc"
    array[0] = 7
    assert mapping[HEADER_BYTES + 1] == 7
    assert not gone
    del array
    assert gone == [1]
    mapping.close()


def test_a_tail_that_outgrows_what_was_mapped(pool: SegmentPool) -> None:
    ours, fd = ReceivedSegments(), make_memfd(HEADER_BYTES + 8 * LENGTH, 100)
    os.pwrite(fd, b"short", HEADER_BYTES)
    assert bytes(ours.map_untrusted(fd, SENDER)[:5]) == b"short"
    os.pwrite(fd, struct.pack("=QB", 8 * LENGTH, 0), 0)
    os.pwrite(fd, b"end", HEADER_BYTES + 8 * LENGTH - 3)
    assert bytes(ours.map_untrusted(fd, SENDER)[-3:]) == b"end"
    os.pwrite(fd, struct.pack("=QB", 8 * LENGTH + 1, 0), 0)
    with pytest.raises(RemoteProtocolError, match="for a tail of"):
        ours.map_untrusted(fd, SENDER)
    os.close(fd)


def test_one_segment_sent_twice_is_looked_at_twice(pool: SegmentPool) -> None:
    ours, owned = ReceivedSegments(), pool.store([b"x" * LENGTH], LENGTH)
    first, second = ours.map_untrusted(owned.fd, SENDER), ours.map_untrusted(owned.fd, SENDER)
    del first
    assert bytes(second) == b"x" * LENGTH
    assert mapped_segments() == 2
    del second
    assert mapped_segments() == 1
    owned.close()


def test_mappings_that_are_kept_are_bounded(pool: SegmentPool, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ReceivedSegments()
    monkeypatch.setattr(received, "LOCAL_MAX_KEPT", 3)
    owned = [pool.store([b"x" * LENGTH], LENGTH) for _ in range(5)]
    for one in owned:
        ours.map_untrusted(one.fd, SENDER)
    assert mapped_segments() == 3
    monkeypatch.setattr(received, "LOCAL_MAX_KEPT_BYTES", LENGTH)
    ours.map_untrusted(owned[0].fd, SENDER)
    assert mapped_segments() == 3, "it is too large to be kept, and pushes nothing out"
    ours.sender_gone(Sender())
    assert mapped_segments() == 3
    ours.sender_gone(SENDER)
    assert mapped_segments() == 0
    for one in owned:
        one.close()


def test_nothing_stays_mapped_of_a_sender_that_is_gone(pool: SegmentPool) -> None:
    ours, sender, owned = ReceivedSegments(), Sender(), pool.store([b"x" * LENGTH], LENGTH)
    view = ours.map_untrusted(owned.fd, sender)
    sender.closed = True
    ours.sender_gone(sender)
    assert bytes(view) == b"x" * LENGTH
    del view
    assert mapped_segments() == 0
    owned.close()


def test_mappings_are_bounded_and_further_tails_are_copied(pool: SegmentPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(received, "LOCAL_MAX_MAPPINGS", received.live.value + 2)
    segment = pool.store([b"x" * LENGTH], LENGTH)
    kept = [map_tail_untrusted(segment.fd) for _ in range(3)]
    assert [type(view) for view in kept] == [memoryview, memoryview, bytearray]
    assert all(bytes(view) == b"x" * LENGTH for view in kept)
    segment.close()


def test_a_receiver_that_keeps_everything_costs_a_bounded_number_of_descriptors(pool: SegmentPool) -> None:
    before = open_fds()
    lent = LentSegments()
    for _ in range(LOCAL_MAX_LENT + 10):
        lent.add(pool.store([b"x"], 1))
    assert open_fds() <= before + LOCAL_MAX_LENT
    lent.close()
    assert open_fds() == before


@pytest.mark.parametrize(
    ("size", "length", "seals", "why"),
    [
        (HEADER_BYTES + 100, 100, 0, "not sealed"),
        (HEADER_BYTES + 100, 101, SHRINK, "for a tail of 101"),
        (HEADER_BYTES + 100, 1 << 63, SHRINK, "for a tail of"),
        (HEADER_BYTES - 1, 10, SHRINK, "without a header"),
        (0, 0, SHRINK, "without a header"),
    ],
)
def test_segments_that_could_end_us_are_refused(size: int, length: int, seals: int, why: str) -> None:
    fd = make_memfd(size, length, seals)
    with pytest.raises(RemoteProtocolError, match=why):
        map_tail_untrusted(fd)
    os.close(fd)


def test_the_sender_cannot_cut_off_what_we_look_at(pool: SegmentPool) -> None:
    fd = make_memfd(HEADER_BYTES + LENGTH, LENGTH)
    view = map_tail_untrusted(fd)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 100)
    assert view[-1] == 0
    os.close(fd)


def test_a_file_a_pipe_and_a_read_only_memfd_are_refused(tmp_path: object) -> None:
    reader, writer = os.pipe()
    plain = os.open("/proc/self/exe", os.O_RDONLY)
    sealed = make_memfd(HEADER_BYTES + 10, 10, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE)
    for fd in (reader, plain, sealed):
        with pytest.raises(RemoteProtocolError):
            map_tail_untrusted(fd)
    for fd in (reader, writer, plain, sealed):
        os.close(fd)


def test_a_tail_of_no_bytes(pool: SegmentPool) -> None:
    segment = pool.store([], 0)
    assert len(map_tail_untrusted(segment.fd)) == 0
    segment.close()


def test_a_tail_in_a_garbage_cycle_leaves_no_closed_segment_behind() -> None:
    """What was received in part when its path was lost: mapping and segment are finalized together, in any order."""
    pool = SegmentPool()
    for _ in range(50):
        cycle: list[object] = [pool.allocate(300_000)]
        cycle.append(cycle)
        del cycle
        gc.collect()
        segment = pool.store([b"x" * 300_000], 300_000)
        assert segment.fd >= 0
        pool.give_back(segment)
        pool.store([pool.allocate(300_000)], 300_000).close()
    pool.close()
