"""Finds peers that have a blob: those we are connected with, and those that the DHT names."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Protocol

import trio

from lattica.blobs.source_stream import SourceStream
from lattica.errors import LatticaError
from lattica_protocols.blobs import PROTOCOL
from lattica_protocols.errors import ProtocolError
from lattica_protocols.limits import MAX_FETCH_SOURCES

if TYPE_CHECKING:
    from collections.abc import Callable

    from lattica.blobs.source_stream import SourceOwner
    from lattica.host import Host
    from lattica.interfaces import Connection
    from lattica_protocols.cid import Cid
    from lattica_protocols.multiaddr import Multiaddr
    from lattica_protocols.peer_id import PeerId

log = logging.getLogger("lattica.blobs")

ASK_TIMEOUT = 15.0
"""Seconds for one peer to be reached and to say what it has. A punch through two NATs takes up to 5."""
MAX_CONNECTED_ASKED = 64
"""Connected peers that are asked directly. A question costs a stream and 60 bytes."""
MAX_PROVIDERS = 32
"""Providers taken from the DHT: twice as many as can send at a time."""
AGAIN_SECONDS = 20.0
"""How long a source whose connection was lost is asked again: it may be changing networks."""
_AGAIN_PAUSES = (0.1, 2.0)
"""Seconds between: doubling from the first to the second."""
_ASKED_AT_A_TIME = 16
MAX_WAITING = 128
"""Peers that wait for a place."""
MAX_TURNS = 2
"""Turns of a peer that had to make room: in the first one its path may have been busy."""


class ContentRouting(Protocol):
    """What content needs of the DHT; `key` is the multihash of a content id."""

    async def provide(self, key: bytes) -> int:
        """Tell the network that we have it, now and again before the record expires; how many peers were told."""

    async def stop_providing(self, key: bytes) -> None:
        """Tell it no more."""

    def provided(self) -> list[bytes]:
        """Keys that are being told."""

    def find_providers(self, key: bytes, count: int) -> AsyncIterator[tuple[PeerId, Sequence[Multiaddr]]]:
        """Peers that said so, as they are found."""


class SourceSearch:
    """Asks peers about one blob and hands over those that have some of it.

    `found(source)` is called for each. `named` are peers that the user told us of. A peer is asked once a round;
    `rejected` peers never again.
    """

    def __init__(
        self,
        host: Host,
        routing: ContentRouting | None,
        cid: Cid,
        owner: SourceOwner,
        found: Callable[[SourceStream], None],
        named: Sequence[PeerId] = (),
    ) -> None:
        self._host = host
        self._routing = routing
        self._cid = cid
        self._owner = owner
        self._found = found
        self._named = list(named)
        self.rejected: set[PeerId] = set()
        self.active: dict[PeerId, SourceStream] = {}
        self.asked: set[PeerId] = set()
        self.silent: set[PeerId] = set()
        """Asked, and neither reached nor heard of."""
        self.waiting: OrderedDict[PeerId, Sequence[Multiaddr]] = OrderedDict()
        """Peers that may have it, while all places are taken. Whoever takes all places and sends nothing must not keep
        the others out: see `displace`."""
        self._displaced: Counter[PeerId] = Counter()
        self._letting_in = 0

    async def run_round(self, hints: Sequence[PeerId] = ()) -> None:
        """Ask `hints`; if none of them has anything, everybody we can think of."""
        if hints:
            async with trio.open_nursery() as nursery:
                for peer in hints:
                    nursery.start_soon(self._ask, peer, ())
            if self.active:
                return
        limiter = trio.Semaphore(_ASKED_AT_A_TIME)
        started: set[PeerId] = set()
        async with trio.open_nursery() as nursery:
            for peer in dict.fromkeys([*self._named, *self._connected()[:MAX_CONNECTED_ASKED]]):
                started.add(peer)
                nursery.start_soon(self._ask_within, limiter, peer, ())
            if self._routing is None:
                return
            try:
                async for peer, addrs in self._routing.find_providers(self._cid.multihash.to_bytes(), MAX_PROVIDERS):
                    if peer not in started:
                        started.add(peer)
                        nursery.start_soon(self._ask_within, limiter, peer, addrs)
            except LatticaError as error:
                log.info("providers_failed cid=%s error=%s", self._cid, error)

    def displace(self, source: SourceStream) -> None:
        """A source that gives little makes room for a peer that waits, and waits itself."""
        self._displaced[source.peer] += 1
        source.reset()
        self._wait(source.peer, ())

    async def let_in(self) -> None:
        """Ask those that wait, as far as there is room."""

        async def ask(peer: PeerId, addrs: Sequence[Multiaddr]) -> None:
            try:
                await self._ask(peer, addrs)
            finally:
                self._letting_in -= 1

        async with trio.open_nursery() as nursery:
            while self.waiting and len(self.active) + self._letting_in < MAX_FETCH_SOURCES:
                peer, addrs = self.waiting.popitem(last=False)
                self._letting_in += 1
                nursery.start_soon(ask, peer, addrs)

    def _wait(self, peer: PeerId, addrs: Sequence[Multiaddr]) -> None:
        if peer not in self.rejected and self._displaced[peer] < MAX_TURNS and len(self.waiting) < MAX_WAITING:
            self.waiting.setdefault(peer, addrs)

    async def ask_again(self, peer: PeerId) -> None:
        """The connection with a source was lost: ask it over another one, for as long as its return is likely."""
        pause = _AGAIN_PAUSES[0]
        with trio.move_on_after(AGAIN_SECONDS):
            while True:
                await self._ask(peer, ())
                if peer not in self.silent:
                    return
                await trio.sleep(pause * self._host.rng.uniform(0.75, 1.25))
                pause = min(2 * pause, _AGAIN_PAUSES[1])

    async def replace(self, source: SourceStream, connection: Connection) -> None:
        """Take a source to a better connection: a stream there, and the end of this one once the new one answers."""
        new: SourceStream | None = None
        try:
            with trio.move_on_after(ASK_TIMEOUT):
                stream = await self._host.open_stream(source.peer, PROTOCOL, connection=connection)
                new = SourceStream(self._owner, source.peer, stream)
                new.start(self._cid.multihash)
                await new.answered.wait()
        except (LatticaError, ProtocolError) as error:
            log.debug("source_stays peer=%s cid=%s error=%s", source.peer.short(), self._cid, error)
        finally:
            useful = new is not None and new.have is not None and self.active.get(source.peer) is source
            if new is not None and not useful:
                new.reset()
        if new is not None and useful:
            self.active[source.peer] = new
            source.reset()
            self._found(new)

    def describe(self) -> str:
        """How many peers were asked, in words."""
        if not self.asked:
            return "no peer is connected and the network names no provider"
        text = f"asked {len(self.asked)} peer{'s' if len(self.asked) > 1 else ''}"
        if self.rejected:
            text += f", {len(self.rejected)} sent wrong bytes"
        return text + (f", {len(self.silent)} did not answer" if self.silent else "")

    def _connected(self) -> list[PeerId]:
        peers = []
        for peer in self._host.peers():
            known = self._host.peerstore.protocols(peer)
            if not known or PROTOCOL in known:
                peers.append(peer)
        self._host.rng.shuffle(peers)
        return peers

    async def _ask_within(self, limiter: trio.Semaphore, peer: PeerId, addrs: Sequence[Multiaddr]) -> None:
        async with limiter:
            await self._ask(peer, addrs)

    async def _ask(self, peer: PeerId, addrs: Sequence[Multiaddr]) -> None:
        if peer == self._host.peer_id or peer in self.active or peer in self.rejected:
            return
        if len(self.active) >= MAX_FETCH_SOURCES:
            self._wait(peer, addrs)
            return
        self.asked.add(peer)
        self.silent.add(peer)
        source: SourceStream | None = None
        useful = False
        try:
            with trio.move_on_after(ASK_TIMEOUT):
                stream = await self._host.open_stream(peer, PROTOCOL, stream_class="bulk", addrs=addrs)
                source = SourceStream(self._owner, peer, stream)
                source.start(self._cid.multihash)
                await source.answered.wait()
                if not source.closed:
                    self.silent.discard(peer)
                    useful = source.have is not None and peer not in self.active
                    if useful and len(self.active) >= MAX_FETCH_SOURCES:
                        useful = False
                        self._wait(peer, addrs)
        except (LatticaError, ProtocolError) as error:
            log.debug("ask_failed peer=%s cid=%s error=%s", peer.short(), self._cid, error)
        finally:
            if source is not None and not useful:
                source.reset()
        if source is not None and useful:
            self.active[peer] = source
            self._found(source)
