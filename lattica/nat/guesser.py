"""Punches through NATs whose ports have to be guessed: prediction, and the birthday technique.

Runs while the relayed connection carries the data. The peers exchange fresh samples of their NATs over it
(`lattica_protocols.nat.guess`), a machine sends the probes (`nat.punch`), and the socket that got through becomes a
QUIC path: the side that accepted the relayed connection waits on it, the other one dials. All other sockets are closed
when the attempt ends, 30 s after its beginning at most.

One attempt at a time: it may hold 256 sockets and sends up to 100 packets a second. A peer that asks meanwhile is told
so and comes back.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import random
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from lattica.errors import ConnectError
from lattica.host import PeerConnected
from lattica.nat.runner import MachineRun
from lattica.negotiate import LazyStream
from lattica.transports.quic_connection import to_multiaddr
from lattica_protocols.dcutr import PunchBudget
from lattica_protocols.limits import (
    GUESS_ANSWERS_PER_MINUTE,
    GUESS_MAX_MESSAGE_BYTES,
    GUESS_PER_IP_BURST,
    GUESS_PER_IP_PER_SECOND,
    PUNCH_TRACKED_IPS,
)
from lattica_protocols.nat.guess import HALF_KEY_BYTES, PROTOCOL_ID, GuessExchange, refusal
from lattica_protocols.nat.punch import PathFound, PunchEnded, Puncher, most_probes
from lattica_protocols.nat.punch_plan import Side, Technique, choose_technique, should_open, techniques_to_try

if TYPE_CHECKING:
    from lattica.host import Host
    from lattica.interfaces import Connection, Stream
    from lattica.nat.service import NatService
    from lattica.transports.circuit import CircuitTransport
    from lattica.transports.quic import QuicTransport
    from lattica.transports.quic_endpoint import Endpoint
    from lattica_protocols.multiaddr import Multiaddr
    from lattica_protocols.nat.behaviour import NatBehaviour
    from lattica_protocols.nat.punch_plan import PunchPlan
    from lattica_protocols.peer_id import PeerId
    from lattica_protocols.stun import SocketAddr

log = logging.getLogger("lattica.nat")

EXCHANGE_SECONDS: Final = 10.0
"""For the messages and both sides' samples."""
OPENER_WAIT: Final = 0.15
"""Between packets that open our own NATs and those that may reach the partner's: more than the two starts differ."""
HANDSHAKE_SECONDS: Final = 5.0
"""Of QUIC, once probes get through."""
TURN_SECONDS: Final = 1.0
"""A partner that asks while an attempt runs waits for so long: one that has found its path ends within 0.8 s."""
BUSY_SECONDS: Final = (0.5, 3.0)
"""Until a partner that was busy is asked again: a birthday takes 3 s in the median."""
BUSY_TRIES: Final = 16


@dataclass
class Guess:
    """One attempt, for reports."""

    technique: Technique
    opened_sockets: bool = False
    """Ours was the side that opened many sockets (birthday)."""
    probes: int = 0
    """That our side sent."""
    seconds: float = 0.0
    running: bool = True
    direct: bool = False
    found_remote: Multiaddr | None = None
    """Where the partner is on the path that was found."""
    error: str = ""
    """Why there is no direct path."""
    partner: NatBehaviour | None = None
    """What the partner said that its NATs do."""

    def __str__(self) -> str:
        part = {True: ", many sockets", False: ", many ports"}[self.opened_sockets]
        how = f"{self.technique.value}{part if self.technique is Technique.BIRTHDAY else ''}"
        result = "direct" if self.direct else "running" if self.running else self.error
        return f"{how}: {self.probes} probes, {self.seconds:.1f} s: {result}"


