"""SQLite files that are damaged: what counts as damage, and where such a file goes.

A damaged file is renamed, never deleted: somebody may want to look for what it had. Whoever opens one starts a new file
and says what is lost. What is no damage (no permission, a full disk, a lock) is not for us to repair.
"""

from __future__ import annotations

import itertools
import logging
import shutil
import sqlite3
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

log = logging.getLogger("lattica.datastore")

_WAL_INDEX_VERSION: Final = 3_007_000
_MOST_PAGES: Final = 1 << 20
"""4 GiB of 4 KiB each; the number in a damaged header can be any."""
_DAMAGE: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT, sqlite3.SQLITE_ERROR})
"""The last is what a damaged schema gives: our statements are right for the tables that we made."""
MOVE_AWAY: Final = "move the file away to go on without what it holds"
ADVICE: Final = f"look at the disk and the permissions, or {MOVE_AWAY}"


@contextmanager
def reading_damage() -> Iterator[None]:
    """Turn the `UnicodeDecodeError` that the module raises for a message about a damaged schema into damage."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise sqlite3.DatabaseError(f"the schema is no text: {error}") from None


def lenient_text(data: bytes) -> str:
    """For `text_factory`: a damaged text is a wrong text, and not the end of reading."""
    return data.decode("utf-8", "replace")


def check_database(connection: sqlite3.Connection) -> None:
    """Raises `sqlite3.DatabaseError` when the pages of the file do not fit together. Reads all of it."""
    verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if verdict != "ok":
        raise sqlite3.DatabaseError(" ".join(verdict.split()))


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the file itself is why it could not be opened."""
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:  # from check_database
        return isinstance(error, sqlite3.DatabaseError)
    return code & 0xFF in _DAMAGE


def logged_frames(path: Path) -> int:
    """How many frames the write-ahead log had that are not in the database yet, by the index beside it (`-shm`): 0
    after an orderly end, which removes both. To be asked before the database is opened.

    The index (https://sqlite.org/walformat.html, in the byte order of the machine): its header of 48 bytes twice, with
    the version at 0 and the frames at 16; at 96 the frames that the database has already.
    """
    try:
        with path.with_name(path.name + "-shm").open("rb") as file:
            index = file.read(100)
    except FileNotFoundError:
        return 0
    if len(index) < 100 or index[:48] != index[48:96]:
        return 0
    version, *_, frames = struct.unpack_from("=5I", index)
    (stored,) = struct.unpack_from("=I", index, 96)
    return int(frames) if version == _WAL_INDEX_VERSION and stored < frames else 0


def log_was_cut(connection: sqlite3.Connection, frames: int) -> bool:
    """Whether fewer frames than `logged_frames` told could be read: SQLite takes the others for never written."""
    return bool(frames and connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[1] < frames)


def move_aside(path: Path) -> Path:
    """Rename a damaged file to `<name>.damaged-<n>`; where it is now."""
    number = 1
    while (target := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    path.rename(target)
    for suffix in ("-wal", "-shm"):  # they belong to the damaged file
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    return target


def readable_rows(path: Path, tables: Mapping[str, str], starts: Sequence[bytes]) -> dict[str, list[tuple[Any, ...]]]:
    """Rows of a damaged file by table. `tables`: the column that each is ordered by, the first one; `starts`: values of
    it, ascending, from each of which is read on up to the next or to a page that cannot be read.

    Works on a copy that is as long as the file says it was: of a shorter one SQLite reads nothing. Errors: `OSError`.
    """
    with TemporaryDirectory(prefix=f"{path.name}-", dir=path.parent) as folder:
        copy = Path(folder) / path.name
        shutil.copyfile(path, copy)
        wal = path.with_name(path.name + "-wal")
        if wal.exists():
            shutil.copyfile(wal, copy.with_name(wal.name))
        with copy.open("r+b") as file:
            header = file.read(32).ljust(32, b"\0")
            pages = min(int.from_bytes(header[28:32], "big"), _MOST_PAGES)
            file.truncate(max(copy.stat().st_size, int.from_bytes(header[16:18], "big") * pages))
        with closing(sqlite3.connect(copy)) as database:
            database.text_factory = lenient_text
            return {table: _rows_from(database, table, column, starts) for table, column in tables.items()}


def _rows_from(database: sqlite3.Connection, table: str, column: str, starts: Sequence[bytes]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    failed: list[str] = []
    for start, end in itertools.zip_longest(starts, starts[1:]):
        try:
            for row in database.execute(f"SELECT * FROM {table} WHERE {column} >= ? ORDER BY {column}", (start,)):
                if end is not None and isinstance(row[0], bytes) and row[0] >= end:
                    break
                rows.append(row)  # one by one: those before an error are kept
        except (sqlite3.Error, UnicodeDecodeError) as error:
            failed.append(str(error))
    if failed:
        log.info("database_partly_unreadable table=%s ranges=%d error=%s", table, len(failed), failed[0])
    return rows
