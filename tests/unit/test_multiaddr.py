"""Multiaddrs, by the vectors of other implementations."""

import copy

import pytest

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.keys import PrivateKey
from lattica_protocols.multiaddr import PART_TABLE, Multiaddr
from lattica_protocols.peer_id import PeerId

PEER = PeerId.from_public_key(PrivateKey.generate(b"1" * 32).public_key)
RELAY = PeerId.from_public_key(PrivateKey.generate(b"2" * 32).public_key)
QM = "QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC"

# The binary forms are from the tests of go-multiaddr and js-multiaddr.
VECTORS = [
    ("/ip4/127.0.0.1/udp/1234", "047f000001910204d2"),
    ("/ip4/127.0.0.1/tcp/4321", "047f0000010610e1"),
    ("/ip4/127.0.0.1/udp/1234/ip4/127.0.0.1/tcp/4321", "047f000001910204d2047f0000010610e1"),
    ("/ip6/2001:8a0:7ac5:4201:3ac9:86ff:fe31:7095/tcp/8000", "29200108a07ac542013ac986fffe317095061f40"),
    (f"/p2p/{QM}", "a503221220d52ebb89d85b02a284948203a62ff28389c57c9f42beec4ec20db76a68911c0b"),
    (
        "/ip4/127.0.0.1/udp/1234/quic-v1/webtransport/certhash/b2uaraocy6yrdblb4sfptaddgimjmmpy",
        "047f000001910204d2cd03d103d20313d501103858f62230ac3c915f300c664312c63f",
    ),
    ("/dns4/ab.c/tcp/443/wss", "360461622e630601bbde03"),
    ("/unix/a/b/c", "9003062f612f622f63"),
    ("/ip6zone/x/ip6/fe80::1", "2a017829fe800000000000000000000000000001"),
]


@pytest.mark.parametrize(("text", "binary"), VECTORS)
def test_vectors(text: str, binary: str) -> None:
    addr = Multiaddr.parse(text)
    assert addr.to_bytes().hex() == binary
    assert Multiaddr.from_bytes_untrusted(bytes.fromhex(binary)) == addr
    assert Multiaddr.parse(str(addr)) == addr


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        (f"/ip4/127.0.0.1/ipfs/{QM}", f"/ip4/127.0.0.1/p2p/{QM}"),
        ("/ip4/1.2.3.4/tcp/1/", "/ip4/1.2.3.4/tcp/1"),
        ("/ip4/1.2.3.4/tcp/0001", "/ip4/1.2.3.4/tcp/1"),
        ("/ip6/0:0:0::1/tcp/1", "/ip6/::1/tcp/1"),
        ("/ip6/::ffff:1.2.3.4/tcp/1", "/ip6/::ffff:1.2.3.4/tcp/1"),
        (f"/p2p/{PEER.to_cid_text()}", f"/p2p/{PEER}"),
    ],
)
def test_normal_form(text: str, normal: str) -> None:
    assert str(Multiaddr.parse(text)) == normal


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "start with a slash"),
        ("/", "empty"),
        ("ip4/1.2.3.4", "start with a slash"),
        ("/ip4", "/ip4 needs a value"),
        ("/ip4/300.1.1.1/tcp/1", "300"),
        ("/ip4/127.0.0.1/tcp", "/tcp needs a value"),
        ("/ip4/127.0.0.1/tcp/65536", "65536"),
        ("/ip4/127.0.0.1/tcp/-1", "-1"),
        ("/ip4/127.0.0.1/tcp/¹", "not a number"),
        ("/ip4/127.0.0.1/udp/port", "port"),
        ("/ip4/127.0.0.1/p2p", "/p2p needs a value"),
        ("/ip4/127.0.0.1/p2p/tcp", "not a peer id"),
        ("/ip4/127.0.0.1/quic/1234", "unknown protocol '1234'"),
        ("/ip4/127.0.0.1//tcp/1", "unknown protocol ''"),
        ("/ip6/fe80::1%eth0/tcp/1", "ip6zone"),
        ("/certhash/b2uaraocy6yrdblb4sfptaddgimjmmp", "cut off|base 32"),
        ("/dns/a b/tcp/1", "not a name"),
        ("/unix", "needs a value"),
        ("/nothing/value", "unknown protocol 'nothing'"),
        ("/tcp/1" * 33, "32 parts"),
        ("/" + "x" * 5000, "characters"),
    ],
)
def test_refused_text(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        Multiaddr.parse(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("binary", "reason"),
    [
        ("", "empty"),
        ("047f0000", "cut off"),
        ("04", "cut off"),
        ("0600", "cut off"),
        ("ff01", "unknown protocol 255"),
        ("8400" + "7f000001", "not minimal"),
        ("3600", "not a name"),
        ("360161" + "3602ff00", "malformed address"),
        ("36032f2f61", "not a name"),
        ("a50300", "cut off"),
        ("a50303121100", "digest"),
        ("9003022f61" + "0600ff", "follows /unix"),
        ("900301" + "61", "absolute path"),
        ("0601bb" * 40, "parts"),
    ],
)
def test_refused_binary(binary: str, reason: str) -> None:
    with pytest.raises(RemoteProtocolError, match=reason):
        Multiaddr.from_bytes_untrusted(bytes.fromhex(binary))


def test_too_long() -> None:
    with pytest.raises(RemoteProtocolError, match="over 1024"):
        Multiaddr.from_bytes_untrusted(bytes(1025))
    addr = Multiaddr.parse("/dns/" + "a" * 1000)
    with pytest.raises(ValueError, match="over 1024"):
        addr.encapsulate(addr)


def test_looking_into_an_address() -> None:
    addr = Multiaddr.parse(f"/ip4/1.2.3.4/udp/9/quic-v1/p2p/{PEER}")
    assert addr.protocols() == (("ip4", "1.2.3.4"), ("udp", "9"), ("quic-v1", None), ("p2p", str(PEER)))
    assert addr.names() == ("ip4", "udp", "quic-v1", "p2p")
    assert addr.value("udp") == "9"
    assert addr.value("quic-v1") is None
    assert addr.has("quic-v1")
    assert addr.value("tcp") is None
    assert addr.peer_id() == PEER
    assert addr.without_peer() == Multiaddr.quic("1.2.3.4", 9)
    assert addr.without_peer().peer_id() is None
    assert addr.without_peer().without_peer() == addr.without_peer()
    assert addr.with_peer(RELAY).peer_id() == RELAY
    assert not addr.is_circuit
    assert addr.host_port() == ("udp", "1.2.3.4", 9)


def test_circuit_addresses() -> None:
    relay = Multiaddr.tcp("1.2.3.4", 9).with_peer(RELAY)
    circuit = relay.encapsulate("/p2p-circuit")
    target = circuit.with_peer(PEER)
    assert str(target) == f"/ip4/1.2.3.4/tcp/9/p2p/{RELAY}/p2p-circuit/p2p/{PEER}"
    assert circuit.is_circuit
    assert circuit.peer_id() is None
    assert circuit.relay_id() == target.relay_id() == RELAY
    assert target.peer_id() == PEER
    assert target.without_peer() == circuit
    assert circuit.before_circuit() == target.before_circuit() == relay
    assert relay.before_circuit() is None
    assert relay.relay_id() is None
    assert Multiaddr.parse("/p2p-circuit").relay_id() is None


def test_making_addresses() -> None:
    assert str(Multiaddr.tcp("1.2.3.4", 5)) == "/ip4/1.2.3.4/tcp/5"
    assert str(Multiaddr.quic("::1", 5)) == "/ip6/::1/udp/5/quic-v1"
    assert str(Multiaddr.tcp("example.org", 5)) == "/dns/example.org/tcp/5"
    for host, port in [("", 1), ("a/b", 1), ("1.2.3.4", 65536), ("1.2.3.4", -1)]:
        with pytest.raises(ValueError):
            Multiaddr.tcp(host, port)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/ip6zone/eth0/ip6/fe80::1/tcp/5", ("tcp", "fe80::1%eth0", 5)),
        ("/dns6/a.b/tcp/5/wss", ("tcp", "a.b", 5)),
        ("/ip4/1.2.3.4", None),
        ("/ip4/1.2.3.4/p2p-circuit", None),
        ("/memory/5", None),
        ("/tcp/5/ip4/1.2.3.4", None),
        ("/ip6zone/a", None),
    ],
)
def test_host_port(text: str, expected: object) -> None:
    assert Multiaddr.parse(text).host_port() == expected


