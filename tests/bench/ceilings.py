"""What the machine can do at most: trio over plain TCP, and with encrypted frames of 64 KiB, buffers re-used.

Run as a sender or receiver process by `run.py`. The frame is `u16 length || ciphertext || tag`, as Noise has it, and
nothing else happens: no stream, no window, no hash, no disk.
"""

from __future__ import annotations

import json
import struct
import sys
import time

import trio
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

PLAIN = 65519
FRAME = PLAIN + 16 + 2
KEY = bytes(range(32))
PER_SEND = 4
CIPHERS = {"ChaCha20-Poly1305": ChaCha20Poly1305, "AES-256-GCM": AESGCM}


async def send_bytes(stream: trio.SocketStream, total: int, cipher: ChaCha20Poly1305 | AESGCM | None) -> None:
    data = memoryview(bytearray(PLAIN))
    out = bytearray(FRAME * PER_SEND)
    view = memoryview(out)
    for i in range(PER_SEND):
        struct.pack_into(">H", out, i * FRAME, PLAIN + 16)
    counter = sent = 0
    while sent < total:
        if cipher is not None:
            for i in range(PER_SEND):
                nonce = struct.pack("<4xQ", counter)
                counter += 1
                cipher.encrypt_into(nonce, data, None, view[i * FRAME + 2 : (i + 1) * FRAME])
        await stream.send_all(out)
        sent += PLAIN * PER_SEND
    await stream.receive_some(1)  # the receiver has it all


async def receive_bytes(stream: trio.SocketStream, total: int, cipher: ChaCha20Poly1305 | AESGCM | None) -> None:
    buffer = bytearray(FRAME * PER_SEND)
    view = memoryview(buffer)
    plain = bytearray(PLAIN)
    counter = received = filled = 0
    while received < total:
        got = await stream.socket.recv_into(view[filled:])
        if got == 0:
            raise RuntimeError("the sender ended early")
        filled += got
        if filled < len(buffer):
            continue
        filled = 0
        if cipher is not None:
            for i in range(PER_SEND):
                nonce = struct.pack("<4xQ", counter)
                counter += 1
                cipher.decrypt_into(nonce, view[i * FRAME + 2 : (i + 1) * FRAME], None, plain)
        received += PLAIN * PER_SEND
    await stream.send_all(b"x")


async def main() -> None:
    settings = json.loads(sys.argv[1])
    cipher = CIPHERS[settings["cipher"]](KEY) if settings["cipher"] else None
    total = settings["bytes"]
    if settings["role"] == "receive":
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        sys.stdout.write(json.dumps({"port": listener.socket.getsockname()[1]}) + "\n")
        sys.stdout.flush()
        stream = await listener.accept()
        await receive_bytes(stream, total, cipher)
    else:
        stream = await trio.open_tcp_stream("127.0.0.1", settings["port"])
        started = time.perf_counter()
        await send_bytes(stream, total, cipher)
        seconds = time.perf_counter() - started
        sys.stdout.write(json.dumps({"bytes_per_second": total / seconds}) + "\n")


trio.run(main)
