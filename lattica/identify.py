"""Identify: each side of a new connection asks the other who it is, what it speaks and where it listens.

`/ipfs/id/1.0.0` is asked on every new connection, `/ipfs/id/push/1.0.0` tells connected peers when our addresses or
protocols changed. What a peer says is believed only about itself: the key must belong to the peer id that the
handshake proved, and addresses only enter the peerstore with a time to live.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakSet

import trio

from lattica._version import __version__
from lattica.errors import LatticaError, PeerMisbehaved, StreamReset
from lattica.host import PeerConnected, SelfChanged
from lattica.peerstore import CONNECTED_TTL, PeerInfo
from lattica_protocols.errors import ProtocolError, RemoteProtocolError
from lattica_protocols.identify import Identify, PushBudget
from lattica_protocols.limits import MAX_IDENTIFY_MESSAGE_BYTES, MAX_IDENTIFY_MESSAGES
from lattica_protocols.peer_record import PeerRecord

if TYPE_CHECKING:
    from lattica.host import Host
    from lattica.interfaces import Connection, Stream
    from lattica_protocols.multiaddr import Multiaddr
    from lattica_protocols.peer_id import PeerId

log = logging.getLogger("lattica.identify")

ID_PROTOCOL = "/ipfs/id/1.0.0"
PUSH_PROTOCOL = "/ipfs/id/push/1.0.0"
PROTOCOL_VERSION = "/lattica/common/1.0.0"
"""Peers of the Rust lattica cut whoever has another protocol version than their own, unless it contains `common`."""
TIMEOUT = 15.0
"""Seconds for one exchange; a peer that never identifies still works, its protocols are then negotiated."""
GRACE = 2.0
"""Seconds for further messages, once there is one, from a peer that does not end the stream."""
AFTER_BURST = 10.0
"""Seconds after a push that was one too many before the peer is asked instead: a question costs as much as a push."""
AGENT = f"lattica-py/{__version__}"


class IdentifyService:
    """Asks, answers and pushes. `protocol_version` must equal the peer's to stay connected with some networks."""

    def __init__(self, host: Host, *, protocol_version: str = PROTOCOL_VERSION, agent: str = AGENT) -> None:
        self._host = host
        self._protocol_version = protocol_version
        self._agent = agent
        self._sequence = 0
        self._pushes: WeakKeyDictionary[Connection, PushBudget] = WeakKeyDictionary()
        self._to_ask: WeakSet[Connection] = WeakSet()
        """Connections with a push that was not read."""
        host.handle(ID_PROTOCOL, self._answer)
        host.handle(PUSH_PROTOCOL, self._receive_push)

    async def run(self, *, unix_now: int) -> None:
        """Identify every new connection and push our changes, until cancelled."""
        self._sequence = unix_now
        async with trio.open_nursery() as nursery:
            async for event in self._host.subscribe():
                if isinstance(event, PeerConnected):
                    nursery.start_soon(self._ask, event.connection)
                elif isinstance(event, SelfChanged):
                    self._sequence += 1
                    for connection in self._host.connections():
                        nursery.start_soon(self._push, connection)

    async def ask_again(self) -> None:
        """Ask every connected peer anew: where it sees us may have changed."""
        async with trio.open_nursery() as nursery:
            for connection in self._host.connections():
                nursery.start_soon(self._ask, connection)

    def messages(self, connection: Connection) -> list[bytes]:
        """What we tell the peer at the other end of `connection`."""
        addrs = tuple(self._host.advertised_addrs())
        return Identify(
            public_key=self._host.key.public_key,
            listen_addrs=addrs,
            protocols=tuple(self._host.protocols()),
            observed_addr=connection.remote_addr,
            protocol_version=self._protocol_version,
            agent_version=self._agent,
            signed_peer_record=PeerRecord(self._host.peer_id, self._sequence, addrs).seal(self._host.key),
        ).encode_messages()

    # -- the three exchanges ------------------------------------------------------------------------------
    async def _answer(self, stream: Stream) -> None:
        for message in self.messages(stream.connection):
            await stream.send_frame(message)
        await stream.aclose()

    async def _receive_push(self, stream: Stream) -> None:
        connection = stream.connection
        if not self._pushes.setdefault(connection, PushBudget()).take(trio.current_time()):
            if connection not in self._to_ask:
                self._to_ask.add(connection)
                self._host.nursery.start_soon(self._ask_after_burst, connection)
            raise PeerMisbehaved("too many identify pushes")
        with trio.fail_after(TIMEOUT):
            await self._learn(stream)
        await stream.aclose()

    async def _ask(self, connection: Connection) -> None:
        try:
            with trio.fail_after(TIMEOUT):
                stream = await self._host.open_stream(connection.peer_id, ID_PROTOCOL, connection=connection)
                try:
                    await stream.close_write()
                    await self._learn(stream)
                finally:
                    stream.reset()
        except (LatticaError, ProtocolError, trio.TooSlowError) as error:
            log.debug("identify_failed peer=%s error=%s", connection.peer_id.short(), error)

    async def _ask_after_burst(self, connection: Connection) -> None:
        """What the pushes said that were not read, in one question."""
        with trio.move_on_after(AFTER_BURST):
            await connection.closed.wait()
            return
        self._to_ask.discard(connection)
        await self._ask(connection)

    async def _push(self, connection: Connection) -> None:
        if PUSH_PROTOCOL not in self._host.peerstore.protocols(connection.peer_id):
            return
        try:
            with trio.fail_after(TIMEOUT):
                stream = await self._host.open_stream(connection.peer_id, PUSH_PROTOCOL, connection=connection)
                with stream.reset_on_error():
                    for message in self.messages(connection):
                        await stream.send_frame(message)
                    await stream.aclose()
        except (LatticaError, ProtocolError, trio.TooSlowError) as error:
            log.debug("identify_push_failed peer=%s error=%s", connection.peer_id.short(), error)

    async def _learn(self, stream: Stream) -> None:
        """Read messages until the end of the stream and merge them into what we know of the peer."""
        messages = [await stream.receive_frame(MAX_IDENTIFY_MESSAGE_BYTES)]
        # Go sends several and ends the stream. Peers that send one need not end it in order: Rust and JS read no more.
        with trio.move_on_after(GRACE), contextlib.suppress(StreamReset):
            while first := await stream.receive_some(1):
                stream.push_back(first)
                messages.append(await stream.receive_frame(MAX_IDENTIFY_MESSAGE_BYTES))
                if len(messages) > MAX_IDENTIFY_MESSAGES:
                    raise RemoteProtocolError(f"more than {MAX_IDENTIFY_MESSAGES} identify messages")
        self._merge(stream.connection, Identify.decode_untrusted(messages))

    def _merge(self, connection: Connection, message: Identify) -> None:
        peer = connection.peer_id
        if message.public_key is not None and not peer.matches(message.public_key):
            raise RemoteProtocolError("identify names another peer's key")
        try:
            record = message.peer_record_untrusted()
        except RemoteProtocolError as error:  # of a newer kind, or damaged; what the peer says unsigned still counts
            log.debug("peer_record_refused peer=%s error=%s", peer.short(), error)
            record = None
        addrs = record.addrs if record is not None and record.peer_id == peer else message.listen_addrs
        if addrs:
            self._host.peerstore.add_addrs(peer, [a for a in addrs if _may_be_at(a, peer, connection)], CONNECTED_TTL)
        observed = None if message.observed_addr is None else message.observed_addr.without_peer()  # JS appends our id
        if observed is not None:
            connection.observed_addr = observed
        before = self._host.peerstore.info(peer) or PeerInfo()
        self._host.publish_identified(
            peer,
            PeerInfo(
                agent=message.agent_version or before.agent,
                protocol_version=message.protocol_version or before.protocol_version,
                protocols=frozenset(message.protocols) or before.protocols,
                observed_addr=observed or before.observed_addr,
            ),
        )


def _may_be_at(addr: Multiaddr, peer: PeerId, connection: Connection) -> bool:
    """Whether `peer` can be meant by an address that it names. A loopback address of another machine is ours: dialling
    it would try services of this machine for a stranger, or meet ourselves while time counts."""
    from_here = connection.remote_addr.ip() is None or connection.remote_addr.is_loopback
    return addr.peer_id() in (None, peer) and (from_here or not addr.is_loopback)