@pytest.mark.parametrize(
    ("host", "kinds"),
    [
        ("/ip4/8.8.8.8", {"global"}),
        ("/ip6/2606:4700::1", {"global"}),
        ("/dns/example.org", {"global"}),
        ("/dnsaddr/example.org", {"global"}),
        ("/dns4/localhost", {"loopback"}),
        ("/dns4/x.LOCALHOST.", {"loopback"}),
        ("/dns4/notlocalhost", {"global"}),
        ("/ip4/127.1.2.3", {"loopback"}),
        ("/ip6/::1", {"loopback"}),
        ("/ip4/10.1.2.3", {"private"}),
        ("/ip4/192.168.1.1", {"private"}),
        ("/ip4/172.31.0.1", {"private"}),
        ("/ip4/100.64.0.1", {"private"}),
        ("/ip4/169.254.1.1", {"private"}),
        ("/ip6/fe80::1", {"private"}),
        ("/ip6/fd00::1", {"private"}),
        ("/ip6/::ffff:10.0.0.1", {"private"}),
        ("/ip6/::ffff:8.8.8.8", {"global"}),
        ("/ip6/64:ff9b::808:808", {"global"}),
        ("/ip4/0.0.0.0", {"unspecified"}),
        ("/ip6/::", {"unspecified"}),
        ("/ip4/224.0.0.1", set()),
        ("/ip6/ff02::1", set()),
        ("/memory/1", set()),
        ("/unix/tmp/socket", set()),
    ],
)
def test_reach(host: str, kinds: set[str]) -> None:
    addr = Multiaddr.parse(host)
    assert {kind for kind in ("loopback", "private", "global", "unspecified") if getattr(addr, f"is_{kind}")} == kinds


def test_being_a_value() -> None:
    first, second = Multiaddr.parse("/ip4/1.2.3.4/tcp/1"), Multiaddr.parse("/ip4/1.2.3.4/tcp/2")
    assert len({first, Multiaddr.tcp("1.2.3.4", 1), second}) == 2
    assert sorted([second, first]) == [first, second]
    assert repr(first) == "Multiaddr('/ip4/1.2.3.4/tcp/1')"
    assert first != "/ip4/1.2.3.4/tcp/1"
    assert copy.deepcopy([first, PEER]) == [first, PEER]
    with pytest.raises(AttributeError):
        first._text = ""


def test_table_is_consistent() -> None:
    assert len({part.code for part in PART_TABLE}) == len({part.name for part in PART_TABLE}) == len(PART_TABLE)
    assert all((part.size == 0) == (part.from_text is None) == (part.to_text is None) for part in PART_TABLE)
