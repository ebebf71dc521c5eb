"""A relay: gives reservations to peers that others cannot reach, and carries connections to them.

Off unless somebody starts it. What it grants is decided by `RelayTable`; bytes go through `Splice`; a cap on the
bandwidth is shared by `FairShares`. It learns only who talks to whom: both ends speak Noise through the circuit.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

import trio

from lattica.errors import ConnectionLost, LatticaError, ProtocolNotSupported
from lattica.host import PeerDisconnected
from lattica.negotiate import LazyStream
from lattica.relay.requests import first_answer, for_circuits
from lattica.relay.splice import Ledger, Splice
from lattica_protocols.errors import ProtocolError, RemoteProtocolError
from lattica_protocols.limits import RELAY_MAX_MESSAGE_BYTES, RELAY_SETUP_SECONDS
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.relay.admission import Circuit, RelayLimits, RelayTable
from lattica_protocols.relay.fairness import TICK_SECONDS, FairShares
from lattica_protocols.relay.messages import (
    HOP_PROTOCOL,
    STOP_PROTOCOL,
    HopMessage,
    HopType,
    RelayPeer,
    Reservation,
    Status,
    StopMessage,
    StopType,
    describe_status,
    hop_status,
    peer_untrusted,
)
from lattica_protocols.relay.voucher import Voucher

if TYPE_CHECKING:
    from collections.abc import Callable

    from lattica.host import Host
    from lattica.interfaces import Connection, Stream
    from lattica_protocols.peer_id import PeerId

log = logging.getLogger("lattica.relay")

IDLE_SECONDS: Final = 180.0
"""A circuit through which nothing went for so long is ended: libp2p peers ping through it every 15 to 30 s."""
REQUEST_SECONDS: Final = 10.0
"""For the one message of a hop stream to arrive."""
MAX_OWN_ADDRS: Final = 8


class RelayServer:
    """The hop service of `host`. It serves from `start` to `stop`; `run` is its background work."""

    def __init__(
        self,
        host: Host,
        *,
        limits: RelayLimits | None = None,
        bytes_per_second: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`bytes_per_second`: for all circuits together, both ways added; `None`: no cap. `clock`: Unix seconds."""
        self.table = RelayTable(limits)
        self.circuits = Ledger()
        self.serving = False
        self._host = host
        self._clock = clock
        self._protected: set[PeerId] = set()
        self._shares = FairShares(bytes_per_second, trio.current_time())

    def start(self) -> None:
        """Serve from now on: identify tells everybody."""
        if not self.serving:
            self.serving = True
            self._host.handle(HOP_PROTOCOL, self._serve)

    def stop(self) -> None:
        """Grant nothing more. Circuits that are open go on."""
        if self.serving:
            self.serving = False
            self._host.unhandle(HOP_PROTOCOL)

    async def run(self) -> None:
        """Notice peers that leave, share the bandwidth, end circuits that rest, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow_peers)
            nursery.start_soon(self._end_idle)
            if self._shares.rate is not None:
                nursery.start_soon(self._share)

    async def _follow_peers(self) -> None:
        async for event in self._host.subscribe():
            if isinstance(event, PeerDisconnected):
                self._gone(event.peer)

    def _gone(self, peer: PeerId) -> None:
        self.table.peer_gone(peer)
        if peer in self._protected:
            self._protected.discard(peer)
            self._host.unprotect(peer)

    async def _end_idle(self) -> None:
        while True:
            await trio.sleep(IDLE_SECONDS)
            for splice in self.circuits:
                if not splice.active:
                    splice.abort("nothing went through it")
                splice.active = False

    async def _share(self) -> None:
        while True:
            await trio.sleep(TICK_SECONDS)
            if self._shares.handle_timer(trio.current_time()):
                for splice in self.circuits:
                    if not splice.share.stopped:
                        splice.resume()

    # -- requests -----------------------------------------------------------------------------------------
    async def _serve(self, stream: Stream) -> None:
        with trio.fail_after(REQUEST_SECONDS):
            data = await stream.receive_frame(RELAY_MAX_MESSAGE_BYTES)
        try:
            message = HopMessage.decode_untrusted(data)
            if message.type == HopType.RESERVE:
                await self._reserve(stream)
            elif message.type == HopType.CONNECT:
                await self._connect(stream, peer_untrusted(message.peer)[0])
            else:
                await _refuse(stream, Status.UNEXPECTED_MESSAGE)
        except RemoteProtocolError:
            await _refuse(stream, Status.MALFORMED_MESSAGE)

    async def _reserve(self, stream: Stream) -> None:
        connection = stream.connection
        peer, now = connection.peer_id, trio.current_time()
        relayed = connection.path == "relay"
        refusal = self.table.reserve(peer, connection.remote_addr.ip(), relayed=relayed, now=now)
        if refusal is not None:
            log.info("reservation_refused peer=%s reason=%s", peer.short(), refusal.name)
            await _refuse(stream, refusal)
            return
        if not self._host.connections(peer):
            self.table.peer_gone(peer)  # it left while it asked, and nobody will tell us again
        elif peer not in self._protected:
            self._protected.add(peer)
            self._host.protect(peer)  # whoever relies on us is not cut off to make room
        expire = int(self._clock() + self.table.limits.reservation_seconds)
        voucher = Voucher(self._host.peer_id, peer, expire).seal(self._host.key)
        addrs = tuple(addr.with_peer(self._host.peer_id).to_bytes() for addr in self._own_addrs(connection))
        answer = HopMessage(
            type=HopType.STATUS,
            reservation=Reservation(expire=expire, addrs=addrs, voucher=voucher),
            limit=self.table.limits.message(),
            status=Status.OK,
        )
        log.info("reservation_granted peer=%s addr=%s", peer.short(), connection.remote_addr)
        await stream.send_frame(answer.encode())
        await stream.aclose()

    def _own_addrs(self, connection: Connection) -> list[Multiaddr]:
        """Where others reach us, as far as that can be of use to a peer's partners."""
        remote = connection.remote_addr
        return [
            addr
            for addr in self._host.advertised_addrs()
            if not addr.is_circuit
            and (not addr.is_loopback or remote.is_loopback)
            and (addr.is_global or not remote.is_global)
        ][:MAX_OWN_ADDRS]

    # -- circuits -----------------------------------------------------------------------------------------
    async def _connect(self, stream: Stream, target: PeerId) -> None:
        source = stream.connection
        circuit = self.table.connect(
            source.peer_id,
            source.remote_addr.ip(),
            target,
            relayed=source.path == "relay",
            now=trio.current_time(),
        )
        if not isinstance(circuit, Circuit):
            await _refuse(stream, circuit)
            return
        try:
            await self._open(stream, circuit)
        finally:
            self.table.circuit_over(circuit)

    async def _open(self, stream: Stream, circuit: Circuit) -> None:
        """Ask the target, and carry the circuit to its end."""
        try:
            with trio.fail_after(RELAY_SETUP_SECONDS):
                other = await self._ask_target(stream.connection, circuit.target)
        except (LatticaError, ProtocolError, trio.TooSlowError) as error:
            log.debug("circuit_failed target=%s error=%s", circuit.target.short(), error)
            await _refuse(stream, Status.CONNECTION_FAILED)
            return
        splice: Splice | None = None
        try:
            peer = RelayPeer.make(circuit.target, _seen_at(other.connection))
            await stream.send_frame(hop_status(Status.OK, limit=self.table.limits.message(), peer=peer))
            if isinstance(other, LazyStream):
                other = other.negotiated()
            splice = Splice(
                stream, other, self.circuits, self._shares, self._host.nursery, self.table.limits.circuit_bytes
            )
            splice.start()
            log.debug("circuit_open source=%s target=%s", circuit.source.short(), circuit.target.short())
            with trio.move_on_after(self.table.limits.circuit_seconds or float("inf")):
                await splice.over.wait()
        finally:
            if splice is not None:
                splice.abort("its time is over")
            else:
                other.reset()

    async def _ask_target(self, source: Connection, target: PeerId) -> Stream:
        connections = for_circuits(self._host.connections(target))
        if not connections:
            raise ConnectionLost("it is not connected directly any more")
        request = StopMessage(
            type=StopType.CONNECT,
            peer=RelayPeer.make(source.peer_id, _seen_at(source)),
            limit=self.table.limits.message(),
        )

        async def ask(connection: Connection) -> Stream:
            stream = await self._host.open_stream(target, STOP_PROTOCOL, connection=connection)
            with stream.reset_on_error():
                await stream.send_frame(request.encode())
                answer = StopMessage.decode_untrusted(await stream.receive_frame(RELAY_MAX_MESSAGE_BYTES))
                if answer.type != StopType.STATUS or answer.status != Status.OK:
                    raise ProtocolNotSupported(f"the target said: {describe_status(answer.status)}")
            return stream

        return await first_answer(connections, ask, lambda late: late.reset())


def _seen_at(connection: Connection) -> list[Multiaddr]:
    """The address a peer is connected from, for hole punching on the other side."""
    return [] if connection.remote_addr.ip() is None else [connection.remote_addr]


async def _refuse(stream: Stream, status: Status) -> None:
    await stream.send_frame(hop_status(status))
    await stream.aclose()
