"""Identify: what a peer says about itself (`/ipfs/id/1.0.0`, and `/ipfs/id/push/1.0.0` when that changed).

    message Identify {
      bytes public_key = 1;              the key's protobuf
      repeated bytes listen_addrs = 2;   binary multiaddrs
      repeated string protocols = 3;
      bytes observed_addr = 4;           where the sender sees the receiver
      string protocol_version = 5;
      string agent_version = 6;
      bytes signed_peer_record = 8;      an envelope, see peer_record.py; in go and js, not in the specification's text
    }

The responder writes one message as `uvarint(length) || protobuf` and closes; go splits a large one into up to ten that
the receiver merges. In a push, a field that is missing is unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.keys import PublicKey
from lattica_protocols.limits import (
    IDENTIFY_PUSH_BURST,
    IDENTIFY_PUSHES_PER_SECOND,
    MAX_ENVELOPE_BYTES,
    MAX_IDENTIFY_ADDRS,
    MAX_IDENTIFY_MESSAGE_BYTES,
    MAX_IDENTIFY_MESSAGES,
    MAX_IDENTIFY_PROTOCOLS,
    MAX_IDENTIFY_SENT_BYTES,
    MAX_IDENTIFY_TEXT_BYTES,
    MAX_PUBLIC_KEY_BYTES,
)
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_record import PeerRecord, decode_addrs_untrusted
from lattica_protocols.protobuf import Kind, Message, optional, repeated


@dataclass(slots=True)
class PushBudget:
    """How many pushes are read from one connection."""

    tokens: float = float(IDENTIFY_PUSH_BURST)
    updated: float | None = None

    def take(self, now: float) -> bool:
        """Whether one more is read now; one that is not costs nothing."""
        if self.updated is not None:
            refill = (now - self.updated) * IDENTIFY_PUSHES_PER_SECOND
            self.tokens = min(float(IDENTIFY_PUSH_BURST), self.tokens + refill)
        self.updated = now
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


@dataclass(frozen=True, slots=True)
class _IdentifyMessage(Message):
    public_key: bytes | None = optional(1, Kind.BYTES, max_bytes=MAX_PUBLIC_KEY_BYTES)
    listen_addrs: tuple[bytes, ...] = repeated(2, Kind.BYTES, max_count=MAX_IDENTIFY_ADDRS)
    protocols: tuple[str, ...] = repeated(
        3, Kind.STRING, max_bytes=MAX_IDENTIFY_TEXT_BYTES, max_count=MAX_IDENTIFY_PROTOCOLS
    )
    observed_addr: bytes | None = optional(4, Kind.BYTES)
    protocol_version: str | None = optional(5, Kind.STRING, max_bytes=MAX_IDENTIFY_TEXT_BYTES)
    agent_version: str | None = optional(6, Kind.STRING, max_bytes=MAX_IDENTIFY_TEXT_BYTES)
    signed_peer_record: bytes | None = optional(8, Kind.BYTES, max_bytes=MAX_ENVELOPE_BYTES)


@dataclass(frozen=True, slots=True)
class Identify:
    """One peer's description of itself. `None` and empty mean that it did not say."""

    public_key: PublicKey | None = None
    listen_addrs: tuple[Multiaddr, ...] = ()
    protocols: tuple[str, ...] = ()
    observed_addr: Multiaddr | None = None
    """Where the sender of the message sees its receiver."""
    protocol_version: str | None = None
    agent_version: str | None = None
    signed_peer_record: bytes | None = None
    """The envelope as it came. `peer_record_untrusted` verifies it."""

    def encode(self) -> bytes:
        """The protobuf, without the length prefix."""
        return _IdentifyMessage(
            public_key=self.public_key.to_protobuf() if self.public_key else None,
            listen_addrs=tuple(addr.to_bytes() for addr in self.listen_addrs),
            protocols=self.protocols,
            observed_addr=self.observed_addr.to_bytes() if self.observed_addr else None,
            protocol_version=self.protocol_version,
            agent_version=self.agent_version,
            signed_peer_record=self.signed_peer_record,
        ).encode()

    def encode_messages(self) -> list[bytes]:
        """What to send: one message, or two when that is over 4 KiB, which Rust reads no more of.

        The first has all but the signed record, and no more addresses than fit: those of the local network are left out
        before others. Rust and JS read no second one; in there the record has all addresses.
        """
        whole = self.encode()
        if len(whole) <= MAX_IDENTIFY_SENT_BYTES:
            return [whole]
        kept = sorted(self.listen_addrs, key=lambda a: 2 * a.is_loopback + a.is_private)[:MAX_IDENTIFY_ADDRS]
        first = replace(self, signed_peer_record=None, listen_addrs=tuple(kept))
        while len(encoded := first.encode()) > MAX_IDENTIFY_SENT_BYTES and kept:
            del kept[-max(1, len(kept) // 16) :]
            first = replace(first, listen_addrs=tuple(kept))
        second = Identify(signed_peer_record=self.signed_peer_record).encode()
        return [encoded, second] if 0 < len(second) <= MAX_IDENTIFY_MESSAGE_BYTES else [encoded]

    @classmethod
    def decode_untrusted(cls, messages: bytes | Iterable[bytes]) -> Identify:
        """Read one message, or merge the several that a peer sent.

        Lists are joined, of single values the last counts. Addresses that we cannot read are left out; text is
        stripped of what cannot be printed, for it ends up in logs and on terminals.
        """
        parts = [messages] if isinstance(messages, bytes | bytearray | memoryview) else list(messages)
        if len(parts) > MAX_IDENTIFY_MESSAGES:
            raise RemoteProtocolError(f"identify in over {MAX_IDENTIFY_MESSAGES} messages")
        for part in parts:
            if len(part) > MAX_IDENTIFY_MESSAGE_BYTES:
                raise RemoteProtocolError(f"identify message of {len(part)} bytes is over the limit")
            if len(parts) > 1:
                _IdentifyMessage.decode_untrusted(part)
        # Joining protobuf messages, each of them whole, is what the format defines as merging them.
        message = _IdentifyMessage.decode_untrusted(b"".join(parts))
        observed = decode_addrs_untrusted([message.observed_addr or b""])
        return cls(
            public_key=PublicKey.from_protobuf_untrusted(message.public_key) if message.public_key else None,
            listen_addrs=decode_addrs_untrusted(message.listen_addrs),
            protocols=tuple(dict.fromkeys(message.protocols)),
            observed_addr=observed[0] if observed else None,
            protocol_version=_printable(message.protocol_version),
            agent_version=_printable(message.agent_version),
            signed_peer_record=message.signed_peer_record,
        )

    def peer_record_untrusted(self) -> PeerRecord | None:
        """The signed record, verified; None when there is none."""
        return PeerRecord.open_untrusted(self.signed_peer_record) if self.signed_peer_record else None


def _printable(text: str | None) -> str | None:
    return None if text is None else "".join(character for character in text if character.isprintable())
