"""The SQLite file: what is noted comes back, damage is survived, errors are clear."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lattica.datastore import MIGRATIONS, Datastore, PublishedValue, StoredContact
from lattica.errors import ConfigError, StorageFull
from lattica_protocols.kad.store import ProviderRecord, ValueRecord
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId

PEER = PeerId.from_bytes_untrusted(bytes.fromhex("002408011220") + bytes(32))
ADDRS = (Multiaddr.parse("/ip4/8.8.8.8/tcp/1"), Multiaddr.parse("/ip6/::1/udp/1/quic-v1"))


def fill(store: Datastore) -> None:
    store.save_provider(ProviderRecord(b"k", PEER, ADDRS, 1.5))
    store.save_record(ValueRecord(b"r", b"value", b"sender", 1.0, 2.0))
    store.save_provided(b"mine", 3.0)
    store.save_published(PublishedValue("name", b"v", 1 << 62, 5, True, 6.0))
    store.save_contacts([StoredContact(PEER, ADDRS, 7.0)])


def check(store: Datastore) -> None:
    assert store.load_providers() == [ProviderRecord(b"k", PEER, ADDRS, 1.5)]
    assert store.load_records() == [ValueRecord(b"r", b"value", b"sender", 1.0, 2.0)]
    assert store.load_provided() == {b"mine": 3.0}
    assert store.load_published() == [PublishedValue("name", b"v", 1 << 62, 5, True, 6.0)]
    assert store.load_contacts() == [StoredContact(PEER, ADDRS, 7.0)]


@pytest.mark.parametrize("in_memory", [True, False])
def test_what_is_noted_comes_back(in_memory: bool, tmp_path: Path, run: Callable[..., Any]) -> None:
    async def main() -> None:
        with Datastore.open(None if in_memory else tmp_path / "lattica.db") as store:
            fill(store)
            assert store.pending() == 6
            await store.flush()
            assert store.pending() == 0
            await store.flush()
            check(store)
            assert await store.read(store.load_provided) == {b"mine": 3.0}
            store.drop_provider(b"k", PEER)
            store.drop_record(b"r")
            store.drop_provided(b"mine")
            store.drop_published("name")
            store.save_contacts([])
            assert store.load_providers() == store.load_records() == store.load_published() == []
            assert store.load_contacts() == []

    run(main)


def test_leaving_writes(tmp_path: Path) -> None:
    path = tmp_path / "lattica.db"
    with Datastore.open(path) as store:
        fill(store)
    with Datastore.open(path) as store:
        check(store)
        assert store.moved_aside is None
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_the_last_note_of_a_row_wins() -> None:
    with Datastore.open(None) as store:
        for n in range(100):
            store.save_provided(b"k", float(n))
        assert store.pending() == 1
        store.drop_provided(b"k")
        store.save_provided(b"k", 5.0)
        assert store.load_provided() == {b"k": 5.0}


@pytest.mark.parametrize("damage", [b"this is no database at all, it is text" * 100, None])
def test_a_damaged_file_is_moved_aside(damage: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "lattica.db"
    with Datastore.open(path) as store:
        for n in range(2000):
            store.save_provided(n.to_bytes(32, "big"), 1.0)
    if damage is None:
        whole = path.read_bytes()
        damage = whole[:8192] + os.urandom(16384) + whole[24576:]
    path.write_bytes(damage)
    with Datastore.open(path) as store:
        assert store.load_provided() == {}
        fill(store)
        assert store.moved_aside == tmp_path / "lattica.db.damaged-1"
    assert (tmp_path / "lattica.db.damaged-1").read_bytes() == damage
    path.write_bytes(b"again" * 1000)
    with Datastore.open(path) as store:
        assert store.moved_aside == tmp_path / "lattica.db.damaged-2"


def test_a_log_that_is_missing_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    killed = tmp_path / "killed"
    killed.mkdir()
    with Datastore.open(tmp_path / "lattica.db") as store:
        fill(store)
        store.load_provided()  # writes what was noted
        for name in ("lattica.db", "lattica.db-shm"):
            shutil.copyfile(tmp_path / name, killed / name)
    with Datastore.open(tmp_path / "lattica.db"):
        assert "database_log_cut" not in caplog.text
    with Datastore.open(killed / "lattica.db") as store:
        assert "database_log_cut" in caplog.text
        assert store.load_provided() == {}


def test_a_row_that_makes_no_sense_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "lattica.db"
    with Datastore.open(path) as store:
        fill(store)
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("INSERT INTO providers VALUES (x'00', x'0000', x'', 1)")
        connection.execute("INSERT INTO contacts VALUES (x'1220', x'ff', 'never')")
    connection.close()
    with Datastore.open(path) as store:
        check(store)
    assert caplog.text.count("database_row_skipped") == 2


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lattica.db"
    Datastore.open(path).close()
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    connection.close()
    with pytest.raises(ConfigError, match="newer version"):
        Datastore.open(path)


def test_no_place_for_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot open"):
        Datastore.open(tmp_path / "missing" / "lattica.db")
    (tmp_path / "directory").mkdir()
    with pytest.raises(ConfigError, match="cannot open"):
        Datastore.open(tmp_path / "directory")


def test_a_full_disk_keeps_the_notes(tmp_path: Path, run: Callable[..., Any]) -> None:
    async def main() -> None:
        with Datastore.open(tmp_path / "lattica.db") as store:
            pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
            store._connection.execute(f"PRAGMA max_page_count = {pages}")
            for n in range(1000):
                store.save_record(ValueRecord(n.to_bytes(4, "big"), bytes(4000), b"", 1.0, 2.0))
            with pytest.raises(StorageFull, match="full"):
                await store.flush()
            assert store.pending() == 1000
            store._connection.execute("PRAGMA max_page_count = 1000000")
            await store.flush()
            assert len(store.load_records()) == 1000

    run(main)
