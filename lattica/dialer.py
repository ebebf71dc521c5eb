"""Happy eyeballs over all addresses of a peer (RFC 8305, adapted): the first handshake that succeeds wins.

Addresses are ordered (loopback and private networks before public ones, direct before relayed, TCP before QUIC
because TCP carries bulk thirty times as fast here), the families interleaved, and started one after the other
with a short delay; an attempt that fails starts the next one at once. Relayed addresses do not wait for all direct
ones: they start after one delay, so that a peer that cannot be reached directly answers soon; a better path is looked
for afterwards (`lattica.punch`).

What is known of a peer may be old, and a relay that died does not refuse: it keeps silent. So others are asked for
addresses as soon as the known ones take long, and those are tried beside them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import trio

from lattica.errors import ConnectError, DialError, NoAddresses, WrongPeer

if TYPE_CHECKING:
    from lattica.interfaces import Connection
    from lattica_protocols.multiaddr import Multiaddr

ATTEMPT_DELAY = 0.25
"""Seconds before the next address is tried beside the first: RFC 8305, section 8."""
SEARCH_DELAY = 1.0
"""Seconds before others are asked: a handshake over a relay at the other end of the world takes as long."""
MAX_ATTEMPTS = 24
"""Addresses tried for one peer; a peer chooses how many it advertises."""

DialOne = Callable[["Multiaddr"], Awaitable["Connection"]]


def order_addresses(addrs: Sequence[Multiaddr], *, prefer: str = "tcp") -> list[Multiaddr]:
    """The order in which to try `addrs`; IPv6 and IPv4 alternate within one rank."""

    def rank(addr: Multiaddr) -> tuple[int, int, int]:
        target = addr.host_port()
        reach = 0 if addr.is_loopback else 1 if addr.is_private else 2
        transport = target[0] if target is not None else ""
        return (1 if addr.is_circuit else 0, 0 if transport == prefer or prefer == "any" else 1, reach)

    ranked = sorted(dict.fromkeys(addrs), key=rank)
    out: list[Multiaddr] = []
    start = 0
    while start < len(ranked):
        end = start
        while end < len(ranked) and rank(ranked[end]) == rank(ranked[start]):
            end += 1
        group = ranked[start:end]
        six = [a for a in group if a.value("ip6") is not None]
        four = [a for a in group if a.value("ip6") is None]
        while six or four:
            if six:
                out.append(six.pop(0))
            if four:
                out.append(four.pop(0))
        start = end
    return out[:MAX_ATTEMPTS]


async def dial_first(addrs: Sequence[Multiaddr], dial_one: DialOne, *, delay: float = ATTEMPT_DELAY) -> Connection:
    """Dial `addrs` in order, each `delay` seconds after the one before, and return the first connection.

    The others are cancelled; a connection that completes at the same moment is closed. When all fail:
    `WrongPeer` if somebody else answered, else `ConnectError` naming every address and its failure.
    """
    if not addrs:
        raise NoAddresses("no address of this peer is known that we can dial")
    winner: list[Connection] = []
    failures: list[tuple[Multiaddr, DialError]] = []
    circuits = [addr for addr in addrs if addr.is_circuit]
    direct = [addr for addr in addrs if not addr.is_circuit]
    direct_failed = trio.Event()

    async def attempt(addr: Multiaddr, failed: trio.Event) -> None:
        try:
            connection = await dial_one(addr)
        except DialError as error:
            failures.append((addr, error))
            failed.set()
            if len(failures) >= len(direct):
                direct_failed.set()
            return
        if winner:
            connection.abort()
            return
        winner.append(connection)
        nursery.cancel_scope.cancel()

    async def attempt_all(group: Sequence[Multiaddr]) -> None:
        for addr in group:
            failed = trio.Event()
            nursery.start_soon(attempt, addr, failed)
            with trio.move_on_after(delay):
                await failed.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(attempt_all, direct)
        if direct and circuits:
            with trio.move_on_after(delay):
                await direct_failed.wait()
        await attempt_all(circuits)
    if winner:
        return winner[0]
    for _, error in failures:
        if isinstance(error, WrongPeer):
            raise error
    if len(failures) == 1:
        raise failures[0][1]
    told = [str(error) if str(addr) in str(error) else f"{addr}: {error}" for addr, error in failures]
    raise ConnectError("; ".join(told))


async def dial_with_search(
    dial: Callable[[], Awaitable[Connection]], search: Callable[[], Awaitable[Connection | None]]
) -> Connection:
    """What `dial` makes of the addresses that are known; when it fails or takes `SEARCH_DELAY`, what `search` finds
    besides, if that is quicker. `search` returns `None` when it finds nothing.

    `WrongPeer` at once; when both fail, `ConnectError` with both reasons.
    """
    winner: list[Connection] = []
    errors: list[ConnectError] = []
    failed = trio.Event()

    async def attempt(how: Callable[[], Awaitable[Connection | None]]) -> None:
        try:
            connection = await how()
        except ConnectError as error:
            errors.append(error)
            failed.set()
            if isinstance(error, WrongPeer):
                nursery.cancel_scope.cancel()
            return
        if connection is not None:
            winner.append(connection)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(attempt, dial)
        with trio.move_on_after(SEARCH_DELAY):
            await failed.wait()
        await attempt(search)
    if winner:
        return winner[0]
    for error in errors:
        if isinstance(error, WrongPeer) or len(errors) == 1:
            raise error
    raise ConnectError("; ".join(map(str, errors)))
