"""Noise as libp2p uses it (`/noise`): `Noise_XX_25519_ChaChaPoly_SHA256` with proof of the peer id.

Every Noise message, in the handshake and after it, travels as

    u16 big-endian length || message            length <= 65535

Handshake, with an empty prologue (`e`, `s`: ephemeral and static X25519 keys of the sender):

    1  initiator -> responder   e                          (32 bytes, no payload of ours)
    2  responder -> initiator   e, ee, s, es   + payload
    3  initiator -> responder   s, se          + payload

The payload of messages 2 and 3 is protobuf:

    1: identity_key   the host key (`PublicKey` protobuf)
    2: identity_sig   signature by it over "noise-libp2p-static-key:" || static X25519 key
    4: extensions     2: stream_muxers, repeated text; 2048: transport_ciphers, repeated text

Both sides name their muxers in order of preference; the first of the *initiator's* that the responder has too
is used and needs no negotiation of its own. When a side sends none (rust-libp2p), multistream-select does it
afterwards.

Beyond libp2p, each side may name in its extensions (field 2048: from 1024 on they are free for experiments) the
ciphers it would rather use after the handshake than the one of the protocol's name. The first of the initiator's
that the responder named too is used by both; peers that know nothing of it skip the field and stay with
ChaChaPoly. The handshake authenticates both lists, so nobody on the way can take one out.

`NoiseHandshake` is the machine. What it ends with, `NoiseSealer` and `NoiseOpener`, is in `noise_transport`.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import nacl.bindings
import nacl.exceptions
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.keys import PrivateKey, PublicKey
from lattica_protocols.limits import (
    MAX_NOISE_CIPHERS,
    MAX_NOISE_HANDSHAKE_BYTES,
    MAX_NOISE_MUXERS,
    MAX_PUBLIC_KEY_BYTES,
    MAX_SIGNATURE_BYTES,
)
from lattica_protocols.noise_transport import KEY_BYTES, TAG_BYTES, Cipher, NoiseOpener, NoiseSealer, hkdf
from lattica_protocols.protobuf import Kind, Message, optional, repeated

PROTOCOL_ID: Final = "/noise"
PROTOCOL_NAME: Final = b"Noise_XX_25519_ChaChaPoly_SHA256"
CIPHERS_FIELD: Final = 2048
"""Of the extensions."""

_SIGNED_PREFIX: Final = b"noise-libp2p-static-key:"
_nonce: Final = struct.Struct("<IQ").pack
_get_length: Final = struct.Struct(">H").unpack_from


@dataclass(frozen=True, slots=True)
class NoiseExtensions(Message):
    """What the two sides tell each other under the handshake's protection."""

    stream_muxers: Sequence[str] = repeated(2, Kind.STRING, max_bytes=256, max_count=MAX_NOISE_MUXERS)
    transport_ciphers: Sequence[str] = repeated(CIPHERS_FIELD, Kind.STRING, max_bytes=64, max_count=MAX_NOISE_CIPHERS)


@dataclass(frozen=True, slots=True)
class NoisePayload(Message):
    """Payload of handshake messages 2 and 3."""

    identity_key: bytes | None = optional(1, Kind.BYTES, max_bytes=MAX_PUBLIC_KEY_BYTES)
    identity_sig: bytes | None = optional(2, Kind.BYTES, max_bytes=MAX_SIGNATURE_BYTES)
    extensions: NoiseExtensions | None = optional(4, NoiseExtensions)


@dataclass(frozen=True, slots=True)
class NoiseIdentity:
    """Our static X25519 key and the proof that it belongs to our host key. Made once, used for every
    handshake."""

    static_private: bytes
    static_public: bytes
    payload: bytes
    ciphers: tuple[Cipher, ...] = ()

    @classmethod
    def create(
        cls, key: PrivateKey, static_private: bytes, muxers: Sequence[str], ciphers: Sequence[Cipher] = ()
    ) -> NoiseIdentity:
        """`static_private`: 32 random bytes. `muxers`: what we speak, best first. `ciphers`: what we would rather
        use after the handshake, best first; empty leaves it at ChaChaPoly with everybody."""
        static_public = nacl.bindings.crypto_scalarmult_base(static_private)
        payload = NoisePayload(
            identity_key=key.public_key.to_protobuf(),
            identity_sig=key.sign(_SIGNED_PREFIX + static_public),
            extensions=NoiseExtensions(tuple(muxers), tuple(ciphers)) if muxers or ciphers else None,
        )
        return cls(static_private, static_public, payload.encode(), tuple(ciphers))


