"""Reservation vouchers: a relay's signature under "this peer has a reservation here until then".

    signed envelope, domain `libp2p-relay-rsvp`, payload type 03 02
    Voucher { bytes relay = 1; bytes peer = 2; uint64 expiration = 3 (unix seconds); }

Nothing asks for them yet in any implementation; a relay of ours makes them as the specification wants, and a voucher
that a relay gives us has to be right if there is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lattica_protocols.envelope import SignedEnvelope
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.keys import PrivateKey
from lattica_protocols.peer_id import PeerId
from lattica_protocols.protobuf import Kind, Message, required

VOUCHER_DOMAIN: Final = "libp2p-relay-rsvp"
VOUCHER_TYPE: Final = b"\x03\x02"


@dataclass(frozen=True, slots=True)
class _VoucherMessage(Message):
    relay: bytes = required(1, Kind.BYTES, max_bytes=128)
    peer: bytes = required(2, Kind.BYTES, max_bytes=128)
    expiration: int = required(3, Kind.UINT)


@dataclass(frozen=True, slots=True)
class Voucher:
    """`relay` takes circuits to `peer` until then."""

    relay: PeerId
    peer: PeerId
    expiration: int
    """Unix seconds."""

    def seal(self, key: PrivateKey) -> bytes:
        """The signed envelope's bytes. `ValueError` when the key is not the relay's."""
        if not self.relay.matches(key.public_key):
            raise ValueError("a voucher is signed by the relay")
        message = _VoucherMessage(
            relay=self.relay.to_bytes(), peer=self.peer.to_bytes(), expiration=self.expiration
        ).encode()
        return SignedEnvelope.seal(key, VOUCHER_DOMAIN, VOUCHER_TYPE, message).to_bytes()

    @classmethod
    def open_untrusted(cls, envelope: bytes) -> Voucher:
        """Verify and read. Signed by somebody else than the relay it names: refused."""
        sealed = SignedEnvelope.open_untrusted(envelope, VOUCHER_DOMAIN, VOUCHER_TYPE)
        message = _VoucherMessage.decode_untrusted(sealed.payload)
        relay = PeerId.from_bytes_untrusted(message.relay)
        if relay != sealed.signer:
            raise RemoteProtocolError("relay voucher signed by another peer")
        return cls(relay, PeerId.from_bytes_untrusted(message.peer), message.expiration)
