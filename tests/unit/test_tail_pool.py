"""Buffers of tails are used again exactly when nobody can see them."""

from __future__ import annotations

import numpy as np
import pytest

from lattica.rpc.buffers import TailPool
from lattica_protocols.rpc.tensors import decode_value_untrusted, encode_value

SIZE = 256 * 1024


def address(buffer: object) -> int:
    return int(np.frombuffer(buffer, np.uint8).__array_interface__["data"][0])  # type: ignore[call-overload]


@pytest.mark.parametrize("length", [0, 1, 5000, 16 << 10, (16 << 10) + 1, 100_000, SIZE + 7])
def test_lengths(length: int) -> None:
    buffer = TailPool().allocate(length)
    assert len(buffer) == length
    assert not memoryview(buffer).readonly


def test_a_free_buffer_is_used_again() -> None:
    pool = TailPool()
    first = pool.allocate(SIZE)
    place = address(first)
    second = pool.allocate(SIZE)
    assert address(second) != place
    del first
    assert address(pool.allocate(SIZE - 100)) == place


def test_an_array_over_a_tail_keeps_it() -> None:
    pool = TailPool()
    values = np.arange(SIZE, dtype=np.uint8)
    head, buffers = encode_value(values)
    tail = pool.allocate(SIZE)
    memoryview(tail)[:] = b"".join(buffers)
    got = decode_value_untrusted(head, tail)[10:20]
    place = address(tail)
    del tail
    for _ in range(20):
        other = pool.allocate(SIZE)
        assert address(other) != place
        memoryview(other)[:] = bytes(SIZE)
    assert got.tolist() == list(range(10, 20))
    del got, other
    assert place in [address(kept) for kept in [pool.allocate(SIZE) for _ in range(20)]]


def test_what_is_kept_is_bounded_and_given_back() -> None:
    pool = TailPool(max_bytes=4 * SIZE)
    held = [pool.allocate(SIZE) for _ in range(10)]
    assert pool.kept_bytes == 4 * SIZE
    del held
    pool.trim()
    assert pool.kept_bytes == 4 * SIZE
    pool.trim()
    assert pool.kept_bytes == 0
