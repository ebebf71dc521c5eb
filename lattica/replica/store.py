"""Spaces on disk: `spaces.db`, SQLite in WAL mode.

What a replica has to keep is written in one transaction before anything of it is acknowledged or sent, so a kill -9 at
any point loses no acknowledged operation, and nobody can know an operation of ours that we do not: that would make us
sign its sequence number twice. (A power cut, unlike a kill, can lose the last transactions: `synchronous=NORMAL`.)

    spaces       number, space, genesis, instance
    operations   place, items, data                     a row (`short_form`) with how many items each has; place: space
                                                        number << 40 | n, in the order of admission (ascending keys
                                                        fill their pages)
    forks        space number, author, first, second    proofs of equivocation; second is a msgpack array of the others
                                                        when a proof has more than two operations
    checkpoints  space number, data                     the newest
    snapshots    space number, n, state                 the document after the first n operations, behind its BLAKE3
    lost         space number, data                     own operations that a checkpoint left out
    signed       space number, header                   the checkpoint we signed last as one of a quorum

Beside it stands `spaces.json`, the genesis of each. When the database is damaged it is renamed; then, and when it lacks
a space of that list, the spaces are fetched from other members again: what only this member had is lost, and the log
and `Store.damaged` say so.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import msgpack
from blake3 import blake3

from lattica.damaged_database import ADVICE, is_damage, move_aside
from lattica.database import WrittenByNewer, open_database
from lattica.errors import ConfigError, StorageError, StorageFull
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.replica.equivocation import CROWD_OPERATIONS, FORK_OPERATIONS
from lattica_protocols.replica.genesis import Genesis, space_text
from lattica_protocols.replica.operation import Operation
from lattica_protocols.replica.replica import Unsaved
from lattica_protocols.replica.short_form import RowWriter

log = logging.getLogger("lattica.replica")

SCHEMA = """
CREATE TABLE IF NOT EXISTS spaces (number INTEGER PRIMARY KEY, space BLOB NOT NULL UNIQUE, genesis BLOB NOT NULL,
    instance INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS operations (place INTEGER PRIMARY KEY, items INTEGER NOT NULL, data BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS forks (number INTEGER NOT NULL, author BLOB NOT NULL, first BLOB NOT NULL,
    second BLOB NOT NULL, PRIMARY KEY (number, author)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS checkpoints (number INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS snapshots (number INTEGER PRIMARY KEY, n INTEGER NOT NULL, state BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS lost (number INTEGER NOT NULL, data BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS signed (number INTEGER PRIMARY KEY, header BLOB NOT NULL);
"""
VERSION = 3
"""2 has the tables `lost` and `signed`, and digests in `snapshots`; 3 has operations in the short form."""
MIGRATIONS = {
    1: "DELETE FROM snapshots;",
    2: """
ALTER TABLE operations RENAME TO operations_2;
CREATE TABLE operations (place INTEGER PRIMARY KEY, items INTEGER NOT NULL, data BLOB NOT NULL);
INSERT INTO operations SELECT place, "end" - start, data FROM operations_2 ORDER BY place;
DROP TABLE operations_2;
""",
}
"""What makes the next version of a database of each; operations that were stored in the full form stay so."""
_IN_SPACE = "place BETWEEN ? AND ?"


def _places(number: int) -> tuple[int, int]:
    """The places that the operations of a space can have."""
    return number << 40, (number + 1 << 40) - 1


@dataclass
class StoredSpace:
    """What is on disk about a space."""

    genesis: Genesis
    instance: int
    operations: list[tuple[bytes, int]]
    forks: list[list[bytes]]
    checkpoint: bytes | None
    snapshot: tuple[int, bytes]
    lost: list[bytes]
    signed: bytes


class SpaceStore:
    """Made by `open`; a context manager. All methods block for one SQLite transaction, usually under 0.1 ms."""

    def __init__(self, connection: sqlite3.Connection, path: Path | None) -> None:
        self._connection = connection
        self.path = path
        self.damaged: str | None = None
        """What was lost, when the file was damaged."""
        self.to_restore: list[Genesis] = []
        """Spaces that a damaged file had: to be fetched from others."""
        self._numbers: dict[bytes, int] = {}
        self._next: dict[int, int] = {}
        self._rows: dict[int, RowWriter] = {}
        """By space number; one that starts anew goes on with full operations."""

    @classmethod
    def open(cls, home: Path | None) -> SpaceStore:
        """Open or create `spaces.db` in `home`; `None` keeps everything in memory. Raises `ConfigError`."""
        if home is None:
            return cls(_connect(None)[0], None)
        path = home / "spaces.db"
        damage = None
        try:
            connection, cut = _connect(path)
        except sqlite3.Error as error:
            if not is_damage(error):
                raise ConfigError(f"home: cannot open {path}: {error}; {ADVICE}") from None
            damage = (error, move_aside(path))
            connection, cut = _connect(path)
        store = cls(connection, path)
        if damage is not None:
            store._note_damage(*damage)
        else:
            store._compare_with_list()
            if cut:
                store._note_log_cut()
        return store

    def _note_damage(self, error: Exception, moved: Path) -> None:
        self.to_restore = _read_list(self._list_path())
        names = ", ".join(f"{genesis.name} ({space_text(genesis.id)})" for genesis in self.to_restore) or "unknown"
        self.damaged = (
            f"the database of the spaces was damaged ({error}) and is now {moved.name}; edits that had not reached "
            f"another member are lost; fetched again from other members: {names}"
        )
        log.error("spaces_damaged moved_to=%s spaces=%d error=%s", moved, len(self.to_restore), error)

    def _compare_with_list(self) -> None:
        """The database may be sound and yet not the one that was here: deleted, emptied, or without its log."""
        known = {row[0] for row in self._connection.execute("SELECT space FROM spaces")}
        listed = _read_list(self._list_path()) if self._list_path().exists() else []
        self.to_restore = [genesis for genesis in listed if genesis.id not in known]
        if self.to_restore:
            names = ", ".join(f"{genesis.name} ({space_text(genesis.id)})" for genesis in self.to_restore)
            self.damaged = (
                f"the database of the spaces had lost {names}: its file or its log (spaces.db-wal) was deleted or cut; "
                "edits that had not reached another member are lost, the rest is fetched again from other members"
            )
            log.error("spaces_missing path=%s spaces=%d", self.path, len(self.to_restore))
        if known - {genesis.id for genesis in listed}:
            self._write_list()

    def _note_log_cut(self) -> None:
        """The last transactions are gone. We go on in chains that nobody has seen: others may have operations of ours
        that are missing here, and whoever signs a number twice is excluded for it."""
        rows = self._connection.execute("SELECT space FROM spaces").fetchall()
        if not rows:
            return  # every space is restored
        with _Writing(self._connection):
            for (space,) in rows:
                instance = int.from_bytes(os.urandom(4), "big")
                self._connection.execute("UPDATE spaces SET instance = ? WHERE space = ?", (instance, space))
        text = (
            "the log of the database of the spaces (spaces.db-wal) was cut or damaged: the last edits are lost "
            "where they had not reached another member, and fetched again where they had"
        )
        self.damaged = text if self.damaged is None else f"{self.damaged}; {text}"
        log.error("spaces_log_cut path=%s spaces=%d", self.path, len(rows))

    def note_partly_lost(self, genesis: Genesis, missing: int, error: Exception) -> None:
        """Rows of a space could not be read back: `missing` operations."""
        text = (
            f"{missing} stored operations of {genesis.name} ({space_text(genesis.id)}) were damaged ({error}); they "
            "are fetched again from other members, edits that had not reached one are lost"
        )
        self.damaged = text if self.damaged is None else f"{self.damaged}; {text}"
        log.error("space_partly_lost space=%s operations=%d error=%s", space_text(genesis.id), missing, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Everything is written already."""
        self._connection.close()

    # -- spaces ---------------------------------------------------------------------------------------------
    def load(self) -> list[StoredSpace]:
        """Everything that is stored."""
        out = []
        for number, space, genesis, instance in self._connection.execute("SELECT * FROM spaces").fetchall():
            self._numbers[space] = number
            try:
                parsed = Genesis.decode_untrusted(genesis)
            except RemoteProtocolError as error:
                log.error("space_skipped space=%s error=%s", space.hex(), error)
                continue
            out.append(self._load(number, parsed, instance))
        return out

    def load_space(self, genesis: Genesis) -> StoredSpace:
        """What is stored of one space."""
        number = self._numbers[genesis.id]
        row = self._connection.execute("SELECT instance FROM spaces WHERE number = ?", (number,)).fetchone()
        return self._load(number, genesis, row[0])

    def try_to_write(self) -> None:
        """Raises `StorageFull` or `StorageError` when nothing can be written."""
        with _Writing(self._connection):
            self._connection.execute("UPDATE spaces SET instance = instance")

    def _load(self, number: int, genesis: Genesis, instance: int) -> StoredSpace:
        run = self._connection.execute
        rows = run(
            f"SELECT data, items, place FROM operations WHERE {_IN_SPACE} ORDER BY place", _places(number)
        ).fetchall()
        self._next[number] = rows[-1][2] + 1 if rows else number << 40
        forks = run("SELECT first, second FROM forks WHERE number = ?", (number,)).fetchall()
        checkpoint = run("SELECT data FROM checkpoints WHERE number = ?", (number,)).fetchone()
        snapshot = run("SELECT n, state FROM snapshots WHERE number = ?", (number,)).fetchone()
        signed = run("SELECT header FROM signed WHERE number = ?", (number,)).fetchone()
        return StoredSpace(
            genesis,
            instance,
            [(row[0], row[1]) for row in rows],
            [_read_proof(*row) for row in forks],
            None if checkpoint is None else checkpoint[0],
            _checked_snapshot(snapshot),
            [row[0] for row in run("SELECT data FROM lost WHERE number = ?", (number,)).fetchall()],
            b"" if signed is None else signed[0],
        )

    def add(self, genesis: Genesis, instance: int) -> None:
        """Note a new space."""
        with _Writing(self._connection):
            cursor = self._connection.execute(
                "INSERT INTO spaces (space, genesis, instance) VALUES (?, ?, ?)",
                (genesis.id, genesis.encode(), instance),
            )
        number = cursor.lastrowid
        assert number is not None
        self._numbers[genesis.id] = number
        self._next[number] = number << 40
        self._write_list()

    def remove(self, space: bytes) -> None:
        """Forget a space."""
        number = self._numbers.pop(space)
        self._rows.pop(number, None)
        self.to_restore = [genesis for genesis in self.to_restore if genesis.id != space]
        self._write_list(without=space)  # first: what stands in the list and not here counts as lost
        with _Writing(self._connection):
            self._connection.execute(f"DELETE FROM operations WHERE {_IN_SPACE}", _places(number))
            for table in ("forks", "checkpoints", "snapshots", "lost", "signed", "spaces"):
                self._connection.execute(f"DELETE FROM {table} WHERE number = ?", (number,))

    # -- contents -------------------------------------------------------------------------------------------
    def save(
        self, space: bytes, unsaved: Unsaved, kept: Sequence[tuple[Operation, int]] = (), instance: int | None = None
    ) -> None:
        """Write what changed, in one transaction. With a checkpoint, `kept` are all operations that stay beside it.

        Raises `StorageFull` or `StorageError`; then nothing was written.
        """
        number = self._numbers[space]
        first = self._next[number]
        run = self._connection.execute
        row = self._rows.pop(number, None) or RowWriter()  # put back when all of it is written
        operations: Sequence[tuple[Operation, int]] = unsaved.operations
        with _Writing(self._connection):
            if unsaved.checkpoint is not None:
                operations, row = kept, RowWriter()
                run(f"DELETE FROM operations WHERE {_IN_SPACE}", _places(number))
                run("DELETE FROM snapshots WHERE number = ?", (number,))
                run("INSERT OR REPLACE INTO checkpoints VALUES (?, ?)", (number, unsaved.checkpoint.encode()))
            self._connection.executemany(
                "INSERT INTO operations VALUES (?, ?, ?)",
                [(first + index, items, row.write(op)) for index, (op, items) in enumerate(operations)],
            )
            for fork in unsaved.forks:
                proof = _proof_columns([op.encoded for op in fork.operations])
                run("INSERT OR REPLACE INTO forks VALUES (?, ?, ?, ?)", (number, fork.author, *proof))
            run_many = self._connection.executemany
            run_many("INSERT INTO lost VALUES (?, ?)", [(number, op.encoded) for op in unsaved.lost])
            if unsaved.signed:
                run("INSERT OR REPLACE INTO signed VALUES (?, ?)", (number, unsaved.signed))
            if instance is not None:
                run("UPDATE spaces SET instance = ? WHERE number = ?", (instance, number))
        self._next[number] = first + len(operations)
        self._rows[number] = row

    def save_snapshot(self, space: bytes, operations: int, state: bytes) -> None:
        """Keep the document after the first `operations` stored ones, so that they need not be applied at a start."""
        with _Writing(self._connection):
            self._connection.execute(
                "INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?)",
                (self._numbers[space], operations, blake3(state).digest() + state),
            )

    def count(self, space: bytes) -> int:
        """Operations stored since the checkpoint."""
        row = self._connection.execute(
            f"SELECT COUNT(*) FROM operations WHERE {_IN_SPACE}", _places(self._numbers[space])
        ).fetchone()
        return int(row[0])

    def flush_log(self) -> None:
        """Put what stands in the write-ahead log into the database."""
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def stored_bytes(self) -> int:
        """Size of the database, its log included."""
        if self.path is None:
            return 0
        files = [self.path, self.path.with_name(self.path.name + "-wal")]
        return sum(file.stat().st_size for file in files if file.exists())

    # -- the list beside it ---------------------------------------------------------------------------------
    def _list_path(self) -> Path:
        assert self.path is not None
        return self.path.with_name("spaces.json")

    def _write_list(self, without: bytes = b"") -> None:
        if self.path is None:
            return
        rows = self._connection.execute("SELECT genesis FROM spaces WHERE space != ?", (without,)).fetchall()
        lost = [genesis.encode() for genesis in self.to_restore if genesis.id not in self._numbers]
        temporary = self._list_path().with_suffix(".json.new")
        try:
            temporary.write_text(json.dumps([genesis.hex() for genesis in [*(row[0] for row in rows), *lost]]), "utf-8")
            temporary.replace(self._list_path())
        except OSError as error:
            log.warning("spaces_list_not_written path=%s error=%s", self._list_path(), error)


class _Writing:
    """One transaction; errors of SQLite become ours."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:  # another program has it locked, or the disk does not answer
            raise _storage_error(error) from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._connection.execute("COMMIT" if error is None else "ROLLBACK")
        except sqlite3.Error as failure:
            error = error or failure
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        if isinstance(error, sqlite3.Error):
            raise _storage_error(error) from None


def _storage_error(error: sqlite3.Error) -> StorageError:
    if "full" in str(error):
        return StorageFull("the disk is full: nothing was stored")
    return StorageError(f"the database of the spaces cannot be written: {error}")


def _connect(path: Path | None) -> tuple[sqlite3.Connection, bool]:
    """See `open_database`."""
    try:
        return open_database(path, SCHEMA, _migrate, VERSION)
    except WrittenByNewer as error:
        raise ConfigError(f"home: {error}") from None


def _migrate(connection: sqlite3.Connection, version: int) -> None:
    if version < VERSION:
        steps = "".join(MIGRATIONS[each] for each in range(version, VERSION)) if version else ""
        connection.executescript(f"BEGIN; {steps} {SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")


def _checked_snapshot(row: tuple[int, bytes] | None) -> tuple[int, bytes]:
    """The document of a snapshot; none when there is none or it is damaged."""
    if row is None or blake3(row[1][32:]).digest() != row[1][:32]:
        return 0, b""
    return row[0], row[1][32:]


def _proof_columns(row: Sequence[bytes]) -> tuple[bytes, bytes]:
    return row[0], row[1] if len(row) == FORK_OPERATIONS else msgpack.packb(row[1:])


def _read_proof(first: bytes, second: bytes) -> list[bytes]:
    """The operations of a proof. An operation is an array of 8, the others of a longer proof one of more than 15."""
    if second[:1] != b"\xdc":
        return [first, second]
    try:
        return [first, *msgpack.unpackb(second, max_array_len=CROWD_OPERATIONS)]
    except (ValueError, msgpack.UnpackException):
        return [first]  # which is no proof: the space is restored from what is sound


def _read_list(path: Path) -> list[Genesis]:
    try:
        return [Genesis.decode_untrusted(bytes.fromhex(text)) for text in json.loads(path.read_text("utf-8"))]
    except (OSError, ValueError, TypeError, RemoteProtocolError) as error:
        log.error("spaces_list_unreadable path=%s error=%s", path, error)
        return []
