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
    4: extensions     2: stream_muxers, repeated text

Both sides name their muxers in order of preference; the first of the *initiator's* that the responder has too
is used and needs no negotiation of its own. When a side sends none (rust-libp2p), multistream-select does it
afterwards.

After the handshake a message is `ciphertext || 16-byte tag`, so it carries up to 65519 bytes of plaintext.
The nonce is 4 zero bytes and a little-endian u64 that counts messages from 0; each direction has its own key
and counter.

`NoiseHandshake` is the machine for the first part, `NoiseSealer` and `NoiseOpener` are the second. They work
in place: a plaintext that stands in the send buffer becomes ciphertext there, and back in the receive buffer,
so no byte is copied for the sake of encryption. OpenSSL's ChaCha20-Poly1305 allows input and output to be the
very same memory.
"""

from __future__ import annotations

import hashlib
import hmac
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
    MAX_NOISE_HANDSHAKE_BYTES,
    MAX_NOISE_MUXERS,
    MAX_PUBLIC_KEY_BYTES,
    MAX_SIGNATURE_BYTES,
)
from lattica_protocols.protobuf import Kind, Message, optional, repeated

PROTOCOL_ID: Final = "/noise"
PROTOCOL_NAME: Final = b"Noise_XX_25519_ChaChaPoly_SHA256"
MAX_MESSAGE: Final = 65535
"""Bytes of one Noise message: the length before it is a u16."""
TAG_BYTES: Final = 16
MAX_PLAINTEXT: Final = MAX_MESSAGE - TAG_BYTES
FRAME_OVERHEAD: Final = 2 + TAG_BYTES

_KEY_BYTES: Final = 32
_SIGNED_PREFIX: Final = b"noise-libp2p-static-key:"
_MAX_NONCE: Final = 2**64 - 2
"""The Noise specification reserves 2**64 - 1 (for rekeying)."""
_nonce = struct.Struct("<IQ").pack
_put_length = struct.Struct(">H").pack_into
_get_length = struct.Struct(">H").unpack_from


class NotAuthentic(RemoteProtocolError):
    """After the handshake: not what the peer sent, but altered, repeated or cut on its way."""


@dataclass(frozen=True, slots=True)
class NoiseExtensions(Message):
    """What the two sides tell each other under the handshake's protection."""

    stream_muxers: Sequence[str] = repeated(2, Kind.STRING, max_bytes=256, max_count=MAX_NOISE_MUXERS)


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

    @classmethod
    def create(cls, key: PrivateKey, static_private: bytes, muxers: Sequence[str]) -> NoiseIdentity:
        """`static_private`: 32 random bytes. `muxers`: what we speak, best first; empty sends no
        extension."""
        static_public = nacl.bindings.crypto_scalarmult_base(static_private)
        payload = NoisePayload(
            identity_key=key.public_key.to_protobuf(),
            identity_sig=key.sign(_SIGNED_PREFIX + static_public),
            extensions=NoiseExtensions(stream_muxers=tuple(muxers)) if muxers else None,
        )
        return cls(static_private, static_public, payload.encode())


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
        self.chaining_key, key = _hkdf(self.chaining_key, shared)
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
        return _hkdf(self.chaining_key, b"")


class NoiseHandshake:
    """One side of one handshake.

    `receive_untrusted(data)` takes bytes as they come and says how many it used: what follows message 2 or 3
    in the same read belongs to the transport phase. `poll_transmit()` gives what is to be sent. When
    `finished` is true, `remote_key` is the proven host key, `muxer` the agreed muxer or `None`, and `split()`
    gives the two ciphers.
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
        if len(ephemeral_private) != _KEY_BYTES:
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
            return NoiseSealer(first), NoiseOpener(second)
        return NoiseSealer(second), NoiseOpener(first)

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
            self._remote_ephemeral = message[:_KEY_BYTES]
            if len(self._remote_ephemeral) < _KEY_BYTES:
                raise RemoteProtocolError("Noise handshake message is too short")
            state.mix_hash(self._remote_ephemeral)
            offset = _KEY_BYTES
        if number == 1:
            state.mix_key(_diffie_hellman_untrusted(self._ephemeral, self._remote_ephemeral))
        static = b""
        if number > 0:
            end = offset + _KEY_BYTES + TAG_BYTES
            static = state.decrypt_and_hash_untrusted(message[offset:end])
            if len(static) != _KEY_BYTES:
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
        theirs = payload.extensions.stream_muxers if payload.extensions is not None else ()
        preferred, other = (self._muxers, theirs) if self._initiator else (theirs, self._muxers)
        self.muxer = next((muxer for muxer in preferred if muxer in other), None)


class NoiseSealer:
    """Encrypts what we send."""

    __slots__ = ("_encrypt_into", "_nonce")

    def __init__(self, key: bytes) -> None:
        self._encrypt_into = ChaCha20Poly1305(key).encrypt_into
        self._nonce = 0

    def seal(self, buffer: memoryview, start: int, length: int) -> int:
        """Turn `length` bytes of plaintext at `start + 2` into a frame from `start` to the returned end, in
        place.

        The buffer needs 16 more bytes behind the plaintext. `LocalProtocolError` when the nonces are used up.
        """
        nonce = self._nonce
        if nonce > _MAX_NONCE:
            raise LocalProtocolError("all Noise nonces are used: the connection has to be made anew")
        _put_length(buffer, start, length + TAG_BYTES)
        start += 2
        end = start + length
        self._encrypt_into(_nonce(0, nonce), buffer[start:end], None, buffer[start : end + TAG_BYTES])
        self._nonce = nonce + 1
        return end + TAG_BYTES


class NoiseOpener:
    """Decrypts what we receive."""

    __slots__ = ("_decrypt_into", "_nonce")

    def __init__(self, key: bytes) -> None:
        self._decrypt_into = ChaCha20Poly1305(key).decrypt_into
        self._nonce = 0

    def open_untrusted(self, message: memoryview) -> memoryview:
        """Decrypt one message (without its length) in place. The result is the front part of `message`."""
        nonce = self._nonce
        plaintext = message[:-TAG_BYTES]
        if len(message) < TAG_BYTES:
            raise NotAuthentic(f"Noise message of {len(message)} bytes")
        if nonce > _MAX_NONCE:
            raise RemoteProtocolError("all Noise nonces are used")
        try:
            self._decrypt_into(_nonce(0, nonce), message, None, plaintext)
        except InvalidTag:
            raise NotAuthentic("Noise message does not decrypt") from None
        self._nonce = nonce + 1
        return plaintext


def _diffie_hellman_untrusted(private: bytes, public: bytes) -> bytes:
    """X25519. A public key of small order gives zeros whatever our key is; libsodium refuses it, as we have
    to."""
    try:
        return nacl.bindings.crypto_scalarmult(private, public)
    except nacl.exceptions.CryptoError:
        raise RemoteProtocolError("Noise handshake with a key of small order") from None


def _hkdf(chaining_key: bytes, data: bytes) -> tuple[bytes, bytes]:
    """HKDF of the Noise specification, section 4.3, with two outputs."""
    secret = hmac.digest(chaining_key, data, "sha256")
    first = hmac.digest(secret, b"\x01", "sha256")
    return first, hmac.digest(secret, first + b"\x02", "sha256")
