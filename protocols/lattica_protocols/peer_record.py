"""Peer records: the addresses of a peer, signed by it, so that third parties can pass them on (libp2p RFC 3).

    message PeerRecord { bytes peer_id = 1; uint64 seq = 2; repeated AddressInfo addresses = 3; }
    message AddressInfo { bytes multiaddr = 1; }

It travels in a signed envelope, domain `libp2p-peer-record`, type 03 01. rust-libp2p writes the names that stand in the
RFC's text (`libp2p-routing-state`, `/libp2p/routing-state-record`); we read both. Of two records the higher `seq`
counts; ours is the unix time in seconds when the addresses changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lattica_protocols.envelope import SignedEnvelope
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.keys import PrivateKey
from lattica_protocols.limits import MAX_MULTIADDR_BYTES, MAX_PEER_RECORD_ADDRS
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId
from lattica_protocols.protobuf import Kind, Message, optional, repeated, required

PEER_RECORD_DOMAIN = "libp2p-peer-record"
PEER_RECORD_TYPE = b"\x03\x01"
_RFC_DOMAIN = "libp2p-routing-state"
_RFC_TYPE = b"/libp2p/routing-state-record"


@dataclass(frozen=True, slots=True)
class _AddressInfo(Message):
    multiaddr: bytes | None = optional(1, Kind.BYTES)


@dataclass(frozen=True, slots=True)
class _PeerRecordMessage(Message):
    peer_id: bytes = required(1, Kind.BYTES)
    seq: int | None = optional(2, Kind.UINT)
    addresses: Sequence[_AddressInfo] = repeated(3, _AddressInfo, max_count=MAX_PEER_RECORD_ADDRS)


@dataclass(frozen=True, slots=True)
class PeerRecord:
    """Who, where, and how new."""

    peer_id: PeerId
    seq: int
    addrs: tuple[Multiaddr, ...]

    def seal(self, key: PrivateKey) -> bytes:
        """The signed envelope's bytes. `ValueError` when the record is not about the key's own peer."""
        if not self.peer_id.matches(key.public_key):
            raise ValueError("a peer record is signed by the peer it is about")
        addresses = [_AddressInfo(multiaddr=addr.to_bytes()) for addr in self.addrs]
        message = _PeerRecordMessage(peer_id=self.peer_id.to_bytes(), seq=self.seq, addresses=addresses)
        return SignedEnvelope.seal(key, PEER_RECORD_DOMAIN, PEER_RECORD_TYPE, message.encode()).to_bytes()

    @classmethod
    def open_untrusted(cls, envelope: bytes) -> PeerRecord:
        """Verify an envelope and read the record in it. Addresses we cannot read are left out."""
        if _RFC_TYPE in envelope:
            sealed = SignedEnvelope.open_untrusted(envelope, _RFC_DOMAIN, _RFC_TYPE)
        else:
            sealed = SignedEnvelope.open_untrusted(envelope, PEER_RECORD_DOMAIN, PEER_RECORD_TYPE)
        message = _PeerRecordMessage.decode_untrusted(sealed.payload)
        peer_id = PeerId.from_bytes_untrusted(message.peer_id)
        if peer_id != sealed.signer:
            raise RemoteProtocolError("peer record signed by another peer")
        addrs = decode_addrs_untrusted(info.multiaddr or b"" for info in message.addresses)
        return cls(peer_id, message.seq or 0, addrs)


def decode_addrs_untrusted(addrs: Iterable[bytes]) -> tuple[Multiaddr, ...]:
    """Those addresses of a peer's list that we can read, in its order and without repetitions; never raises.

    Others are skipped, not refused: a newer peer may have kinds of addresses we have not heard of.
    """
    out: dict[Multiaddr, None] = {}
    for data in addrs:
        if not 0 < len(data) <= MAX_MULTIADDR_BYTES:
            continue
        try:
            out[Multiaddr.from_bytes_untrusted(data)] = None
        except RemoteProtocolError:
            continue
    return tuple(out)
