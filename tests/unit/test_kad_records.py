"""Validators, stores, admission and the answering side."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from lattica_protocols.envelope import SignedEnvelope
from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.kad import records, store
from lattica_protocols.kad.admission import Admission
from lattica_protocols.kad.messages import (
    KadMessage,
    MessageType,
    PeerAddrs,
    PeerEntry,
    Record,
    decode_message_untrusted,
    encode_answer,
    peer_entry,
    peers_untrusted,
)
from lattica_protocols.kad.records import Validators, open_value_untrusted, record_key, seal_value
from lattica_protocols.kad.routing import RoutingTable
from lattica_protocols.kad.server import KadServer, addresses_for
from lattica_protocols.kad.shares import Shares
from lattica_protocols.kad.store import ProviderDropped, ProviderStore, ValueStore
from lattica_protocols.keys import PrivateKey
from lattica_protocols.limits import KAD_MAX_MESSAGE_BYTES, KAD_MAX_RECORD_LIFETIME
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId

NOW = 1_800_000_000.0
HOUR = 3600.0
ALICE = PrivateKey.generate(b"a" * 32)
BOB = PrivateKey.generate(b"b" * 32)
ALICE_ID = PeerId.from_public_key(ALICE.public_key)
BOB_ID = PeerId.from_public_key(BOB.public_key)
ADDR = Multiaddr.parse("/ip4/8.8.8.8/tcp/4101")


def peer(n: int) -> PeerId:
    return PeerId.from_bytes_untrusted(bytes.fromhex("002408011220") + n.to_bytes(32, "big"))


def refusal(key: bytes, value: bytes, now: float = NOW) -> str | None:
    return Validators().refusal(key, value, now)


# -- /lattica/ ----------------------------------------------------------------------------------------------------
def test_a_signed_value() -> None:
    key, record = seal_value(ALICE, "models/llama", b"value", sequence=7, expires=int(NOW) + 60)
    assert key == f"/lattica/{ALICE_ID}/models/llama".encode()
    assert refusal(key, record) is None
    opened = open_value_untrusted(key, record)
    assert (opened.publisher, opened.name, opened.value) == (ALICE_ID, "models/llama", b"value")
    assert (opened.sequence, opened.expires) == (7, int(NOW) + 60)
    assert Validators().expires(key, record) == int(NOW) + 60


def test_only_the_owner_of_a_key_writes_it() -> None:
    key, _ = seal_value(ALICE, "n", b"", sequence=1, expires=int(NOW) + 60)
    payload = records._Payload(key=key, value=b"mine", sequence=99, expires=int(NOW) + 60).encode()
    forged = SignedEnvelope.seal(BOB, records.DOMAIN, records.PAYLOAD_TYPE, payload).to_bytes()
    assert "does not own the key" in (refusal(key, forged) or "")


def test_refused_values() -> None:
    key, record = seal_value(ALICE, "n", b"v", sequence=1, expires=int(NOW) + 60)
    other_key, _ = seal_value(ALICE, "m", b"v", sequence=1, expires=int(NOW) + 60)
    assert refusal(key, record, NOW + 60) == "record has expired"
    assert "another key" in (refusal(other_key, record) or "")
    assert "signature" in (refusal(key, record[:-1] + bytes([record[-1] ^ 1])) or "")
    far = seal_value(ALICE, "n", b"v", sequence=1, expires=int(NOW) + KAD_MAX_RECORD_LIFETIME + 1)[1]
    assert "too far" in (refusal(key, far) or "")
    # An unknown field changes no signature, so the encoding has to be canonical.
    assert refusal(key, record + b"\x50\x00") == "record is not encoded canonically"
    envelope = SignedEnvelope.open_untrusted(record, records.DOMAIN, records.PAYLOAD_TYPE)
    loose = SignedEnvelope.seal(ALICE, records.DOMAIN, records.PAYLOAD_TYPE, envelope.payload + b"\x50\x00")
    assert refusal(key, loose.to_bytes()) == "record is not encoded canonically"
    elsewhere = SignedEnvelope.seal(ALICE, "libp2p-peer-record", records.PAYLOAD_TYPE, envelope.payload)
    assert "signature" in (refusal(key, elsewhere.to_bytes()) or "")
    for bad in (b"/lattica/", b"/lattica/x/y", b"/lattica/" + str(ALICE_ID).encode(), key.replace(b"12D3", b"\xff")):
        assert refusal(bad, record) is not None
    cid_form = key.replace(str(ALICE_ID).encode(), ALICE_ID.to_cid_text().encode())
    assert refusal(cid_form, record) == "the peer id in the key is not in base 58"
    assert "over" in (refusal(key, bytes(9000)) or "")
    assert refusal(b"", record) is not None
    assert refusal(b"/other/x", record) == "no rules for keys of this namespace"
    assert Validators(accept_any=True).refusal(b"/other/x", b"anything", NOW) is None
    assert Validators(accept_any=True).refusal(key, b"anything", NOW) is not None


def test_order_of_values() -> None:
    key, first = seal_value(ALICE, "n", b"1", sequence=1, expires=int(NOW) + 60)
    values = [
        first,
        seal_value(ALICE, "n", b"1", sequence=1, expires=int(NOW) + 61)[1],
        seal_value(ALICE, "n", b"0", sequence=2, expires=int(NOW) + 10)[1],
        seal_value(ALICE, "n", b"2", sequence=2, expires=int(NOW) + 10)[1],
    ]
    validators = Validators()
    low, high = sorted(values[2:])
    for older, newer in ((values[0], values[1]), (values[1], low), (low, high)):
        assert validators.better(key, newer, older)
        assert not validators.better(key, older, newer)
    assert not validators.better(key, first, first)


def test_names() -> None:
    for name in ("", "x" * 129, "a\nb", "ü" * 65):
        with pytest.raises(LocalProtocolError, match="record name"):
            record_key(ALICE_ID, name)
    with pytest.raises(LocalProtocolError, match="too long"):
        seal_value(ALICE, "n", bytes(8192), sequence=1, expires=int(NOW))


def test_vectors() -> None:
    path = Path(__file__).parent.parent / "vectors" / "dht-records.json"
    for vector in json.loads(path.read_text())["records"]:
        private_key = PrivateKey.generate(bytes.fromhex(vector["seed"]))
        value = bytes.fromhex(vector["value"])
        key, record = seal_value(
            private_key, vector["name"], value, sequence=vector["sequence"], expires=vector["expires"]
        )
        assert key.decode() == vector["key"]
        assert record.hex() == vector["record"]
        assert open_value_untrusted(key, record).value == value


# -- /pk/ ---------------------------------------------------------------------------------------------------------
def test_public_keys() -> None:
    key = b"/pk/" + ALICE_ID.to_bytes()
    assert refusal(key, ALICE.public_key.to_protobuf()) is None
    assert refusal(key, BOB.public_key.to_protobuf()) == "public key does not fit the peer id in its key"
    assert refusal(key, b"junk") is not None
    assert refusal(b"/pk/", ALICE.public_key.to_protobuf()) is not None


# -- stores -------------------------------------------------------------------------------------------------------
def test_providers_expire_and_their_addresses_before() -> None:
    providers = ProviderStore()
    providers.add(b"k", ALICE_ID, [ADDR], NOW)
    providers.add(b"k", BOB_ID, [ADDR], NOW + 1 * HOUR)
    assert [p.peer for p in providers.get(b"k", NOW + HOUR)] == [BOB_ID, ALICE_ID]
    assert providers.get(b"k", NOW + HOUR)[1].addrs == ()
    assert [p.peer for p in providers.get(b"k", NOW + HOUR, 1)] == [BOB_ID]
    assert [p.peer for p in providers.get(b"k", NOW + 48 * HOUR)] == [BOB_ID]
    assert providers.poll_changes() != []
    assert providers.expire(NOW + 48 * HOUR) == 1
    assert providers.poll_changes() == [ProviderDropped(b"k", ALICE_ID)]
    assert len(providers) == 1
    providers.remove(b"k", BOB_ID)
    providers.remove(b"k", BOB_ID)
    assert len(providers) == 0


def test_provider_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "KAD_PROVIDERS_PER_KEY", 3)
    monkeypatch.setattr(store, "KAD_PROVIDER_KEYS_PER_PEER", 4)
    monkeypatch.setattr(store, "KAD_MAX_PROVIDER_RECORDS", 8)
    providers = ProviderStore()
    for n in range(3):
        assert providers.add(b"k", peer(n), [], NOW + n)
    assert providers.add(b"k", peer(0), [], NOW + 3), "renewed"
    assert providers.add(b"k", peer(9), [], NOW + 4)
    assert [p.peer for p in providers.get(b"k", NOW + 4)] == [peer(9), peer(0), peer(2)]
    assert [providers.add(bytes([n]), ALICE_ID, [], NOW) for n in range(5)] == [True] * 4 + [False]
    assert providers.add(b"other", BOB_ID, [], NOW)
    assert not providers.add(b"another", BOB_ID, [], NOW), "the store is full"
    assert len(providers) == 8


def test_one_network_does_not_hide_the_providers_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids cost nothing: whoever announces a key under many must not be all that is known and told of it."""
    monkeypatch.setattr(store, "KAD_PROVIDERS_PER_KEY", 8)
    providers = ProviderStore()
    providers.add(b"k", ALICE_ID, [ADDR], NOW, "192.0.2.0/24")
    providers.add(b"k", BOB_ID, [ADDR], NOW, "198.51.100.0/24")
    for n in range(100):
        assert providers.add(b"k", peer(n), [ADDR], NOW + 1 + n, "203.0.113.0/24")
    told = [p.peer for p in providers.get(b"k", NOW + 200, 4)]
    assert told == [peer(99), BOB_ID, ALICE_ID, peer(98)]
    assert len(providers) == 8
    assert providers.add(b"k", peer(200), [ADDR], NOW + 300, "192.0.2.0/24")
    assert [p.peer for p in providers.get(b"k", NOW + 300, 3)] == [peer(200), peer(99), BOB_ID]


