"""What a peer says about itself: in one message or several, and what is left out or refused of it."""

from dataclasses import replace

import pytest

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.identify import Identify
from lattica_protocols.keys import PrivateKey
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId
from lattica_protocols.peer_record import PeerRecord

KEY = PrivateKey.generate(b"1" * 32)
ADDR = Multiaddr.parse("/ip4/1.2.3.4/tcp/5")
OTHER_ADDR = Multiaddr.parse("/ip4/1.2.3.4/udp/5/quic-v1")
FULL = Identify(
    public_key=KEY.public_key,
    listen_addrs=(ADDR, OTHER_ADDR),
    protocols=("/a", "/b"),
    observed_addr=Multiaddr.parse("/ip4/8.8.8.8/tcp/9"),
    protocol_version="ipfs/0.1.0",
    agent_version="lattica/1",
    signed_peer_record=PeerRecord(PeerId.from_public_key(KEY.public_key), 3, (ADDR,)).seal(KEY),
)


def test_round_trip_and_layout() -> None:
    assert Identify.decode_untrusted(FULL.encode()) == FULL
    record = FULL.peer_record_untrusted()
    assert record is not None
    assert record.addrs == (ADDR,)
    small = Identify(protocols=("/a",), agent_version="x")
    assert small.encode().hex() == "1a022f61" "320178"  # fmt: skip
    assert small.peer_record_untrusted() is None


def test_nothing_said() -> None:
    assert Identify.decode_untrusted(b"") == Identify()


def test_several_messages_are_merged() -> None:
    first = Identify(listen_addrs=(ADDR,), protocols=("/a",), agent_version="old").encode()
    second = Identify(listen_addrs=(OTHER_ADDR, ADDR), protocols=("/b", "/a"), agent_version="new").encode()
    merged = Identify.decode_untrusted([first, second])
    assert merged == Identify(listen_addrs=(ADDR, OTHER_ADDR), protocols=("/a", "/b"), agent_version="new")


def test_a_message_that_is_cut_off_does_not_eat_the_next() -> None:
    with pytest.raises(RemoteProtocolError, match="cut off"):
        Identify.decode_untrusted([b"\x1a\x04/a", b"\x1a\x02/b"])


def test_more_than_rust_reads_goes_into_a_second_message() -> None:
    public = [Multiaddr.parse(f"/ip6/2606:4700::{i:x}/tcp/{4000 + i}") for i in range(60)]
    local = [Multiaddr.parse(f"/ip6/fd00::{i:x}/udp/{4000 + i}/quic-v1") for i in range(200)]
    record = PeerRecord(PeerId.from_public_key(KEY.public_key), 3, tuple(public[:40])).seal(KEY)
    large = replace(FULL, listen_addrs=(*local, *public), signed_peer_record=record)
    first, second = large.encode_messages()
    assert len(first) <= 4096
    alone = Identify.decode_untrusted(first)
    assert set(public) < set(alone.listen_addrs), "those of the local network are left out first"
    assert len(first) > 3800, "and no more of them than needed"
    assert (alone.protocols, alone.observed_addr) == (FULL.protocols, FULL.observed_addr)
    merged = Identify.decode_untrusted([first, second]).peer_record_untrusted()
    assert merged is not None
    assert merged.addrs == tuple(public[:40])
    assert FULL.encode_messages() == [FULL.encode()]
    assert len(replace(large, signed_peer_record=None).encode_messages()) == 1


def test_unreadable_addresses_and_control_characters_are_left_out() -> None:
    unknown = b"\x12\x03\xff\x01x" + b"\x22\x03\xff\x01x" + b"\x32\x05ab\x1b[c"
    assert Identify.decode_untrusted(unknown) == Identify(agent_version="ab[c")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (bytes(8193), "over the limit"),
        ([b""] * 11, "over 10 messages"),
        (b"\x1a\x00" * 513, "over 512 values"),
        (b"\x12\x00" * 257, "over 256 values"),
        (b"\x32\x81\x02" + b"a" * 257, "over 256"),
        (b"\x0a\x02\x08\x01", "field data"),
        (b"\x1a\x01\xff", "UTF-8"),
    ],
)
def test_refused(messages: bytes | list[bytes], reason: str) -> None:
    with pytest.raises(RemoteProtocolError, match=reason):
        Identify.decode_untrusted(messages)
