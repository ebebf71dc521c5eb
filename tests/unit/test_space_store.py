"""Spaces on disk: databases of earlier versions are read, damaged rows are seen, a failed write leaves a sound row."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from replica_members import deliver, genesis, member, put

from lattica.errors import ConfigError, StorageError
from lattica.replica.store import VERSION, SpaceStore
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.replica.genesis import space_text
from lattica_protocols.replica.operation import Operation
from lattica_protocols.replica.replica import Replica

SPACE = genesis()

VERSION_2 = """
CREATE TABLE spaces (number INTEGER PRIMARY KEY, space BLOB NOT NULL UNIQUE, genesis BLOB NOT NULL,
    instance INTEGER NOT NULL);
CREATE TABLE operations (place INTEGER PRIMARY KEY, start INTEGER NOT NULL, "end" INTEGER NOT NULL,
    data BLOB NOT NULL);
CREATE TABLE forks (number INTEGER NOT NULL, author BLOB NOT NULL, first BLOB NOT NULL,
    second BLOB NOT NULL, PRIMARY KEY (number, author)) WITHOUT ROWID;
CREATE TABLE checkpoints (number INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE snapshots (number INTEGER PRIMARY KEY, n INTEGER NOT NULL, state BLOB NOT NULL);
CREATE TABLE lost (number INTEGER NOT NULL, data BLOB NOT NULL);
CREATE TABLE signed (number INTEGER PRIMARY KEY, header BLOB NOT NULL);
PRAGMA user_version = 2;
"""


def edits(replica: Replica, first: int, last: int) -> list[Operation]:
    return [put(replica, f"k{number % 5}", number) for number in range(first, last)]


def saved(replica: Replica, store: SpaceStore) -> None:
    store.save(SPACE.id, replica.take_unsaved())


def loaded(store: SpaceStore) -> Replica:
    (stored,) = store.load()
    replica = member(0, SPACE)
    replica.load(stored.operations, stored.forks, stored.snapshot)
    return replica


def test_a_database_of_the_version_before_is_read_and_written_on(tmp_path: Path) -> None:
    owner, a = member(0, SPACE), member(1, SPACE)
    deliver(a, *edits(owner, 0, 20))
    deliver(owner, *edits(a, 20, 25))
    with sqlite3.connect(tmp_path / "spaces.db") as old:
        old.executescript(VERSION_2)
        old.execute("INSERT INTO spaces VALUES (1, ?, ?, 7)", (SPACE.id, SPACE.encode()))
        rows = [(1 << 40 | n, e.start, e.end, e.op.encoded) for n, e in enumerate(owner.graph.counted())]
        old.executemany("INSERT INTO operations VALUES (?, ?, ?, ?)", rows)
    old.close()
    with SpaceStore.open(tmp_path) as store:
        replica = loaded(store)
        assert replica.root() == owner.root()
        assert replica.verify().ok
        edits(replica, 30, 40)
        saved(replica, store)
    with SpaceStore.open(tmp_path) as store:
        again = loaded(store)
        assert again.root() == replica.root()
        assert again.value() == replica.value()
        assert again.verify().ok


def test_a_database_of_a_later_version_is_refused_in_one_line(tmp_path: Path) -> None:
    SpaceStore.open(tmp_path).close()
    with sqlite3.connect(tmp_path / "spaces.db") as later:
        later.execute(f"PRAGMA user_version = {VERSION + 1}")
    later.close()
    with pytest.raises(ConfigError, match=r"newer version of lattica \(schema"):
        SpaceStore.open(tmp_path)


def test_rows_go_on_after_restarts_and_failed_writes(tmp_path: Path) -> None:
    owner = member(0, SPACE)
    with SpaceStore.open(tmp_path) as store:
        store.add(SPACE, 7)
        edits(owner, 0, 3)
        saved(owner, store)
        edits(owner, 3, 6)
        unsaved = owner.take_unsaved()
        condition = "BEFORE INSERT ON operations WHEN NEW.place % 8 = 4"
        store._connection.execute(f"CREATE TRIGGER fails {condition} BEGIN SELECT RAISE(ABORT, ''); END")
        with pytest.raises(StorageError):
            store.save(SPACE.id, unsaved)
        store._connection.execute("DROP TRIGGER fails")
        store.save(SPACE.id, unsaved)
        assert loaded(store).root() == owner.root()
    with SpaceStore.open(tmp_path) as store:
        replica = loaded(store)
        edits(replica, 6, 9)
        saved(replica, store)
        assert loaded(store).root() == replica.root()


@pytest.mark.parametrize("place", [0, 4, 9])
def test_a_bit_that_changed_in_a_row_is_seen(tmp_path: Path, place: int) -> None:
    owner = member(0, SPACE)
    with SpaceStore.open(tmp_path) as store:
        store.add(SPACE, 7)
        edits(owner, 0, 10)
        saved(owner, store)
        (data,) = store._connection.execute("SELECT data FROM operations LIMIT 1 OFFSET ?", (place,)).fetchone()
        changed = data[:-40] + bytes([data[-40] ^ 1]) + data[-39:]
        store._connection.execute("UPDATE operations SET data = ? WHERE data = ?", (changed, data))
        with pytest.raises(RemoteProtocolError):
            loaded(store)


def delete(home: Path) -> None:
    for name in ("spaces.db", "spaces.db-wal", "spaces.db-shm"):
        (home / name).unlink(missing_ok=True)


def empty(home: Path) -> None:
    delete(home)
    (home / "spaces.db").touch()


@pytest.mark.parametrize("lose", [delete, empty])
def test_spaces_that_the_database_lacks_are_restored(tmp_path: Path, lose: Callable[[Path], None]) -> None:
    """A database that is gone is a sound new one, in which nothing tells that there was anything."""
    other = genesis(1)
    with SpaceStore.open(tmp_path) as store:
        assert store.damaged is None
        for space in (SPACE, other):
            store.add(space, 7)
    lose(tmp_path)
    with SpaceStore.open(tmp_path) as store:
        assert store.to_restore == [SPACE, other]
        for space in (SPACE, other):
            assert space_text(space.id) in (store.damaged or "")
        store.add(SPACE, 8)  # and killed before the other one
    with SpaceStore.open(tmp_path) as store:
        assert store.to_restore == [other]
        store.add(other, 8)
        store.remove(other.id)
    with SpaceStore.open(tmp_path) as store:
        assert store.to_restore == []
        assert store.damaged is None
        assert [stored.genesis for stored in store.load()] == [SPACE]


@pytest.mark.parametrize("content", [None, b"", b"[", b"\xff\x00"])
def test_a_list_of_spaces_that_cannot_be_read_is_written_again(tmp_path: Path, content: bytes | None) -> None:
    with SpaceStore.open(tmp_path) as store:
        store.add(SPACE, 7)
    path = tmp_path / "spaces.json"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with SpaceStore.open(tmp_path) as store:
        assert store.damaged is None
    empty(tmp_path)
    with SpaceStore.open(tmp_path) as store:
        assert store.to_restore == [SPACE]


def copied(home: Path, to: Path) -> Path:
    """The files as a kill would leave them."""
    to.mkdir()
    for file in home.iterdir():
        shutil.copyfile(file, to / file.name)
    return to


@pytest.mark.parametrize("damage", ["removed", "emptied", "cut", "overwritten", "none"])
def test_a_log_that_was_cut_is_told_and_its_chain_left(tmp_path: Path, damage: str) -> None:
    """Operations of ours may be with others and no more with us: to sign their numbers again means to be excluded."""
    owner = member(0, SPACE)
    (tmp_path / "home").mkdir()
    with SpaceStore.open(tmp_path / "home") as store:
        store.add(SPACE, 7)
        for number in range(20):
            edits(owner, number, number + 1)
            saved(owner, store)
        home = copied(tmp_path / "home", tmp_path / "killed")
    path = home / "spaces.db-wal"
    content = path.read_bytes()
    half = len(content) // 2
    if damage == "removed":
        path.unlink()
    elif damage != "none":
        path.write_bytes({"emptied": b"", "cut": content[:half], "overwritten": content[:half] + bytes(half)}[damage])
    with SpaceStore.open(home) as store:
        stored = store.load()
        if damage == "none":
            assert store.damaged is None
            assert [(len(s.operations), s.instance) for s in stored] == [(20, 7)]
        elif damage in ("removed", "emptied"):
            assert stored == []
            assert store.to_restore == [SPACE]
            assert "spaces.db-wal" in (store.damaged or "")
        else:
            assert 0 < len(stored[0].operations) < 20
            assert stored[0].instance != 7
            assert "spaces.db-wal" in (store.damaged or "")
        home = copied(home, tmp_path / "again")
    with SpaceStore.open(home) as store:
        assert store.to_restore == ([SPACE] if damage in ("removed", "emptied") else [])
        assert store.load() == stored