class PortGuesser:
    """See the top of the file."""

    def __init__(
        self,
        host: Host,
        circuits: CircuitTransport,
        nat: NatService,
        quic: QuicTransport,
        *,
        opening_hops: Callable[[], int],
        hops_measured: Callable[[], bool],
    ) -> None:
        """`opening_hops`: how far a datagram has to go that opens our own NATs; 0: we have none. `hops_measured`: that
        it is known to suffice."""
        self.nat = nat
        self.on_guess: Callable[[Connection, Guess], None] = lambda relayed, guess: None
        """Told of each attempt that begins over a relayed connection; the `Guess` is up to date when it has ended."""
        self._host = host
        self._circuits = circuits
        self._quic = quic
        self._opening_hops = opening_hops
        self._hops_measured = hops_measured
        self._rng = random.SystemRandom()
        self._budget = PunchBudget(GUESS_PER_IP_BURST, GUESS_PER_IP_PER_SECOND)
        self.turn = trio.Lock()
        """Held by the attempt that runs."""
        self._answered: dict[PeerId, list[float]] = {}

    @property
    def is_busy(self) -> bool:
        """Whether an attempt runs."""
        return self.turn.locked()

    def start(self) -> None:
        """Serve peers that begin an attempt."""
        self._host.handle(PROTOCOL_ID, self._answer)

    async def attempt(self, relayed: Connection, *, hopeless_too: bool) -> bool:
        """The part of the side that accepted `relayed`: one technique after the other. Whether a path was found.

        `hopeless_too`: try the birthday also where both verdicts say that it cannot work.
        """
        techniques: list[Technique] | None = None
        busy = 0
        while not relayed.closed.is_set() and techniques != [] and busy < BUSY_TRIES:
            async with self.turn:
                own = await self.nat.sample_ports()
                exchange = GuessExchange(initiator=True)
                with trio.fail_after(EXCHANGE_SECONDS):
                    stream = LazyStream(await relayed.open_stream(), PROTOCOL_ID)
                    techniques = await self._offer(stream, exchange, own, techniques, hopeless_too)
                if not exchange.refused and await self._punch(relayed, exchange):
                    return True
            if exchange.refused:
                busy += 1
                await trio.sleep(self._rng.uniform(*BUSY_SECONDS))
        return False

    async def _offer(
        self, stream: Stream, exchange: GuessExchange, own: Side, left: list[Technique] | None, hopeless_too: bool
    ) -> list[Technique] | None:
        """The initiator's messages. Which techniques are left."""
        with stream.reset_on_error():
            exchange.offer(own, os.urandom(HALF_KEY_BYTES), trio.current_time())
            await _send(stream, exchange)
            exchange.receive_untrusted(await stream.receive_frame(GUESS_MAX_MESSAGE_BYTES), trio.current_time())
            if exchange.partner is not None:
                behaviours = own.behaviour, exchange.partner.behaviour
                if left is None:
                    left = list(techniques_to_try(*behaviours))
                    if not hopeless_too and choose_technique(*behaviours) is Technique.NONE:
                        del left[1:]
                technique, left = left[0], left[1:]
                exchange.go(technique, trio.current_time(), opens=should_open(*behaviours, initiator=True))
                await _send(stream, exchange)
            await stream.aclose()
        return left

    async def _answer(self, stream: Stream) -> None:
        """The other side's part."""
        relayed = stream.connection
        if relayed.path != "relay":
            stream.reset()
            return
        exchange = GuessExchange(initiator=False)
        with trio.fail_after(EXCHANGE_SECONDS):
            exchange.receive_untrusted(await stream.receive_frame(GUESS_MAX_MESSAGE_BYTES), trio.current_time())
        with trio.move_on_after(TURN_SECONDS) as waiting:
            await self.turn.acquire()
        if waiting.cancelled_caught:
            await self._refuse(stream)
            return
        try:
            if not self._may_answer(relayed.peer_id):
                await self._refuse(stream)
                return
            with trio.fail_after(EXCHANGE_SECONDS):
                exchange.offer(await self.nat.sample_ports(), os.urandom(HALF_KEY_BYTES), trio.current_time())
                await _send(stream, exchange)
                exchange.receive_untrusted(await stream.receive_frame(GUESS_MAX_MESSAGE_BYTES), trio.current_time())
                await stream.aclose()
            await self._punch(relayed, exchange)
        finally:
            self.turn.release()

    async def _refuse(self, stream: Stream) -> None:
        await stream.send_frame(refusal())
        await stream.aclose()

    def _may_answer(self, peer: PeerId) -> bool:
        now = trio.current_time()
        for other, times in list(self._answered.items()):
            if now - times[-1] >= 60:
                del self._answered[other]
        recent = [at for at in self._answered.get(peer, []) if now - at < 60]
        if len(recent) >= GUESS_ANSWERS_PER_MINUTE or len(self._answered) >= PUNCH_TRACKED_IPS:
            return False
        self._answered[peer] = [*recent, now]
        return True

    # -- the punch ----------------------------------------------------------------------------------------
    async def _punch(self, relayed: Connection, exchange: GuessExchange) -> bool:
        """What was agreed on. Whether a direct connection came of it."""
        assert exchange.technique is not None
        peer, started = relayed.peer_id, trio.current_time()
        guess = Guess(exchange.technique, exchange.opens and exchange.technique is Technique.BIRTHDAY)
        guess.partner = None if exchange.partner is None else exchange.partner.behaviour
        self.on_guess(relayed, guess)
        plan = exchange.plan(
            self._proven(relayed),
            opener_ttl=self._opening_hops() or None,
            opener_wait=OPENER_WAIT,
            opener_measured=self._hops_measured(),
        )
        towards, most = _towards(plan), most_probes(plan)
        try:
            if towards is None:
                guess.error = "the relay sees the peer at none of the addresses that it names for UDP"
            elif not self._budget.take(ipaddress.ip_address(towards[0]), started, most):
                guess.error = f"{towards[0]} got as many packets as are allowed for now"
            else:
                try:
                    await trio.sleep_until(exchange.start_at or started)
                    await self._run(relayed, exchange, plan, guess)
                finally:
                    unused = max(0, most - guess.probes)
                    self._budget.give_back(ipaddress.ip_address(towards[0]), trio.current_time(), unused)
        finally:
            guess.running, guess.seconds = False, trio.current_time() - started
            log.info(
                "punch_guessed peer=%s technique=%s direct=%s probes=%d seconds=%.3f error=%s",
                peer.short(),
                guess.technique.value,
                guess.direct,
                guess.probes,
                guess.seconds,
                guess.error or "-",
            )
        return guess.direct

    async def _run(self, relayed: Connection, exchange: GuessExchange, plan: PunchPlan, guess: Guess) -> None:
        """Send the probes until one gets through, or the attempt is over, or there is another direct path."""
        peer, began = relayed.peer_id, trio.current_time()
        machine = Puncher(plan, exchange.key, controlling=exchange.initiator, rng=self._rng, now=began)
        guess.error = "nothing got through"
        async with trio.open_nursery() as nursery:
            found: list[PathFound] = []

            def on_event(event: object) -> bool:
                if isinstance(event, PathFound):
                    found.append(event)
                    guess.found_remote = to_multiaddr(event.remote)
                    guess.probes, guess.seconds = machine.probes, event.seconds
                    endpoint = self._promoted(run, event, peer, accepts=exchange.initiator)
                    nursery.start_soon(self._connect, endpoint, event, peer, exchange.initiator, guess)
                return isinstance(event, PunchEnded)

            async def give_up(when: Callable[[], Awaitable[None]], reason: str) -> None:
                await when()
                if not found:
                    guess.error = reason
                    nursery.cancel_scope.cancel()

            towards = _towards(plan)
            assert towards is not None
            run = MachineRun(self._quic.endpoint_for(towards), nursery, on_event)
            async with trio.open_nursery() as watching:
                watching.start_soon(give_up, lambda: self._until_direct(peer), "another direct path was quicker")
                watching.start_soon(give_up, relayed.closed.wait, "the relayed connection was closed")
                try:
                    await self.nat.run_machine(machine, run)
                finally:
                    guess.probes = machine.probes
                watching.cancel_scope.cancel()

    def _promoted(self, run: MachineRun, found: PathFound, peer: PeerId, *, accepts: bool) -> Endpoint:
        """The socket that got through, for QUIC."""

        async def accept(connection: Connection) -> None:
            if connection.peer_id == peer:
                await self._host.on_inbound(connection)
            else:
                connection.abort()

        def make(bound: socket.socket) -> Endpoint:
            endpoint = self._quic.adopt_socket(bound, accept if accepts else None)
            self.nat.attach_punched(endpoint)
            return endpoint

        return run.promote(found.socket, make)

    async def _connect(self, endpoint: Endpoint, found: PathFound, peer: PeerId, waits: bool, guess: Guess) -> None:
        """QUIC over the path: the controlling side waits for the other one to dial."""
        try:
            with trio.move_on_after(HANDSHAKE_SECONDS) as scope:
                if waits:
                    await self._until_direct(peer)
                else:
                    link = await self._quic.dial_punched(endpoint, found.remote, peer)
                    guess.direct = self._host.adopt(link)
            guess.direct = guess.direct or (waits and not scope.cancelled_caught)
            guess.error = "" if guess.direct else "probes got through, and QUIC did not"
        except ConnectError as error:
            guess.error = f"probes got through, and QUIC did not: {error}"
        finally:
            if endpoint.ends_with_links:
                self._quic.stop_accepting(endpoint)

    async def _until_direct(self, peer: PeerId) -> None:
        """Until there is a direct connection with `peer`."""
        with self._host.subscribe() as events:
            if any(c.path != "relay" for c in self._host.connections(peer)):
                return
            async for event in events:
                if isinstance(event, PeerConnected) and event.peer == peer and event.connection.path != "relay":
                    return

    def _proven(self, relayed: Connection) -> set[str]:
        """Where the partner is for certain: the IP addresses at which the relay sees it."""
        facts = self._circuits.facts(relayed)
        return set() if facts is None else {str(ip) for addr in facts.seen_at if (ip := addr.ip()) is not None}


def _towards(plan: PunchPlan) -> SocketAddr | None:
    """One address of those that get the probes, which are all the partner's; `None`: there is nothing to do."""
    if plan.open_towards is not None:
        return plan.open_towards
    if plan.search_ip is not None:
        return plan.search_ip, plan.search_low
    return plan.targets[0] if plan.targets else None


async def _send(stream: Stream, exchange: GuessExchange) -> None:
    while (message := exchange.poll_transmit()) is not None:
        await stream.send_frame(message)


__all__ = ["Guess", "PortGuesser"]
