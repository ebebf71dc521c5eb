"""What members that cheat do: they hold a writer's key and a replica, and keep no rule."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from pycrdt import Doc, Map
from replica_network import UNIX, Member, Network
from replica_updates import some_update

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.keys import PrivateKey
from lattica_protocols.limits import REPLICA_MAX_INSTANCES, REPLICA_MAX_UPDATE_BYTES
from lattica_protocols.replica import client_ids
from lattica_protocols.replica.client_ids import client_id
from lattica_protocols.replica.messages import Kind as MessageKind
from lattica_protocols.replica.messages import encode_message
from lattica_protocols.replica.operation import Kind, Operation
from lattica_protocols.replica.placement import places_of_state_untrusted
from lattica_protocols.varint import encode_uvarint

Sent = list[tuple[int, list[Operation]]]
"""Operations for each of some neighbours."""
Way = Callable[[Network, Member, random.Random], Sent]


def cheat(network: Network, member: Member, way: Way | None = None) -> None:
    """One thing that no honest member would do. Every other cheater only contradicts and collides: the rest of what
    they do gets them excluded."""
    rng = network.rng
    if way is None:
        way = rng.choice((contradict, collide) if member.number % 2 == 0 else WAYS)
    if not member.neighbours:
        return
    for target, ops in way(network, member, rng):
        for op in ops:
            data = encode_message(MessageKind.OPERATIONS, network.genesis.id, 0, [op.encoded])
            for _ in range(3):  # the network loses a part
                network.send(member.number, target, data)


def _next(network: Network, member: Member, body: bytes, kind: int = Kind.EDIT, **other: Any) -> Operation:
    """What the member's next operation would be, unless `other` says otherwise."""
    replica = member.replica
    chain = (member.key.public_key.data, replica.instance)
    tip = replica.graph.tip(chain)
    previous = [] if tip is None else [tip.op.id]
    fields: dict[str, Any] = {
        "kind": kind,
        "instance": replica.instance,
        "seq": 0 if tip is None else tip.op.seq + 1,
        "parents": [*previous, *sorted(replica.graph.heads.difference(previous))],
        "time": int(UNIX + network.now),
        "body": body,
    }
    return Operation.seal(member.key, network.genesis.id, **(fields | other))


def _update(member: Member, value: object, client: int | None = None) -> bytes:
    """An update as the member's next edit of a key that others use, too."""
    doc: Doc[Any] = Doc(client_id=client if client is not None else member.replica.doc.client_id)
    doc.apply_update(member.replica.doc.get_update())
    seen: list[bytes] = []
    subscription = doc.observe(lambda event: seen.append(event.update))
    doc.get("m:config", type=Map)["key0"] = value
    doc.unobserve(subscription)
    return seen[0]


def equivocate(network: Network, member: Member, rng: random.Random) -> Sent:
    """Two operations with one sequence number, to different neighbours; sometimes something on top of each."""
    first, second = (_next(network, member, _update(member, value)) for value in ("first", "other"))
    return [(target, [rng.choice((first, second))]) for target in member.neighbours]


def crowd(network: Network, member: Member, rng: random.Random) -> Sent:
    """More instances than one author may have, half of them to each neighbour, sometimes on top of what it has."""
    heads = sorted(member.replica.graph.heads)
    first = rng.getrandbits(31)
    made = [
        _next(network, member, b"", instance=first + n, seq=0, parents=heads if rng.random() < 0.1 else [])
        for n in range(2 * REPLICA_MAX_INSTANCES + 2)
    ]
    return [(target, rng.sample(made, REPLICA_MAX_INSTANCES)) for target in member.neighbours]


def forge_signature(network: Network, member: Member, rng: random.Random) -> Sent:
    op = _next(network, member, _update(member, "forged"))
    data = op.encoded[:-1] + bytes([op.encoded[-1] ^ 1])
    return [(target, [Operation.decode_untrusted(data, network.genesis.id)]) for target in member.neighbours]


