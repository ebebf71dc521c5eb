"""Neighbours and members that try to make a replica wait, forget, grow or work."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from replica_members import NOW, data, deliver, forged, genesis, key_of, member, put

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import (
    REPLICA_MAX_LIMBO,
    REPLICA_MAX_MESSAGE_BYTES,
    REPLICA_MAX_PENDING,
    REPLICA_MAX_PENDING_BYTES,
    REPLICA_MAX_PENDING_PER_PEER,
    REPLICA_MAX_PRESENCE_BYTES,
    REPLICA_MAX_PRESENT,
    REPLICA_MAX_UPDATE_BYTES,
)
from lattica_protocols.replica.checkpoint import Checkpoint
from lattica_protocols.replica.download import CHUNK, STALLED
from lattica_protocols.replica.equivocation import Fork
from lattica_protocols.replica.floor import ChainEnd
from lattica_protocols.replica.messages import Kind, decode_message_untrusted, encode_message
from lattica_protocols.replica.operation import Operation
from lattica_protocols.replica.presence import Presence
from lattica_protocols.replica.replica import Replica
from lattica_protocols.replica.sync import ReplicaSync
from lattica_protocols.varint import encode_uvarint

SPACE = genesis()
BAD, GOOD = 66, 1


def machine_of(replica: Replica) -> ReplicaSync[int]:
    machine: ReplicaSync[int] = ReplicaSync(replica, random.Random(1), 0.0)
    for peer in (BAD, GOOD):
        machine.add_neighbour(peer, 0.0)
    machine.poll_transmit()
    return machine


def sent(machine: ReplicaSync[int], kind: Kind) -> list[tuple[int, tuple[Any, ...]]]:
    messages = [(peer, decode_message_untrusted(data)) for peer, data in machine.poll_transmit()]
    return [(peer, message.fields) for peer, message in messages if message.kind == kind]


def hear(machine: ReplicaSync[int], peer: int, kind: Kind, *fields: object, now: float = 0.0) -> None:
    machine.receive_message_untrusted(peer, encode_message(kind, SPACE.id, *fields), now, NOW + now)


# -- checkpoints ---------------------------------------------------------------------------------------------------
def checkpointed(size: int = 2000) -> tuple[Replica, bytes, bytes, tuple[int, int, bytes]]:
    """A replica behind, and a checkpoint of at least that size that it should take: its bytes, id and rank."""
    owner = member(0, SPACE)
    for number in range(-(-size // 200_000) if size > 2000 else 0):
        put(owner, f"{number}", "y" * 200_000)
    put(owner, "x", "y" * 2000)
    made = owner.make_checkpoint(NOW)
    return member(1, SPACE), made.encode(), made.id, made.rank


def test_garbage_under_the_id_of_a_good_checkpoint_does_not_make_it_bad() -> None:
    replica, encoded, key, rank = checkpointed()
    machine = machine_of(replica)
    hear(machine, BAD, Kind.HELLO, bytes(32), *rank)
    assert [peer for peer, _ in sent(machine, Kind.GET_CHECKPOINT)] == [BAD]
    hear(machine, BAD, Kind.CHECKPOINT, key, 0, 40, b"g" * 40)
    hear(machine, BAD, Kind.HELLO, bytes(32), *rank)
    assert sent(machine, Kind.GET_CHECKPOINT) == []
    hear(machine, GOOD, Kind.HELLO, bytes(32), *rank)
    assert [peer for peer, _ in sent(machine, Kind.GET_CHECKPOINT)] == [GOOD]
    hear(machine, GOOD, Kind.CHECKPOINT, key, 0, len(encoded), encoded)
    assert replica.rank() == rank
    assert data(replica) == {"x": "y" * 2000}


def test_a_good_head_with_another_state_is_the_neighbours_fault() -> None:
    replica, encoded, key, rank = checkpointed()
    machine = machine_of(replica)
    hear(machine, BAD, Kind.HELLO, bytes(32), *rank)
    hear(machine, BAD, Kind.CHECKPOINT, key, 0, len(encoded), encoded[:-1] + bytes([encoded[-1] ^ 1]))
    assert replica.checkpoint is None
    hear(machine, GOOD, Kind.HELLO, bytes(32), *rank)
    hear(machine, GOOD, Kind.CHECKPOINT, key, 0, len(encoded), encoded)
    assert replica.rank() == rank


@pytest.mark.parametrize("length", [0, 1, CHUNK - 1, CHUNK + 1])
def test_a_checkpoint_comes_in_whole_pieces_or_not_at_all(length: int) -> None:
    """A byte at a time, each within 10 s, would keep the others from being asked for years."""
    replica, _, _, rank = checkpointed()
    machine = machine_of(replica)
    fake = bytes([7]) * 32
    hear(machine, BAD, Kind.HELLO, bytes(32), 99, 10**6, fake)
    if length <= CHUNK - 1:
        hear(machine, BAD, Kind.CHECKPOINT, fake, 0, 10 * CHUNK, bytes(length))
    else:
        hear(machine, BAD, Kind.CHECKPOINT, fake, 0, 10 * CHUNK, b"\x93" + bytes(length - 1))
    hear(machine, GOOD, Kind.HELLO, bytes(32), *rank)
    assert (GOOD, (rank[2], 0)) in sent(machine, Kind.GET_CHECKPOINT)


def test_what_nobody_signed_who_may_is_not_fetched_to_its_end() -> None:
    stranger = member(5, SPACE)
    big = member(1, SPACE)
    for number in range(6):
        put(big, f"k{number}", bytes(200_000))
    encoded = big.unsigned_checkpoint(int(NOW)).signed(key_of(5)).encode()
    key = big.unsigned_checkpoint(int(NOW)).id
    assert len(encoded) > 2 * CHUNK
    machine = machine_of(stranger)
    hear(machine, BAD, Kind.HELLO, bytes(32), 1, 10**6, key)
    hear(machine, BAD, Kind.CHECKPOINT, key, 0, len(encoded), encoded[:CHUNK])
    assert [fields[1] for _, fields in sent(machine, Kind.GET_CHECKPOINT)] == [0]
    hear(machine, GOOD, Kind.HELLO, bytes(32), 1, 10**6, key)
    assert sent(machine, Kind.GET_CHECKPOINT) == []


def test_who_is_slow_on_purpose_holds_nobody_up() -> None:
    """The true head of the checkpoint, a total of 90 MB, a piece every 9 s: nobody else was asked for 27 minutes."""
    replica, encoded, key, rank = checkpointed(CHUNK)
    machine = machine_of(replica)
    hear(machine, BAD, Kind.HELLO, bytes(32), *rank)
    total, now, asked = 90 << 20, 0.0, list[int]()
    for number in range(8):
        piece = encoded[:CHUNK] if not number else bytes(CHUNK)
        hear(machine, BAD, Kind.CHECKPOINT, key, number * CHUNK, total, piece, now=now)
        now += 9.0
        machine.handle_timer(now, NOW + now)
        hear(machine, GOOD, Kind.HELLO, bytes(32), *rank, now=now)
        asked += [peer for peer, _ in sent(machine, Kind.GET_CHECKPOINT) if peer == GOOD]
        if asked:
            break
    assert asked == [GOOD]
    assert now < 60
    for offset in range(0, len(encoded), CHUNK):
        hear(machine, GOOD, Kind.CHECKPOINT, key, offset, len(encoded), encoded[offset : offset + CHUNK], now=now)
    assert replica.rank() == rank


def test_a_checkpoint_with_a_number_that_no_instance_has_is_refused() -> None:
    owner = member(0, SPACE)
    put(owner, "x", 1)
    made = owner.unsigned_checkpoint(int(NOW))
    for floor in (
        replace(made.floor, chains={(key_of(1).public_key.data, 1 << 40): ChainEnd(0, 1, bytes(32), 1)}),
        replace(made.floor, excluded={key_of(1).public_key.data: (0, 1 << 40)}),
    ):
        bad = Checkpoint.make(
            space=made.space,
            number=1,
            previous=bytes(32),
            time=1,
            root=made.root,
            operations=1,
            floor=floor,
            state=made.state,
        ).signed(key_of(0))
        with pytest.raises(RemoteProtocolError, match="instance out of range"):
            member(1, SPACE).receive_checkpoint(bad.encode())


def test_who_never_answers_is_asked_ever_less() -> None:
    replica, _, _, rank = checkpointed()
    machine = machine_of(replica)
    asked, now = 0, 0.0
    while now < 1000:
        now += 1.0
        hear(machine, BAD, Kind.HELLO, bytes(32), 99, 10**6, int(now).to_bytes(32, "big"), now=now)
        asked += len(sent(machine, Kind.GET_CHECKPOINT))
        machine.handle_timer(now, NOW + now)
    assert asked < 10
    now += STALLED + 6
    machine.handle_timer(now, NOW + now)
    hear(machine, BAD, Kind.HELLO, bytes(32), 99, 10**6, bytes(32), now=now)
    hear(machine, GOOD, Kind.HELLO, bytes(32), *rank, now=now)
    assert [peer for peer, _ in sent(machine, Kind.GET_CHECKPOINT)] == [GOOD]


def test_an_old_checkpoint_that_is_replayed_changes_nothing() -> None:
    owner, a = member(0, SPACE), member(1, SPACE)
    put(owner, "x", 1)
    old = owner.make_checkpoint(NOW)
    owner.adopt(old)
    put(owner, "x", 2)
    owner.adopt(owner.make_checkpoint(NOW))
    assert owner.checkpoint is not None
    assert a.receive_checkpoint(owner.checkpoint.encode())
    root = a.root()
    assert not a.receive_checkpoint(old.encode())
    machine = machine_of(a)
    hear(machine, BAD, Kind.HELLO, bytes(32), *old.rank)
    assert sent(machine, Kind.GET_CHECKPOINT) == []
    assert a.root() == root
    assert data(a) == {"x": 2}


def test_what_was_made_offline_before_a_checkpoint_is_merged_after_it() -> None:
    owner, away, other = member(0, SPACE), member(1, SPACE), member(2, SPACE)
    deliver(away, put(owner, "x", 1))
    mine = [put(away, "offline", 1), put(away, "offline", 2)]
    put(owner, "x", 2)
    made = owner.make_checkpoint(NOW)
    owner.adopt(made)
    other.receive_checkpoint(made.encode())
    deliver(owner, *mine)
    deliver(other, *mine)
    away.receive_checkpoint(made.encode())
    assert away.lost == []
    assert {each.root() for each in (owner, away, other)} == {owner.root()}
    assert data(owner) == data(away) == data(other) == {"x": 2, "offline": 2}


# -- memory and work -----------------------------------------------------------------------------------------------
def test_withheld_parents_are_bounded_in_bytes_and_do_not_push_out_those_of_others() -> None:
    replica, a = member(0, SPACE), member(1, SPACE)
    machine = machine_of(replica)

    def orphan(number: int, size: int) -> Operation:
        return forged(a, bytes(size), parents=[number.to_bytes(32, "big")], seq=0, instance=number)

    honest = orphan(1 << 30, 10)
    hear(machine, GOOD, Kind.OPERATIONS, 0, [honest.encoded])
    for number in range(REPLICA_MAX_PENDING_PER_PEER + 20):
        hear(machine, BAD, Kind.OPERATIONS, 0, [orphan(number, 100).encoded])
    assert len(machine._pending) == REPLICA_MAX_PENDING_PER_PEER + 1
    assert honest.id in machine._pending
    for number in range(60):
        hear(machine, 1000 + number, Kind.OPERATIONS, 0, [orphan(5000 + number, REPLICA_MAX_UPDATE_BYTES).encoded])
    assert machine._pending_bytes <= REPLICA_MAX_PENDING_BYTES
    assert len(machine._pending) <= REPLICA_MAX_PENDING
    assert set(machine._waiting) == {parent for op, _ in machine._pending.values() for parent in op.parents}


def test_thousands_of_forks_are_counted_a_few_times_only() -> None:
    """A member shows a twin of each of its operations, the last first: each is an earlier place than the one before."""
    a, replica = member(1, SPACE), member(0, SPACE)
    own = [put(a, "x", number) for number in range(400)]
    deliver(replica, *own)
    machine = machine_of(replica)
    before = replica.generation
    for op in reversed(own):
        twin = forged(a, b"", seq=op.seq, parents=list(op.parents), time=op.time + 1)
        hear(machine, BAD, Kind.OPERATIONS, 0, [twin.encoded])
        hear(machine, BAD, Kind.FORKS, [(op.encoded, twin.encoded)])
    assert replica.generation - before <= 2
    assert replica.graph.excluded(a.key.public_key.data)  # type: ignore[union-attr]
    first = own[0]
    twin = forged(a, b"", seq=0, parents=list(first.parents), time=first.time + 1)
    hear(machine, GOOD, Kind.FORKS, [(first.encoded, twin.encoded)], now=100.0)
    assert data(replica) == {}
    other = member(2, SPACE)
    deliver(other, Fork(first, twin), *own)
    assert other.root() == replica.root()


def test_many_branches_of_one_fork_are_forgotten() -> None:
    a, replica = member(1, SPACE), member(0, SPACE)
    for number in range(REPLICA_MAX_LIMBO + 100):
        deliver(replica, forged(a, b"", time=int(NOW) - number))
    assert replica.graph.limbo <= REPLICA_MAX_LIMBO
    assert len(replica.graph.entries) <= REPLICA_MAX_LIMBO


def test_a_small_question_has_no_huge_answer() -> None:
    replica = member(0, SPACE)
    for number in range(20):
        put(replica, f"k{number}", bytes(200_000))
    machine = machine_of(replica)
    hear(machine, BAD, Kind.WANT, [entry.op.id for entry in replica.graph.counted()])
    assert sum(len(message) for _, message in machine.poll_transmit()) < 3 << 20


# -- presence ------------------------------------------------------------------------------------------------------
def test_presence_expires_and_cannot_be_replayed() -> None:
    space, key = SPACE.id, key_of(1)
    theirs, ours = Presence(space), Presence(space)
    record = theirs.announce(key, b"1", 0.0, NOW)
    assert ours.receive_untrusted(record, 5.0, NOW)
    assert [member.info for member in ours.members(34.0)] == [b"1"]
    assert ours.members(36.0) == []
    assert not ours.receive_untrusted(record, 40.0, NOW + 40)
    assert ours.members(40.0) == []
    newer = theirs.announce(key, b"2", 41.0, NOW + 41)
    assert ours.receive_untrusted(newer, 41.0, NOW + 41)
    for time in (NOW + 10_000, NOW - 10_000):
        assert not ours.receive_untrusted(Presence(space).announce(key_of(3), b"1", 0.0, time), 0.0, NOW)
    forged_record = (newer[0], newer[1] + 1, b"other", newer[3])
    assert not ours.receive_untrusted(forged_record, 42.0, NOW + 41)
    assert not Presence(bytes(32)).receive_untrusted(newer, 42.0, NOW + 41)


def test_who_leaves_is_gone_at_once_and_cannot_be_brought_back() -> None:
    replica = member(1, SPACE)
    machine, other = machine_of(replica), machine_of(member(2, SPACE))
    machine.presence_info = b"1"
    machine.announce_presence(0.0, NOW)
    here = sent(machine, Kind.PRESENCE)[0][1][0]
    hear(other, GOOD, Kind.PRESENCE, here)
    assert len(other.presence.members(0.0)) == 1
    machine.presence_info = None
    machine.announce_presence(0.0, NOW)
    hear(other, GOOD, Kind.PRESENCE, sent(machine, Kind.PRESENCE)[0][1][0])
    assert other.presence.members(0.0) == machine.presence.members(0.0) == []
    hear(other, GOOD, Kind.PRESENCE, here)
    assert other.presence.members(0.0) == []
    machine.announce_presence(1.0, NOW + 1)
    assert sent(machine, Kind.PRESENCE) == []


def test_strangers_do_not_crowd_out_writers() -> None:
    presence = Presence(SPACE.id)
    strangers = [key_of_number(number) for number in range(REPLICA_MAX_PRESENT + 20)]
    for key in strangers:
        presence.receive_untrusted(Presence(SPACE.id).announce(key, b"1", 0.0, NOW), 0.0, NOW)
    assert len(presence.members(1.0)) == REPLICA_MAX_PRESENT
    writer = key_of(1)
    record = Presence(SPACE.id).announce(writer, b"here", 0.0, NOW)
    assert presence.receive_untrusted(record, 1.0, NOW, {writer.public_key.data})
    members = presence.members(1.0)
    assert len(members) == REPLICA_MAX_PRESENT
    assert b"here" in [member.info for member in members]


def test_all_who_are_present_fit_messages() -> None:
    replica = member(0, SPACE)
    machine: ReplicaSync[int] = ReplicaSync(replica, random.Random(1), 0.0)
    for number in range(REPLICA_MAX_PRESENT):
        record = Presence(SPACE.id).announce(key_of_number(number), bytes(REPLICA_MAX_PRESENCE_BYTES), 0.0, NOW)
        assert machine.presence.receive_untrusted(record, 0.0, NOW)
    machine.add_neighbour(GOOD, 0.0)
    messages = [data for _, data in machine.poll_transmit()]
    assert all(len(data) <= REPLICA_MAX_MESSAGE_BYTES for data in messages)
    other = machine_of(member(1, SPACE))
    for message in messages:
        other.receive_message_untrusted(GOOD, message, 0.0, NOW)
    assert len(other.presence.members(1.0)) == REPLICA_MAX_PRESENT


def key_of_number(number: int) -> Any:
    return type(key_of(0)).generate((1000 + number).to_bytes(32, "big"))


# -- time and values -----------------------------------------------------------------------------------------------
def test_a_number_that_is_none_is_like_itself() -> None:
    a = member(1, SPACE)
    put(a, "nan", float("nan"))
    put(a, "inf", float("inf"))
    assert a.verify().ok


def test_time_ahead_waits_and_time_behind_is_refused() -> None:
    a, replica = member(1, SPACE), Replica(SPACE)
    first = put(a, "x", 1)
    ahead = forged(a, b"", time=int(NOW) + 601)
    replica.receive_operation(first, NOW)
    with pytest.raises(RemoteProtocolError, match="ahead"):
        replica.receive_operation(ahead, NOW)
    replica.receive_operation(ahead, NOW + 1)
    behind = forged(a, b"", time=int(NOW) - 1)
    with pytest.raises(RemoteProtocolError, match="before"):
        replica.receive_operation(behind, NOW)


# -- the disk ------------------------------------------------------------------------------------------------------
def test_a_stored_operation_that_changed_and_names_what_a_fork_never_had_is_damage() -> None:
    """Not an error of ours, with which the daemon would not start."""
    a, b = member(1, SPACE), member(2, SPACE)
    first = put(a, "x", 1)
    deliver(b, first)
    last = put(b, "x", 2)
    deliver(b, forged(a, b"", seq=0, parents=[], time=int(NOW) - 1))
    assert b.graph.exclusions()
    forks = [[op.encoded for op in fork.operations] for fork in b.graph.forks.values()]
    client = encode_uvarint(a.doc.client_id)
    at = last.encoded.index(client) + len(client)
    changed = last.encoded[:at] + b"\x70" + last.encoded[at + 1 :]
    again = member(2, SPACE)
    with pytest.raises(RemoteProtocolError, match="not the one that its author signed"):
        again.load([(first.encoded, 1), (changed, 1)], forks)
