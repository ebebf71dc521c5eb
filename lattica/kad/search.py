"""Driving the lookup machines: a task per request, and a search whose results are read while it runs."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Self

import trio

from lattica.errors import LatticaError
from lattica_protocols.errors import ProtocolError
from lattica_protocols.kad.messages import PeerAddrs

if TYPE_CHECKING:
    from lattica_protocols.kad.lookup import Lookup
    from lattica_protocols.peer_id import PeerId

log = logging.getLogger("lattica.kad")

Ask = Callable[["PeerId"], Awaitable[Iterable[PeerAddrs]]]
"""Asks one peer, digests what the answer carries and gives the closer peers in it."""


async def drive(lookup: Lookup, ask: Ask, *, book: dict[PeerId, PeerAddrs]) -> None:
    """Run `lookup` to its end. Addresses of peers heard of go into `book` for `ask` to use; the first word counts.

    A peer that cannot be asked is the lookup's business and no error.
    """
    wake = trio.Event()

    async def one(peer: PeerId) -> None:
        try:
            closer = list(await ask(peer))
        except (LatticaError, ProtocolError) as error:
            log.debug("request_failed peer=%s error=%s", peer.short(), error)
            lookup.on_failure(peer, trio.current_time())
        else:
            for named in closer:
                book.setdefault(named.peer, named)
            lookup.on_success(peer, [named.peer for named in closer], trio.current_time())
        wake.set()

    async with trio.open_nursery() as nursery:
        while True:
            while (peer := lookup.next(trio.current_time())) is not None:
                nursery.start_soon(one, peer)
            if lookup.finished:
                nursery.cancel_scope.cancel()
                return
            deadline = lookup.next_timeout()
            with trio.move_on_at(float("inf") if deadline is None else deadline):
                await wake.wait()
            wake = trio.Event()


class ProviderSearch:
    """An asynchronous iterator over providers: `async for peer, addrs in search`, each peer once.

    It goes on in the background while nobody reads, and is bounded by its lookup. `cancel` ends it early.
    """

    def __init__(self, count: int) -> None:
        self.asked = 0
        """Peers that were asked; with `answered` for a message when nothing was found. Grows while it runs."""
        self.answered = 0
        self.scope = trio.CancelScope()
        """Of the task that searches."""
        self._count = count
        self._found: set[PeerId] = set()
        self._queue: deque[PeerAddrs] = deque()
        self._changed = trio.Event()
        self._done = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> PeerAddrs:
        await trio.lowlevel.checkpoint()
        while not self._queue:
            if self._done:
                raise StopAsyncIteration
            await self._changed.wait()
        return self._queue.popleft()

    def cancel(self) -> None:
        """Stop searching; what was found already can still be read."""
        self.scope.cancel()
        self.finish()

    # -- the side that searches ---------------------------------------------------------------------------
    @property
    def is_full(self) -> bool:
        """As many as wanted were found."""
        return len(self._found) >= self._count

    def found(self, provider: PeerAddrs) -> None:
        """Hand on a provider, unless it was before or there are enough."""
        if provider.peer in self._found or self.is_full or self._done:
            return
        self._found.add(provider.peer)
        self._queue.append(provider)
        self._wake()

    def finish(self) -> None:
        """Nothing more will be found."""
        self._done = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        if not self._done:
            self._changed = trio.Event()
