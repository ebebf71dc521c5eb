"""Text forms of bytes: base 58 (Bitcoin alphabet), base 32, base 64 for URLs, and multibase on top of them.

Multibase is one character that names the base, then the text: `z` base58btc, `b` base32 in lower case without padding,
`u` base64url without padding, `f` base16 in lower case (https://github.com/multiformats/multibase).

Decoders take text that people type as well as text from peers; they raise `ValueError` with one line, and the caller
turns that into the error that fits.
"""

from __future__ import annotations

import base64
import binascii

from lattica_protocols.limits import MAX_TEXT_BYTES

_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_DIGITS = {character: value for value, character in enumerate(_ALPHABET)}


def encode_base58(data: bytes) -> str:
    """Base 58 as Bitcoin and IPFS write it; each leading zero byte is a `1`."""
    number = int.from_bytes(data, "big")
    out = []
    while number:
        number, digit = divmod(number, 58)
        out.append(_ALPHABET[digit])
    zeros = len(data) - len(data.lstrip(b"\0"))
    return "1" * zeros + "".join(reversed(out))


def decode_base58(text: str) -> bytes:
    """The inverse of `encode_base58`. `ValueError` for a character that is not in the alphabet."""
    _check_size(text)
    number = 0
    for character in text:
        digit = _DIGITS.get(character)
        if digit is None:
            raise ValueError(f"{character!r} is no base 58 digit")
        number = number * 58 + digit
    zeros = len(text) - len(text.lstrip("1"))
    return bytes(zeros) + number.to_bytes((number.bit_length() + 7) // 8, "big")


def encode_base32(data: bytes) -> str:
    """RFC 4648 base 32 in lower case, without padding."""
    return base64.b32encode(data).decode().rstrip("=").lower()


def decode_base32(text: str) -> bytes:
    """The inverse of `encode_base32`; upper case is read as well, padding and left-over bits are refused."""
    _check_size(text)
    try:
        data = base64.b32decode(text.upper() + "=" * (-len(text) % 8))
    except (binascii.Error, ValueError):
        raise ValueError("not base 32") from None
    if encode_base32(data) != text.lower():
        raise ValueError("not base 32: wrong length or stray bits at the end")
    return data


def encode_base64url(data: bytes) -> str:
    """RFC 4648 base 64 with `-` and `_`, without padding."""
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def decode_base64url(text: str) -> bytes:
    """The inverse of `encode_base64url`; padding and left-over bits are refused."""
    _check_size(text)
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        raise ValueError("not base 64") from None
    if encode_base64url(data) != text:
        raise ValueError("not base 64: wrong characters, length or stray bits at the end")
    return data


def encode_multibase(data: bytes, base: str = "b") -> str:
    """`data` with the multibase prefix `base`: one of `z`, `b`, `u`, `f`."""
    match base:
        case "z":
            return "z" + encode_base58(data)
        case "b":
            return "b" + encode_base32(data)
        case "u":
            return "u" + encode_base64url(data)
        case "f":
            return "f" + data.hex()
        case _:
            raise ValueError(f"unknown multibase prefix {base!r}")


def decode_multibase(text: str) -> bytes:
    """The inverse, by the prefix; `B` and `F` (upper case) are read as well. `ValueError` otherwise."""
    _check_size(text)
    match text[:1]:
        case "z":
            return decode_base58(text[1:])
        case "b" | "B":
            return decode_base32(text[1:])
        case "u":
            return decode_base64url(text[1:])
        case "f" | "F":
            try:
                return binascii.unhexlify(text[1:])
            except (binascii.Error, ValueError):
                raise ValueError("not hexadecimal") from None
        case prefix:
            raise ValueError(f"unknown multibase prefix {prefix!r}")


def _check_size(text: str) -> None:
    if len(text) > MAX_TEXT_BYTES:
        raise ValueError(f"text of {len(text)} characters is over the limit of {MAX_TEXT_BYTES}")