def test_one_network_does_not_fill_the_provider_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "KAD_MAX_PROVIDER_RECORDS", 20)
    providers = ProviderStore()
    for n in range(20):
        assert providers.add(bytes([n]), peer(n % 3), [], NOW + n, "flood")
    assert not providers.add(b"more", peer(1), [], NOW + 20, "flood")
    taken = [providers.add(bytes([100 + n]), ALICE_ID, [], NOW + 21 + n, "honest") for n in range(30)]
    assert taken == [True] * 10 + [False] * 20, "half of the store"
    assert len(providers) == 20
    assert providers.get(bytes([9]), NOW + 60) == [], "the oldest went"
    assert providers.get(bytes([10]), NOW + 60) != []
    assert not providers.add(b"more", peer(1), [], NOW + 60, "flood")
    assert providers.add(b"more", BOB_ID, [], NOW + 60, "third")
    assert providers.expire(NOW + 60 + 48 * HOUR) == 20


def test_one_network_does_not_fill_the_value_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "KAD_MAX_VALUES", 20)
    monkeypatch.setattr(store, "KAD_MAX_VALUES_BYTES", 20_000)
    values = ValueStore(Validators(accept_any=True))
    for n in range(19):
        values.put_untrusted(bytes([n]), bytes(1000), BOB_ID, NOW, "flood")
    with pytest.raises(RemoteProtocolError, match="full"):
        values.put_untrusted(b"more", bytes(2000), BOB_ID, NOW, "flood")
    values.put_untrusted(b"small", b"x", ALICE_ID, NOW, "honest")
    values.put_untrusted(b"large", bytes(2500), ALICE_ID, NOW, "honest")
    assert values.get(b"small", NOW) == b"x"
    assert values.get(b"large", NOW) == bytes(2500)
    assert values.stored_bytes <= 20_000
    assert [n for n in range(19) if values.get(bytes([n]), NOW) is None] == [0, 1]

    values.put_untrusted(b"small", b"x", BOB_ID, NOW + 1, "flood")  # repeated by somebody else
    for n in range(3):
        values.put_untrusted(bytes([50 + n]), bytes(1000), ALICE_ID, NOW + 2, "honest")
    assert values.get(b"small", NOW + 2) == b"x"


