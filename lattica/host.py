"""The host: this peer's identity, its sessions with other peers, and the protocols it serves.

A connection that comes up, dialled or accepted, is registered in the session of its peer and gets one task that
accepts its streams. Each inbound stream runs through multistream-select and then in its handler, in a task of its
own; whatever goes wrong there ends that stream and nothing else.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import trio

from lattica.dialer import dial_first, dial_with_search, order_addresses
from lattica.errors import ConnectError, ConnectionLost, DialError, LatticaError, NoAddresses, WrongPeer
from lattica.interfaces import Connection, Listener, Stream, StreamClass, Transport
from lattica.listen_addrs import expand_wildcards
from lattica.negotiate import LazyStream, RefusalPace, accept_protocol, select_protocol
from lattica.peerstore import CONNECTED_TTL, FOUND_TTL, PeerInfo, Peerstore
from lattica.session import Session
from lattica.unread import UnreadAccount
from lattica_protocols.errors import ProtocolError
from lattica_protocols.limits import (
    MAX_CONNECTIONS,
    MAX_CONNECTIONS_PER_PEER,
    MAX_INBOUND_STREAMS_PER_CONNECTION,
    NEGOTIATION_TIMEOUT,
)

if TYPE_CHECKING:
    from lattica_protocols.keys import PrivateKey
    from lattica_protocols.multiaddr import Multiaddr
    from lattica_protocols.peer_id import PeerId

log = logging.getLogger("lattica.host")

StreamHandler = Callable[[Stream], Awaitable[None]]
Gate = Callable[["PeerId"], str | None]
"""Returns why a peer may not connect, `None` when it may."""
DIAL_TIMEOUT = 15.0
"""Seconds for one peer, all its addresses together. A punch through two NATs takes at most 5."""
BULK_UPGRADE_TIMEOUT = 2.0
"""Seconds that the first bulk stream waits for a TCP connection beside an existing QUIC one."""
BULK_IDLE = 30.0
"""Seconds after which a connection set apart for bulk is closed when nothing uses it: the next shard often follows."""
BULK_UPGRADE_RETRY = 300.0
"""Seconds before TCP is tried again: a firewall does not change from minute to minute."""
INTERFACES_KNOWN_FOR = 1.0
"""Seconds until this machine's interfaces are looked at again, unless a change is told before (`addrs_changed`). That
takes a fifth of a millisecond for each address listened on, and every connection asks eight times where we listen."""
_EVENT_BUFFER = 4096
_GRACE = 20.0
"""Seconds that a new connection is safe from trimming."""


@dataclass(frozen=True, slots=True)
class PeerConnected:
    """The first connection with a peer, or a further one (`first` is false)."""

    peer: PeerId
    connection: Connection
    first: bool


@dataclass(frozen=True, slots=True)
class PeerDisconnected:
    """The last connection with a peer is gone."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class PeerIdentified:
    """Identify (or a push) told what the peer speaks."""

    peer: PeerId
    info: PeerInfo


@dataclass(frozen=True, slots=True)
class SelfChanged:
    """Our own addresses or protocols changed: connected peers should hear of it."""


@dataclass(frozen=True, slots=True)
class NetworkChanged:
    """We are in another network, or others see us at a new address: what failed before may work now."""


HostEvent = PeerConnected | PeerDisconnected | PeerIdentified | SelfChanged | NetworkChanged


