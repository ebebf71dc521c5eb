"""Spaces over real nodes: create, join, edit on both sides, members, restart, bad input."""

from __future__ import annotations

import os
import sqlite3
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

import lattica
from lattica import node
from lattica.errors import StorageFull
from lattica.node import Node, NodeConfig, open_node
from lattica.replica import Space, service
from lattica_protocols.replica.proof import verify_proof_untrusted

TCP = "/ip4/127.0.0.1/tcp/0"


@asynccontextmanager
async def two_nodes(tmp_path: Path) -> AsyncIterator[tuple[Node, Node]]:
    async with open_node(NodeConfig(home=tmp_path / "one", listen=[TCP], kad_mode="server")) as one:
        addr = f"{one.host.listen_addrs()[0]}/p2p/{one.peer_id}"
        config = NodeConfig(home=tmp_path / "two", listen=[TCP], bootstrap=[addr], kad_mode="server")
        async with open_node(config) as two:
            await two.wait_identified(one.peer_id)
            await one.wait_identified(two.peer_id)
            yield one, two


async def until_equal(*spaces: Space) -> None:
    with trio.fail_after(20):
        while len({space.root() for space in spaces}) > 1:
            await trio.testing.wait_all_tasks_blocked(0.005)


def test_two_members_write_and_read_each_other(run, tmp_path: Path) -> None:
    async def main() -> None:
        async with two_nodes(tmp_path) as (one, two):
            space = await one.spaces.create("roster", [two.peer_id])
            space["model"] = {"name": "tiny", "layers": [1, 2]}
            space.counter("calls").increment(5)
            other = await two.spaces.join(space.id)
            await until_equal(space, other)
            assert other["model"].value() == {"name": "tiny", "layers": [1, 2]}
            other["model"]["layers"].append(3)
            other.counter("calls").increment()
            with other.transaction():
                other.text("notes").append("hello")
                other.set("workers").add("w1")
                other.list("queue").extend([1, 2, 3])
            await until_equal(space, other)
            assert space["model"]["layers"] == [1, 2, 3]
            assert space.counter("calls").value() == 6
            assert space.snapshot() == other.snapshot()
            assert str(space.text("notes")) == "hello"
            assert [entry.author for entry in space.log()].count(two.peer_id) == 3
            assert space.verify().ok
            proof = space.prove(space.log()[-1].id)
            assert len(proof) < 4096
            assert verify_proof_untrusted(proof).root == other.root()

    run(main)


