"""Relayed connections for which no direct one was found are tried again, and sooner when somebody's network changes."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from natted_nodes import circuit_to, natted_pair, until_direct
from test_relay import QUIC

from lattica import punch
from lattica.interfaces import Connection
from lattica.node import Node
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.paths.retry import NEWS_SECONDS, Pauses

PAUSES = Pauses(60.0, 900.0, 0.5)
"""Nothing happens by itself while a test runs."""


async def resting(a: Node, b: Node) -> None:
    """Until both wait for the next round of attempts with the other."""
    while not all(
        any(relayed.peer_id == other.peer_id for relayed in node.punch._resting) for node, other in ((a, b), (b, a))
    ):
        await trio.lowlevel.checkpoint()


async def leave(relayed: Connection, a: Node, b: Node) -> None:
    await relayed.aclose()
    while a.host.connections(b.peer_id) or b.host.connections(a.peer_id):
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_news_of_the_network_are_a_reason_to_try_again(
    run: Any, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    monkeypatch.setattr(punch, "PUNCH_PAUSES", PAUSES)

    async def main() -> None:
        async with natted_pair(QUIC) as pair:
            a, b = pair.a, pair.b
            known, b.punch.candidates = b.punch.candidates, lambda: []  # type: ignore[method-assign]
            await pair.start_punching()
            await pair.connect()
            await resting(a, b)
            assert b.punch.reports[a.peer_id].attempts == 0
            b.punch.candidates = known  # type: ignore[method-assign]
            started = trio.current_time()
            if whose == "ours":
                b.host.network_changed()
            else:
                told = [*a.host.advertised_addrs(), Multiaddr.parse("/ip4/192.0.2.1/udp/4101/quic-v1")]
                a.host.advertised_addrs = lambda: told  # type: ignore[method-assign]
                a.host.addrs_changed()
            assert await until_direct(b, a) == "quic"
            assert trio.current_time() - started < PAUSES.rested + 2 * NEWS_SECONDS + 4

    run(main)


def test_a_peer_comes_back_before_the_search_for_its_former_connection_has_ended(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(punch, "PUNCH_PAUSES", PAUSES)

    async def main() -> None:
        async with natted_pair(QUIC) as pair:
            a, b = pair.a, pair.b
            for node in (a, b):
                node.punch.candidates = lambda: []  # type: ignore[method-assign]
            searching, may_end = trio.Event(), trio.Event()
            dial_known = b.punch._dial_known

            async def lasting(*arguments: Any) -> None:
                if not searching.is_set():
                    searching.set()
                    await may_end.wait()
                await dial_known(*arguments)

            monkeypatch.setattr(b.punch, "_dial_known", lasting)
            await pair.start_punching()
            former = await pair.connect()
            await searching.wait()
            await leave(former, a, b)
            again = await pair.connect()
            await resting(a, b)
            may_end.set()
            await leave(again, a, b)
            await pair.connect()
            await resting(a, b)

    run(main)


@pytest.mark.parametrize("again", ["relayed", "direct"])
def test_a_connection_made_anew_begins_the_report_anew(run: Any, monkeypatch: pytest.MonkeyPatch, again: str) -> None:
    """What a former one tried, and the time since then, is not its own; what the peer claimed stays."""
    monkeypatch.setattr(punch, "PUNCH_PAUSES", PAUSES)
    claim = "/ip4/192.0.2.1/udp/4101/quic-v1"

    async def main() -> None:
        async with natted_pair(QUIC) as pair:
            a, b = pair.a, pair.b
            known, b.punch.candidates = b.punch.candidates, lambda: []  # type: ignore[method-assign]
            await pair.start_punching()
            relayed = await pair.connect()
            await resting(a, b)
            for node, other in ((a, b), (b, a)):
                former = node.punch.reports[other.peer_id]
                former.started -= 100
                former.attempts = 7
                former.errors, former.tried, former.unproven = ["of the former"], ["of the former"], [claim]
            await leave(relayed, a, b)
            addr = circuit_to(b) if again == "relayed" else b.host.listen_addrs()[0]
            await a.host.dial(b.peer_id, [addr])
            if again == "relayed":
                await resting(a, b)
                for node, other in ((a, b), (b, a)):
                    report = node.punch.reports[other.peer_id]
                    assert (report.attempts, report.tried, report.unproven) == (0, [], [claim])
                    assert "of the former" not in report.errors
                b.punch.candidates = known  # type: ignore[method-assign]
                b.host.network_changed()
            for node, other in ((a, b), (b, a)):
                await until_direct(node, other)
                while not node.punch.reports[other.peer_id].result:
                    await trio.lowlevel.checkpoint()
                report = node.punch.reports[other.peer_id]
                assert report.result == "quic"
                if again == "relayed":
                    assert report.seconds is not None
                    assert report.seconds < 50
                else:
                    assert (report.seconds, report.technique, report.unproven) == (None, "dial", [claim])

    run(main)


def test_a_direct_path_that_is_lost_beside_a_relayed_one_is_looked_for_again(run: Any) -> None:
    async def main() -> None:
        async with natted_pair(QUIC) as pair:
            a, b = pair.a, pair.b
            await pair.start_punching()
            relayed = await pair.connect()
            stream = await relayed.open_stream()
            stream.write(b"x")  # it is in use, and stays
            await until_direct(b, a)
            await until_direct(a, b)
            for one, other in ((a, b), (b, a)):
                for connection in one.host.connections(other.peer_id):
                    if connection.path != "relay":
                        connection.abort()
            assert await until_direct(b, a) == "quic"
            assert not relayed.closed.is_set()

    run(main)
