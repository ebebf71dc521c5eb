"""Serving others: the streams that peers open to ask us."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from lattica.errors import PeerMisbehaved
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.kad.admission import Admission
from lattica_protocols.kad.messages import MessageType, decode_message_untrusted, encode_answer
from lattica_protocols.limits import KAD_MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from lattica.interfaces import Stream
    from lattica_protocols.kad.server import KadServer

log = logging.getLogger("lattica.kad")

IDLE_TIMEOUT = 60.0
"""Seconds that a stream may stay open without a request (go-libp2p-kad-dht)."""

SEND_TIMEOUT = 10.0
"""Seconds for a peer to take an answer of at most 16 KiB."""


class Inbound:
    """The stream handler. `clock` gives Unix seconds; `on_stored` is called when a request may have changed a store."""

    def __init__(self, server: KadServer, clock: Callable[[], float], on_stored: Callable[[], None]) -> None:
        self._server = server
        self._on_stored = on_stored
        self._clock = clock
        self._admission = Admission()
        self.requests = 0
        self.refused = 0

    async def serve(self, stream: Stream) -> None:
        """Answer the requests of one stream until its end. What it raises resets the stream."""
        peer = stream.connection.peer_id
        if not self._admission.stream_opened(peer, trio.current_time()):
            self.refused += 1
            raise PeerMisbehaved("too many Kademlia streams at once")
        try:
            while await self._serve_one(stream):
                pass
            await stream.aclose()
        finally:
            self._admission.stream_closed(peer, trio.current_time())

    async def _serve_one(self, stream: Stream) -> bool:
        """One request; false at the end of the stream."""
        peer = stream.connection.peer_id
        with trio.fail_after(IDLE_TIMEOUT):
            first = await stream.receive_some(1)
            if not first:
                return False
            stream.push_back(first)
            data = await stream.receive_frame(KAD_MAX_MESSAGE_BYTES)
        if not self._admission.request(peer, trio.current_time()):
            self.refused += 1
            raise PeerMisbehaved("too many Kademlia requests")
        self.requests += 1
        request = decode_message_untrusted(data)
        try:
            answer = self._server.answer_untrusted(request, peer, stream.connection.remote_addr, self._clock())
        except RemoteProtocolError:
            self.refused += 1
            raise
        if request.type in (MessageType.ADD_PROVIDER, MessageType.PUT_VALUE):
            self._on_stored()
        if answer is not None:
            with trio.fail_after(SEND_TIMEOUT):
                await stream.send_frame(encode_answer(answer))
        await trio.lowlevel.checkpoint()  # many requests may have come at once: others have their turn in between
        return True