class _SymmetricState:
    """Chaining key, handshake hash and current cipher: `SymmetricState` of the Noise specification, section
    5.2."""

    __slots__ = ("chaining_key", "cipher", "hash", "nonce")

    def __init__(self, prologue: bytes) -> None:
        assert len(PROTOCOL_NAME) == 32
        self.hash = PROTOCOL_NAME
        self.chaining_key = PROTOCOL_NAME
        self.cipher: ChaCha20Poly1305 | None = None
        self.nonce = 0
        self.mix_hash(prologue)

    def mix_hash(self, data: bytes) -> None:
        self.hash = hashlib.sha256(self.hash + data).digest()

    def mix_key(self, shared: bytes) -> None:
        self.chaining_key, key = hkdf(self.chaining_key, shared)
        self.cipher = ChaCha20Poly1305(key)
        self.nonce = 0

    def encrypt_and_hash(self, plaintext: bytes) -> bytes:
        out = plaintext
        if self.cipher is not None:
            out = self.cipher.encrypt(_nonce(0, self.nonce), plaintext, self.hash)
            self.nonce += 1
        self.mix_hash(out)
        return out

    def decrypt_and_hash_untrusted(self, data: bytes) -> bytes:
        out = data
        if self.cipher is not None:
            try:
                out = self.cipher.decrypt(_nonce(0, self.nonce), data, self.hash)
            except InvalidTag:
                raise RemoteProtocolError("Noise handshake message does not decrypt") from None
            self.nonce += 1
        self.mix_hash(data)
        return out

    def split(self) -> tuple[bytes, bytes]:
        return hkdf(self.chaining_key, b"")


