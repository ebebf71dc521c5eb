"""Neighbours that never were: a writer names any two items as the neighbours of a new one, and signs it."""

from __future__ import annotations

import itertools
import random

import pytest
from pycrdt import Array, Doc
from replica_byzantine import hand_over, judge, play
from replica_members import NOW, forged, genesis, member

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.replica.client_ids import client_id
from lattica_protocols.replica.operation import Operation
from lattica_protocols.replica.order import Run, hangs_below, is_gap
from lattica_protocols.replica.replica import Replica
from lattica_protocols.varint import encode_uvarint

U = encode_uvarint
SPACE = genesis(4)
Named = tuple[int, int] | None
"""Number of the author and clock."""


def clients() -> list[int]:
    """Client ids of the writers 1 to 4, by number."""
    return [client_id(member(number, SPACE).key.public_key.data, 7) for number in range(1, 5)]  # type: ignore[union-attr]


RANK = sorted(range(1, 5), key=lambda number: clients()[number - 1])
"""The writers by their client ids, which decide between items in one gap."""


def item(author: int, clock: int, left: Named, right: Named) -> bytes:
    """An update with one list item, its value the author's number."""
    named = b"".join(U(clients()[who - 1]) + U(at) for each in (left, right) if each for who, at in [each])
    info = 8 | (0x80 if left else 0) | (0x40 if right else 0)
    place = named or b"\1\3l:x"
    return b"\1\1" + U(clients()[author - 1]) + U(clock) + bytes([info]) + place + b"\1\x7d" + bytes([author]) + b"\0"


def shown(*updates: bytes) -> list[int]:
    """What yrs makes of the updates in this order."""
    doc = Doc[object]()
    for update in updates:
        doc.apply_update(update)
    return [int(value) for value in doc.get("l:x", type=Array)]


A, B, C, D = RANK
CASES = {
    # a, behind it c and b beside each other; then one between c and b, the wrong way round, and d behind a meanwhile
    "right before left": [
        (A, item(A, 0, None, None), []),
        (D, item(D, 0, (A, 0), None), [0]),
        (B, item(B, 0, (A, 0), None), [0]),
        (C, item(C, 0, (D, 0), (A, 0)), [0, 1]),
    ],
    # right stands behind left in everybody's list, but hangs below an item between
    "far apart": [
        (A, item(A, 0, None, None), []),
        (C, item(C, 0, (A, 0), None), [0]),
        (D, item(D, 0, (A, 0), None), [0]),
        (B, item(B, 0, None, (C, 0)), [0, 1]),
    ],
    "the end of another's run": [
        (A, item(A, 0, None, None).replace(b"\1\x7d", b"\3\x7d\x01\x7d\x01\x7d"), []),
        (C, item(C, 0, (A, 1), None), [0]),
        (B, item(B, 0, (A, 0), (A, 2)), [0]),
    ],
}


def sign(case: list[tuple[int, bytes, list[int]]]) -> list[Operation]:
    signed: list[Operation] = []
    for author, body, parents in case:
        past = [signed[index].id for index in parents]
        signed.append(forged(member(author, SPACE), body, parents=sorted(past)))
    return signed


@pytest.mark.parametrize("name", CASES)
def test_neighbours_that_never_were_are_refused_in_every_order(name: str) -> None:
    ops = sign(CASES[name])
    values = []
    for order in itertools.permutations(ops):
        replica = Replica(SPACE)
        refused = hand_over(replica, *order)
        assert refused == {ops[-1].id: "an item between two that were never neighbours"}
        values.append((replica.root(), replica.value()))
        copy = Doc[object]()
        copy.apply_update(replica.doc.get_update())
        assert list(copy.get("l:x", type=Array)) == replica.value()["l:x"]
    assert all(value == values[0] for value in values)


def test_yrs_alone_shows_them_in_the_order_in_which_they_came() -> None:
    """Why it is refused: without the rule this one item makes two orders of the same four operations."""
    first, second, third, bad = (body for _, body, _ in CASES["far apart"])
    assert shown(first, second, third, bad) != shown(first, second, bad, third)


@pytest.mark.parametrize("seed", range(0, 400, 20))
def test_whatever_byzantine_writers_sign_equal_roots_are_one_document(seed: int) -> None:
    taken = 0
    for number in range(seed, seed + 4):
        rng = random.Random(number)
        taken += judge(*play(rng), rng)
    assert taken > 10


def test_the_question_about_runs_is_the_one_about_items() -> None:
    """Against the definition, on trees of all shapes, chains of hundreds among them."""
    rng = random.Random(7)
    for _ in range(60):
        runs: list[tuple[Run, int]] = []
        above: dict[tuple[int, int], tuple[int, int] | None] = {}
        straight = rng.random()
        for number in range(rng.choice((5, 40, 300))):
            length = rng.choice((1, 1, 4))
            left = None
            if runs and rng.random() < 0.97:
                index = len(runs) - 1 if rng.random() < straight else rng.randrange(len(runs))
                left = (index, 10 * index + rng.randrange(runs[index][1]))
            run = Run(1, 10 * number, *((None, 0) if left is None else (runs[left[0]][0], left[1])))
            above[number, 10 * number] = left
            above.update({(number, 10 * number + n): (number, 10 * number + n - 1) for n in range(1, length)})
            runs.append((run, length))
        items = list(above)
        for _ in range(300):
            one, two = rng.choice(items), rng.choice(items)
            path = []
            at: tuple[int, int] | None = one
            while at is not None:
                path.append(at)
                at = above[at]
            first, second = ((runs[number][0], clock) for number, clock in (one, two))
            assert hangs_below(*first, *second) == (two in path)
            over = above[two]
            assert is_gap(first, second) == (two not in path and (over is None or over in path))
            assert is_gap(None, second) == (over is None)


def test_long_chains_are_climbed_in_few_steps() -> None:
    top = run = Run(1, 0, None, 0)
    for number in range(1, 200_000):
        run = Run(1, number, run, number - 1)
    steps, at = 0, run
    while at is not top:
        assert at.jump is not None
        at, steps = at.jump, steps + 1
    assert steps < 40
    assert hangs_below(run, 199_999, top, 0)


def test_an_honest_edit_beside_taken_contradictions_is_possible() -> None:
    """A member that follows the rule gives gaps that nobody had seen before; whoever has them edits on."""
    below = [(author, item(author, 0, (A, 0), None), [0]) for author in (B, C)]
    ops = sign([(A, item(A, 0, None, None), []), *below])
    author = member(D, SPACE)
    hand_over(author, *ops)
    for at in range(4):
        with author.transaction(NOW):
            author.doc.get("l:x", type=Array).insert(at * 2, 9)
    other = Replica(SPACE)
    assert not hand_over(other, *[entry.op for entry in author.graph.counted()])
    assert other.value() == author.value()


def test_the_neighbour_has_to_be_in_the_same_list() -> None:
    author = member(A, SPACE)
    body = b"\1\3" + U(clients()[A - 1]) + b"\0" + b"\x08\1\3l:x\1\x7e" + b"\x08\1\3l:y\1\x7e"
    body += b"\xc8" + U(clients()[A - 1]) + b"\0" + U(clients()[A - 1]) + b"\1\1\x7e" + b"\0"
    with pytest.raises(RemoteProtocolError, match="different containers"):
        Replica(SPACE).receive_operation(forged(author, body), NOW)
