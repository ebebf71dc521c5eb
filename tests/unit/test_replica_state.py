"""Places of a whole document, as a checkpoint has it, against those of the operations that made it."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
from replica_members import NOW, deliver, genesis, member

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.replica.placement import GONE, Place, Table, places_of_state_untrusted
from lattica_protocols.varint import encode_uvarint

sys.path.append(str(Path(__file__).resolve().parents[1] / "sim"))

from replica_network import edit_at_random


@pytest.mark.parametrize("seed", range(4))
def test_a_state_has_its_items_where_the_operations_put_them(seed: int) -> None:
    rng = random.Random(seed)
    members = [member(number, genesis()) for number in range(3)]
    for _ in range(150):
        one = rng.choice(members)
        with one.transaction(NOW):
            edit_at_random(one, rng)
        if rng.random() < 0.7:
            deliver(one, *(entry.op for other in members for entry in other.graph.counted()))
    every = [entry.op for other in members for entry in other.graph.counted()]
    deliver(members[0], *every)
    tables = places_of_state_untrusted(members[0].doc.get_update())
    seen = 0
    for entry in members[0].graph.counted():
        for clock in range(entry.start, entry.end):
            if entry.places is None:  # not looked at: nothing named it
                continue
            placed = entry.places.at(clock) if isinstance(entry.places, Table) else entry.places
            found = tables[entry.branch.client].at(clock)
            if found is not GONE:
                assert bare(found.place) == bare(placed.place)
                assert bare(found.holds) in (None, bare(placed.holds))
                assert found.is_gone or bare(found.holds) == bare(placed.holds)
                seen += 1
    assert seen > 100


def bare(where: Any) -> Any:
    """A container or place without the operation that made the container: a state does not tell it."""
    if isinstance(where, Place):
        return bare(where.container), where.key
    return where._replace(name=where.name[:2]) if where is not None and where.level else where


def state(*items: bytes) -> bytes:
    return b"\x01" + encode_uvarint(len(items)) + b"\x05\x00" + b"".join(items) + b"\x00"


FIRST = b"\x28\x01\x03m:x\x01k\x01\x7f"  # the value null under the key k of the map x
BEHIND = b"\xa1\x05"


def test_deleted_items_share_the_place_of_what_they_overwrote() -> None:
    (table,) = places_of_state_untrusted(
        state(FIRST, BEHIND + b"\x00\x01", BEHIND + b"\x01\x02", BEHIND + b"\x02\x01")
    ).values()
    assert [placed.place for placed in table.placed] == [table.placed[0].place] * 4
    assert [placed.is_gone for placed in table.placed] == [False, True, True, True]
    assert table.clocks == [0, 1, 2, 4]


@pytest.mark.parametrize(
    "items",
    [
        [BEHIND + b"\x00\x01"],  # itself
        [BEHIND + b"\x01\x01", BEHIND + b"\x00\x01"],
        [FIRST, BEHIND + b"\x02\x01", BEHIND + b"\x03\x01", BEHIND + b"\x01\x01"],
    ],
)
def test_items_that_name_each_other_in_a_circle_are_refused(items: list[bytes]) -> None:
    with pytest.raises(RemoteProtocolError, match="circle"):
        places_of_state_untrusted(state(*items))


def test_an_item_may_stand_behind_a_later_one_of_another_author() -> None:
    later = b"\x01\x06\x00" + b"\xa8\x05\x01\x01\x7f"
    data = b"\x02" + later + b"\x02\x05\x00" + FIRST + b"\xa8\x05\x00\x01\x7f" + b"\x00"
    tables = places_of_state_untrusted(data)
    assert tables[6].placed[0].place == tables[5].placed[0].place


def test_a_state_that_is_cut_off_is_refused() -> None:
    whole = state(FIRST, BEHIND + b"\x00\x01", BEHIND + b"\x01\x02")
    for length in range(len(whole) - 1):
        with pytest.raises(RemoteProtocolError):
            places_of_state_untrusted(whole[:length])
