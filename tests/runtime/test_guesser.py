"""Guessing ports between two nodes over loopback, with real sockets: the exchange over the relay, probes, QUIC on top.

Loopback has no NATs. Verdicts are given that make the peers search anyway: a socket on loopback is a hard side's as
good as one behind a NAT, only that nothing has to be opened. Real NATs are the business of tests/nat.
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from natted_nodes import circuit_to, natted_node
from test_relay import QUIC, relay_node
from waiting import until

from lattica.errors import LatticaError
from lattica.interfaces import Connection
from lattica.nat.guesser import Guess, PortGuesser
from lattica.negotiate import LazyStream
from lattica.node import Node
from lattica.transports.quic import QuicTransport
from lattica.transports.quic_endpoint import Endpoint
from lattica_protocols.limits import GUESS_ANSWERS_PER_MINUTE, GUESS_MAX_MESSAGE_BYTES
from lattica_protocols.nat.behaviour import Allocation, Filtering, Mapping, NatBehaviour, Ports
from lattica_protocols.nat.guess import PROTOCOL_ID, GuessExchange, GuessMessage, GuessType
from lattica_protocols.nat.punch_plan import Side, Technique

APDF = Filtering.ADDRESS_AND_PORT_DEPENDENT
EASY = NatBehaviour(Mapping.ENDPOINT_INDEPENDENT, APDF)
HARD = NatBehaviour(Mapping.ADDRESS_AND_PORT_DEPENDENT, APDF)


def open_sockets() -> int:
    """Of this process, of all kinds."""
    links = [Path("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd")]
    return sum(link.is_symlink() and os.readlink(link).startswith("socket:") for link in links)


def guesser(node: Node) -> PortGuesser:
    assert node.punch.guesser is not None
    return node.punch.guesser


def give_verdict(node: Node, verdict: NatBehaviour, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its samples are real, what it makes of them is not."""
    sample = guesser(node).nat.sample_ports

    async def sampled() -> Side:
        side = await sample()
        low, high = 32768, 60999
        return replace(side, behaviour=replace(verdict, allocation=Allocation(Ports.RANDOM, low, high, last=low)))

    monkeypatch.setattr(guesser(node).nat, "sample_ports", sampled)


@asynccontextmanager
async def connected_pair() -> AsyncIterator[tuple[Node, Node, list[Guess]]]:
    """A opened a relayed connection to B; both know an observer and guess ports, and no other punch runs."""
    guesses: list[Guess] = []
    async with relay_node(QUIC) as relay, natted_node(relay, [QUIC]) as a, natted_node(relay, [QUIC]) as b:
        for node in (a, b):
            await node.discover_nat()
            guesser(node).start()
            guesser(node).on_guess = lambda _, guess: guesses.append(guess)
        connection = await a.host.connect(None, [circuit_to(b)])
        assert connection.path == "relay"
        while not b.host.connections(a.peer_id):
            await trio.lowlevel.checkpoint()
        yield a, b, guesses


def relayed(node: Node, other: Node) -> Connection:
    return next(c for c in node.host.connections(other.peer_id) if c.path == "relay")


@pytest.mark.parametrize("verdicts", [(EASY, HARD), (HARD, EASY)], ids=["B opens", "A opens"])
def test_a_birthday_becomes_a_quic_path(run, monkeypatch, verdicts: tuple[NatBehaviour, NatBehaviour]) -> None:
    async def main() -> None:
        async with connected_pair() as (a, b, guesses):
            for node, verdict in zip((a, b), verdicts, strict=True):
                give_verdict(node, verdict, monkeypatch)
            adopted: list[Endpoint] = []
            adopt = QuicTransport.adopt_socket

            def adopt_socket(self: QuicTransport, *arguments: Any) -> Endpoint:
                adopted.append(adopt(self, *arguments))
                return adopted[-1]

            monkeypatch.setattr(QuicTransport, "adopt_socket", adopt_socket)
            before = open_sockets()
            assert await guesser(b).attempt(relayed(b, a), hopeless_too=True)
            for node, other in ((a, b), (b, a)):
                assert {c.path for c in node.host.connections(other.peer_id)} == {"relay", "quic"}
            while any(guess.running for guess in guesses):
                await trio.lowlevel.checkpoint()
            assert [guess.technique for guess in guesses] == [Technique.BIRTHDAY] * 2
            assert sorted(guess.opened_sockets for guess in guesses) == [False, True]
            for guess in guesses:
                assert guess.probes <= 100 * guess.seconds + 20
            # all but the winner, and those that trace routers for a moment
            await until(lambda: open_sockets() < before + 10, 10, lambda: "all but the winner are closed")
            (direct,) = [c for c in a.host.connections(b.peer_id) if c.path == "quic"]
            assert direct.direction == "outbound"
            await a.ping.ping(b.peer_id, connection=direct)
            (winner,) = adopted
            assert not winner.closed
            assert not winner.accepting, "it was for one peer"
            await direct.aclose()
            while not winner.closed:
                await trio.lowlevel.checkpoint()

    run(main)