def withhold(network: Network, member: Member, rng: random.Random) -> Sent:
    """An operation linked to one that nobody ever gets."""
    op = _next(network, member, b"", parents=[rng.randbytes(32)], seq=0, instance=rng.getrandbits(32))
    return [(target, [op]) for target in member.neighbours]


def withhold_for_a_while(network: Network, member: Member, rng: random.Random) -> Sent:
    """Two operations of which the first reaches one neighbour only, at last."""
    first = _next(network, member, _update(member, "first"))
    second = _next(network, member, b"", seq=first.seq + 1, parents=[first.id])
    one = rng.choice(member.neighbours)
    data = encode_message(MessageKind.OPERATIONS, network.genesis.id, 0, [first.encoded])
    network.at(network.now + rng.uniform(1, 8), lambda: network.send(member.number, one, data))
    return [(target, [second]) for target in member.neighbours]


def write_by_hand(network: Network, member: Member, rng: random.Random) -> Sent:
    """An update that no use of the types makes."""
    replica = member.replica
    known: dict[int, int] = {}
    for entry in replica.graph.counted():
        known[entry.branch.client] = max(known.get(entry.branch.client, 0), entry.end)
    tip = replica.graph.tip((member.key.public_key.data, replica.instance))
    body = some_update(rng, client_id(member.key.public_key.data, replica.instance), tip.end if tip else 0, known)
    return [(target, [_next(network, member, body)]) for target in member.neighbours]


def contradict(network: Network, member: Member, rng: random.Random) -> Sent:
    """Items between any two of a list or text: the wrong way round, far apart, or such as an honest member could."""
    replica = member.replica
    beside: dict[str, list[tuple[int, int]]] = {"l:items": [], "t:notes": []}
    for client, table in places_of_state_untrusted(replica.doc.get_update()).items():
        for clock, placed in zip(table.clocks, table.placed, strict=True):
            if placed.place is not None and placed.place.container.name in beside:
                beside[placed.place.container.name].append((client, clock))  # type: ignore[index]
    tip = replica.graph.tip((member.key.public_key.data, replica.instance))
    client, start = client_id(member.key.public_key.data, replica.instance), tip.end if tip else 0
    items = b""
    count = rng.randrange(1, 4)
    for clock in range(start, start + count):
        name = rng.choice(list(beside))
        info, place = 8 if name[0] == "l" else 4, b""
        for bit in (0x80, 0x40):
            if beside[name] and rng.random() < 0.6:
                info |= bit
                place += b"".join(map(encode_uvarint, rng.choice(beside[name])))
        beside[name].append((client, clock))
        place = place or b"\1" + encode_uvarint(len(name)) + name.encode()
        items += bytes([info]) + place + (b"\1\x7d\1" if name[0] == "l" else b"\1!")
    op = _next(network, member, b"\1" + b"".join(map(encode_uvarint, (count, client, start))) + items + b"\0")
    try:
        replica.receive_operation(Operation.decode_untrusted(op.encoded, network.genesis.id), UNIX + network.now)
    except RemoteProtocolError:
        pass  # it goes out all the same
    return [(target, [op]) for target in member.neighbours]


def pretend_a_checkpoint(network: Network, member: Member, rng: random.Random) -> Sent:
    """A rank above all others, garbage for whoever asks for it, and garbage under the id of a good one."""
    good = network.members[0].replica.rank()[2]
    for target in member.neighbours:
        for key in (rng.randbytes(32), good):
            hello = encode_message(MessageKind.HELLO, network.genesis.id, rng.randbytes(32), 9, 10**6, key)
            chunk = encode_message(MessageKind.CHECKPOINT, network.genesis.id, key, 0, 40, rng.randbytes(40))
            network.send(member.number, target, hello)
            network.at(network.now + 0.5, lambda t=target, c=chunk: network.send(member.number, t, c))
    return []


