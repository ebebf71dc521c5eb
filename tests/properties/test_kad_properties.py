"""Whatever the bytes: an answer, or RemoteProtocolError. And what is true of every table and lookup."""

from __future__ import annotations

import contextlib
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.kad.keyspace import position
from lattica_protocols.kad.lookup import Lookup
from lattica_protocols.kad.messages import (
    KadMessage,
    PeerEntry,
    Record,
    decode_message_untrusted,
    encode_answer,
    peers_untrusted,
)
from lattica_protocols.kad.records import Validators, open_value_untrusted, seal_value
from lattica_protocols.kad.routing import RoutingTable
from lattica_protocols.kad.server import KadServer
from lattica_protocols.keys import PrivateKey
from lattica_protocols.limits import KAD_MAX_MESSAGE_BYTES
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId

NOW = 1_800_000_000.0
ALICE = PrivateKey.generate(b"a" * 32)
ADDR = Multiaddr.parse("/ip4/8.8.8.8/tcp/1")


def peer(n: int) -> PeerId:
    return PeerId.from_bytes_untrusted(bytes.fromhex("002408011220") + n.to_bytes(32, "big"))


ids = st.one_of(st.binary(max_size=50), st.integers(0, 60).map(lambda n: peer(n).to_bytes()))
entries = st.builds(
    PeerEntry,
    id=st.none() | ids,
    addrs=st.lists(st.binary(max_size=60) | st.just(ADDR.to_bytes()), max_size=4).map(tuple),
    connection=st.none() | st.integers(-(2**31), 2**31 - 1),
)
records = st.builds(
    Record,
    key=st.none() | st.binary(max_size=20),
    value=st.none() | st.binary(max_size=200),
    time_received=st.none() | st.text(max_size=10),
    publisher=st.none() | ids,
    ttl=st.none() | st.integers(0, 2**32),
)
keys = st.binary(max_size=90) | st.just(b"/lattica/x/y") | st.just(b"/pk/" + peer(1).to_bytes())
messages = st.builds(
    KadMessage,
    type=st.integers(0, 5),
    key=st.none() | keys,
    record=st.none() | records,
    closer_peers=st.lists(entries, max_size=6).map(tuple),
    provider_peers=st.lists(entries, max_size=6).map(tuple),
)


def make_server() -> KadServer:
    table = RoutingTable(peer(0), 0.0)
    for n in range(1, 30):
        table.add(peer(n), [], 0.0)
    return KadServer(peer(0), table, lambda p: (ADDR,), validators=Validators(accept_any=True))


@given(messages)
def test_messages_round_trip(message: KadMessage) -> None:
    assert decode_message_untrusted(message.encode()) == message


@given(st.binary(max_size=300))
def test_garbage(data: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        message = decode_message_untrusted(data)
        peers_untrusted([*message.closer_peers, *message.provider_peers], 20)
    with contextlib.suppress(RemoteProtocolError):
        open_value_untrusted(b"/lattica/x/y", data)
    for key in (b"/lattica/" + str(peer(1)).encode() + b"/n", b"/pk/" + peer(1).to_bytes(), data[:200]):
        Validators().refusal(key, data, NOW)


@given(messages, st.integers(0, 60))
def test_any_request_is_answered_or_refused(message: KadMessage, sender: int) -> None:
    server = make_server()
    with contextlib.suppress(RemoteProtocolError):
        answer = server.answer_untrusted(message, peer(sender), ADDR, NOW)
        if answer is not None:
            data = encode_answer(answer)
            assert len(data) <= KAD_MAX_MESSAGE_BYTES
            assert decode_message_untrusted(data).type == message.type
    assert all(change.provider == peer(sender) for change in server.providers.poll_changes())


@given(st.data())
def test_a_flipped_bit_spoils_a_record(data: st.DataObject) -> None:
    key, record = seal_value(ALICE, "name", b"value", sequence=5, expires=int(NOW) + 60)
    bit = data.draw(st.integers(0, 8 * len(record) - 1))
    spoiled = bytearray(record)
    spoiled[bit // 8] ^= 1 << bit % 8
    assert Validators().refusal(key, bytes(spoiled), NOW) is not None


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from("asfr"), st.integers(0, 400)), max_size=300), st.binary(max_size=8))
def test_tables_stay_whole(steps: list[tuple[str, int]], key: bytes) -> None:
    table = RoutingTable(peer(0), 0.0)
    for now, (step, n) in enumerate(steps):
        if step == "a":
            table.add(peer(n), [Multiaddr.parse(f"/ip4/8.8.{n % 7}.8/tcp/1")] if n % 2 else [], float(now))
        elif step == "s":
            table.succeeded(peer(n), float(now))
        elif step == "f":
            table.failed(peer(n))
        else:
            table.remove(peer(n))
        while table.next_event() is not None:
            pass
    inside = [contact.peer for bucket in table.buckets for contact in bucket.nodes.values()]
    assert sorted(inside) == sorted(table.peers())
    for bucket in table.buckets:
        assert len(bucket) <= 20
        assert not set(bucket.nodes) & set(bucket.replacement_nodes)
        present = [*bucket.nodes.values(), *bucket.replacement_nodes.values()]
        assert all(bucket.contains(contact.long_id) for contact in present)
        for subnet in {subnet for contact in present for subnet in contact.subnets}:
            assert sum(subnet in contact.subnets for contact in present) <= 2
    distances = [position(p.to_bytes()) ^ position(key) for p in table.closest(key)]
    assert distances == sorted(position(p.to_bytes()) ^ position(key) for p in table.peers())[:20]


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 3))
def test_every_lookup_ends(seed: int, paths: int) -> None:
    """Random answers, failures and silence: it ends, within its requests, and asks nobody twice."""
    rng = random.Random(seed)
    population = [peer(n) for n in range(rng.randrange(1, 200))]
    lookup = Lookup(rng.randbytes(8), rng.sample(population, min(5, len(population))), own=population[0], paths=paths)
    asked: list[PeerId] = []
    waiting: list[PeerId] = []
    now = 0.0
    while not lookup.finished:
        while (one := lookup.next(now)) is not None:
            asked.append(one)
            waiting.append(one)
        if waiting and rng.random() < 0.8:
            one = waiting.pop(rng.randrange(len(waiting)))
            if rng.random() < 0.7:
                lookup.on_success(one, rng.choices(population, k=rng.randrange(25)), now)
            else:
                lookup.on_failure(one, now)
        else:
            timeout = lookup.next_timeout()
            now = max(now, timeout) if timeout is not None else now + 1.0
    assert len(asked) == len(set(asked)) == lookup.requests <= 160
    assert population[0] not in asked
    assert len(lookup.result()) <= 20
