"""What follows a Noise handshake: messages of at most 65519 bytes of plaintext, sealed and opened in place.

    u16 big-endian length || ciphertext || 16-byte tag          length = ciphertext + tag <= 65535

Each direction has its own key and counts its messages from 0; the counter is the nonce. Two ciphers:

* `ChaChaPoly`, what libp2p's `/noise` prescribes. Nonce: 4 zero bytes and the counter as little-endian u64.
* `AESGCM`, when both sides asked for it in the handshake (see `noise`): with the AES instructions of a processor
  it takes a fifth of the time. AES-256-GCM as in section 12.4 of the Noise specification: 4 zero bytes and the
  counter as big-endian u64. Its key is made from the one that the handshake gave for that direction,

      first output of HKDF(key, "lattica noise AESGCM")

  so that no key ever serves two ciphers. And it is replaced after every 2**20 messages, by the specification's
  REKEY (section 4.2: the first 32 bytes of the encryption of 32 zeros with the nonce 2**64 - 1); the counter goes
  on. GCM weakens as one key encrypts more: 2**20 messages are at most 2**32 blocks, which leaves an attacker an
  advantage of 2**-64 (the limit of RFC 9001, appendix B.1.1: blocks squared over 2**128).

A plaintext that stands in the send buffer becomes ciphertext there, and back in the receive buffer, so no byte is
copied for the sake of encryption. OpenSSL allows input and output to be the very same memory, with both ciphers.
"""

from __future__ import annotations

import enum
import hmac
import struct
from collections.abc import Callable
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError

MAX_MESSAGE: Final = 65535
"""Bytes of one Noise message: the length before it is a u16."""
TAG_BYTES: Final = 16
MAX_PLAINTEXT: Final = MAX_MESSAGE - TAG_BYTES
FRAME_OVERHEAD: Final = 2 + TAG_BYTES
KEY_BYTES: Final = 32
REKEY_AFTER: Final = 2**20
"""Messages under one key of AES-256-GCM."""

_LAST_NONCE: Final = 2**64 - 2
"""The Noise specification reserves 2**64 - 1 for rekeying."""
_AES_LABEL: Final = b"lattica noise AESGCM"
_little_endian: Final = struct.Struct("<IQ").pack
_big_endian: Final = struct.Struct(">IQ").pack
_put_length: Final = struct.Struct(">H").pack_into

Nonce = Callable[[int, int], bytes]


class NotAuthentic(RemoteProtocolError):
    """After the handshake: not what the peer sent, but altered, repeated or cut on its way."""


class Cipher(enum.StrEnum):
    """The transport phase's cipher, by the name it has in Noise protocol names."""

    CHACHAPOLY = "ChaChaPoly"
    AESGCM = "AESGCM"


def hkdf(chaining_key: bytes, data: bytes) -> tuple[bytes, bytes]:
    """HKDF of the Noise specification, section 4.3, with two outputs."""
    secret = hmac.digest(chaining_key, data, "sha256")
    first = hmac.digest(secret, b"\x01", "sha256")
    return first, hmac.digest(secret, first + b"\x02", "sha256")


class _Direction:
    """Key and counter of one direction. `_limit` is the first counter that the key must not be used with."""

    __slots__ = ("_aead", "_key", "_limit", "_nonce", "_pack", "cipher")

    def __init__(self, key: bytes, cipher: Cipher = Cipher.CHACHAPOLY) -> None:
        self.cipher = cipher
        self._nonce = 0
        self._pack: Nonce
        self._aead: ChaCha20Poly1305 | AESGCM
        if cipher is Cipher.AESGCM:
            self._pack, self._limit = _big_endian, REKEY_AFTER
            self._key = hkdf(key, _AES_LABEL)[0]
            self._aead = AESGCM(self._key)
        else:
            self._pack, self._limit = _little_endian, _LAST_NONCE + 1
            self._key = key
            self._aead = ChaCha20Poly1305(key)

    def _pass_limit(self) -> bool:
        """Replace the key when its messages are used up. False: there are no more nonces at all."""
        if self._nonce > _LAST_NONCE or not isinstance(self._aead, AESGCM):
            return False
        self._key = self._aead.encrypt(self._pack(0, _LAST_NONCE + 1), bytes(KEY_BYTES), None)[:KEY_BYTES]
        self._aead = AESGCM(self._key)
        self._limit = min(self._limit + REKEY_AFTER, _LAST_NONCE + 1)
        return True


class NoiseSealer(_Direction):
    """Encrypts what we send. Made from the handshake's 32-byte key for the direction."""

    __slots__ = ()

    def seal(self, buffer: memoryview, start: int, length: int) -> int:
        """Turn `length` bytes of plaintext at `start + 2` into a frame from `start` to the returned end, in
        place.

        The buffer needs 16 more bytes behind the plaintext. `LocalProtocolError` when the nonces are used up.
        """
        nonce = self._nonce
        if nonce >= self._limit and not self._pass_limit():
            raise LocalProtocolError("all Noise nonces are used: the connection has to be made anew")
        _put_length(buffer, start, length + TAG_BYTES)
        start += 2
        end = start + length
        self._aead.encrypt_into(self._pack(0, nonce), buffer[start:end], None, buffer[start : end + TAG_BYTES])
        self._nonce = nonce + 1
        return end + TAG_BYTES


class NoiseOpener(_Direction):
    """Decrypts what we receive. Made from the handshake's 32-byte key for the direction."""

    __slots__ = ()

    def open_untrusted(self, message: memoryview) -> memoryview:
        """Decrypt one message (without its length) in place. The result is the front part of `message`."""
        nonce = self._nonce
        plaintext = message[:-TAG_BYTES]
        if len(message) < TAG_BYTES:
            raise NotAuthentic(f"Noise message of {len(message)} bytes")
        if nonce >= self._limit and not self._pass_limit():
            raise RemoteProtocolError("all Noise nonces are used")
        try:
            self._aead.decrypt_into(self._pack(0, nonce), message, None, plaintext)
        except InvalidTag:
            raise NotAuthentic("Noise message does not decrypt") from None
        self._nonce = nonce + 1
        return plaintext
