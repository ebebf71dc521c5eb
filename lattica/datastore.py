"""Everything small that must survive a restart: one SQLite file, `lattica.db`.

Written behind: whoever changes something calls a `save_*` or `drop_*` method, which only notes it down; `flush` writes
all notes in one transaction, in a worker thread, so the event loop never waits for a disk. The last change of a row
wins, so the notes never grow beyond the rows there are. A crash loses at most what was noted since the last flush, and
nothing in here is the only copy of something a user made: records are renewed, contacts are found again.

The file is in WAL mode with `synchronous=NORMAL`: a power cut can lose the last transactions and never damages it. If
it is damaged all the same (a full copy of a broken disk, another program), it is renamed to `lattica.db.damaged-<n>`, a
new one is started, and the log says so. The schema has a version in `user_version`; `MIGRATIONS` lead from each to the
next, and a file of a newer version is refused instead of guessed at.

Tables (times are Unix seconds; addresses are multiaddrs, each as uvarint(length) || bytes):

    providers  key, provider, addrs, received               who told us to provide what
    records    key, value, sender, received, expires        values that others stored with us
    provided   key, announced                               what we provide ourselves
    published  name, value, sequence, expires, renew, put   values that we sign ourselves
    contacts   peer, addrs, seen                            the routing table at the last snapshot
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import trio

from lattica.damaged_database import ADVICE, is_damage, move_aside
from lattica.database import WrittenByNewer, open_database
from lattica.errors import ConfigError, StorageFull
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.kad.store import ProviderRecord, ValueRecord
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId
from lattica_protocols.varint import decode_uvarint_untrusted, encode_uvarint

if TYPE_CHECKING:
    Statement = tuple[str, tuple[Any, ...]]

log = logging.getLogger("lattica.datastore")
T = TypeVar("T")

MIGRATIONS: Sequence[str] = (
    """
    CREATE TABLE providers (key BLOB NOT NULL, provider BLOB NOT NULL, addrs BLOB NOT NULL, received REAL NOT NULL,
        PRIMARY KEY (key, provider)) WITHOUT ROWID;
    CREATE TABLE records (key BLOB PRIMARY KEY, value BLOB NOT NULL, sender BLOB NOT NULL, received REAL NOT NULL,
        expires REAL NOT NULL) WITHOUT ROWID;
    CREATE TABLE provided (key BLOB PRIMARY KEY, announced REAL NOT NULL) WITHOUT ROWID;
    CREATE TABLE published (name TEXT PRIMARY KEY, value BLOB NOT NULL, sequence INTEGER NOT NULL,
        expires INTEGER NOT NULL, renew INTEGER NOT NULL, put REAL NOT NULL) WITHOUT ROWID;
    CREATE TABLE contacts (peer BLOB PRIMARY KEY, addrs BLOB NOT NULL, seen REAL NOT NULL) WITHOUT ROWID;
    """,
)
"""Step n leads from version n to n + 1. Published steps never change."""


@dataclass(frozen=True, slots=True)
class PublishedValue:
    """A value of ours: what is signed under `name`."""

    name: str
    value: bytes
    sequence: int
    expires: int
    """Unix seconds."""
    renew: bool
    """Sign it anew before it expires, for as long as we run."""
    put: float
    """Unix seconds when it was last stored in the network, 0: never."""


@dataclass(frozen=True, slots=True)
class StoredContact:
    """A peer that was in the routing table."""

    peer: PeerId
    addrs: tuple[Multiaddr, ...]
    seen: float


class Datastore:
    """Made by `open`. A context manager: leaving it writes what was noted and closes the file."""

    def __init__(self, connection: sqlite3.Connection, path: Path | None) -> None:
        self._connection = connection
        self._notes: dict[tuple[str, *tuple[Any, ...]], Statement] = {}
        self._noted = trio.Event()
        self._writing = trio.Lock()
        self.path = path
        self.moved_aside: Path | None = None
        """Where a damaged file was renamed to by `open`."""

    @classmethod
    def open(cls, path: Path | None) -> Datastore:
        """Open or create the file at `path`; `None` keeps everything in memory.

        Takes a few milliseconds of disk; meant for start-up. `ConfigError`: the file cannot be opened or written, or
        it was written by a newer version.
        """
        if path is None:
            return cls(_connect(None)[0], None)
        moved = None
        try:
            connection, cut = _connect(path)
        except sqlite3.Error as error:
            if not is_damage(error):
                raise ConfigError(f"home: cannot open {path}: {error}; {ADVICE}") from None
            moved = move_aside(path)
            log.error("database_damaged path=%s error=%s moved_to=%s", path, error, moved)
            connection, cut = _connect(path)
        except OSError as error:
            raise ConfigError(f"home: cannot open {path}: {error.strerror}") from None
        if cut:
            log.error("database_log_cut path=%s", path)
        store = cls(connection, path)
        store.moved_aside = moved
        return store

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Write what was noted, and close. Blocks for one transaction."""
        try:
            self._write(self._take_notes())
        except sqlite3.Error as error:
            log.error("database_write_failed path=%s error=%s", self.path, error)
        self._connection.close()

    async def flush(self) -> None:
        """Write what was noted since the last flush, in one transaction and another thread.

        `StorageFull`: it could not be written (the message says why). The notes are kept for the next time.
        """
        async with self._writing:
            notes = self._take_notes()
            if not notes:
                return
            try:
                await self._off_loop(lambda: self._write(notes))
            except sqlite3.Error as error:
                self._notes = notes | self._notes
                self._noted.set()
                raise StorageFull(f"cannot write {self.path}: {error}") from None

    async def read(self, load: Callable[[], T]) -> T:
        """Run one of the `load_*` methods without holding up the event loop."""
        async with self._writing:
            return await self._off_loop(load)

    async def _off_loop(self, work: Callable[[], T]) -> T:
        if self.path is None:  # memory answers in microseconds; a thread would take longer to start
            await trio.lowlevel.checkpoint()
            return work()
        return await trio.to_thread.run_sync(work)

    async def wait_noted(self) -> None:
        """Returns when there is something to write."""
        await self._noted.wait()

    def pending(self) -> int:
        """Rows that are noted and not yet written."""
        return len(self._notes)

    def _take_notes(self) -> dict[tuple[str, *tuple[Any, ...]], Statement]:
        notes, self._notes = self._notes, {}
        self._noted = trio.Event()
        return notes

    def _note(self, row: tuple[str, *tuple[Any, ...]], sql: str, values: tuple[Any, ...]) -> None:
        self._notes[row] = sql, values
        self._noted.set()

    def _write(self, notes: dict[tuple[str, *tuple[Any, ...]], Statement]) -> None:
        with self._connection:  # commits, or rolls back
            for sql, values in notes.values():
                self._connection.execute(sql, values)

    def _save(self, table: str, key: tuple[Any, ...], *values: Any) -> None:
        marks = ", ".join("?" * (len(key) + len(values)))
        self._note((table, *key), f"INSERT OR REPLACE INTO {table} VALUES ({marks})", (*key, *values))

    def _drop(self, table: str, columns: str, *key: Any) -> None:
        condition = " AND ".join(f"{column} = ?" for column in columns.split())
        self._note((table, *key), f"DELETE FROM {table} WHERE {condition}", key)

    def _load(self, table: str, make: Callable[..., Any]) -> list[Any]:
        """All rows, through `make`. A row that does not parse is skipped: somebody edited the file."""
        self._write(self._take_notes())
        out = []
        for row in self._connection.execute(f"SELECT * FROM {table}"):
            try:
                out.append(make(*row))
            except (RemoteProtocolError, ValueError, TypeError) as error:
                log.warning("database_row_skipped table=%s error=%s", table, error)
        return out

    # -- provider records of others -----------------------------------------------------------------------
    def save_provider(self, record: ProviderRecord) -> None:
        key = record.key, record.provider.to_bytes()
        self._save("providers", key, _pack_addrs(record.addrs), record.received)

    def drop_provider(self, key: bytes, provider: PeerId) -> None:
        self._drop("providers", "key provider", key, provider.to_bytes())

    def load_providers(self) -> list[ProviderRecord]:
        return self._load(
            "providers",
            lambda key, provider, addrs, received: ProviderRecord(
                bytes(key), PeerId.from_bytes_untrusted(provider), _unpack_addrs(addrs), float(received)
            ),
        )

    # -- values of others ---------------------------------------------------------------------------------
    def save_record(self, record: ValueRecord) -> None:
        self._save("records", (record.key,), record.value, record.sender, record.received, record.expires)

    def drop_record(self, key: bytes) -> None:
        self._drop("records", "key", key)

    def load_records(self) -> list[ValueRecord]:
        return self._load(
            "records",
            lambda key, value, sender, received, expires: ValueRecord(
                bytes(key), bytes(value), bytes(sender), float(received), float(expires)
            ),
        )

    # -- what we provide and publish ----------------------------------------------------------------------
    def save_provided(self, key: bytes, announced: float) -> None:
        """`announced` in Unix seconds, 0: not yet."""
        self._save("provided", (key,), announced)

    def drop_provided(self, key: bytes) -> None:
        self._drop("provided", "key", key)

    def load_provided(self) -> dict[bytes, float]:
        return dict(self._load("provided", lambda key, announced: (bytes(key), float(announced))))

    def save_published(self, value: PublishedValue) -> None:
        self._save("published", (value.name,), value.value, value.sequence, value.expires, int(value.renew), value.put)

    def drop_published(self, name: str) -> None:
        self._drop("published", "name", name)

    def load_published(self) -> list[PublishedValue]:
        return self._load(
            "published",
            lambda name, value, sequence, expires, renew, put: PublishedValue(
                str(name), bytes(value), int(sequence), int(expires), bool(renew), float(put)
            ),
        )

    # -- the routing table --------------------------------------------------------------------------------
    def save_contacts(self, contacts: Iterable[StoredContact]) -> None:
        """Replace the snapshot."""
        for note in [note for note in self._notes if note[0] == "contacts"]:
            del self._notes[note]
        self._note(("contacts",), "DELETE FROM contacts", ())
        for contact in contacts:
            self._save("contacts", (contact.peer.to_bytes(),), _pack_addrs(contact.addrs), contact.seen)

    def load_contacts(self) -> list[StoredContact]:
        return self._load(
            "contacts",
            lambda peer, addrs, seen: StoredContact(
                PeerId.from_bytes_untrusted(peer), _unpack_addrs(addrs), float(seen)
            ),
        )


# -- the file -------------------------------------------------------------------------------------------------------
def _connect(path: Path | None) -> tuple[sqlite3.Connection, bool]:
    """See `open_database`."""
    try:
        return open_database(path, "".join(MIGRATIONS), _migrate, len(MIGRATIONS), isolation_level="DEFERRED")
    except WrittenByNewer as error:
        raise ConfigError(f"home: {error}") from None


def _migrate(connection: sqlite3.Connection, version: int) -> None:
    for number, script in enumerate(MIGRATIONS[version:], version + 1):
        connection.executescript(f"BEGIN; {script}; PRAGMA user_version = {number}; COMMIT;")


def _pack_addrs(addrs: Iterable[Multiaddr]) -> bytes:
    packed = bytearray()
    for addr in addrs:
        raw = addr.to_bytes()
        packed += encode_uvarint(len(raw)) + raw
    return bytes(packed)


def _unpack_addrs(packed: bytes) -> tuple[Multiaddr, ...]:
    out, offset = [], 0
    while offset < len(packed):
        length, offset = decode_uvarint_untrusted(packed, offset)
        out.append(Multiaddr.from_bytes_untrusted(packed[offset : offset + length]))
        offset += length
    return tuple(out)
