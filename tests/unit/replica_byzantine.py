"""Writers with a valid key who sign contradictory updates, and the judgement on what replicas make of them.

`play` lets a few of them write: items of lists and texts whose left and right neighbours are any two of the items that
the author knows (in the wrong order, far apart, in runs of others or of their own, deleted ones, items of the same
operation), keys that overwrite any earlier value, nested types, deletions, twins with one sequence number; and honest
edits between, which have to be possible on top of all that. `judge` hands what was signed to replicas in different
orders, through restarts, documents and checkpoints: wherever the roots are equal, the documents have to be.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import count
from typing import Any

from pycrdt import Doc
from replica_members import NOW, genesis, key_of, member

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.replica.checkpoint import Checkpoint
from lattica_protocols.replica.client_ids import client_id, forked_client
from lattica_protocols.replica.errors import MissingParents, NotYet
from lattica_protocols.replica.genesis import Genesis
from lattica_protocols.replica.operation import Operation
from lattica_protocols.replica.plain import container, document_value, same_value, to_shared
from lattica_protocols.replica.replica import Replica
from lattica_protocols.replica.short_form import RowWriter
from lattica_protocols.varint import encode_uvarint

Item = tuple[str, int, int]
"""Where it stands (a container's name, or that of its parent's item), its client and clock."""
WRITERS = 4
CONTENTS = {
    "l": (b"\x08\1\x7d\1", b"\x08\3\x7d\1\x7d\2\x7d\3", b"\x07\0", b"\x01\2"),
    "t": (b"\x04\1a", b"\x04\3xyz", b"\x01\1"),
    "m": (b"\x08\1\x7d\7", b"\x07\0", b"\x07\1", b"\x01\1"),
}
LENGTHS = {b"\x08\3\x7d\1\x7d\2\x7d\3": 3, b"\x01\2": 2, b"\x04\3xyz": 3}


def find_instance(author: bytes, wanted: int, start: int) -> int:
    """An instance of the author with this client id. For tests in which those have few bits."""
    return next(instance for instance in count(start) if client_id(author, instance) == wanted)


def colliding_instances(rng: random.Random, ids: int = 2) -> list[int]:
    """Instances of the writers, all of which have one of so many client ids."""
    authors = [key_of(number).public_key.data for number in range(1, WRITERS + 1)]
    wanted = [client_id(authors[0], rng.getrandbits(32)) for _ in range(ids)]
    return [find_instance(author, rng.choice(wanted), rng.getrandbits(20)) for author in authors]


class Contradictory:
    """Writes items into the same few containers; knows where those of others stand."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.items: dict[bytes, list[Item]] = {}
        """By operation."""

    def known(self, replica: Replica) -> list[Item]:
        """By the names that they have in its document, most of the time."""
        known: list[Item] = []
        for entry in replica.graph.entries.values():
            items = self.items.get(entry.op.id, [])
            if replica.graph.is_renamed(entry) and self.rng.random() < 0.9:
                own, new = entry.branch.client, forked_client(entry.op.id)
                items = [
                    (place.replace(f":{own}:", f":{new}:"), {own: new, -own: -new}.get(client, client), clock)
                    for place, client, clock in items
                ]
            known += items
        return known

    def update(self, replica: Replica, client: int, start: int) -> tuple[bytes, list[Item]]:
        """An update of a few items of `client` from the clock `start`, and what is in it."""
        rng = self.rng
        known = self.known(replica)
        out, own, clock = b"", list[Item](), start
        items = rng.choice((1, 1, 2, 3, 5))
        for _ in range(items):
            item, place, length = self._item(client, known + own)
            if item[0] & 0x1F == 7:
                own.append((f"{'ml'[item[-1] == 0]}:{client}:{clock}", -client, clock))
            own += [(place, client, clock + n) for n in range(length)]
            out += item
            clock += length
        head = b"\1" + encode_uvarint(items) + encode_uvarint(client) + encode_uvarint(start)
        return head + out + self._deletions(known), own

    def _item(self, client: int, known: list[Item]) -> tuple[bytes, str, int]:
        rng = self.rng
        places = sorted({place for place, _, _ in known} | {"l:x", "t:x", "m:x k", "m:x j"})
        place = rng.choice([each for each in places if not each[2:].startswith("-")])
        if rng.random() < 0.5:
            place = "l:x"
        kind = place[0]
        content = rng.choice(CONTENTS[kind])
        beside = [(c, k) for where, c, k in known if where == place and c > 0]
        info, origins = content[0], b""
        named = [rng.choice(beside) if beside and rng.random() < 0.65 else None for _ in range(2)]
        if kind == "m":
            named[1] = None
        for bit, each in zip((0x80, 0x40), named, strict=True):
            if each is not None:
                info |= bit
                origins += encode_uvarint(each[0]) + encode_uvarint(each[1])
        if not origins:
            origins, key = self._parent(place)
            info |= key
        return bytes([info]) + origins + content[1:], place, LENGTHS.get(content, 1)

    def _parent(self, place: str) -> tuple[bytes, int]:
        name, _, key = place.partition(" ")
        if name.count(":") == 2:
            _, client, clock = name.split(":")
            at = b"\0" + encode_uvarint(int(client)) + encode_uvarint(int(clock))
            key = key or ("k" if name[0] == "m" else "")
        else:
            at = b"\1" + encode_uvarint(len(name)) + name.encode()
        return (at + encode_uvarint(len(key)) + key.encode(), 0x20) if key else (at, 0)

    def _deletions(self, known: list[Item]) -> bytes:
        chosen: dict[int, set[int]] = {}
        for _, client, clock in known:
            if client > 0 and self.rng.random() < 0.04:
                chosen.setdefault(client, set()).add(clock)
        out = encode_uvarint(len(chosen))
        for client, clocks in chosen.items():
            out += encode_uvarint(client) + encode_uvarint(len(clocks))
            out += b"".join(encode_uvarint(clock) + b"\1" for clock in sorted(clocks))
        return out


