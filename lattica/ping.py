"""`/ipfs/ping/1.0.0`: 32 random bytes, echoed. Answers others and measures round-trip times."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import trio

from lattica.errors import ConnectionLost, PeerMisbehaved

if TYPE_CHECKING:
    from lattica.host import Host
    from lattica.interfaces import Connection, Stream
    from lattica_protocols.peer_id import PeerId

PROTOCOL = "/ipfs/ping/1.0.0"
SIZE = 32
IDLE_TIMEOUT = 60.0
"""Seconds without a ping before an inbound stream is closed; go waits as long."""


class PingService:
    """Echoes pings, and sends them."""

    def __init__(self, host: Host) -> None:
        self._host = host
        host.handle(PROTOCOL, self._answer)

    async def _answer(self, stream: Stream) -> None:
        while True:
            with trio.fail_after(IDLE_TIMEOUT):
                first = await stream.receive_some(SIZE)
                if not first:
                    break
                rest = await stream.receive_exactly(SIZE - len(first)) if len(first) < SIZE else b""
            await stream.send_all(first + rest)
            await trio.lowlevel.checkpoint()  # thousands may have come at once: others have their turn in between
        await stream.aclose()

    async def ping(self, peer: PeerId, *, timeout: float = 10.0, connection: Connection | None = None) -> float:
        """One round trip in seconds. A stream per ping: rust-libp2p stalls on the second ping of a stream.

        Errors: `ConnectError`, `ConnectionLost` (also when no answer came in time), `PeerMisbehaved`.
        """
        try:
            with trio.fail_after(timeout):
                stream = await self._host.open_stream(peer, PROTOCOL, connection=connection)
                try:
                    nonce = os.urandom(SIZE)
                    started = trio.current_time()
                    await stream.send_all(nonce)
                    answer = await stream.receive_exactly(SIZE)
                    elapsed = trio.current_time() - started
                    await stream.aclose()
                finally:
                    stream.reset()
        except trio.TooSlowError:
            raise ConnectionLost(f"{peer.short()} did not answer a ping within {timeout:g} s") from None
        if answer != nonce:
            raise PeerMisbehaved("the answer to a ping was not an echo")
        return elapsed
