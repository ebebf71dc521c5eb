"""Relayed connections: dialling `<relay>/p2p/RELAY/p2p-circuit/p2p/TARGET`, and taking what relays bring us.

A circuit is a stream of the connection with the relay. It is upgraded with Noise and yamux like a TCP socket, from end
to end: the relay sees neither who we are to each other nor what we say. A relay is always reached directly.

`listen("/p2p-circuit")` takes circuits from relays in `relays`; its listener has the addresses at these relays, which
`lattica.relay.RelayClient` keeps up to date.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from lattica.errors import ConnectError, ConnectionLost, DialError, PathAltered, PathLost, WrongPeer
from lattica.interfaces import Connection, Listener, OnConnection, Stream, Transport
from lattica.relay.requests import CIRCUIT, SECOND_SECONDS, first_answer, for_circuits, open_circuit
from lattica.transports.channel import StreamChannel
from lattica.transports.muxed import MuxedConnection
from lattica.transports.upgrade import ConnectionFacts, Upgrader
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import (
    NEGOTIATION_TIMEOUT,
    RELAY_MAX_CANDIDATES,
    RELAY_MAX_MESSAGE_BYTES,
    RELAY_MAX_UNFINISHED_CIRCUITS,
)
from lattica_protocols.paths.heartbeat import USUAL, Pace
from lattica_protocols.relay.messages import STOP_PROTOCOL, Status, StopMessage, StopType, peer_untrusted, stop_status

if TYPE_CHECKING:
    from lattica.host import Host
    from lattica_protocols.multiaddr import Multiaddr
    from lattica_protocols.peer_id import PeerId

log = logging.getLogger("lattica.relay")


@dataclass(slots=True)
class RelayTroubles:
    """What befell connections through one relay, which the encryption from end to end notices."""

    altered: int = 0
    """Bytes came that the peer did not send, or not then."""
    silent: int = 0
    """Nothing came any more, while the relay itself was there."""
    last: str = ""


@dataclass(frozen=True, slots=True)
class CircuitFacts:
    """What is known of a relayed connection beside what every connection tells."""

    relay: PeerId
    seen_at: tuple[Multiaddr, ...]
    """Where the relay sees the partner, if it told: what hole punching may trust."""


class CircuitTransport(Transport):
    """Made for one `host`; the connections to relays are the host's own."""

    def __init__(
        self,
        host: Host,
        *,
        entropy: Callable[[int], bytes] = os.urandom,
        pace: Pace = USUAL,
        upgrader: Upgrader | None = None,
    ) -> None:
        self.relays: set[PeerId] = set()
        """Peers from which circuits are taken."""
        self.troubles: OrderedDict[PeerId, RelayTroubles] = OrderedDict()
        """By relay, the newest last."""
        self._host = host
        self._upgrader = upgrader or Upgrader(host.key, entropy, pace=pace)
        self._facts: dict[Connection, CircuitFacts] = {}
        self._dialling: dict[PeerId, trio.Lock] = {}
        self._unfinished: dict[trio.CancelScope, None] = {}
        """Handshakes of inbound circuits, the oldest first."""
        self._on_connection: OnConnection | None = None

    def facts(self, connection: Connection) -> CircuitFacts | None:
        """About a relayed connection of this transport that is up."""
        return self._facts.get(connection)

    def is_relay(self, peer: PeerId | None) -> bool:
        """Whether we use `peer` as a relay, or are about to."""
        return peer in self.relays or peer in self._dialling

    # -- dialling -----------------------------------------------------------------------------------------
    def can_dial(self, addr: Multiaddr) -> bool:
        return addr.names().count("p2p-circuit") == 1 and addr.relay_id() not in (None, self._host.peer_id)

    async def dial(self, addr: Multiaddr, expected: PeerId | None) -> MuxedConnection:
        relay, target = addr.relay_id(), expected or addr.peer_id()
        if relay is None or target is None or not self.can_dial(addr):
            raise DialError(f"{addr}: a relayed address names the relay and the peer behind it")
        if target in (relay, self._host.peer_id):
            raise DialError(f"{addr}: the relay and the two peers are three different ones")
        via = await self.connect_relay(relay, addr)
        opened = await first_answer(
            [via, *(c for c in for_circuits(self._host.connections(relay)) if c is not via)],
            lambda connection: open_circuit(self._host, connection, target),
            lambda late: late.stream.reset(),
            delay=2 * SECOND_SECONDS,  # the relay may have to ask the target twice
        )
        via = opened.stream.connection
        facts = ConnectionFacts(via.local_addr, addr.without_peer(), "outbound", "relay")
        try:
            connection = await self._upgrader.upgrade(
                StreamChannel(opened.stream, self._host.nursery), facts, target, initiator=True
            )
        except WrongPeer as error:
            raise WrongPeer(f"{addr}: {error}") from None
        except DialError as error:
            raise DialError(f"{addr}: {error}") from None
        self._host.nursery.start_soon(self._run, connection, CircuitFacts(relay, opened.seen_at))
        return connection

    async def connect_relay(self, relay: PeerId, addr: Multiaddr | None = None) -> Connection:
        """A direct connection with `relay`: one that is up, or one over `addr` and what else is known."""
        lock = self._dialling.setdefault(relay, trio.Lock())
        try:
            async with lock:
                if direct := for_circuits(self._host.connections(relay)):
                    return direct[0]
                before = None if addr is None else addr.before_circuit()
                named = [] if before is None or not before.without_peer().names() else [before.without_peer()]
                known = [a for a in self._host.peerstore.addrs(relay) if not a.is_circuit]
                return await self._host.dial(relay, list(dict.fromkeys([*named, *known])))
        except ConnectError as error:
            raise DialError(f"no connection with the relay {relay.short()}: {error}") from None
        finally:
            if not lock.statistics().tasks_waiting:
                self._dialling.pop(relay, None)

    async def _run(self, connection: MuxedConnection, facts: CircuitFacts) -> None:
        self._facts[connection] = facts
        try:
            await connection.run()
        finally:
            del self._facts[connection]
            self._note_trouble(facts.relay, connection.close_error)

    def _note_trouble(self, relay: PeerId, error: Exception | None) -> None:
        if not isinstance(error, PathLost):
            return
        altered = isinstance(error, PathAltered)
        if not altered and all(c.path == "relay" or c.closed.is_set() for c in self._host.connections(relay)):
            return  # the relay is gone altogether, or we are cut off
        found = self.troubles.setdefault(relay, RelayTroubles())
        found.altered += altered
        found.silent += not altered
        found.last = str(error)
        self.troubles.move_to_end(relay)
        while len(self.troubles) > RELAY_MAX_CANDIDATES:
            self.troubles.popitem(last=False)
        log.info("relayed_path_lost relay=%s error=%s", relay.short(), error)

    # -- listening ----------------------------------------------------------------------------------------
    def can_listen(self, addr: Multiaddr) -> bool:
        return addr == CIRCUIT

    async def listen(self, addr: Multiaddr, on_connection: OnConnection) -> CircuitListener:
        await trio.lowlevel.checkpoint()
        if addr != CIRCUIT or self._on_connection is not None:
            raise DialError(f"{addr}: circuits are taken once, at /p2p-circuit")
        self._on_connection = on_connection
        self._host.handle(STOP_PROTOCOL, self._serve)
        return CircuitListener(self)

    def stop_listening(self) -> None:
        self._on_connection = None
        self._host.unhandle(STOP_PROTOCOL)

    async def _serve(self, stream: Stream) -> None:
        """A relay brings a circuit."""
        via, on_connection = stream.connection, self._on_connection
        with trio.fail_after(NEGOTIATION_TIMEOUT):
            data = await stream.receive_frame(RELAY_MAX_MESSAGE_BYTES)
        try:
            request = StopMessage.decode_untrusted(data)
            source, seen_at = peer_untrusted(request.peer)
        except RemoteProtocolError:
            await _refuse(stream, Status.MALFORMED_MESSAGE)
            return
        if request.type != StopType.CONNECT:
            await _refuse(stream, Status.UNEXPECTED_MESSAGE)
        elif (
            on_connection is None
            or via.peer_id not in self.relays
            or via.path == "relay"
            or self._host.gate(source) is not None
        ):
            await _refuse(stream, Status.PERMISSION_DENIED)
        else:
            await self._accept(stream, source, seen_at, on_connection)

    async def _accept(
        self, stream: Stream, source: PeerId, seen_at: tuple[Multiaddr, ...], on_connection: OnConnection
    ) -> None:
        via = stream.connection
        remote = via.remote_addr.with_peer(via.peer_id).encapsulate(CIRCUIT)
        scope = self._begin_handshake()
        try:
            with scope:
                await stream.send_frame(stop_status(Status.OK))
                channel = StreamChannel(stream, self._host.nursery)
                facts = ConnectionFacts(via.local_addr, remote, "inbound", "relay")
                connection = await self._upgrader.upgrade(channel, facts, source, initiator=False)
        except (DialError, ConnectionLost) as error:
            log.debug("circuit_refused relay=%s peer=%s error=%s", via.peer_id.short(), source.short(), error)
            stream.reset()
            return
        finally:
            self._unfinished.pop(scope, None)
        if scope.cancelled_caught:
            log.debug("circuit_refused relay=%s peer=%s error=%s", via.peer_id.short(), source.short(), "too slow")
            stream.reset()
            return
        self._host.nursery.start_soon(on_connection, connection)
        await self._run(connection, CircuitFacts(via.peer_id, seen_at))


    def _begin_handshake(self) -> trio.CancelScope:
        """Of an inbound circuit. When there are too many the oldest has to go: whoever means it is done within a round
        trip or two, and who opens circuits and keeps silent must not keep others out."""
        while len(self._unfinished) >= RELAY_MAX_UNFINISHED_CIRCUITS:
            oldest = next(iter(self._unfinished))
            del self._unfinished[oldest]
            oldest.cancel()
        scope = trio.CancelScope()
        self._unfinished[scope] = None
        return scope


class CircuitListener(Listener):
    """`addrs` are those of the relays at which there is a reservation now, each with `/p2p/RELAY/p2p-circuit`."""

    def __init__(self, transport: CircuitTransport) -> None:
        self.addrs: list[Multiaddr] = []
        self._transport = transport

    async def aclose(self) -> None:
        self.addrs.clear()
        self._transport.stop_listening()
        await trio.lowlevel.checkpoint()


async def _refuse(stream: Stream, status: Status) -> None:
    await stream.send_frame(stop_status(status))
    await stream.aclose()