def play(
    rng: random.Random, rounds: int = 14, forks: float = 0.03, instances: Sequence[int] = ()
) -> tuple[Genesis, list[Operation]]:
    """Operations that writers signed, those that are refused among them, in an order in which they can be taken.
    Random instances (unless these are given) give each writer another client id."""
    space = genesis(WRITERS)
    instances = instances or [rng.getrandbits(32) for _ in range(WRITERS)]
    members = [member(number, space, instances[number - 1]) for number in range(1, WRITERS + 1)]
    hand = Contradictory(rng)
    made: list[Operation] = []
    for _ in range(rounds):
        author = rng.choice(members)
        if rng.random() < 0.4:
            hand_over(author, *made)
        if rng.random() < 0.3 and author.why_not_writable() is None:
            made += honest_edit(author, rng)
            continue
        twins = 2 if rng.random() < forks else 1
        signed = [_sign(author, hand) for _ in range(twins)]
        made += signed
        hand_over(author, signed[0])
    return space, made


def _sign(author: Replica, hand: Contradictory) -> Operation:
    assert author.key is not None
    chain = (author.key.public_key.data, author.instance)
    tip = author.graph.tip(chain)
    body, items = hand.update(author, client_id(*chain), tip.end if tip is not None else 0)
    previous = [] if tip is None else [tip.op.id]
    op = Operation.seal(
        author.key,
        author.space,
        instance=author.instance,
        seq=0 if tip is None else tip.op.seq + 1,
        parents=[*previous, *sorted(author.graph.heads.difference(previous))],
        time=int(NOW),
        body=body,
    )
    hand.items[op.id] = items
    return op


def honest_edit(author: Replica, rng: random.Random) -> list[Operation]:
    """What the types make; it has to be possible whatever stands in the document."""
    with author.transaction(NOW) as made:
        items, text, data = (container(author.doc, name) for name in ("l:x", "t:x", "m:x"))
        what = rng.randrange(4)
        if what == 0 and len(items):
            del items[rng.randrange(len(items))]
        elif what == 1:
            text.insert(rng.randrange(len(text) + 1), rng.choice(("q", "rst")))
        elif what == 2:
            data[rng.choice("kj")] = to_shared(rng.choice((1, [2, 3])))
        else:
            items.insert(rng.randrange(len(items) + 1), to_shared(rng.choice((5, [6]))))
    return list(made)


