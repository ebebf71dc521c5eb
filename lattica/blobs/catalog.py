"""The content store's table of contents: SQLite, one row a blob, and the objects that are small.

Rows say where the bytes of a blob are and which chunks are thought to be there. They are hints: nothing is served,
handed out or reported as complete on the word of a row alone, so losing the last seconds of them in a power cut
(`synchronous=NORMAL`) costs work and never content. The connection is shared by threads under one lock.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lattica.blobs.files import FileIdentity, storage_errors
from lattica.damaged_database import ADVICE, is_damage, move_aside, readable_rows
from lattica.database import WrittenByNewer, open_database
from lattica.errors import StorageError, StorageFull

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

log = logging.getLogger("lattica.blobs")

SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS objects (multihash BLOB PRIMARY KEY, data BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS blobs (
    multihash BLOB PRIMARY KEY,
    cid BLOB NOT NULL,
    kind TEXT NOT NULL,
    size INTEGER NOT NULL,
    chunks INTEGER NOT NULL,
    have BLOB,
    path TEXT,
    owned INTEGER NOT NULL,
    identity TEXT,
    pinned INTEGER NOT NULL,
    added REAL NOT NULL
) WITHOUT ROWID;
"""


_TABLES = {"objects": 2, "blobs": 11}
"""The number of columns of each."""
_KEYS = [b"", *(bytes((0x1E, 32, first)) for first in range(256))]
"""Where reading a damaged file begins, and begins again: BLAKE3 multihashes are spread evenly."""


@dataclass(slots=True)
class Row:
    """One blob."""

    multihash: bytes
    cid: bytes
    kind: str
    """`blob`, `folder` or `raw`."""
    size: int
    chunks: int
    have: bytes | None
    """Bitmap of the chunks that are there; `None`: all."""
    path: str | None
    """The file with the data. `None` for folders and raw blocks."""
    owned: bool
    """Whether the file is ours to write and to delete."""
    identity: FileIdentity | None
    """What the file looked like when its chunks were last known to be right."""
    pinned: bool
    added: float
    """Unix time."""


class Catalog:
    """Opens (and makes) the database. `StorageError` when it cannot be used.

    A damaged one is renamed, and what can be read of it is taken over: rows and objects are checked when they are used.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self.damaged: str | None = None
        """What happened to the file, when it was damaged."""
        try:
            self._db = self._connect()
        except sqlite3.Error as error:
            if not is_damage(error):
                raise StorageError(f"{path}: {error}; {ADVICE}") from error
            self._replace_damaged(error)

    def _connect(self) -> sqlite3.Connection:
        try:
            with storage_errors(self._path):
                db, cut = open_database(self._path, _SCHEMA, _migrate, SCHEMA_VERSION)
        except WrittenByNewer as error:
            raise StorageError(str(error)) from None
        db.execute("PRAGMA cache_size = -1024")
        if cut:
            self._note_log_cut()
        return db

    def _note_log_cut(self) -> None:
        self.damaged = (
            f"the log of the content store's catalog ({self._path.name}-wal) was cut or damaged, its last changes are "
            "lost. Files themselves are as they were: share or get again what 'lattica blobs list' lacks"
        )
        log.error("catalog_log_cut path=%s", self._path)

    def _replace_damaged(self, damage: sqlite3.Error) -> None:
        with storage_errors(self._path):
            saved = readable_rows(self._path, dict.fromkeys(_TABLES, "multihash"), _KEYS)
            moved = move_aside(self._path)
        try:
            self._db = self._connect()
            for table, columns in _TABLES.items():
                marks = ", ".join("?" * columns)
                rows = [row for row in saved[table] if len(row) == columns]
                self._db.execute("BEGIN")
                self._db.executemany(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", rows)
                self._db.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._error(error) from error
        blobs = self._db.execute("SELECT COUNT(*) FROM blobs").fetchone()[0]
        self.damaged = (
            f"the catalog of the content store was damaged ({damage}) and is now {moved.name}; {blobs} entries could "
            "be read from it. Files themselves are as they were: share or get again what 'lattica blobs list' lacks"
        )
        log.error("catalog_damaged moved_to=%s blobs=%d error=%s", moved, blobs, damage)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def rows(self) -> Iterator[Row]:
        """All blobs."""
        columns = "multihash, cid, kind, size, chunks, have, path, owned, identity, pinned, added"
        for row in self._query(f"SELECT {columns} FROM blobs"):
            multihash, cid, kind, size, chunks, have, path, owned, mark, pinned, added = row
            try:
                identity = FileIdentity(*(int(part) for part in mark.split())) if mark else None
            except (ValueError, TypeError, AttributeError):  # damaged: the file is hashed again
                identity = None
            yield Row(multihash, cid, kind, size, chunks, have, path, bool(owned), identity, bool(pinned), added)

    def put(self, row: Row) -> None:
        identity = row.identity
        mark = None
        if identity is not None:
            mark = f"{identity.inode} {identity.size} {identity.mtime_ns} {identity.ctime_ns}"
        values = (row.multihash, row.cid, row.kind, row.size, row.chunks, row.have, row.path, int(row.owned), mark)
        self._query(
            "INSERT OR REPLACE INTO blobs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*values, int(row.pinned), row.added),
        )

    def delete(self, multihash: bytes) -> None:
        self._query("DELETE FROM blobs WHERE multihash = ?", (multihash,))

    def find_object(self, multihash: bytes) -> bytes | None:
        found = self._query("SELECT data FROM objects WHERE multihash = ?", (multihash,))
        return found[0][0] if found else None

    def put_object(self, multihash: bytes, data: bytes) -> None:
        """`data` was checked; what stands there may be damaged."""
        self._query("INSERT OR REPLACE INTO objects VALUES (?, ?)", (multihash, data))

    def delete_object(self, multihash: bytes) -> None:
        self._query("DELETE FROM objects WHERE multihash = ?", (multihash,))

    def object_keys(self) -> list[tuple[bytes, int]]:
        """(multihash, bytes) of all objects."""
        return [(row[0], row[1]) for row in self._query("SELECT multihash, length(data) FROM objects")]

    def _query(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        try:
            with self._lock:
                return self._db.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise self._error(error) from error

    def _error(self, error: sqlite3.Error) -> StorageError:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            return StorageFull(f"no space left for {self._path}: free some; nothing is lost")
        return StorageError(f"{self._path}: {error}")


def _migrate(db: sqlite3.Connection, version: int) -> None:
    db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