class NoiseHandshake:
    """One side of one handshake.

    `receive_untrusted(data)` takes bytes as they come and says how many it used: what follows message 2 or 3
    in the same read belongs to the transport phase. `poll_transmit()` gives what is to be sent. When
    `finished` is true, `remote_key` is the proven host key, `muxer` the agreed muxer or `None`, `cipher` the one of
    the transport phase, and `split()` gives both of its directions.
    """

    __slots__ = (
        "_buffer",
        "_ephemeral",
        "_identity",
        "_initiator",
        "_messages",
        "_muxers",
        "_out",
        "_remote_ephemeral",
        "_state",
        "cipher",
        "finished",
        "muxer",
        "payload",
        "remote_key",
    )

    def __init__(
        self,
        identity: NoiseIdentity,
        *,
        initiator: bool,
        ephemeral_private: bytes,
        muxers: Sequence[str] = (),
        prologue: bytes = b"",
    ) -> None:
        """`ephemeral_private`: 32 fresh random bytes, never used for a second handshake."""
        if len(ephemeral_private) != KEY_BYTES:
            raise LocalProtocolError("the ephemeral key has 32 bytes")
        self._identity = identity
        self._initiator = initiator
        self._ephemeral = ephemeral_private
        self._muxers = tuple(muxers)
        self._state = _SymmetricState(prologue)
        self._buffer = bytearray()
        self._out = bytearray()
        self._messages = 0
        self._remote_ephemeral = b""
        self.finished = False
        self.remote_key: PublicKey | None = None
        self.payload: NoisePayload | None = None
        self.muxer: str | None = None
        self.cipher = Cipher.CHACHAPOLY
        if initiator:
            self._write_message()

    def poll_transmit(self) -> bytes:
        """Framed bytes to send now; empty when it is the peer's turn."""
        out = bytes(self._out)
        self._out.clear()
        return out

    def receive_untrusted(self, data: bytes | bytearray | memoryview) -> int:
        """Take bytes up to the end of the handshake. Returns how many of `data` were taken."""
        taken = 0
        while not self.finished and taken < len(data):
            need = 2 - len(self._buffer)
            if need <= 0:
                (length,) = _get_length(self._buffer)
                if length > MAX_NOISE_HANDSHAKE_BYTES:
                    raise RemoteProtocolError(f"Noise handshake message of {length} bytes")
                need = 2 + length - len(self._buffer)
            piece = data[taken : taken + need]
            self._buffer += piece
            taken += len(piece)
            if len(self._buffer) >= 2 and len(self._buffer) == 2 + _get_length(self._buffer)[0]:
                message = bytes(self._buffer[2:])
                self._buffer.clear()
                self._read_message_untrusted(message)
        return taken

    def split(self) -> tuple[NoiseSealer, NoiseOpener]:
        """The ciphers for what we send and for what we receive."""
        if not self.finished:
            raise LocalProtocolError("the Noise handshake is not finished")
        first, second = self._state.split()
        if self._initiator:
            return NoiseSealer(first, self.cipher), NoiseOpener(second, self.cipher)
        return NoiseSealer(second, self.cipher), NoiseOpener(first, self.cipher)

    # -- the three messages ----------------------------------------------------------------------------------
    def _write_message(self) -> None:
        state, identity = self._state, self._identity
        out = bytearray()
        if self._messages < 2:
            public = nacl.bindings.crypto_scalarmult_base(self._ephemeral)
            state.mix_hash(public)
            out += public
        if self._messages == 1:
            state.mix_key(_diffie_hellman_untrusted(self._ephemeral, self._remote_ephemeral))
        payload = b""
        if self._messages > 0:
            out += state.encrypt_and_hash(identity.static_public)
            state.mix_key(_diffie_hellman_untrusted(identity.static_private, self._remote_ephemeral))
            payload = identity.payload
        out += state.encrypt_and_hash(payload)
        self._messages += 1
        self._out += len(out).to_bytes(2, "big") + out
        self.finished = self._messages == 3

    def _read_message_untrusted(self, message: bytes) -> None:
        state, number = self._state, self._messages
        if (number % 2 == 0) == self._initiator:
            raise RemoteProtocolError("Noise handshake message out of turn")
        offset = 0
        if number < 2:
            self._remote_ephemeral = message[:KEY_BYTES]
            if len(self._remote_ephemeral) < KEY_BYTES:
                raise RemoteProtocolError("Noise handshake message is too short")
            state.mix_hash(self._remote_ephemeral)
            offset = KEY_BYTES
        if number == 1:
            state.mix_key(_diffie_hellman_untrusted(self._ephemeral, self._remote_ephemeral))
        static = b""
        if number > 0:
            end = offset + KEY_BYTES + TAG_BYTES
            static = state.decrypt_and_hash_untrusted(message[offset:end])
            if len(static) != KEY_BYTES:
                raise RemoteProtocolError("Noise handshake message is too short")
            state.mix_key(_diffie_hellman_untrusted(self._ephemeral, static))
            offset = end
        payload = state.decrypt_and_hash_untrusted(message[offset:])
        self._messages += 1
        if number > 0:
            self._verify_untrusted(payload, static)
        if self._messages < 3:
            self._write_message()
        else:
            self.finished = True

    def _verify_untrusted(self, data: bytes, static: bytes) -> None:
        payload = NoisePayload.decode_untrusted(data)
        if payload.identity_key is None or payload.identity_sig is None:
            raise RemoteProtocolError("Noise handshake without a host key")
        key = PublicKey.from_protobuf_untrusted(payload.identity_key)
        if not key.verify(_SIGNED_PREFIX + static, payload.identity_sig):
            raise RemoteProtocolError("Noise handshake: the host key did not sign the static key")
        self.remote_key = key
        self.payload = payload
        extensions = payload.extensions or NoiseExtensions()
        self.muxer = self._first_common(self._muxers, extensions.stream_muxers)
        self.cipher = Cipher(self._first_common(self._identity.ciphers, extensions.transport_ciphers) or self.cipher)

    def _first_common(self, ours: Sequence[str], theirs: Sequence[str]) -> str | None:
        preferred, other = (ours, theirs) if self._initiator else (theirs, ours)
        return next((name for name in preferred if name in other), None)


def _diffie_hellman_untrusted(private: bytes, public: bytes) -> bytes:
    """X25519. A public key of small order gives zeros whatever our key is; libsodium refuses it, as we have
    to."""
    try:
        return nacl.bindings.crypto_scalarmult(private, public)
    except nacl.exceptions.CryptoError:
        raise RemoteProtocolError("Noise handshake with a key of small order") from None