def test_records_count_for_the_network_of_their_sender() -> None:
    """Asked through the server: the address of the connection says whose a record is, not what the record claims."""
    server = KadServer(ALICE_ID, RoutingTable(ALICE_ID, 0.0), lambda peer: [], validators=Validators(accept_any=True))
    for text, origin in (
        ("/ip4/8.8.4.7/tcp/1", "8.8.4.0/24"),
        ("/ip6/2001:4860:1:2::3/udp/1/quic-v1", "2001:4860:1::/48"),
        ("/ip4/192.168.1.7/tcp/1", "192.168.1.7"),
        (f"/ip4/8.8.4.9/tcp/1/p2p/{BOB_ID}/p2p-circuit", "8.8.4.0/24"),
    ):
        key, remote = origin.encode(), Multiaddr.parse(text)
        claims = [peer_entry(PeerAddrs(BOB_ID, (ADDR,)))]
        server.answer_untrusted(
            KadMessage(type=MessageType.ADD_PROVIDER, key=key, provider_peers=claims), BOB_ID, remote, NOW
        )
        record = Record(key=key, value=b"v")
        server.answer_untrusted(KadMessage(type=MessageType.PUT_VALUE, key=key, record=record), BOB_ID, remote, NOW)
        assert [r.origin for r in server.values.records() if r.key == key] == [origin]
        changes = server.providers.poll_changes()
        assert [change.origin for change in changes if isinstance(change, store.ProviderRecord)] == [origin]