class Host:
    """One peer. Made by `open_host`; its tasks live in `nursery`."""

    def __init__(self, key: PrivateKey, nursery: trio.Nursery, *, announce: Sequence[Multiaddr] = ()) -> None:
        from lattica_protocols.peer_id import PeerId

        self.key = key
        self.peer_id: PeerId = PeerId.from_public_key(key.public_key)
        self.nursery = nursery
        self.rng = random.SystemRandom()
        self.peerstore = Peerstore(trio.current_time)
        self.counters: Counter[str] = Counter()
        self.announce = list(announce)
        self.address_sources: list[Callable[[], Iterable[Multiaddr]]] = []
        """Where we can be reached besides where we listen: observed addresses, mapped ports."""
        self.unreachable: frozenset[Multiaddr] = frozenset()
        """Of these, those at which others have tried in vain."""
        self.reachability: Literal["public", "private", "unknown"] = "unknown"
        """Whether strangers can connect with us directly, as far as was tried (`lattica.reach`)."""
        self.gate: Gate = lambda peer: None
        self.find_addrs: Callable[[PeerId], Awaitable[Iterable[Multiaddr]]] | None = None
        """Where to ask (the DHT) about a peer whose addresses are not known or do not answer."""
        self._transports: list[Transport] = []
        self._listeners: list[Listener] = []
        self._expanded: dict[Multiaddr, list[Multiaddr]] = {}
        self._expanded_until = float("-inf")
        self._handlers: dict[str, StreamHandler] = {}
        self._sessions: dict[PeerId, Session] = {}
        self._dials: dict[tuple[PeerId, bool], trio.Event] = {}
        """That are under way: to addresses that were known, and to those that a search found."""
        self._protected: Counter[PeerId] = Counter()
        self._subscribers: list[trio.MemorySendChannel[HostEvent]] = []
        self._unread = UnreadAccount(self.connections, nursery.start_soon)

    # -- protocols ----------------------------------------------------------------------------------------
    def handle(self, protocol: str, handler: StreamHandler) -> None:
        """Serve `protocol`: `handler(stream)` runs in a task of its own for each inbound stream."""
        self._handlers[protocol] = handler
        self._publish(SelfChanged())

    def unhandle(self, protocol: str) -> None:
        """Serve `protocol` no more; streams that are open go on."""
        if self._handlers.pop(protocol, None) is not None:
            self._publish(SelfChanged())

    def protocols(self) -> list[str]:
        """What we serve, as identify tells it."""
        return sorted(self._handlers)

    async def open_stream(
        self,
        peer: PeerId,
        protocols: str | Sequence[str],
        *,
        stream_class: StreamClass = "control",
        addrs: Sequence[Multiaddr] = (),
        dial: bool = True,
        route: bool = True,
        connection: Connection | None = None,
        eager: bool = False,
    ) -> Stream:
        """A stream to `peer` that speaks one of `protocols` (`stream.protocol` tells which).

        Takes the best connection for `stream_class` (or `connection`), and dials when there is none and `dial` is
        true; `route` as for `connect`. When identify told that the peer speaks the first of them, the proposal
        travels with the first data, unless `eager`: then the stream is known to reach the peer.
        Errors: `ConnectError`, `ConnectionLost`, `ProtocolNotSupported`.
        """
        wanted = [protocols] if isinstance(protocols, str) else list(protocols)
        if connection is None:
            connection = await self._connection_for(peer, stream_class, addrs, dial, route)
        stream = await connection.open_stream()
        known = self.peerstore.protocols(peer)
        for protocol in wanted:
            if protocol in known and not eager:
                return LazyStream(stream, protocol)
        try:
            with stream.reset_on_error(), trio.fail_after(NEGOTIATION_TIMEOUT):
                await select_protocol(stream, wanted)
        except trio.TooSlowError:
            raise ConnectionLost(f"{peer.short()} did not answer the proposal of {wanted[0]}") from None
        return stream

    async def _connection_for(
        self, peer: PeerId, stream_class: StreamClass, addrs: Sequence[Multiaddr], dial: bool, route: bool
    ) -> Connection:
        best = self.connection(peer, stream_class)
        if best is None:
            if not dial:
                raise ConnectionLost(f"no connection with {peer.short()} is up")
            return await self.connect(peer, addrs, route=route)
        if stream_class == "bulk" and best.path == "quic" and dial:
            # Bulk is an order of magnitude quicker over TCP.
            return await self._dial_tcp(peer) or self.connection(peer, stream_class) or best
        return best

    async def dial_for_bulk(self, peer: PeerId) -> None:
        """Set a TCP connection apart for much bulk, beside the one that calls use: no call then waits behind it.

        Only where TCP connects already. `PeerConnected` tells that it is up; it is closed when nobody uses it.
        """
        best = self.connection(peer, "bulk")
        if best is None or best.path != "tcp" or best.for_bulk:
            return
        connection = await self._dial_tcp(peer)
        if connection is not None:
            connection.set_apart_for_bulk()
            self.nursery.start_soon(self._close_when_idle, connection)

    async def _close_when_idle(self, connection: Connection) -> None:
        moved = -1
        while not connection.closed.is_set() and (connection.stream_count() or moved != connection.received_bytes):
            moved = connection.received_bytes
            with trio.move_on_after(BULK_IDLE):
                await connection.closed.wait()
        await connection.aclose()

    async def _dial_tcp(self, peer: PeerId) -> Connection | None:
        """A TCP connection besides those that are up; `None` where that failed, now or not long ago."""
        session, now = self._sessions[peer], trio.current_time()
        if now < session.bulk_upgrade_at:
            return None
        targets = []
        for addr in self.peerstore.addrs(peer):
            target = addr.host_port()
            if target is not None and target[0] == "tcp":
                targets.append(addr)
        if not targets:
            return None
        session.bulk_upgrade_at = now + BULK_UPGRADE_RETRY
        connection: Connection | None = None
        with trio.move_on_after(BULK_UPGRADE_TIMEOUT):
            try:
                connection = await self._dial(peer, targets)
                session.bulk_upgrade_at = 0.0
            except ConnectError as error:
                log.debug("bulk_upgrade_failed peer=%s error=%s", peer.short(), error)
        return connection

    # -- connections --------------------------------------------------------------------------------------
    def connections(self, peer: PeerId | None = None) -> list[Connection]:
        """Connections that are up, with one peer or with all."""
        if peer is not None:
            session = self._sessions.get(peer)
            return [] if session is None else [c for c in session.connections if not c.closed.is_set()]
        return [c for session in self._sessions.values() for c in session.connections if not c.closed.is_set()]

    def connection(self, peer: PeerId, stream_class: StreamClass = "control") -> Connection | None:
        """The best connection with `peer` that is up."""
        session = self._sessions.get(peer)
        return None if session is None else session.best(stream_class)

    def peers(self) -> list[PeerId]:
        """Peers with at least one connection."""
        return list(self._sessions)

    def protect(self, peer: PeerId) -> None:
        """Never close this peer's connections for lack of room. Counted: `unprotect` as often."""
        self._protected[peer] += 1

    def unprotect(self, peer: PeerId) -> None:
        self._protected[peer] -= 1
        if self._protected[peer] <= 0:
            del self._protected[peer]

    def is_protected(self, peer: PeerId) -> bool:
        return peer in self._protected

    async def connect(
        self, peer: PeerId | None, addrs: Sequence[Multiaddr] = (), *, route: bool = True
    ) -> Connection:
        """A connection with `peer`: one that is up, or a new one over `addrs` and all addresses known.

        With `peer` None the first of `addrs` has to name the peer or whoever answers is accepted.
        With `route` others are asked (`find_addrs`) when no address is known or none of them answers soon.
        Errors: `NoAddresses`, `WrongPeer`, `ConnectError`.
        """
        if peer is None:
            named = [p for p in (addr.peer_id() for addr in addrs) if p is not None]
            if not named:
                return await self._dial(None, addrs)
            peer = named[0]
        if peer == self.peer_id:
            raise ConnectError("this is our own peer id")
        reason = self.gate(peer)
        if reason is not None:
            raise ConnectError(reason)
        if addrs:
            self.peerstore.add_addrs(peer, addrs, CONNECTED_TTL)
        best = self.connection(peer)
        if best is not None:
            return best
        known = self.peerstore.addrs(peer)
        if not route or self.find_addrs is None:
            return await self._connect_once(peer, known)
        return await dial_with_search(lambda: self._connect_once(peer, known), lambda: self._find_more(peer, known))

    async def dial(self, peer: PeerId, addrs: Sequence[Multiaddr]) -> Connection:
        """A new connection with `peer` over one of `addrs`, also when others are up: to a relay, or to leave one.

        Errors: `NoAddresses`, `WrongPeer`, `ConnectError`.
        """
        reason = self.gate(peer)
        if reason is not None:
            raise ConnectError(reason)
        return await self._dial(peer, addrs)

    async def _find_more(self, peer: PeerId, known: Collection[Multiaddr]) -> Connection | None:
        """A connection by addresses that others know besides. The search itself may connect with the peer."""
        assert self.find_addrs is not None
        found = [addr.without_peer() for addr in await self.find_addrs(peer)]
        self.peerstore.add_addrs(peer, found, FOUND_TTL)
        new = [addr for addr in found if addr not in known]
        return await self._connect_once(peer, new, searched=True) if new else self.connection(peer)

    async def _connect_once(self, peer: PeerId, addrs: Sequence[Multiaddr], *, searched: bool = False) -> Connection:
        """Whoever comes while another one dials waits for that."""
        while True:
            best = self.connection(peer)
            if best is not None:
                return best
            running = self._dials.get((peer, searched))
            if running is None:
                break
            await running.wait()
        done = self._dials[peer, searched] = trio.Event()
        try:
            return await self._dial(peer, addrs)
        finally:
            del self._dials[peer, searched]
            done.set()

    async def _dial(self, peer: PeerId | None, addrs: Sequence[Multiaddr]) -> Connection:
        usable = [a for a in addrs if any(t.can_dial(a) for t in self._transports)]
        if not usable:
            raise NoAddresses(
                "no address of this peer is known"
                if not addrs
                else f"none of its addresses can be dialled from here: {', '.join(map(str, addrs[:4]))}"
            )
        self.counters["dials"] += 1
        try:
            with trio.fail_after(DIAL_TIMEOUT):
                connection = await dial_first(order_addresses(usable), lambda addr: self._dial_one(addr, peer))
        except trio.TooSlowError:
            raise ConnectError(f"no answer within {DIAL_TIMEOUT:g} s from {', '.join(map(str, usable[:4]))}") from None
        if not self._register(connection):
            raise ConnectError("the connection was refused by our own rules or limits")
        self.peerstore.add_addrs(connection.peer_id, [connection.remote_addr], CONNECTED_TTL)
        return connection

    async def _dial_one(self, addr: Multiaddr, peer: PeerId | None) -> Connection:
        for transport in self._transports:
            if transport.can_dial(addr):
                try:
                    return await transport.dial(addr, peer)
                except WrongPeer:
                    if peer is not None:
                        self.peerstore.remove_addr(peer, addr)
                    raise
        raise DialError(f"no transport for {addr}")

    async def disconnect(self, peer: PeerId) -> int:
        """Close all connections with `peer`; how many there were."""
        connections = self.connections(peer)
        for connection in connections:
            await connection.aclose()
        return len(connections)

    async def on_inbound(self, connection: Connection) -> None:
        """Transports hand accepted connections over here."""
        self.counters["inbound_connections"] += 1
        self._register(connection)

    def adopt(self, connection: Connection) -> bool:
        """Take a connection that was made without `dial` (a punched one). False: it was refused, and closed."""
        return self._register(connection)

    def _register(self, connection: Connection) -> bool:
        peer = connection.peer_id
        reason = self.gate(peer)
        session = self._sessions.get(peer)
        if reason is None and peer == self.peer_id:
            reason = "a connection with ourselves"
        if reason is None and len(self.connections(peer)) >= MAX_CONNECTIONS_PER_PEER:
            reason = "too many connections with this peer"
        if reason is None and len(self.connections()) >= MAX_CONNECTIONS and not self._trim():
            reason = "too many connections"
        if reason is not None:
            log.info("connection_refused peer=%s reason=%s", peer.short(), reason)
            self.counters["connections_refused"] += 1
            connection.abort()
            return False
        first = session is None
        if session is None:
            session = self._sessions[peer] = Session(peer)
            self.peerstore.pin(peer)
        session.connections.append(connection)
        connection.on_unread = self._unread.grew
        log.debug("connected peer=%s path=%s addr=%s", peer.short(), connection.path, connection.remote_addr)
        self.nursery.start_soon(self._serve_connection, session, connection)
        self._publish(PeerConnected(peer, connection, first))
        return True

    def _trim(self) -> bool:
        """Close the idlest connection to make room. False when every one is in use, new or protected."""
        limit = trio.current_time() - _GRACE
        idle = [
            c
            for c in self.connections()
            if c.stream_count() == 0 and c.opened_at < limit and c.peer_id not in self._protected
        ]
        if not idle:
            return False
        min(idle, key=lambda c: c.sent_bytes + c.received_bytes).abort()
        return True

    async def _serve_connection(self, session: Session, connection: Connection) -> None:
        slots = trio.Semaphore(MAX_INBOUND_STREAMS_PER_CONNECTION)
        pace = RefusalPace()
        try:
            while True:
                stream = await connection.accept_stream()
                await slots.acquire()
                self.nursery.start_soon(self._serve_stream, stream, slots, pace)
        except ConnectionLost as error:
            log.debug("connection_ended peer=%s path=%s why=%s", session.peer_id.short(), connection.path, error)
        finally:
            connection.abort()
            session.connections.remove(connection)
            if isinstance(connection.close_error, ConnectionLost):
                session.path_lost()  # without a goodbye: it was the network, or the peer's process died
            if not session.connections and self._sessions.get(session.peer_id) is session:
                del self._sessions[session.peer_id]
                self.peerstore.unpin(session.peer_id)
                self._publish(PeerDisconnected(session.peer_id))

    async def _serve_stream(self, stream: Stream, slots: trio.Semaphore, pace: RefusalPace) -> None:
        peer = stream.connection.peer_id
        try:
            with trio.fail_after(NEGOTIATION_TIMEOUT):
                protocol = await accept_protocol(stream, self._handlers, pace)
            await self._handlers[protocol](stream)
        except Exception as error:  # a bug in a handler must cost its stream and not the node
            if _is_the_peers(error):
                self.counters["streams_failed"] += 1
                log.debug("stream_failed peer=%s protocol=%s error=%s", peer.short(), stream.protocol, error)
            else:
                self.counters["handler_bugs"] += 1
                log.exception("handler_failed peer=%s protocol=%s", peer.short(), stream.protocol)
            stream.reset()
        finally:
            slots.release()

    # -- listening ----------------------------------------------------------------------------------------
    def add_transport(self, transport: Transport) -> None:
        """Dial with `transport` from now on."""
        self._transports.append(transport)

    def transports(self) -> list[Transport]:
        return list(self._transports)

    async def listen(self, addr: Multiaddr) -> Listener:
        """Listen on `addr`. Errors: `OSError` when it cannot be bound, `DialError` when no transport takes it."""
        for transport in self._transports:
            if transport.can_listen(addr):
                listener = await transport.listen(addr, self.on_inbound)
                self._listeners.append(listener)
                self._publish(SelfChanged())
                return listener
        raise DialError(f"no transport can listen on {addr}")

    async def stop_listening(self) -> None:
        """Accept no more connections; those that are up stay."""
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            await listener.aclose()

    def listen_addrs(self) -> list[Multiaddr]:
        """Where we listen, wildcards expanded to the addresses of the interfaces, without `/p2p`."""
        now = trio.current_time()
        if now >= self._expanded_until:
            self._expanded.clear()
            self._expanded_until = now + INTERFACES_KNOWN_FOR
        out: dict[Multiaddr, None] = {}
        for listener in self._listeners:
            for addr in listener.addrs:
                expanded = self._expanded.get(addr)
                if expanded is None:
                    expanded = self._expanded[addr] = expand_wildcards(addr)
                out.update(dict.fromkeys(expanded))
        return list(out)

    def advertised_addrs(self) -> list[Multiaddr]:
        """What others are told: the configured `announce` addresses, else where we listen and `address_sources`."""
        if self.announce:
            return list(self.announce)
        further = [addr for source in self.address_sources for addr in source() if addr not in self.unreachable]
        return list(dict.fromkeys([*self.listen_addrs(), *further]))

    def bound_addrs(self) -> list[Multiaddr]:
        """The sockets that we listen on, as they are bound: wildcards not expanded."""
        return list(dict.fromkeys(addr for listener in self._listeners for addr in listener.addrs))

    # -- events -------------------------------------------------------------------------------------------
    def subscribe(self) -> trio.MemoryReceiveChannel[HostEvent]:
        """Events from now on. A subscriber that falls 4,096 events behind loses the newest, which is logged: who stops
        reading before the host ends closes the channel (`with`)."""
        send, receive = trio.open_memory_channel[HostEvent](_EVENT_BUFFER)
        self._subscribers.append(send)
        return receive

    def addrs_changed(self) -> None:
        """Where we can be reached changed: tell the services, and connected peers by them."""
        self._expanded_until = float("-inf")
        self._publish(SelfChanged())

    def network_changed(self) -> None:
        """Tell the services that what failed may work now."""
        self._publish(NetworkChanged())

    def publish_identified(self, peer: PeerId, info: PeerInfo) -> None:
        """Identify learnt something about `peer`."""
        self.peerstore.set_info(peer, info)
        self._publish(PeerIdentified(peer, info))

    def _publish(self, event: HostEvent) -> None:
        for channel in list(self._subscribers):
            try:
                channel.send_nowait(event)
            except trio.WouldBlock:
                self.counters["events_lost"] += 1
                log.warning("event_lost kind=%s", type(event).__name__)
            except trio.BrokenResourceError:
                self._subscribers.remove(channel)

    async def aclose(self) -> None:
        """Stop listening and say goodbye to every peer."""
        await self.stop_listening()
        async with trio.open_nursery() as closing:
            for connection in self.connections():
                closing.start_soon(connection.aclose)


def _is_the_peers(error: Exception) -> bool:
    """Whether a stream failed by what the peer did or its going away, which handlers with tasks wrap into a group."""
    if isinstance(error, ExceptionGroup):
        return all(_is_the_peers(inner) for inner in error.exceptions)
    return isinstance(error, (LatticaError, ProtocolError, trio.TooSlowError))


@asynccontextmanager
async def open_host(
    key: PrivateKey,
    transports: Callable[[Host], Sequence[Transport]],
    *,
    listen: Sequence[Multiaddr] = (),
    announce: Sequence[Multiaddr] = (),
) -> AsyncIterator[Host]:
    """A running host with `transports(host)`, listening on `listen`. Leaving the block closes everything."""
    async with trio.open_nursery() as nursery:
        host = Host(key, nursery, announce=announce)
        for transport in transports(host):
            host.add_transport(transport)
        try:
            for addr in listen:
                await host.listen(addr)
            yield host
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 2.0):
                await host.aclose()
            nursery.cancel_scope.cancel()
