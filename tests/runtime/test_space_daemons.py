"""Spaces through real daemons: the commands, the clients, five processes of which two are cut off and one is killed."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio
import pytest
from daemon_processes import Process
from waiting import wait_until

import lattica


@pytest.fixture
def folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="space-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def pair(folder: Path) -> Iterator[tuple[Process, Process]]:
    one, two = Process(folder / "one"), Process(folder / "two")
    try:
        one.start()
        two.start("--bootstrap", one.address)
        yield one, two
    finally:
        one.stop()
        two.stop()


def test_the_commands(pair: tuple[Process, Process], folder: Path) -> None:
    one, two = pair
    space = one.json("space", "create", "roster")["space"]
    assert one.json("space", "set", space, "model", '{"version": 3}')["value"] == {"version": 3}
    joined = two.json("space", "join", space)
    assert joined["synced"] is True
    assert two.json("space", "get", space, "model")["value"] == {"version": 3}
    assert two.json("space", "get", "roster")["value"] == {"model": {"version": 3}}
    refused = two.cli("space", "set", space, "x", "1")
    assert refused.returncode == 1
    assert one.peer_id in refused.stderr
    assert two.peer_id in one.json("space", "add-writer", space, two.peer_id)["writers"]
    wait_until(lambda: two.json("space", "root", space) == one.json("space", "root", space))
    two.json("space", "set", space, "x", "1")
    wait_until(lambda: one.json("space", "get", space)["value"] == {"model": {"version": 3}, "x": 1})
    log = one.json("space", "log", space)
    assert [item["kind"] for item in log] == ["edit", "grant", "edit"]
    verified = two.json("space", "verify", space)
    assert verified["ok"] is True
    assert verified["operations"] == 3
    assert verified["refused"] == []
    proof = folder / "proof"
    proven = one.json("space", "prove", space, log[0]["operation"], "-o", str(proof))
    assert proven["bytes"] < 4096
    checked = one.json("space", "verify-proof", str(proof), "--root", one.json("space", "root", space)["root"])
    assert checked["author"] == one.peer_id
    assert {"container": None, "key": "version", "value": 3} in checked["writes"]
    assert one.cli("space", "verify-proof", str(proof), "--root", "00" * 32).returncode == 1
    assert two.cli("space", "checkpoint", space).returncode == 1
    one.json("space", "checkpoint", space)
    wait_until(lambda: two.json("space", "root", space) == one.json("space", "root", space))
    assert two.json("space", "log", space) == []
    assert two.json("space", "root", space)["operations"] == 3
    one.json("space", "remove-writer", space, two.peer_id)
    wait_until(lambda: two.json("space", "list")[0]["writable"] is False)
    assert one.json("status")["spaces"]["spaces"] == 1
    assert one.cli("space", "set", space, "x", "not json").returncode == 2
    assert one.cli("space", "get", "nowhere").returncode == 1
    assert one.cli("space", "join", "not-an-id").returncode == 1
    missing = space[:-4] + ("aaaa" if not space.endswith("aaaa") else "baaa")
    nobody = one.cli("space", "join", missing, "--timeout", "1")
    assert nobody.returncode == 1
    assert len(nobody.stderr.splitlines()) == 1


@pytest.mark.parametrize("value", ['"' + "x" * 300_000 + '"', "[" + "[]," * 40_000 + "1]", '"' + "x" * 3_000_000 + '"'])
def test_a_value_over_the_limit_of_an_operation_is_one_clear_line(folder: Path, value: str) -> None:
    process = Process(folder / "one")
    try:
        process.start()
        space = process.json("space", "create", "roster")["space"]
        root = process.json("space", "root", space)
        refused = process.cli("space", "set", space, "big", value)
        assert refused.returncode not in (0, None)
        assert len(refused.stderr.strip().splitlines()) == 1
        assert "over the limit of 262144: share a blob and write its content id" in refused.stderr
        assert len(refused.stderr) < 300
        assert process.json("space", "root", space) == root
        # What is large in another way, thousands of items, is no error: it becomes several operations.
        lists = json.loads("[" + "[]," * 9_000 + "1]")
        process.json("space", "set", space, "lists", json.dumps(lists))
        assert process.json("space", "get", space, "lists")["value"] == lists
        entries = process.json("space", "log", space)
        assert len(entries) == 1 + 3  # the first one of a chain has to be short: an empty one
        assert entries[0]["bytes"] < 200
    finally:
        process.stop()


def test_the_sync_client_reads_like_a_dict(pair: tuple[Process, Process]) -> None:
    one, two = pair
    with lattica.connect(one.home) as a, lattica.connect(two.home) as b:
        roster = a.space(a.create_space("roster", writers=[two.peer_id])["space"])
        roster["a"] = {"deep": [1, 2]}
        b.join_space(roster.id)
        other = b.space("roster")
        assert other["a"] == {"deep": [1, 2]}
        assert "a" in other
        assert list(other) == ["a"]
        with pytest.raises(KeyError):
            other["missing"]
        changes = roster.watch()
        assert next(changes) == {"action": "watching"}
        with other.transaction() as edit:
            edit["b"] = 1
            edit.counter("calls").increment(3)
            edit.list("queue").extend([1, 2])
            edit.set_of("workers").add("w1")
            edit.text("notes").append("hi")
        seen = {next(changes)["name"] for _ in range(5)}
        assert seen == {"data", "calls", "queue", "workers", "notes"}
        assert roster.root() == other.root()
        assert roster.counter("calls").value() == 3
        assert roster.snapshot() == other.snapshot()
        before = other.root()
        edit = other.transaction()
        edit["c"] = 1
        edit.text("notes").insert(99, "x")
        with pytest.raises(lattica.InvalidArgument), edit:
            pass
        assert other.root() == before
        del other["b"]
        assert "b" not in other
        queue = other.list("queue")
        assert list(queue) == [1, 2]
        assert (queue[0], queue[-1], len(queue), 2 in queue) == (1, 2, 2, True)
        with pytest.raises(IndexError):
            queue[9]
        queue.append({"deep": [7]})
        assert queue[2] == {"deep": [7]}
        assert other.list("queue", 2, "deep")[0] == 7
        queue[0] = "first"
        del queue[-1]
        assert queue == ["first", 2]
        assert other.map("data", "a")["deep"] == [1, 2]
        assert int(other.counter("calls")) == 3
        assert str(other.text("notes")) == "hi"
        assert "w1" in other.set_of("workers")
        with other.present({"role": "worker"}):
            wait_until(lambda: [member["info"] for member in roster.members()] == [{"role": "worker"}])
        wait_until(lambda: roster.members() == [])
        other.announce({"layers": "0-11"})
        wait_until(lambda: [member["info"] for member in roster.members()] == [{"layers": "0-11"}])


def test_the_async_client(pair: tuple[Process, Process]) -> None:
    async def main() -> None:
        async with lattica.aconnect(pair[0].home) as lat:
            space = lat.space((await lat.create_space("async"))["space"])
            await space.set("a", 1)
            async with space.transaction() as edit:
                edit["b"] = 2
            assert await space.get("b") == 2
            assert (await space.verify())["ok"]
            await space.list("queue").append(5)
            assert await space.list("queue")[0] == 5
            assert await space.map()["b"] == 2
            async with space.present("here"):
                assert [member["info"] for member in await space.members()] == ["here"]
            changes = space.watch()
            assert await anext(changes) == {"action": "watching"}
            await space.set("a", 3)
            assert (await anext(changes))["value"] == 3
            await changes.aclose()

    anyio.run(main)
    anyio.run(main, backend="trio")


def test_bad_input_gives_one_line_that_says_what_to_do(pair: tuple[Process, Process], folder: Path) -> None:
    one, two = pair
    space = one.json("space", "create", "mine")["space"]
    two.json("space", "join", space)
    huge = json.dumps("x" * 300_000)
    cases = {
        ("space", "get", "nowhere"): (one, 1, "lattica space list"),
        ("space", "root", space[:-2] + "aa"): (one, 1, "join"),
        ("space", "set", space, "k", "1"): (two, 1, one.peer_id),
        ("space", "add-writer", space, two.peer_id): (two, 1, one.peer_id),
        ("space", "remove-writer", space, two.peer_id): (one, 1, "no writer"),
        ("space", "remove-writer", space, one.peer_id): (one, 1, "hand"),
        ("space", "checkpoint", space): (two, 1, one.peer_id),
        ("space", "set", space, "k", "{"): (one, 2, "not JSON"),
        ("space", "set", space, "k", "123456789012345678901234567890"): (one, 2, "64 bits"),
        ("space", "set", space, "k", "[" * 40 + "]" * 40): (one, 1, "deep"),
        ("space", "delete", space, "nothing"): (one, 1, "nothing"),
        ("space", "get", space, "nothing"): (one, 1, "nothing"),
        ("space", "prove", space, "zz", "-o", str(folder / "p")): (one, 1, "lattica space log"),
        ("space", "verify-proof", str(folder / "absent")): (one, 1, "cannot read"),
        ("space", "join", "not-an-id"): (one, 1, "not-an-id"),
        ("space", "create", "x" * 200): (one, 1, "128"),
    }
    for arguments, (process, code, hint) in cases.items():
        done = process.cli(*arguments)
        assert (done.returncode, hint in done.stderr) == (code, True), (arguments, done.stderr)
        if code == 1:
            assert len(done.stderr.splitlines()) == 1, done.stderr
            assert "Traceback" not in done.stderr
    with lattica.connect(one.home) as lat:
        with pytest.raises(lattica.InvalidArgument, match="over the limit of 262144: share a blob"):
            lat.space(space)["k"] = json.loads(huge)
        assert list(lat.space(space)) == []
    assert one.json("space", "verify", space)["ok"] is True
    (folder / "junk").write_bytes(b"\x98" * 100)
    assert one.cli("space", "verify-proof", str(folder / "junk")).returncode == 1


def test_a_damaged_database_says_what_is_lost_and_comes_back(pair: tuple[Process, Process], folder: Path) -> None:
    one, two = pair
    space = one.json("space", "create", "kept", f"--writer={two.peer_id}")["space"]
    two.json("space", "join", space)
    two.json("space", "set", space, "x", "1")
    wait_until(lambda: one.json("space", "get", space)["value"] == {"x": 1})
    two.stop()
    database = two.home / "spaces.db"
    database.write_bytes(b"damaged " * 4096)
    database.with_name("spaces.db-wal").unlink(missing_ok=True)  # SQLite would heal the file from it
    two.start("--bootstrap", one.address)
    damaged = two.json("status")["spaces"]["damaged"]
    assert "spaces.db.damaged-1" in damaged
    assert "kept" in damaged
    wait_until(lambda: two.json("space", "get", space)["value"] == {"x": 1})
    two.json("space", "set", space, "x", "2")
    wait_until(lambda: one.json("space", "get", space)["value"] == {"x": 2})
    assert one.json("space", "list")[0]["excluded"] == []


def test_five_daemons_two_cut_off_one_killed_while_writing(folder: Path) -> None:
    with ExitStack() as stack:
        daemons = [Process(folder / f"d{number}") for number in range(5)]
        for daemon in daemons:
            stack.callback(daemon.stop)
        daemons[0].start()
        door = ("--bootstrap", daemons[0].address)
        for daemon in daemons[1:]:
            daemon.start(*door)
        lats = [stack.enter_context(lattica.connect(daemon.home)) for daemon in daemons]
        made = lats[0].create_space("five", writers=[daemon.peer_id for daemon in daemons[1:]])
        for lat in lats[1:]:
            lat.join_space(made["space"])
        spaces = [lat.space(made["space"]) for lat in lats]
        for number, space in enumerate(spaces):
            space[f"from{number}"] = number
        # A stopped process is a peer behind a dead link: its connections stay up, nothing gets through.
        cut = daemons[1:3]
        for daemon in cut:
            daemon.signal(signal.SIGSTOP)
        acknowledged: list[int] = []

        def write() -> None:
            for number in range(100_000):
                try:
                    spaces[3].set(f"burst{number % 50}", number)
                except lattica.LatticaError:
                    return
                acknowledged.append(number)

        writer = threading.Thread(target=write)
        writer.start()
        wait_until(lambda: len(acknowledged) > 200)
        daemons[3].signal(signal.SIGKILL)
        daemons[3].wait()
        writer.join()
        spaces[0].counter("while").increment()
        spaces[4].list("while").append("cut off")
        for daemon in cut:
            daemon.signal(signal.SIGCONT)
        spaces[1]["back"] = True
        daemons[3].start(*door)
        # What was acknowledged is there at once, from its own disk.
        last = acknowledged[-1]
        with lattica.connect(daemons[3].home) as lat:
            own = lat.space(made["space"])
            assert own[f"burst{last % 50}"] >= last
            spaces[3] = own
            own["again"] = 1
            wait_until(lambda: len({json.dumps(space.root()) for space in spaces}) == 1, 60)
            snapshots = [space.snapshot() for space in spaces]
            assert all(snapshot == snapshots[0] for snapshot in snapshots)
            assert snapshots[0]["map"]["data"]["again"] == 1
            assert snapshots[0]["counter"]["while"] == 1
            assert all(space.verify()["ok"] for space in spaces)
            assert all(info["excluded"] == [] for info in lat.spaces())