def test_shares_are_those_of_a_count() -> None:
    shares: Shares[int] = Shares()
    rng, held = random.Random(1), dict[int, tuple[str, int]]()
    for entry in range(5000):
        origin, weight = rng.choice("aabcdefgh"), rng.randrange(1, 5)
        shares.put(origin, entry, weight)
        held[entry] = origin, weight
        if rng.random() < 0.9 and len(held) > 30:
            gone = rng.choice([*held])
            shares.drop(held.pop(gone)[0], gone)
        weights: Counter[str] = Counter()
        for name, value in held.values():
            weights[name] += value
        asking = rng.choice("abxy")
        displaced = shares.displaced_by(asking, 3)
        if displaced is None:
            assert weights[asking] + 3 >= max(weights.values())
        else:
            loser = held[displaced][0]
            assert weights[loser] == max(weights.values()) > weights[asking] + 3
            assert displaced == next(entry for entry, (name, _) in held.items() if name == loser), "its oldest"


def test_stored_providers_come_back() -> None:
    providers = ProviderStore()
    for n in range(3):
        providers.add(b"k", peer(n), [ADDR], NOW + n)
    changes = [change for change in providers.poll_changes() if isinstance(change, store.ProviderRecord)]
    again = ProviderStore()
    again.load(reversed(changes), NOW + 48 * HOUR + 1)
    assert [p.peer for p in again.get(b"k", NOW + 48 * HOUR + 1)] == [peer(2)]
    assert again.poll_changes() == []


def test_values_are_replaced_by_newer_ones_only() -> None:
    values = ValueStore(Validators())
    key, old = seal_value(ALICE, "n", b"old", sequence=1, expires=int(NOW) + 60)
    _, new = seal_value(ALICE, "n", b"new", sequence=2, expires=int(NOW + 72 * HOUR))
    assert values.put_untrusted(key, new, BOB_ID, NOW) == new
    assert values.put_untrusted(key, old, BOB_ID, NOW) == new
    assert values.get(key, NOW + 47 * HOUR) == new
    assert values.get(key, NOW + 48 * HOUR) is None
    assert values.expire(NOW + 48 * HOUR) == 1
    assert (len(values), values.stored_bytes) == (0, 0)
    with pytest.raises(RemoteProtocolError, match="expired"):
        values.put_untrusted(key, old, BOB_ID, NOW + 60)


def test_value_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "KAD_VALUES_PER_PUBLISHER", 2)
    monkeypatch.setattr(store, "KAD_MAX_VALUES", 3)
    monkeypatch.setattr(store, "KAD_MAX_VALUES_BYTES", 1000)
    values = ValueStore(Validators(accept_any=True))
    for name in ("a", "b"):
        values.put_untrusted(*seal_value(ALICE, name, b"", sequence=1, expires=int(NOW) + 60), BOB_ID, NOW)
    with pytest.raises(RemoteProtocolError, match="publisher"):
        values.put_untrusted(*seal_value(ALICE, "c", b"", sequence=1, expires=int(NOW) + 60), BOB_ID, NOW)
    values.put_untrusted(*seal_value(ALICE, "b", b"2", sequence=2, expires=int(NOW) + 60), BOB_ID, NOW)
    values.put_untrusted(b"any", b"x", BOB_ID, NOW)
    with pytest.raises(RemoteProtocolError, match="full"):
        values.put_untrusted(b"more", b"x", BOB_ID, NOW)
    with pytest.raises(RemoteProtocolError, match="full"):
        values.put_untrusted(b"any", bytes(1000), BOB_ID, NOW)
    values.put_untrusted(b"any", b"y", ALICE_ID, NOW) if False else None
    assert values.get(b"any", NOW) == b"x"
    again = ValueStore(Validators())
    again.load(values.records(), NOW + 1)
    assert len(again) == 3
    again.load(values.records(), NOW + 61)
    assert again.poll_changes() == []


