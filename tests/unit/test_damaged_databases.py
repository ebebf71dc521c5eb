"""Every database of a home with bytes changed at random places: opening and reading it works, or says what to do."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from replica_members import genesis, member, put

from lattica.blobs import BlobStore
from lattica.blobs.sharing import share_path
from lattica.datastore import Datastore, PublishedValue
from lattica.errors import ConfigError, StorageError
from lattica.replica.store import SpaceStore

ROUNDS = 90
HEADER_BYTES = 100


def make_spaces(home: Path) -> None:
    space = genesis()
    owner = member(0, space)
    with SpaceStore.open(home) as store:
        store.add(space, 7)
        for number in range(100):
            put(owner, f"k{number}", "v" * 100)
        store.save(space.id, owner.take_unsaved())


def read_spaces(home: Path) -> None:
    with SpaceStore.open(home) as store:
        store.load()


def make_datastore(home: Path) -> None:
    with Datastore.open(home / "lattica.db") as store:
        for number in range(200):
            store.save_provided(number.to_bytes(32, "big"), 1.0)
            store.save_published(PublishedValue(f"name{number}", b"v" * 50, 1, 2, True, 0.0))


def read_datastore(home: Path) -> None:
    with Datastore.open(home / "lattica.db") as store:
        for load in (store.load_providers, store.load_records, store.load_provided, store.load_published):
            load()
        store.load_contacts()


def make_blobs(home: Path) -> None:
    source = home / "sources"
    source.mkdir()
    with closing(BlobStore(home)) as store:
        for number in range(60):
            (source / f"file{number}").write_bytes(b"%d " % number * 200)
            share_path(store, source / f"file{number}", stop=threading.Event())


def read_blobs(home: Path) -> None:
    with closing(BlobStore(home)) as store:
        store.list()
        store.catalog.object_keys()


@pytest.mark.parametrize(
    ("name", "make", "read"),
    [
        ("spaces.db", make_spaces, read_spaces),
        ("lattica.db", make_datastore, read_datastore),
        ("catalog.sqlite", make_blobs, read_blobs),
    ],
)
@pytest.mark.parametrize("seed", [1, 2])
def test_no_damage_is_a_bug(
    tmp_path: Path, seed: int, name: str, make: Callable[[Path], None], read: Callable[[Path], None]
) -> None:
    """In the file's header and schema, and anywhere else."""
    rng = random.Random(seed)
    (tmp_path / "sound").mkdir()
    make(tmp_path / "sound")
    sound = (tmp_path / "sound" / name).read_bytes()
    home = tmp_path / "damaged"
    for number in range(ROUNDS):
        data = bytearray(sound)
        end = (HEADER_BYTES, 4096, len(data))[number % 3]
        at, size = rng.randrange(end), rng.choice((1, 2, 8, 60))
        data[at : at + size] = rng.randbytes(size)
        home.mkdir()
        for other in (tmp_path / "sound").glob("*.json"):
            shutil.copy(other, home)
        (home / name).write_bytes(data[: len(sound)])
        try:
            read(home)
        except (ConfigError, StorageError) as error:
            if "move the file away" not in str(error):
                raise
        else:
            read(home)
        shutil.rmtree(home)