def test_circles_that_have_enough_of_each_other_meet(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a parted network leaves them: everybody has as many neighbours as it looks for, all on its own side."""
    monkeypatch.setattr("lattica.replica.service.REPLICA_FANOUT", 1)
    monkeypatch.setattr("lattica.replica.service.REPLICA_MAX_NEIGHBOURS", 1)

    async def main() -> None:
        async with AsyncExitStack() as stack:
            nodes: list[Node] = []
            for _ in range(4):
                door = [f"{nodes[0].host.listen_addrs()[0]}/p2p/{nodes[0].peer_id}"] if nodes else []
                config = NodeConfig(listen=[TCP], bootstrap=door, kad_mode="server")
                nodes.append(await stack.enter_async_context(open_node(config)))
            for node in nodes[1:]:
                await node.wait_identified(nodes[0].peer_id)
            made = await nodes[0].spaces.create("split")
            spaces = [made, *[await node.spaces.join(made.id) for node in nodes[1:]]]
            for number, space in enumerate(spaces):
                for peer in space.machine.neighbours():
                    space.machine.remove_neighbour(peer)
                space.machine.add_neighbour(nodes[number ^ 1].peer_id, trio.current_time())
            await trio.testing.wait_all_tasks_blocked(0.3)  # what was on its way between the sides
            made["x"] = 1
            await until_equal(*spaces)
            assert spaces[3]["x"] == 1

    run(main)


def test_changes_are_watched(run, tmp_path: Path) -> None:
    async def main() -> None:
        async with two_nodes(tmp_path) as (one, two):
            space = await one.spaces.create("roster", [two.peer_id])
            space["a"] = 0
            other = await two.spaces.join(space.id)
            await until_equal(space, other)
            seen, done = [], []

            async def watch(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
                changes = other.watch()
                task_status.started()
                async for change in changes:
                    seen.append((change.kind, change.name, change.key, change.action, change.value))
                    if change.value in (2, [{"insert": ["x"]}]):
                        done.append(change)
                    if len(done) == 2:
                        return

            async with trio.open_nursery() as nursery:
                await nursery.start(watch)
                space["a"] = 1
                space["a"] = 2
                other.list("l").append("x")
            # What arrives together may be told as one change: the last value always is.
            assert ("map", "data", "a", "set", 2) in seen
            assert ("list", "l", None, "edit", [{"insert": ["x"]}]) in seen

    run(main)


def test_neighbours_go_on_after_their_path_was_lost(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "SEARCH_PAUSES", (600.0, 600.0))
    monkeypatch.setattr(node, "BOOTSTRAP_RETRY", (600.0, 600.0))  # nothing else brings them together again

    async def main() -> None:
        async with two_nodes(tmp_path) as (one, two):
            space = await one.spaces.create("roster", [two.peer_id])
            other = await two.spaces.join(space.id)
            await until_equal(space, other)
            for number in range(3):
                space["n"] = number
                await until_equal(space, other)
                other["m"] = number
                await until_equal(space, other)
                for connection in (*one.host.connections(), *two.host.connections()):
                    connection.abort(lattica.errors.PathLost("no answer"))
            space["last"] = True
            await until_equal(space, other)

    run(main)


def test_rights_and_bad_input(run, tmp_path: Path) -> None:
    async def main() -> None:
        async with two_nodes(tmp_path) as (one, two):
            space = await one.spaces.create("mine")
            other = await two.spaces.join(space.id)
            with pytest.raises(lattica.NotWriter, match=str(one.peer_id)):
                other["x"] = 1
            with pytest.raises(lattica.NotWriter):
                other.add_writer(two.peer_id)
            space.add_writer(two.peer_id)
            await until_equal(space, other)
            other["x"] = 1
            await until_equal(space, other)
            space.remove_writer(two.peer_id)
            await until_equal(space, other)
            with pytest.raises(lattica.NotWriter):
                other["x"] = 2
            assert space["x"] == 1
            for value in (object(), {1: 2}, 1 << 70):
                with pytest.raises(lattica.InvalidArgument):
                    space["bad"] = value
            with pytest.raises(lattica.InvalidArgument, match="over the limit"):
                space["big"] = os.urandom(300_000)
            assert "big" not in space
            space["fine"] = True
            with pytest.raises(lattica.SpaceNotFound, match="join"):
                one.spaces.get("nothing")
            unknown = space.id[:-8] + "aaaaaaaa"
            with pytest.raises((lattica.SpaceNotFound, lattica.InvalidArgument)):
                await one.spaces.join(unknown, timeout=1.5)

    run(main)


def test_a_space_is_there_after_a_restart_and_goes_on(run, tmp_path: Path) -> None:
    async def main() -> None:
        async with open_node(NodeConfig(home=tmp_path / "one", listen=[TCP])) as one:
            space = await one.spaces.create("kept")
            for i in range(20):
                space[f"k{i}"] = i
            root, name = space.root(), space.id
        async with open_node(NodeConfig(home=tmp_path / "one", listen=[TCP])) as one:
            space = one.spaces.get(name)
            assert space.root() == root
            space["more"] = 1
            space.checkpoint()
            space["after"] = 2
            root = space.root()
        async with open_node(NodeConfig(home=tmp_path / "one", listen=[TCP])) as one:
            space = one.spaces.get("kept")
            assert space.root() == root
            assert space["k3"] == 3
            assert space["after"] == 2
            assert len(space.log()) == 1
            assert space.operations() == 22
            assert space.verify().ok

    run(main)


def test_a_damaged_row_is_fetched_again_and_nothing_that_nobody_signed_is_kept(run, tmp_path: Path) -> None:
    async def main() -> None:
        async with open_node(NodeConfig(home=tmp_path / "one", listen=[TCP], kad_mode="server")) as one:
            addr = f"{one.host.listen_addrs()[0]}/p2p/{one.peer_id}"
            config = NodeConfig(home=tmp_path / "two", listen=[TCP], bootstrap=[addr], kad_mode="server")
            space = await one.spaces.create("kept", [])
            for number in range(20):
                space["x"] = 1000 + number
            async with open_node(config) as two:
                await until_equal(space, await two.spaces.join(space.id, [one.peer_id]))
            with closing(sqlite3.connect(tmp_path / "two" / "spaces.db", isolation_level=None)) as database:
                query = "SELECT place, data FROM operations LIMIT 1 OFFSET 10"
                place, data = database.execute(query).fetchone()
                value = data.index(struct.pack(">f", 1010.0))
                changed = data[:value] + struct.pack(">f", 1011.0) + data[value + 4 :]
                database.execute("UPDATE operations SET data = ? WHERE place = ?", (changed, place))
            async with open_node(config) as two:
                assert "10 stored operations" in (two.spaces.store.damaged or "")
                other = two.spaces.get(space.id)
                assert other["x"] == 1009
                await until_equal(space, other)
                assert other.verify().ok

    run(main)


def test_an_edit_that_cannot_be_stored_is_taken_back(run, tmp_path: Path) -> None:
    async def main() -> None:
        async with two_nodes(tmp_path) as (one, two):
            space = await one.spaces.create("roster", writers=[two.peer_id])
            space["kept"] = 1
            joined = await two.spaces.join(space.id)
            await until_equal(space, joined)
            database = one.spaces.store._connection
            pages = database.execute("PRAGMA page_count").fetchone()[0]
            database.execute(f"PRAGMA max_page_count = {pages}")
            root = space.root()
            watcher = space.watch()
            for n in range(3):
                with pytest.raises(StorageFull, match="disk is full"):
                    space[f"k{n}"] = "x" * 50_000
                assert space.root() == root
                assert dict(space.map().items()) == {"kept": 1}
            joined["theirs"] = 2
            database.execute("PRAGMA max_page_count = 1000000")
            space["after"] = 3
            await until_equal(space, joined)
            assert dict(space.map().items()) == {"kept": 1, "theirs": 2, "after": 3}
            assert joined.excluded == []
            assert [change async for change in _until(watcher, "after")]
        async with open_node(NodeConfig(home=tmp_path / "one", listen=[TCP])) as one:
            assert dict(one.spaces.get(space.id).map().items()) == {"kept": 1, "theirs": 2, "after": 3}

    run(main)



async def _until(watcher: AsyncIterator[Any], key: str) -> AsyncIterator[Any]:
    """Changes up to the first of `key`."""
    async for change in watcher:
        yield change
        if change.key == key or change.action == "reset":
            return


def test_a_damaged_database_is_replaced_from_another_member(run, tmp_path: Path) -> None:
    async def main() -> None:
        async with open_node(NodeConfig(home=tmp_path / "one", listen=[TCP], kad_mode="server")) as one:
            addr = f"{one.host.listen_addrs()[0]}/p2p/{one.peer_id}"
            config = NodeConfig(home=tmp_path / "two", listen=[TCP], bootstrap=[addr], kad_mode="server")
            space = await one.spaces.create("kept", [])
            async with open_node(config) as two:
                space.add_writer(two.peer_id)
                other = await two.spaces.join(space.id, [one.peer_id])
                await until_equal(space, other)
                other["x"] = 1
                await until_equal(space, other)
            database = tmp_path / "two" / "spaces.db"
            database.write_bytes(b"no database " * 1000)
            async with open_node(config) as two:
                assert "damaged" in (two.spaces.store.damaged or "")
                other = two.spaces.get(space.id)
                await until_equal(space, other)
                assert other["x"] == 1
                other["x"] = 2
                await until_equal(space, other)
                assert not space.excluded

    run(main)