# -- the answering side -------------------------------------------------------------------------------------------
def make_server() -> KadServer:
    table = RoutingTable(peer(0), 0.0)
    for n in range(1, 30):
        table.add(peer(n), [], 0.0)
    return KadServer(peer(0), table, lambda p: (ADDR,) if p in table or p == peer(0) else (), validators=Validators())


def answer(server: KadServer, request: KadMessage, sender: PeerId = BOB_ID) -> KadMessage | None:
    received = decode_message_untrusted(request.encode())
    return server.answer_untrusted(received, sender, Multiaddr.parse("/ip4/9.9.9.9/tcp/1"), NOW)


def test_find_node() -> None:
    server = make_server()
    reply = answer(server, KadMessage(type=MessageType.FIND_NODE, key=peer(3).to_bytes()), sender=peer(4))
    assert reply is not None
    named = [p.peer for p in peers_untrusted(reply.closer_peers, 100)]
    assert len(named) == 20
    assert named[0] == peer(3)
    assert peer(4) not in named, "the asker is left out"
    assert named == server.table.closest(peer(3).to_bytes(), exclude=peer(4))


def test_find_node_names_a_client_that_we_know() -> None:
    server = make_server()
    server._addresses = lambda p: (ADDR,)
    reply = answer(server, KadMessage(type=MessageType.FIND_NODE, key=ALICE_ID.to_bytes()))
    assert reply is not None
    assert peers_untrusted(reply.closer_peers, 100)[0] == PeerAddrs(ALICE_ID, (ADDR,))


def test_find_node_names_ourselves_when_asked_for() -> None:
    """go-libp2p-kad-dht takes a peer into its table only when that peer, asked for itself, names anybody."""
    server = KadServer(peer(0), RoutingTable(peer(0), 0.0), lambda p: (), validators=Validators())
    server.table.add(BOB_ID, [], 0.0)
    reply = answer(server, KadMessage(type=MessageType.FIND_NODE, key=peer(0).to_bytes()), sender=BOB_ID)
    assert reply is not None
    assert [p.id for p in reply.closer_peers] == [peer(0).to_bytes()]


def test_providers_are_stored_for_their_sender_only() -> None:
    server = make_server()
    local = Multiaddr.parse("/ip4/127.0.0.1/tcp/1")
    entry = peer_entry(PeerAddrs(BOB_ID, (local, ADDR)))
    add = KadMessage(type=MessageType.ADD_PROVIDER, key=b"k", provider_peers=(entry,))
    with pytest.raises(RemoteProtocolError, match="sender"):
        answer(server, add, sender=ALICE_ID)
    assert answer(server, add, sender=BOB_ID) is None
    reply = answer(server, KadMessage(type=MessageType.GET_PROVIDERS, key=b"k"), sender=ALICE_ID)
    assert reply is not None
    assert peers_untrusted(reply.provider_peers, 9) == [PeerAddrs(BOB_ID, (ADDR,))], "without the loopback address"
    assert len(reply.closer_peers) == 20
    server.provided.add(b"k")
    reply = answer(server, KadMessage(type=MessageType.GET_PROVIDERS, key=b"k"), sender=ALICE_ID)
    assert reply is not None
    assert [p.peer for p in peers_untrusted(reply.provider_peers, 9)] == [peer(0), BOB_ID]


def test_put_and_get_value() -> None:
    server = make_server()
    key, new = seal_value(ALICE, "n", b"new", sequence=2, expires=int(NOW) + 60)
    _, old = seal_value(ALICE, "n", b"old", sequence=1, expires=int(NOW) + 60)
    for value in (new, old):
        reply = answer(server, KadMessage(type=MessageType.PUT_VALUE, key=key, record=Record(key=key, value=value)))
        assert reply is not None
        assert reply.record == Record(key=key, value=new), "the answer shows what is stored"
    got = answer(server, KadMessage(type=MessageType.GET_VALUE, key=key))
    assert got is not None
    assert got.record == Record(key=key, value=new)
    missing = answer(server, KadMessage(type=MessageType.GET_VALUE, key=b"/lattica/none"))
    assert missing is not None
    assert missing.record is None
    assert len(missing.closer_peers) == 20