def test_peers_that_can_be_found_without_a_guess(run, monkeypatch) -> None:
    async def main() -> None:
        async with connected_pair() as (a, b, guesses):
            for node in (a, b):
                give_verdict(node, EASY, monkeypatch)
            assert await guesser(b).attempt(relayed(b, a), hopeless_too=True)
            assert guesses[0].technique is Technique.SIMPLE

    run(main)


@pytest.mark.parametrize("seconds", [0.3, 1.5])
def test_a_partner_that_is_busy_is_waited_for_and_asked_again(run, monkeypatch, seconds: float) -> None:
    async def main() -> None:
        async with connected_pair() as (a, b, guesses), trio.open_nursery() as nursery:
            for node in (a, b):
                give_verdict(node, EASY, monkeypatch)

            async def hold(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
                async with guesser(a).turn:
                    task_status.started()
                    await trio.sleep(seconds)

            await nursery.start(hold)
            assert await guesser(b).attempt(relayed(b, a), hopeless_too=True)
            assert len(guesses) == 2

    run(main)


def nobody(peer: Side, technique: Technique) -> tuple[tuple[str, int], ...]:
    """Probes go where nobody answers."""
    return (("127.0.0.1", 9),)


def test_an_attempt_ends_with_the_relayed_connection(run, monkeypatch) -> None:
    async def main() -> None:
        async with connected_pair() as (a, b, guesses):
            for node in (a, b):
                give_verdict(node, HARD, monkeypatch)
            monkeypatch.setattr("lattica_protocols.nat.punch_plan._known_targets", nobody)
            before = open_sockets()
            connection = relayed(b, a)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(guesser(b).attempt, connection, hopeless_too=True))
                while len(guesses) < 2:
                    await trio.lowlevel.checkpoint()
                connection.abort()
            assert guesses[0].error == "the relayed connection was closed"
            assert open_sockets() < before + 10

    run(main)


def test_a_partner_that_says_nonsense_or_too_much_is_refused(run) -> None:
    async def main() -> None:
        async with connected_pair() as (a, b, guesses):

            async def ask(data: bytes) -> bytes:
                stream = LazyStream(await relayed(a, b).open_stream(), PROTOCOL_ID)
                try:
                    await stream.send_frame(data)
                    return await stream.receive_frame(GUESS_MAX_MESSAGE_BYTES)
                finally:
                    stream.reset()

            with pytest.raises(LatticaError):
                await ask(b"\xff\xff")
            answers = []
            for i in range(GUESS_ANSWERS_PER_MINUTE + 2):
                offer = GuessMessage(type=GuessType.OFFER, key=i.to_bytes(16, "big")).encode()
                answers.append(GuessMessage.decode_untrusted(await ask(offer)).type)
                while guesser(b).is_busy:
                    await trio.lowlevel.checkpoint()
            assert answers == [GuessType.OFFER] * GUESS_ANSWERS_PER_MINUTE + [GuessType.REFUSED] * 2
            assert not guesses

    run(main)


def test_nothing_is_sent_where_the_relay_does_not_see_the_partner(run, monkeypatch) -> None:
    async def main() -> None:
        async with connected_pair() as (a, b, guesses):
            give_verdict(b, HARD, monkeypatch)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as victim:
                victim.bind(("127.0.0.2", 0))
                stream = LazyStream(await relayed(a, b).open_stream(), PROTOCOL_ID)
                liar = GuessExchange(initiator=True)
                liar.offer(Side(EASY, (victim.getsockname(),)), bytes(16), trio.current_time())
                await stream.send_frame(liar.poll_transmit() or b"")
                answer = await stream.receive_frame(GUESS_MAX_MESSAGE_BYTES)
                liar.receive_untrusted(answer, trio.current_time())
                liar.go(Technique.BIRTHDAY, trio.current_time())
                await stream.send_frame(liar.poll_transmit() or b"")
                await stream.aclose()
                while not guesses or guesses[0].running:
                    await trio.lowlevel.checkpoint()
                assert "at none of the addresses" in guesses[0].error
                victim.setblocking(False)
                with pytest.raises(BlockingIOError):
                    victim.recv(100)

    run(main)
