"""Long tails as shared memory: what is refused, what is used again, what is given back."""

from __future__ import annotations

import fcntl
import gc
import os
import struct
from collections.abc import Iterator

import pytest

from lattica.local import memfd
from lattica.local.memfd import HEADER_BYTES, LentSegments, SegmentPool, map_tail_untrusted
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import LOCAL_MAX_LENT

pytestmark = pytest.mark.skipif(not memfd.AVAILABLE, reason="this system has no memfd")

SHRINK = fcntl.F_SEAL_SHRINK if memfd.AVAILABLE else 0
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
    assert open_fds() <= before + 1
    pool.trim(0.0)
    assert not pool.trim(1000.0)
    assert open_fds() == before


def test_mappings_are_bounded_and_further_tails_are_copied(pool: SegmentPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memfd, "LOCAL_MAX_MAPPINGS", memfd._live.value + 2)
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
