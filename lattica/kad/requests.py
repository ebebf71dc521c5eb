"""One request to one peer: a stream of its own on the connection that is up, or a new connection.

What comes back is checked: the type of the answer, the form of every id and address, and that an address can mean the
same to us as to the peer that names it. Each outcome is told to the routing table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import trio

from lattica.errors import ConnectionLost, LatticaError, ProtocolNotSupported
from lattica_protocols.errors import ProtocolError, RemoteProtocolError
from lattica_protocols.kad.messages import KadMessage, PeerAddrs, decode_message_untrusted, peers_untrusted
from lattica_protocols.kad.server import addresses_for
from lattica_protocols.limits import (
    KAD_MAX_CLOSER_PEERS,
    KAD_MAX_FOREIGN_MESSAGE_BYTES,
    KAD_MAX_PROVIDERS_PER_ANSWER,
)

if TYPE_CHECKING:
    from lattica.host import Host
    from lattica.interfaces import Stream
    from lattica_protocols.kad.routing import RoutingTable
    from lattica_protocols.multiaddr import Multiaddr
    from lattica_protocols.peer_id import PeerId

REQUEST_TIMEOUT = 10.0
"""Seconds for one request with everything: dial, handshake, answer (rust-libp2p: 10)."""

CONFIRM_TIMEOUT = 2.0
"""Seconds to wait for the peer to close the stream of an ADD_PROVIDER, which is its only sign of having taken it."""


class Answer(NamedTuple):
    """What a peer answered, checked."""

    value: bytes | None
    closer: list[PeerAddrs]
    providers: list[PeerAddrs]


class Requests:
    """Sends the requests of one node."""

    def __init__(self, host: Host, protocol: str, table: RoutingTable) -> None:
        self._host = host
        self._protocol = protocol
        self._table = table

    async def ask(self, peer: PeerId, message: KadMessage, addrs: Sequence[Multiaddr] = ()) -> Answer:
        """Send `message` and wait for the answer. `addrs`: where the peer may be, besides what the host knows.

        Errors: those of `Host.open_stream`, `ConnectionLost` (no answer in time), `RemoteProtocolError`.
        """
        with self._reported(peer):
            stream = await self._open(peer, addrs)
            with stream.reset_on_error():
                await stream.send_frame(message.encode())
                answer = decode_message_untrusted(await stream.receive_frame(KAD_MAX_FOREIGN_MESSAGE_BYTES))
                if answer.type != message.type:
                    raise RemoteProtocolError(f"answer of type {answer.type} to a request of type {message.type}")
                checked = self._check_untrusted(stream, message, answer)
            await stream.aclose()
            return checked

    async def tell(self, peer: PeerId, message: KadMessage, addrs: Sequence[Multiaddr] = ()) -> None:
        """Send a `message` that has no answer (ADD_PROVIDER). Returns when the peer has taken it. Errors as `ask`."""
        with self._reported(peer):
            stream = await self._open(peer, addrs)
            try:
                await stream.send_frame(message.encode())
                await stream.close_write()
                with trio.move_on_after(CONFIRM_TIMEOUT):
                    await stream.receive_some(1)
            finally:
                stream.reset()

    async def _open(self, peer: PeerId, addrs: Sequence[Multiaddr]) -> Stream:
        return await self._host.open_stream(peer, self._protocol, addrs=addrs, route=False)  # or lookups without end

    def _check_untrusted(self, stream: Stream, request: KadMessage, answer: KadMessage) -> Answer:
        remote = stream.connection.remote_addr
        own = self._host.peer_id

        def usable(peers: list[PeerAddrs]) -> list[PeerAddrs]:
            return [PeerAddrs(p.peer, addresses_for(p.addrs, remote)) for p in peers if p.peer != own]

        value = None
        if answer.record is not None and answer.record.key in (None, request.key):
            value = answer.record.value
        return Answer(
            value,
            usable(peers_untrusted(answer.closer_peers, KAD_MAX_CLOSER_PEERS)),
            usable(peers_untrusted(answer.provider_peers, KAD_MAX_PROVIDERS_PER_ANSWER)),
        )

    @contextmanager
    def _reported(self, peer: PeerId) -> Iterator[None]:
        """Bounds a request in time and tells the routing table how it went; a cancelled one says nothing."""
        try:
            with trio.fail_after(REQUEST_TIMEOUT):
                yield
        except trio.TooSlowError:
            self._table.failed(peer)
            raise ConnectionLost(f"{peer.short()} did not answer within {REQUEST_TIMEOUT:g} s") from None
        except ProtocolNotSupported:
            self._table.remove(peer)
            raise
        except (LatticaError, ProtocolError):
            self._table.failed(peer)
            raise
        self._table.succeeded(peer, trio.current_time())
