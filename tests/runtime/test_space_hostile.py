"""What a peer that does its worst, and another program, may do to a node's spaces."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from test_spaces import two_nodes

from lattica.errors import InvalidArgument, StorageError, StreamReset
from lattica.interfaces import Stream
from lattica.node import NodeConfig, open_node
from lattica.replica.links import FAIR_QUEUED_BYTES, MAX_ALL_QUEUED_BYTES, MAX_QUEUED_BYTES, Link, Queued
from lattica_protocols.keys import PrivateKey
from lattica_protocols.replica import PROTOCOL
from lattica_protocols.replica.presence import Presence


def test_a_peer_has_one_stream_whose_messages_are_held(run, tmp_path: Path) -> None:
    """512 streams, each with most of a message of 1 MiB, would hold 512 MiB."""

    async def main() -> None:
        async with two_nodes(tmp_path) as (one, two):
            space = await one.spaces.create("roster", [two.peer_id])
            streams: list[Stream] = []
            for _ in range(5):
                stream = await two.host.open_stream(one.peer_id, PROTOCOL)
                stream.write((1 << 20).to_bytes(4, "big"), bytes(1000))
                await stream.drain()
                streams.append(stream)
            with trio.fail_after(10):
                for stream in streams[:-1]:
                    with pytest.raises(StreamReset):
                        await stream.receive_some(100)
            other = await two.spaces.join(space.id)
            space["x"] = 1
            with trio.fail_after(10):
                while other.root() != space.root():
                    await trio.testing.wait_all_tasks_blocked(0.005)
            assert len(one.spaces._inbound) == 1

    run(main)


def test_a_message_of_operations_that_take_long_lets_others_run(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One may take 170 ms, where somebody filled a list: a message of 1,024 of them stopped everything for minutes."""
    monkeypatch.setattr("lattica.replica.service.TURN", 0.0)

    async def main() -> None:
        async with two_nodes(tmp_path) as (one, two), trio.open_nursery() as nursery:
            space = await one.spaces.create("roster", [two.peer_id])
            for number in range(200):
                space[f"{number}"] = number
            other = await two.spaces.join(space.id)
            seen = set()

            async def watch() -> None:
                while True:
                    seen.add(other.operations())
                    await trio.lowlevel.checkpoint()

            nursery.start_soon(watch)
            with trio.fail_after(10):
                while other.root() != space.root():
                    await trio.lowlevel.checkpoint()
            assert len(seen) > 100
            assert other.machine.in_step or await two.spaces.wait_synced(other)
            nursery.cancel_scope.cancel()

    run(main)


def test_a_database_that_another_program_has_locked_costs_the_edit_only(run, tmp_path: Path) -> None:
    async def main() -> None:
        async with open_node(NodeConfig(home=tmp_path)) as node:
            space = await node.spaces.create("roster")
            space["x"] = 1
            with closing(sqlite3.connect(tmp_path / "spaces.db", isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                with pytest.raises(StorageError, match="locked"):
                    space["x"] = 2
                node.spaces.wake()  # the loop stores what is new, too
                await trio.testing.wait_all_tasks_blocked(0.01)
                other.execute("ROLLBACK")
            assert space["x"] == 1
            space["x"] = 3
            assert space["x"] == 3

    run(main)


@pytest.mark.parametrize("info", [b"1" * 40, b'"\\ud800"', b"NaN", b"[" * 1000, b"\xff"])
def test_what_a_stranger_says_about_itself_can_always_be_told(run, tmp_path: Path, info: bytes) -> None:
    async def main() -> None:
        async with open_node(NodeConfig(home=tmp_path)) as node:
            space = await node.spaces.create("roster")
            now = node.spaces._clock()
            record = Presence(space.replica.space).announce(PrivateKey.generate(bytes(32)), info, 0.0, now)
            assert space.machine.presence.receive_untrusted(record, trio.current_time(), now)
            (member,) = space.members()
            assert member.info is None

    run(main)


def test_only_what_others_can_read_is_announced(run, tmp_path: Path) -> None:
    async def main() -> None:
        async with open_node(NodeConfig(home=tmp_path)) as node:
            space = await node.spaces.create("roster")
            bad: list[Any] = [1 << 70, float("nan"), "\ud800", {1, 2}]
            for info in bad:
                with pytest.raises(InvalidArgument, match="JSON value"):
                    space.announce(info)
            space.announce({"load": 0.5})
            assert json.dumps(space.members()[0].info) == '{"load": 0.5}'

    run(main)


def test_peers_that_read_nothing_share_a_bound() -> None:
    queued = Queued()
    links = [Link(None, None, lambda *_: None, queued) for _ in range(40)]  # type: ignore[arg-type]
    for link in links:
        for _ in range(2 * MAX_QUEUED_BYTES >> 20):
            link.send(bytes(1 << 20))
    assert queued.bytes <= MAX_ALL_QUEUED_BYTES + len(links) * FAIR_QUEUED_BYTES
    assert links[0]._queued == MAX_QUEUED_BYTES
    assert links[-1]._queued == FAIR_QUEUED_BYTES
