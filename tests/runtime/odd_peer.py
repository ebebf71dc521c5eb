"""A peer on a raw TCP socket that decides itself how to cut what it sends: multistream, Noise, yamux, by hand."""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

import trio

from lattica_protocols import noise
from lattica_protocols.keys import PrivateKey
from lattica_protocols.multistream import encode_message
from lattica_protocols.noise_transport import FRAME_OVERHEAD

DATA, WINDOW, PING, GO_AWAY = 0, 1, 2, 3
SYN, ACK, FIN, RST = 1, 2, 4, 8
HEADER = encode_message("/multistream/1.0.0")
YAMUX = "/yamux/1.0.0"


class Frame(NamedTuple):
    """A yamux frame; `length` is the data's, or the number in the header."""

    kind: int
    flags: int
    stream: int
    length: int
    body: bytes


def frame(kind: int, flags: int, stream: int, length: int = 0, body: bytes = b"") -> bytes:
    return struct.pack(">BBHII", 0, kind, flags, stream, len(body) or length) + body


class OddPeer:
    """`piece`: bytes for each write to the socket; `message`: plaintext bytes in each Noise message; `padded`: an
    empty Noise message before each."""

    def __init__(
        self,
        stream: trio.SocketStream,
        key: PrivateKey,
        *,
        piece: int = 1 << 30,
        message: int = 65519,
        padded: bool = False,
    ) -> None:
        self.stream = stream
        self._key = key
        self._piece, self._message, self._padded = piece, message, padded
        self._raw = bytearray()
        self._plain = bytearray()

    # -- the socket -------------------------------------------------------------------------------------------
    async def send(self, data: bytes) -> None:
        for start in range(0, len(data), self._piece):
            await self.stream.send_all(data[start : start + self._piece])

    async def read(self, size: int) -> bytes:
        while len(self._raw) < size:
            more = await self.stream.receive_some()
            if not more:
                raise EOFError
            self._raw += more
        data = bytes(self._raw[:size])
        del self._raw[:size]
        return data

    async def expect(self, text: str) -> None:
        """The next multistream message, before Noise."""
        wanted = encode_message(text)
        assert await self.read(len(wanted)) == wanted

    # -- Noise ------------------------------------------------------------------------------------------------
    async def secure(self, *, initiator: bool, muxers: Sequence[str], negotiated: bool = False) -> None:
        """The handshake; `negotiated`: `/noise` was agreed on before."""
        if not negotiated and initiator:
            await self.send(HEADER)
            await self.expect("/multistream/1.0.0")
            for refused in ("/libp2p/simultaneous-connect", "/tls/1.0.0"):
                await self.send(encode_message(refused))
                await self.expect("na")
            await self.send(encode_message("/noise"))
            await self.expect("/noise")
        elif not negotiated:
            await self.send(HEADER)
            await self.expect("/multistream/1.0.0")
            await self.expect("/noise")
            await self.send(encode_message("/noise"))
        identity = noise.NoiseIdentity.create(self._key, os.urandom(32), muxers)
        handshake = noise.NoiseHandshake(identity, initiator=initiator, ephemeral_private=os.urandom(32), muxers=muxers)
        while not handshake.finished:
            await self.send(handshake.poll_transmit())
            length = await self.read(2)
            handshake.receive_untrusted(length + await self.read(int.from_bytes(length, "big")))
        await self.send(handshake.poll_transmit())
        self.muxer = handshake.muxer
        self._sealer, self._opener = handshake.split()

    async def write(self, data: bytes) -> None:
        """Encrypt and send."""
        for start in range(0, len(data), self._message):
            for part in (b"", data[start : start + self._message])[0 if self._padded else 1 :]:
                sealed = bytearray(FRAME_OVERHEAD + len(part))
                sealed[2 : 2 + len(part)] = part
                self._sealer.seal(memoryview(sealed), 0, len(part))
                await self.send(bytes(sealed))

    async def plain(self, size: int) -> bytes:
        """`size` decrypted bytes."""
        while len(self._plain) < size:
            length = int.from_bytes(await self.read(2), "big")
            self._plain += self._opener.open_untrusted(memoryview(bytearray(await self.read(length))))
        data = bytes(self._plain[:size])
        del self._plain[:size]
        return data

    async def agree(self, protocol: str, *, initiator: bool) -> None:
        """multistream inside Noise, without laziness."""
        await self.write(HEADER)
        assert await self.plain(len(HEADER)) == HEADER
        wanted = encode_message(protocol)
        if initiator:
            await self.write(wanted)
        assert await self.plain(len(wanted)) == wanted
        if not initiator:
            await self.write(wanted)

    # -- yamux ------------------------------------------------------------------------------------------------
    async def frame(self) -> Frame:
        kind, flags, stream, length = struct.unpack(">xBHII", await self.plain(12))
        return Frame(kind, flags, stream, length, await self.plain(length) if kind == DATA else b"")

    async def frame_of(self, stream: int, *, kind: int | None = None) -> Frame:
        """The next frame of `stream`; others are let pass."""
        while True:
            found = await self.frame()
            if found.stream == stream and kind in (None, found.kind):
                return found

    async def received(self, stream: int, size: int, *, grant: bool = False) -> bytes:
        """At least `size` bytes of a stream, or those up to its end."""
        data = b""
        while len(data) < size:
            found = await self.frame_of(stream, kind=DATA)
            data += found.body
            if grant and found.body:
                await self.write(frame(WINDOW, 0, stream, len(found.body)))
            if found.flags & FIN:
                break
        return data


@asynccontextmanager
async def dialled_by(
    key: PrivateKey, port: int, muxers: Sequence[str] = (YAMUX,), **cut: int
) -> AsyncIterator[OddPeer]:
    """An odd peer that dialled us and holds a yamux session with us."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        peer = OddPeer(stream, key, **cut)
        await peer.secure(initiator=True, muxers=muxers)
        if peer.muxer is None:
            await peer.agree(YAMUX, initiator=True)
        yield peer
