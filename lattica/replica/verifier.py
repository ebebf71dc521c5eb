"""A program of its own: checks Ed25519 signatures that come on its standard input. Started by `signatures`.

Checking one takes 40 µs without the interpreter lock, and then the lock: beside a thread that takes operations in, a
checking thread waits for it longer than it computes. A process has a lock of its own.

    request   u32 length of all that follows || u32 length || prefix || (u32 length || operation)*      big endian
    answer    a byte for each operation: 1 right, 0 wrong

The signed bytes are `prefix` and the operation without its last 66 bytes; its author stands at 4 to 36, its signature
in its last 64 (`lattica_protocols.replica.operation`). Imports nothing else of ours, so that it starts quickly, and
ends when its input does.
"""

from __future__ import annotations

import signal
import sys
from typing import BinaryIO

from nacl.bindings import crypto_sign_open
from nacl.exceptions import BadSignatureError


def main(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more."""
    while len(head := requests.read(4)) == 4:
        length = int.from_bytes(head, "big")
        data = requests.read(length)
        if len(data) < length:
            return
        answers.write(check(data))
        answers.flush()


def check(data: bytes) -> bytes:
    """The answer to a request."""
    at = 4 + int.from_bytes(data[:4], "big")
    prefix = data[4:at]
    verdicts = bytearray()
    while at < len(data):
        start = at + 4
        at = start + int.from_bytes(data[at:start], "big")
        try:
            crypto_sign_open(data[at - 64 : at] + prefix + data[start : at - 66], data[start + 4 : start + 36])
            verdicts.append(1)
        except (BadSignatureError, ValueError):
            verdicts.append(0)
    return bytes(verdicts)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the daemon, which ends us
    main(sys.stdin.buffer, sys.stdout.buffer)