@pytest.mark.parametrize(
    "request_",
    [
        KadMessage(type=MessageType.FIND_NODE),
        KadMessage(type=MessageType.GET_PROVIDERS, key=bytes(81)),
        KadMessage(type=MessageType.ADD_PROVIDER, key=bytes(81)),
        KadMessage(type=MessageType.ADD_PROVIDER, key=b"k"),
        KadMessage(type=MessageType.PUT_VALUE, key=b"/pk/x"),
        KadMessage(type=MessageType.PUT_VALUE, key=b"/pk/x", record=Record(key=b"/pk/y", value=b"")),
        KadMessage(type=MessageType.PUT_VALUE, key=b"/pk/x", record=Record(key=b"/pk/x", value=b"")),
    ],
)
def test_bad_requests(request_: KadMessage) -> None:
    with pytest.raises(RemoteProtocolError):
        answer(make_server(), request_)


def test_ping() -> None:
    assert answer(make_server(), KadMessage(type=MessageType.PING)) == KadMessage(type=MessageType.PING)


def test_answers_fit() -> None:
    long = Multiaddr.parse("/dns4/" + "x" * 200 + ".org/tcp/1")
    addrs = tuple(Multiaddr.parse(f"{long}/ws") if n else long for n in range(2))
    entries = tuple(peer_entry(PeerAddrs(peer(n), addrs)) for n in range(64))
    message = KadMessage(type=MessageType.GET_PROVIDERS, key=b"k", closer_peers=entries[:20], provider_peers=entries)
    data = encode_answer(message)
    assert len(data) <= KAD_MAX_MESSAGE_BYTES
    decoded = decode_message_untrusted(data)
    assert len(decoded.closer_peers) == len(decoded.provider_peers) or len(decoded.closer_peers) == 20
    assert len(decoded.provider_peers) >= 10


def test_addresses_mean_something_to_the_other_side() -> None:
    here, lan, net, any_ = (
        Multiaddr.parse(f"/ip4/{ip}/tcp/1") for ip in ("127.0.0.1", "192.168.1.2", "8.8.8.8", "0.0.0.0")
    )
    addrs = [here, lan, net, any_, net]
    assert addresses_for(addrs, net) == (net,)
    assert addresses_for(addrs, lan) == (net, lan)
    assert addresses_for(addrs, here) == (net, lan, here)
    assert addresses_for(addrs, None) == (net, lan, here)
    assert len(addresses_for([Multiaddr.tcp("8.8.8.8", n) for n in range(1, 50)], net)) == 8


# -- messages -----------------------------------------------------------------------------------------------------
def test_entries_that_make_no_sense_are_skipped() -> None:
    good = peer_entry(PeerAddrs(ALICE_ID, (ADDR,)))
    entries = [
        PeerEntry(id=b"junk", addrs=()),
        PeerEntry(),
        PeerEntry(
            id=BOB_ID.to_bytes(),
            addrs=(
                b"\xff\xff",
                b"",
                bytes(5000),
                ADDR.with_peer(ALICE_ID).to_bytes(),
                ADDR.with_peer(BOB_ID).to_bytes(),
                Multiaddr.parse("/ip4/0.0.0.0/tcp/1").to_bytes(),
            ),
        ),
        good,
        good,
    ]
    assert peers_untrusted(entries, 20) == [PeerAddrs(BOB_ID, (ADDR,)), PeerAddrs(ALICE_ID, (ADDR,))]
    assert len(peers_untrusted(entries, 1)) == 1


def test_fields_of_rust_are_tolerated() -> None:
    data = bytes.fromhex("08001a160a016b120176d2290568656c6c6fc8305e2a01615001")
    record = decode_message_untrusted(data).record
    assert record is not None
    assert (record.key, record.value, record.publisher, record.ttl) == (b"k", b"v", b"hello", 94)


def test_types() -> None:
    assert decode_message_untrusted(b"").type == MessageType.PUT_VALUE
    with pytest.raises(RemoteProtocolError, match="type 6"):
        decode_message_untrusted(b"\x08\x06")


# -- admission ----------------------------------------------------------------------------------------------------
def test_admission() -> None:
    admission = Admission(rate=10, burst=5, streams=2)
    assert [admission.request(ALICE_ID, 0.0) for _ in range(6)] == [True] * 5 + [False]
    assert admission.request(BOB_ID, 0.0)
    assert admission.request(ALICE_ID, 0.1)
    assert not admission.request(ALICE_ID, 0.1)
    assert [admission.stream_opened(ALICE_ID, 1.0) for _ in range(3)] == [True, True, False]
    admission.stream_closed(ALICE_ID, 1.0)
    assert admission.stream_opened(ALICE_ID, 1.0)
    for now in (100.0, 101.0):
        admission.stream_closed(ALICE_ID, now)
    assert len(admission) == 0, "forgotten when it costs nothing"
