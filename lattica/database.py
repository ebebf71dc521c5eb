"""How all SQLite files of a node are opened: in WAL mode, looked at for damage, and with the tables they should have.

`synchronous=NORMAL`: a power cut can lose the last transactions and never damages the file. What a damaged file means
for whoever opens it is theirs to say; see `damaged_database`.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Final, Literal

from lattica.damaged_database import (
    MOVE_AWAY,
    check_database,
    lenient_text,
    log_was_cut,
    logged_frames,
    reading_damage,
)

BUSY_SECONDS: Final = 2.0
"""How long to wait for somebody who reads the file at the moment (a backup). Two nodes never share a home."""
_NO_VERSION: Final = 1000


class WrittenByNewer(Exception):
    """The file is of a version that we do not know; the text says what to do."""


def open_database(
    path: Path | None,
    schema: str,
    migrate: Callable[[sqlite3.Connection, int], None],
    newest: int,
    *,
    isolation_level: Literal["DEFERRED"] | None = None,
) -> tuple[sqlite3.Connection, bool]:
    """The connection, for any thread, and whether the write-ahead log lost what it had. `path` `None`: in memory.

    `migrate(connection, version)` makes the tables of `schema` out of those of an older `version`, 0 for a new file,
    and sets `user_version` to `newest`. `isolation_level` as for `sqlite3.connect`: `None` begins no transactions.

    Raises `sqlite3.Error` (see `is_damage`), `OSError` when the file cannot be made, and `WrittenByNewer`.
    """
    frames = 0 if path is None else logged_frames(path)
    if path is not None:
        # Created by us so that nobody else can read it; SQLite gives its WAL file the same mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    connection = sqlite3.connect(
        path or ":memory:", timeout=BUSY_SECONDS, isolation_level=isolation_level, check_same_thread=False
    )
    connection.text_factory = lenient_text
    try:
        with reading_damage():
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            cut = log_was_cut(connection, frames)  # before anything is written into it
            check_database(connection)
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if not 0 <= version < _NO_VERSION:
                raise sqlite3.DatabaseError(f"the schema's version is {version}")
            if version > newest:
                raise WrittenByNewer(
                    f"{path} was written by a newer version of lattica (schema {version}): use that one, or {MOVE_AWAY}"
                )
            migrate(connection, version)
            _check_schema(connection, schema)
    except BaseException:  # whatever it was; raised again
        connection.close()
        raise
    return connection, cut


def _check_schema(connection: sqlite3.Connection, schema: str) -> None:
    """Raises `sqlite3.DatabaseError` when the file lacks a table or a column that `schema` makes."""
    with closing(sqlite3.connect(":memory:")) as model:
        model.executescript(schema)
        for (table,) in model.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            columns = f"PRAGMA table_info({table})"
            if connection.execute(columns).fetchall() != model.execute(columns).fetchall():
                raise sqlite3.DatabaseError(f"the table {table} is not the one that was made")
