"""Tools of a peer that breaks the rules: raw Noise and yamux under our control, and a watch over the victim."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import trio
from driven import Driven

from lattica.host import Host
from lattica_protocols import noise
from lattica_protocols.keys import PrivateKey
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.multistream import encode_message
from lattica_protocols.noise_transport import MAX_PLAINTEXT, TAG_BYTES, NoiseOpener, NoiseSealer
from lattica_protocols.peer_id import PeerId
from lattica_protocols.varint import encode_uvarint

ELSEWHERE = "127.0.0.2"
"""Where hostile sockets come from: bounds that count by address must not hit honest peers on 127.0.0.1."""
HEADER = encode_message("/multistream/1.0.0")
DATA, WINDOW, PING, AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8


class Watched:
    """The victim's process and what it is made of."""

    def __init__(self, process: Driven) -> None:
        self.process = process
        self.pid = process.process.pid
        self.peer = PeerId.parse(process.hello["peer_id"])
        self.addrs = [Multiaddr.parse(text) for text in process.hello["addrs"]]
        self.cid: str = process.hello["cid"]

    def port(self, transport: str) -> int:
        for addr in self.addrs:
            found = addr.host_port()
            if found is not None and found[0] == transport:
                return found[2]
        raise LookupError(transport)

    def resident(self) -> int:
        """Bytes."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024
        raise LookupError("the victim is dead")

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def state(self) -> dict[str, Any]:
        return dict(self.process.do("state"))


async def connect(watched: Watched, source: str = ELSEWHERE) -> trio.SocketStream:
    """A TCP connection from `source`."""
    sock = trio.socket.socket()
    await sock.bind((source, 0))
    await sock.connect(("127.0.0.1", watched.port("tcp")))
    return trio.SocketStream(sock)


async def until_closed(stream: trio.SocketStream, seconds: float) -> bytes:
    """What the victim sends until it closes. `trio.TooSlowError` when it does not."""
    received = bytearray()
    with trio.fail_after(seconds):
        try:
            while data := await stream.receive_some(65536):
                received += data
        except trio.BrokenResourceError:
            pass
    return bytes(received)


class RawPeer:
    """A connection after a proper Noise handshake, with our hands on its plaintext."""

    def __init__(self, stream: trio.SocketStream, sealer: NoiseSealer, opener: NoiseOpener) -> None:
        self.stream = stream
        self._sealer = sealer
        self._opener = opener
        self._kept = b""

    @classmethod
    async def dial(cls, watched: Watched, key: PrivateKey | None = None) -> RawPeer:
        stream = await connect(watched)
        key = key or PrivateKey.generate(os.urandom(32))
        identity = noise.NoiseIdentity.create(key, os.urandom(32), ["/yamux/1.0.0"])
        handshake = noise.NoiseHandshake(
            identity, initiator=True, ephemeral_private=os.urandom(32), muxers=["/yamux/1.0.0"]
        )
        opening = HEADER + encode_message("/noise")
        await stream.send_all(opening + handshake.poll_transmit())
        data = b""
        while len(data) < len(opening):
            data += await _some(stream)
        data = data[len(opening) :]
        while not handshake.finished:
            data = data[handshake.receive_untrusted(data) :]
            await stream.send_all(handshake.poll_transmit())
            if not handshake.finished:
                data += await _some(stream)
        peer = cls(stream, *handshake.split())
        peer._kept = data
        return peer

    async def send(self, plaintext: bytes) -> None:
        """As many Noise messages as it takes."""
        out = bytearray()
        for start in range(0, len(plaintext), MAX_PLAINTEXT):
            part = plaintext[start : start + MAX_PLAINTEXT]
            frame = bytearray(2) + part + bytearray(TAG_BYTES)
            self._sealer.seal(memoryview(frame), 0, len(part))
            out += frame
        await self.stream.send_all(out)

    async def receive(self) -> bytes:
        """The plaintext of one message."""
        while len(self._kept) < 2 or len(self._kept) < 2 + int.from_bytes(self._kept[:2], "big"):
            self._kept += await _some(self.stream)
        end = 2 + int.from_bytes(self._kept[:2], "big")
        frame, self._kept = bytearray(self._kept[2:end]), self._kept[end:]
        return bytes(self._opener.open_untrusted(memoryview(frame)))

    async def closed_within(self, seconds: float) -> bool:
        """Whether the victim ends the connection."""
        with trio.move_on_after(seconds):
            try:
                while True:
                    await self.receive()
            except (EOFError, trio.BrokenResourceError):
                return True
        return False


async def _some(stream: trio.SocketStream) -> bytes:
    data = bytes(await stream.receive_some(65536))
    if not data:
        raise EOFError
    return data


def frame(kind: int, flags: int, stream: int, length: int, body: bytes = b"", version: int = 0) -> bytes:
    """A yamux frame, right or wrong."""
    return struct.pack(">BBHII", version, kind, flags, stream, length) + body


def open_protocol(stream: int, protocol: str, first: bytes = b"") -> bytes:
    """A yamux frame that opens a stream and proposes `protocol`, with first bytes behind it."""
    body = HEADER + encode_message(protocol) + first
    return frame(DATA, SYN, stream, len(body), body)


def length_prefix(size: int) -> bytes:
    return encode_uvarint(size)


async def open_hostile_stream(host: Host, watched: Watched, protocol: str) -> Any:
    """A negotiated stream of a proper connection, to be misused."""
    return await host.open_stream(watched.peer, protocol, addrs=watched.addrs[:1])
