"""Drivers of replicated state: what neighbours send to a member, and what third parties are shown."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fuzz_machines import Driver, Transcript

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from replica_byzantine import WRITERS, colliding_instances, hand_over, judge, play
from replica_members import NOW, deliver, forged, genesis, key_of, member, put, update_of

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.replica import client_ids
from lattica_protocols.replica.checkpoint import Checkpoint
from lattica_protocols.replica.client_ids import client_id
from lattica_protocols.replica.download import Downloads
from lattica_protocols.replica.equivocation import CROWD_OPERATIONS
from lattica_protocols.replica.genesis import Genesis
from lattica_protocols.replica.graph import Graph
from lattica_protocols.replica.messages import Kind, encode_message
from lattica_protocols.replica.operation import Kind as Change
from lattica_protocols.replica.operation import Operation
from lattica_protocols.replica.placement import Placement, places_of_state_untrusted
from lattica_protocols.replica.presence import Presence
from lattica_protocols.replica.proof import make_proof, verify_proof_untrusted
from lattica_protocols.replica.proposal import Proposals
from lattica_protocols.replica.replica import Replica
from lattica_protocols.replica.short_form import write_row
from lattica_protocols.replica.sync import ReplicaSync
from lattica_protocols.replica.update import parse_update_untrusted
from lattica_protocols.varint import encode_uvarint

KEYS = [key_of(number).public_key.data for number in range(4)]
SPACE = Genesis.create(KEYS[0], "fuzzed", bytes(16), KEYS[1:], 2, KEYS[1:])


def _member(number: int) -> Replica:
    return Replica(SPACE, key=key_of(number), instance=7, rng=random.Random(number))


def _history() -> Replica:
    """An owner's replica with edits, a grant and a hand-over."""
    owner = _member(0)
    put(owner, "x", {"a": [1, "text", b"b"]})
    put(owner, "x", None)
    owner.change_members(Change.GRANT, key_of(5).public_key.data, NOW)
    owner.change_members(Change.HAND_OVER, KEYS[1], NOW)
    put(owner, "y", 2)
    return owner


def _checkpoint(owner: Replica) -> Checkpoint:
    return owner.unsigned_checkpoint(int(NOW)).signed(key_of(1)).signed(key_of(2))


class Neighbours(Driver):
    name = "replica.ReplicaSync"
    covers = (ReplicaSync, Replica, Proposals, Downloads)

    def seeds(self) -> list[Transcript]:
        owner, writer = _history(), _member(2)
        ops = [entry.op for entry in owner.graph.counted()]
        deliver(writer, *ops)
        twins = [forged(writer, update_of(writer, "x", value)) for value in (1, 2)]
        crowd = [forged(writer, b"", instance=number, parents=[], seq=0) for number in range(CROWD_OPERATIONS)]
        checkpoint = _checkpoint(owner)
        presence = Presence(SPACE.id).announce(key_of(1), b'"here"', 0.0, NOW)
        machine: ReplicaSync[int] = ReplicaSync(writer, random.Random(1), 0.0)
        machine.add_neighbour(0, 0.0)
        machine.propose_checkpoint(0.0, NOW)
        sent = [data for _, data in machine.poll_transmit()]
        operations = encode_message(Kind.OPERATIONS, SPACE.id, 1, [op.encoded for op in ops])
        row = encode_message(Kind.OPERATIONS, SPACE.id, 0, write_row(ops[:3]))
        pushed = encode_message(Kind.OPERATIONS, SPACE.id, 0, write_row(ops[3:], writer.graph.operation_at))
        hello = encode_message(Kind.HELLO, SPACE.id, bytes(32), *checkpoint.rank)
        data = checkpoint.encode()
        return [
            (operations, *sent),
            (row, pushed),
            (operations, encode_message(Kind.FORKS, SPACE.id, [tuple(op.encoded for op in twins)])),
            (encode_message(Kind.FORKS, SPACE.id, [[op.encoded for op in crowd]]),),
            (hello, encode_message(Kind.CHECKPOINT, SPACE.id, checkpoint.id, 0, len(data), data)),
            (
                encode_message(Kind.PRESENCE, SPACE.id, [presence]),
                encode_message(Kind.WANT, SPACE.id, [ops[0].id]),
                encode_message(Kind.GET_GENESIS, SPACE.id, SPACE.id),
                encode_message(Kind.FRONTIER, SPACE.id, bytes(32), True, [(KEYS[0], 7, 1, bytes(8))], []),
            ),
        ]

    def run(self, parts: list[bytes], rng: random.Random) -> None:
        replica, now = _member(3), 0.0
        machine: ReplicaSync[int] = ReplicaSync(replica, rng, now)
        machine.add_neighbour(0, now)
        for part in parts:
            try:
                machine.receive_message_untrusted(0, part, now, NOW + now)
            except RemoteProtocolError:
                continue
            now += rng.choice((0.0, 0.1, 3.0))
            machine.handle_timer(now, NOW + now)
            machine.poll_transmit()
        assert not replica._left_out
        assert replica.verify().ok


