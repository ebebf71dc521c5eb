"""Which ciphers this machine would rather use than ChaCha20-Poly1305: measured, as every system tells it otherwise.

With a processor's AES instructions AES-256-GCM takes a third to a fifth of the time of ChaCha20-Poly1305; without
them, in software that is safe against timing, several times as long.
"""

from __future__ import annotations

import functools
import time
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from lattica_protocols.noise_transport import KEY_BYTES, TAG_BYTES, Cipher

_SAMPLE_BYTES: Final = 16384
_SAMPLES: Final = 5
"""The shortest counts. Altogether about 60 us where it is fast, 1 ms where it is not."""


@functools.cache
def preferred_ciphers() -> tuple[Cipher, ...]:
    """What to ask for in handshakes, best first. Measured once in a process."""
    key = bytes(range(KEY_BYTES))
    return (Cipher.AESGCM,) if _seconds(AESGCM(key)) < _seconds(ChaCha20Poly1305(key)) else ()


def _seconds(aead: AESGCM | ChaCha20Poly1305) -> float:
    """For one message."""
    message, out = bytes(_SAMPLE_BYTES), bytearray(_SAMPLE_BYTES + TAG_BYTES)
    shortest = float("inf")
    for number in range(_SAMPLES):
        began = time.perf_counter()
        aead.encrypt_into(number.to_bytes(12, "big"), message, None, out)
        shortest = min(shortest, time.perf_counter() - began)
    return shortest