def hand_over(replica: Replica, *ops: Operation) -> dict[bytes, str]:
    """Give operations in this order, those that wait again at the end; what was refused, and why."""
    refused: dict[bytes, str] = {}
    left = list(ops)
    while left:
        waiting = []
        for op in left:
            try:
                replica.receive_operation(Operation.decode_untrusted(op.encoded, replica.space), NOW)
            except (MissingParents, NotYet):
                waiting.append(op)
            except RemoteProtocolError as error:
                refused[op.id] = str(error)
        if len(waiting) == len(left):
            break
        left = waiting
    return refused


def judge(space: Genesis, made: list[Operation], rng: random.Random, orders: int = 4) -> int:
    """Raises AssertionError where equal roots are not one document; how many operations were taken."""
    first = Replica(space)
    refused = hand_over(first, *made)
    value = first.value()
    assert not first._left_out
    _check_copies(first, value)
    for _ in range(orders):
        other = Replica(space)
        shuffled = list(made)
        rng.shuffle(shuffled)
        if rng.random() < 0.3:  # all of one author, then all of the next
            rank = {op.author: rng.random() for op in made}
            shuffled.sort(key=lambda op: rank[op.author])
        assert hand_over(other, *shuffled).keys() == refused.keys()
        assert other.root() == first.root()
        assert same_value(other.value(), value), f"{other.value()} is not {value}"
        _check_copies(other, value)
    assert first.verify().ok
    _check_checkpoint(space, [op for op in made if op.id in first.graph.entries], rng)
    return len(first.graph.entries)


def _check_copies(replica: Replica, value: Any) -> None:
    """A document loaded from the state, and a replica that was stopped and started."""
    state = replica.doc.get_update()
    copy = Doc[Any]()
    copy.apply_update(state)
    assert same_value(document_value(copy), value), "loaded from the state"
    again = Replica(replica.genesis)
    row = RowWriter()
    stored = [(row.write(entry.op), entry.end - entry.start) for entry in replica.graph.counted()]
    forks = [[op.encoded for op in fork.operations] for fork in replica.graph.forks.values()]
    contained = len(stored) if not forks else 0
    again.load(stored, forks, (contained, state) if contained else (0, b""))
    assert again.root() == replica.root()
    assert same_value(again.value(), value), "started again"


def _check_checkpoint(space: Genesis, made: list[Operation], rng: random.Random) -> None:
    """The owner makes a checkpoint of some; one replica had all before it, one only some, one only gets it."""
    cut = rng.randrange(len(made) + 1)
    owner = member(0, space)
    hand_over(owner, *made[:cut])
    data = owner.make_checkpoint(NOW).encode()
    Checkpoint.decode_untrusted(data, space)
    replicas = []
    for before in (made, made[: rng.randrange(len(made) + 1)], []):
        replica = Replica(space)
        hand_over(replica, *before)
        assert replica.receive_checkpoint(data)
        rest = list(made)
        rng.shuffle(rest)
        hand_over(replica, *rest)
        replicas.append(replica)
    for fork in [fork for replica in replicas for fork in replica.graph.forks.values()]:
        for replica in replicas:  # members pass proofs on
            replica.receive_fork(fork)
    for replica in replicas:
        _check_copies_on(replica, data)
    assert len({replica.root() for replica in replicas}) == 1
    for replica in replicas[1:]:
        assert same_value(replica.value(), replicas[0].value()), "after a checkpoint"


def _check_copies_on(replica: Replica, checkpoint: bytes) -> None:
    copy = Doc[Any]()
    copy.apply_update(replica.doc.get_update())
    assert same_value(document_value(copy), replica.value()), "loaded from the state on a checkpoint"
    again = Replica(replica.genesis)
    again.receive_checkpoint(checkpoint)
    forks = [[op.encoded for op in fork.operations] for fork in replica.graph.forks.values()]
    again.load([(e.op.encoded, e.end - e.start) for e in replica.graph.counted()], forks)
    assert again.root() == replica.root()
    assert same_value(again.value(), replica.value()), "started again on a checkpoint"