class Shown(Driver):
    name = "replica.proof"

    def seeds(self) -> list[Transcript]:
        owner = _history()
        ops = [entry.op for entry in owner.graph.counted()]
        return [(make_proof(owner, ops[0].id),), (_checkpoint(owner).encode(),), (owner.doc.get_update(),)]

    def run(self, parts: list[bytes], rng: random.Random) -> None:
        for part in parts:
            for read in (
                verify_proof_untrusted,
                lambda data: Checkpoint.decode_untrusted(data, SPACE),
                places_of_state_untrusted,
            ):
                try:
                    read(part)
                except RemoteProtocolError:
                    continue


class Writers(Driver):
    """Writers with keys: each part is what one of them signs, on top of some of what was signed before it."""

    name = "replica.Placement"
    covers = (Placement, Graph)
    MAX_PARTS = 16

    def instances(self) -> list[int]:
        return [7] * WRITERS

    def seeds(self) -> list[Transcript]:
        """A part: which writer, whether it has all before, number of items, items and deletions."""
        out = []
        for number in range(6):
            _, made = play(random.Random(number), forks=0.0, instances=self.instances())
            out.append(tuple(self._part(op, number + at) for at, op in enumerate(made) if op.body))
        return out

    @staticmethod
    def _part(op: Operation, number: int) -> bytes:
        author = [key_of(each).public_key.data for each in range(WRITERS + 1)].index(op.author)
        parsed = parse_update_untrusted(op.body)
        has_items = parsed.end > parsed.start
        head = b"\1" + op.body[1:2] + parsed.client_bytes + encode_uvarint(parsed.start) if has_items else b"\0"
        assert op.body.startswith(head)
        return bytes([author, number % 3 != 0, op.body[1] if has_items else 0]) + op.body[len(head) :]

    def run(self, parts: list[bytes], rng: random.Random) -> None:
        space = genesis(WRITERS)
        members = [member(number, space, instance) for number, instance in enumerate(self.instances(), 1)]
        made: list[Operation] = []
        for part in parts[: self.MAX_PARTS]:
            if len(part) < 3:
                continue
            author = members[part[0] % WRITERS - 1]
            assert author.key is not None
            if part[1] % 2:
                hand_over(author, *made)
            chain = (author.key.public_key.data, author.instance)
            tip = author.graph.tip(chain)
            head = encode_uvarint(client_id(*chain)) + encode_uvarint(0 if tip is None else tip.end)
            op = forged(author, (b"\1" + encode_uvarint(part[2]) + head if part[2] else b"\0") + part[3:])
            made.append(op)
            hand_over(author, op)
        judge(space, made, rng, orders=2)


class Colliding(Writers):
    """The same, of writers whose chains have two client ids among them."""

    name = "replica.Graph, colliding"

    def instances(self) -> list[int]:
        return colliding_instances(random.Random(1))

    def seeds(self) -> list[Transcript]:
        with few_client_ids():
            return super().seeds()

    def run(self, parts: list[bytes], rng: random.Random) -> None:
        with few_client_ids():
            super().run(parts, rng)


@contextmanager
def few_client_ids() -> Iterator[None]:
    """Client ids of 10 bits: others that collide are found at once."""
    bits, client_ids.CLIENT_BITS = client_ids.CLIENT_BITS, 10
    try:
        yield
    finally:
        client_ids.CLIENT_BITS = bits


DRIVERS: list[Driver] = [Neighbours(), Shown(), Writers(), Colliding()]
