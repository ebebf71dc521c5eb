"""Path MTU discovery against imagined paths."""

from __future__ import annotations

import pytest

from lattica.transports.quic_mtu import BASE_BYTES, PathMtuSearch


def explore(search: PathMtuSearch, interface: int, path: int, now: float = 0.0) -> int:
    """Run a search where the interface refuses what is over `interface` and the path loses what is over `path`.

    Returns how many packets were sent.
    """
    packets = 0
    while (size := search.next_probe(now)) is not None:
        assert search.next_probe(now) is None
        while size is not None:
            if size > interface:
                search.probe_failed(size, now)
                break
            packets += 1
            if size <= path:
                search.probe_arrived(size, now)
                break
            probed = size
            size = search.retry()
            if size is None:
                search.probe_failed(probed, now)
    return packets


@pytest.mark.parametrize(
    ("interface", "path", "found", "packets"),
    [
        (65507, 65507, 16384, 2),
        (1472, 1472, 1472, 1),
        (8972, 8972, 8972, 2),
        (8972, 1472, 1472, 13),
        (1472, 1464, 1464, 20),
        (1472, 1399, 1392, 20),
        (1200, 1200, 1200, 0),
        (65507, 1200, 1200, 20),
    ],
)
def test_search(interface: int, path: int, found: int, packets: int) -> None:
    search = PathMtuSearch(28, 16384)
    assert explore(search, interface, path) <= packets
    assert search.size == found
    timeout = search.next_timeout()
    if found == 16384:
        assert timeout is None
    else:
        assert timeout == 600.0


def test_paths_get_better() -> None:
    search = PathMtuSearch(28, 16384)
    explore(search, 1472, 1472)
    assert search.next_probe(599.0) is None
    explore(search, 8972, 8972, now=600.0)
    assert search.size == 8972


def test_black_hole() -> None:
    search = PathMtuSearch(28, 16384)
    explore(search, 1472, 1472)
    search.black_hole(100.0)
    assert search.size == BASE_BYTES
    assert search.next_probe(110.0) is None
    explore(search, 1472, 1400, now=130.0)
    assert search.size == 1392


def test_interface_that_shrinks() -> None:
    search = PathMtuSearch(28, 16384)
    explore(search, 8972, 8972)
    search.too_big(8972, 5.0)
    assert search.size == BASE_BYTES
    explore(search, 1472, 1472, now=5.0)
    assert search.size == 1472


def test_peer_with_a_small_limit() -> None:
    search = PathMtuSearch(48, 1452)
    explore(search, 65507, 65507)
    assert search.size == 1452
    assert PathMtuSearch(28, 1200).next_probe(0.0) is None
