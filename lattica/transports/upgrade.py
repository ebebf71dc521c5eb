"""From a bare channel to a `MuxedConnection`: multistream-select `/noise`, the Noise handshake, the muxer.

    dialler                                       listener
    multistream, /noise, Noise message 1   ->
                                           <-     multistream, /noise, Noise message 2
    Noise message 3 [, yamux frames]       ->
                                           <-     [multistream, /yamux/1.0.0, when the handshake agreed on no
                                           muxer]

Only `/noise` is ever proposed, so nothing is lost by sending the first handshake message along with the
proposal: a peer that does not speak it cannot talk to us anyway. The muxer is negotiated in the handshake
with Go, JS and our own peers; with Rust by multistream-select inside the encryption, where the dialler waits
for the answer.

The same function upgrades a TCP socket and a relayed circuit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import trio

from lattica.errors import ConnectionLost, DialError, ProtocolNotSupported, StreamReset, WrongPeer
from lattica.interfaces import Direction, Path
from lattica.transports.channel import Channel
from lattica.transports.cipher_choice import preferred_ciphers
from lattica.transports.muxed import MuxedConnection, SharedMemory
from lattica_protocols import noise, yamux
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.keys import PrivateKey
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.multistream import Initiator, Responder
from lattica_protocols.noise_transport import FRAME_OVERHEAD, NoiseOpener, NoiseSealer
from lattica_protocols.paths.heartbeat import USUAL, Pace
from lattica_protocols.peer_id import PeerId

HANDSHAKE_TIMEOUT: Final = 10.0
"""Seconds from the open channel to the authenticated connection, on both sides. As rust-libp2p."""
MUXERS: Final = (yamux.PROTOCOL_ID,)
_READ_BYTES: Final = 16384


@dataclass(frozen=True, slots=True)
class ConnectionFacts:
    """What the upgraded connection will say about itself."""

    local_addr: Multiaddr
    remote_addr: Multiaddr
    direction: Direction
    path: Path


class Upgrader:
    """Turns channels into connections. One for all of a node's stream-like transports."""

    def __init__(self, key: PrivateKey, entropy: Callable[[int], bytes], *, pace: Pace = USUAL) -> None:
        """`entropy(n)` gives `n` unpredictable bytes (`os.urandom`)."""
        self.peer_id = PeerId.from_public_key(key.public_key)
        self.memory = SharedMemory()
        self._entropy = entropy
        self._identity = noise.NoiseIdentity.create(key, entropy(32), MUXERS, preferred_ciphers())
        self._pace = pace

    async def upgrade(
        self, channel: Channel, facts: ConnectionFacts, expected: PeerId | None, *, initiator: bool
    ) -> MuxedConnection:
        """Shake hands. The connection still has to be run (`MuxedConnection.run`).

        `initiator`: who takes the dialler's part, which need not be who made the TCP connection (hole
        punching). Errors: `DialError`, `WrongPeer`. On every error, and when cancelled, the channel is
        closed.
        """
        done = False
        try:
            with trio.fail_after(HANDSHAKE_TIMEOUT):
                connection = await self._upgrade(channel, facts, expected, initiator)
            done = True
            return connection
        except trio.TooSlowError:
            raise DialError(f"no handshake within {HANDSHAKE_TIMEOUT:g} s") from None
        except trio.ClosedResourceError:
            raise DialError("closed during the handshake") from None
        except (RemoteProtocolError, ConnectionLost, StreamReset, ProtocolNotSupported) as error:
            raise DialError(f"the handshake failed: {error}") from None
        except OSError as error:
            raise DialError(f"the handshake failed: {error.strerror or error}") from None
        finally:
            if not done:
                channel.close()

    async def _upgrade(
        self, channel: Channel, facts: ConnectionFacts, expected: PeerId | None, initiator: bool
    ) -> MuxedConnection:
        wire = _Wire(channel)
        handshake = noise.NoiseHandshake(
            self._identity, initiator=initiator, ephemeral_private=self._entropy(32), muxers=MUXERS
        )
        if initiator:
            await _propose(wire, noise.PROTOCOL_ID, along=handshake.poll_transmit())
        else:
            await _respond(wire, noise.PROTOCOL_ID)
        while not handshake.finished:
            data = await wire.read()
            wire.unread(data[handshake.receive_untrusted(data) :])
            await wire.send(handshake.poll_transmit())
        assert handshake.remote_key is not None
        peer_id = PeerId.from_public_key(handshake.remote_key)
        if expected is not None and peer_id != expected:
            raise WrongPeer(f"expected the peer {expected}, but {peer_id} answered")
        if peer_id == self.peer_id:
            raise DialError(f"this node itself answered ({peer_id})")
        secured = _SecuredWire(wire, handshake.split())
        if handshake.muxer is None:
            await _negotiate_muxer(secured, handshake, initiator)
        return MuxedConnection(
            channel,
            secured.ciphers,
            initiator=initiator,
            peer_id=peer_id,
            addrs=(facts.local_addr, facts.remote_addr),
            direction=facts.direction,
            path=facts.path,
            memory=self.memory,
            pace=self._pace,
            received=wire.take(),
            decrypted=secured.take(),
        )


