"""What a peer asks of a relay: a reservation, and a circuit to another peer. One hop stream for each."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import trio

from lattica.errors import ConnectionLost, DialError, LatticaError, ProtocolNotSupported
from lattica_protocols.errors import ProtocolError, RemoteProtocolError
from lattica_protocols.limits import RELAY_MAX_MESSAGE_BYTES, RELAY_SETUP_SECONDS
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_record import decode_addrs_untrusted
from lattica_protocols.relay.messages import (
    HOP_PROTOCOL,
    HopMessage,
    HopType,
    Limit,
    RelayPeer,
    Status,
    describe_status,
)
from lattica_protocols.relay.voucher import Voucher

if TYPE_CHECKING:
    from lattica.host import Host
    from lattica.interfaces import Connection, Stream
    from lattica_protocols.peer_id import PeerId

CIRCUIT = Multiaddr.parse("/p2p-circuit")
SECOND_SECONDS = 1.0
"""Until the same is asked over another connection with the same peer: a NAT that restarted forgets TCP, and lets QUIC
move; whoever waits for nothing takes the dead one for good."""

T = TypeVar("T")


class RelayRefused(DialError):
    """It said no, and would say so again."""


@dataclass(frozen=True, slots=True)
class Granted:
    """A reservation."""

    seconds: float
    """How long it lasts, by our clock; the relay's own may be wrong."""
    addrs: tuple[Multiaddr, ...]
    """Of the relay, as it told them, without `/p2p`."""
    limit: Limit | None


@dataclass(frozen=True, slots=True)
class Opened:
    """A circuit: `stream` carries it from its next byte on."""

    stream: Stream
    limit: Limit | None
    seen_at: tuple[Multiaddr, ...]
    """Where the relay sees the other peer, if it tells."""


async def reserve(host: Host, connection: Connection) -> Granted:
    """Ask the relay at the other end of `connection` for a reservation. `DialError` says why there is none."""
    answer, stream = await _ask(host, connection, HopMessage(type=HopType.RESERVE))
    await stream.aclose()
    reservation = answer.reservation
    if reservation is None or reservation.expire is None:
        raise DialError(f"the relay {connection.peer_id.short()} granted a reservation without an end")
    if reservation.voucher:
        _check_voucher(reservation.voucher, connection.peer_id, host.peer_id)
    addrs = [addr.without_peer() for addr in decode_addrs_untrusted(reservation.addrs) if not addr.is_circuit]
    return Granted(reservation.expire - time.time(), tuple(addr for addr in addrs if addr.names()), answer.limit)


async def open_circuit(host: Host, connection: Connection, target: PeerId) -> Opened:
    """Ask the relay at the other end of `connection` for a circuit to `target`. `DialError` says why there is none."""
    answer, stream = await _ask(host, connection, HopMessage(type=HopType.CONNECT, peer=RelayPeer.make(target)))
    seen_at = decode_addrs_untrusted(answer.peer.addrs) if answer.peer is not None else ()
    return Opened(stream, answer.limit, seen_at)


def for_circuits(connections: Iterable[Connection]) -> list[Connection]:
    """Those that circuits can go over, the best first: TCP before QUIC, since it is cheaper, and no other relay's."""
    return sorted((c for c in connections if c.path != "relay"), key=lambda c: (c.doubtful, c.path == "quic"))


async def first_answer(
    connections: Sequence[Connection],
    ask: Callable[[Connection], Awaitable[T]],
    discard: Callable[[T], None],
    *,
    delay: float = SECOND_SECONDS,
) -> T:
    """What comes of `ask`, over the first connection or, when that fails or takes `delay`, over the next one besides.

    `discard`: an answer that came second. Errors: those of `ask`, when all have failed; of a relay that refused at
    once.
    """
    answers: list[T] = []
    errors: list[Exception] = []

    async def attempt(connection: Connection, failed: trio.Event) -> None:
        try:
            answer = await ask(connection)
        except (LatticaError, ProtocolError) as error:
            errors.append(error)
            failed.set()
            if isinstance(error, RelayRefused | ProtocolNotSupported):
                nursery.cancel_scope.cancel()
            return
        if answers:
            discard(answer)
        else:
            answers.append(answer)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for connection in connections:
            failed = trio.Event()
            nursery.start_soon(attempt, connection, failed)
            with trio.move_on_after(delay):
                await failed.wait()
    if answers:
        return answers[0]
    raise errors[-1] if isinstance(errors[-1], RelayRefused | ProtocolNotSupported) else errors[0]


async def _ask(host: Host, connection: Connection, request: HopMessage) -> tuple[HopMessage, Stream]:
    relay = connection.peer_id.short()
    try:
        with trio.fail_after(RELAY_SETUP_SECONDS):
            stream = await host.open_stream(connection.peer_id, HOP_PROTOCOL, connection=connection)
            with stream.reset_on_error():
                await stream.send_frame(request.encode())
                answer = HopMessage.decode_untrusted(await stream.receive_frame(RELAY_MAX_MESSAGE_BYTES))
                if answer.type != HopType.STATUS or answer.status != Status.OK:
                    raise RelayRefused(f"the relay {relay} refused: {describe_status(answer.status)}")
            return answer, stream
    except trio.TooSlowError:
        raise DialError(f"the relay {relay} did not answer within {RELAY_SETUP_SECONDS:g} s") from None
    except ProtocolNotSupported:
        raise DialError(f"{relay} is no relay") from None
    except DialError:
        raise
    except (ProtocolError, ConnectionLost, LatticaError) as error:
        raise DialError(f"the relay {relay}: {error}") from None


def _check_voucher(voucher: bytes, relay: PeerId, peer: PeerId) -> None:
    try:
        opened = Voucher.open_untrusted(voucher)
    except RemoteProtocolError as error:
        raise DialError(f"the relay {relay.short()} gave a bad voucher: {error}") from None
    if opened.relay != relay or opened.peer != peer:
        raise DialError(f"the relay {relay.short()} gave a voucher that is not ours")