def fork_earlier_and_earlier(network: Network, member: Member, rng: random.Random) -> Sent:
    """A twin for every operation of its chain, the last first."""
    chain = (member.key.public_key.data, member.replica.instance)
    own = [entry.op for entry in member.replica.graph.counted() if entry.op.chain == chain]
    twins = [_next(network, member, b"", seq=op.seq, parents=list(op.parents), time=op.time + 1) for op in own]
    return [(target, twins[::-1]) for target in member.neighbours]


def grant_without_right(network: Network, member: Member, rng: random.Random) -> Sent:
    friend = PrivateKey.generate(rng.randbytes(32))
    op = _next(network, member, friend.public_key.data, Kind.GRANT)
    own = Operation.seal(
        friend, network.genesis.id, instance=0, seq=0, parents=[op.id], time=int(UNIX + network.now), body=b""
    )
    return [(target, [op, own]) for target in member.neighbours]


def take_anothers_client(network: Network, member: Member, rng: random.Random) -> Sent:
    """Items under the client id of somebody else, or at clocks that were used."""
    victim = rng.choice(network.honest())
    client = client_id(victim.key.public_key.data, victim.replica.instance)
    op = _next(network, member, _update(member, "stolen", client))
    return [(target, [op]) for target in member.neighbours]


def collide(network: Network, member: Member, rng: random.Random) -> Sent:
    """A chain with the client id of another one, of somebody's or its own, to some of the neighbours."""
    if client_ids.CLIENT_BITS > 16:
        return []  # it takes 2^27 tries for two of its own, 2^53 for a given one
    victim, own = rng.choice([*network.members, member]), member.key.public_key.data
    wanted = client_id(victim.key.public_key.data, victim.replica.instance)
    start = rng.getrandbits(31)
    found = next((i for i in range(start, start + 20_000) if client_id(own, i) == wanted), start)
    fresh: Doc[Any] = Doc(client_id=client_id(own, found))
    fresh.get("m:config", type=Map)["key1"] = "collides"
    heads = sorted(member.replica.graph.heads)
    parents = heads if rng.random() < 0.5 else []
    op = _next(network, member, fresh.get_update(), instance=found, seq=0, parents=parents)
    more = _next(network, member, b"", instance=found, seq=1, parents=[op.id])
    return [(target, [op, more]) for target in member.neighbours if rng.random() < 0.5]


def reuse_clock(network: Network, member: Member, rng: random.Random) -> Sent:
    fresh: Doc[Any] = Doc(client_id=member.replica.doc.client_id)
    fresh.get("m:config", type=Map)["key1"] = "again"
    op = _next(network, member, fresh.get_update())
    return [(target, [op]) for target in member.neighbours]


def oversize(network: Network, member: Member, rng: random.Random) -> Sent:
    op = _next(network, member, b"\x00" * REPLICA_MAX_UPDATE_BYTES)
    return [(target, [op]) for target in member.neighbours[:1]]


def replay(network: Network, member: Member, rng: random.Random) -> Sent:
    entries = member.replica.graph.counted()
    return [(target, [rng.choice(entries).op]) for target in member.neighbours if entries]


def from_the_future(network: Network, member: Member, rng: random.Random) -> Sent:
    op = _next(network, member, b"", time=int(UNIX + 10_000_000))
    return [(target, [op]) for target in member.neighbours]


def garbage(network: Network, member: Member, rng: random.Random) -> Sent:
    for target in member.neighbours:
        kind = rng.choice(list(MessageKind))
        network.send(member.number, target, encode_message(kind, network.genesis.id, rng.randbytes(rng.randrange(40))))
        network.send(member.number, target, rng.randbytes(rng.randrange(60)))
    op = _next(network, member, rng.randbytes(rng.randrange(1, 30)))
    return [(target, [op]) for target in member.neighbours]


WAYS = [
    equivocate,
    equivocate,
    crowd,
    forge_signature,
    withhold,
    withhold_for_a_while,
    write_by_hand,
    write_by_hand,
    contradict,
    pretend_a_checkpoint,
    fork_earlier_and_earlier,
    grant_without_right,
    take_anothers_client,
    collide,
    reuse_clock,
    oversize,
    replay,
    from_the_future,
    garbage,
]