class _Wire:
    """Reads and writes during the handshake, with a way to put back what was read too far."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._unread = b""

    async def read(self) -> bytes:
        """At least one byte. `ConnectionLost` at the end of the channel."""
        if self._unread:
            return self.take()
        buffer = memoryview(bytearray(_READ_BYTES))
        while (size := self._channel.receive_now(buffer)) is None:
            await self._channel.wait_receivable()
        if size == 0:
            raise ConnectionLost("the peer closed the connection")
        return bytes(buffer[:size])

    def unread(self, data: bytes) -> None:
        self._unread = data + self._unread

    def take(self) -> bytes:
        """What was put back."""
        data, self._unread = self._unread, b""
        return data

    async def send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._channel.send_now(view) :]
            if view:
                await self._channel.wait_sendable()


class _SecuredWire(_Wire):
    """The same inside the encryption, for the muxer's negotiation."""

    def __init__(self, outer: _Wire, ciphers: tuple[NoiseSealer, NoiseOpener]) -> None:
        super().__init__(outer._channel)
        self.ciphers = ciphers
        self._outer = outer

    async def read(self) -> bytes:
        while not self._unread:
            frame = bytearray(await self._outer.read())
            while len(frame) < 2 or len(frame) < 2 + int.from_bytes(frame[:2], "big"):
                frame += await self._outer.read()
            end = 2 + int.from_bytes(frame[:2], "big")
            self._outer.unread(bytes(frame[end:]))
            self._unread = bytes(self.ciphers[1].open_untrusted(memoryview(frame)[2:end]))
        return self.take()

    async def send(self, data: bytes) -> None:
        frame = bytearray(FRAME_OVERHEAD + len(data))
        frame[2 : 2 + len(data)] = data
        self.ciphers[0].seal(memoryview(frame), 0, len(data))
        await self._outer.send(bytes(frame))


async def _negotiate_muxer(wire: _SecuredWire, handshake: noise.NoiseHandshake, initiator: bool) -> None:
    """Agree on yamux by multistream-select, as the handshake named none that both know."""
    try:
        await (_propose if initiator else _respond)(wire, yamux.PROTOCOL_ID)
    except (ConnectionLost, OSError) as error:
        assert handshake.payload is not None
        extensions = handshake.payload.extensions
        if extensions is None or not extensions.stream_muxers:
            raise
        offered = ", ".join(
            extensions.stream_muxers
        )  # JS ends the connection when its list and ours have none in common
        raise ProtocolNotSupported(f"the peer does not speak {yamux.PROTOCOL_ID}, only {offered[:200]}") from error


async def _propose(wire: _Wire, protocol: str, *, along: bytes = b"") -> None:
    """Propose one protocol. `along` is sent with the proposal, as if it was accepted."""
    machine = Initiator([protocol], lazy=True)
    await wire.send(machine.poll_transmit() + along)
    while not machine.confirmed:
        machine.receive_data(await wire.read())
        if machine.failed:
            raise ProtocolNotSupported(f"the peer does not speak {protocol}")
    wire.unread(machine.take_leftover())


async def _respond(wire: _Wire, protocol: str) -> None:
    """Accept one protocol."""
    machine = Responder([protocol])
    while machine.selected is None:
        machine.receive_data(await wire.read())
        if answer := machine.poll_transmit():
            await wire.send(answer)
    wire.unread(machine.take_leftover())
