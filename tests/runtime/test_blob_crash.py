"""Content against a real file system, real sockets and kill -9."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from lattica.blobs import BlobStore
from lattica.blobs.part import PartFile, part_path
from lattica.blobs.sharing import Shared, share_path
from lattica.blobs.source_stream import ChunkBuffers
from lattica.blobs.temporary import PREFIX
from lattica.errors import StorageError, StorageFull
from lattica.node import NodeConfig, open_node
from lattica_protocols.blobs.manifest import BlobManifest, make_blob
from lattica_protocols.cid import Cid
from lattica_protocols.limits import CHUNK_BYTES
from lattica_protocols.multihash import BLAKE3, Multihash

CHILD = """
import sys, trio
from pathlib import Path
from lattica.node import NodeConfig, open_node
from lattica_protocols.multiaddr import Multiaddr

async def main(home, addr, cid, dest):
    config = NodeConfig(home=Path(home), listen=[], transports=["tcp"])
    async with open_node(config) as node:
        target = Multiaddr.parse(addr)
        await node.host.connect(target.peer_id(), [target])
        def progress(now):
            print("progress", now.done_bytes, flush=True)
        result = await node.blobs.fetch(cid, Path(dest), progress)
        print("result", result.fetched_bytes, result.reused_bytes, flush=True)

trio.run(main, *sys.argv[1:])
"""


def manifest_of(content: bytes) -> tuple[BlobManifest, Cid]:
    hashes = b"".join(
        Multihash.of(BLAKE3, content[i : i + CHUNK_BYTES]).digest for i in range(0, len(content), CHUNK_BYTES)
    )
    return BlobManifest(len(content), hashes), make_blob(len(content), hashes)[1]


def test_kill_9_in_the_middle_of_a_fetch(run: Callable[..., Any], tmp_path: Path) -> None:
    before_kill, total = 24, 48
    source = tmp_path / "source.bin"
    source.write_bytes(random.Random(1).randbytes(total * CHUNK_BYTES))
    dest = tmp_path / "copy.bin"

    async def main() -> None:
        config = NodeConfig(home=tmp_path / "a", listen=["/ip4/127.0.0.1/tcp/0"], transports=["tcp"])
        async with open_node(config) as node:
            cid = (await node.blobs.share(source)).cid
            reader = node.blobs.reader
            allowed = [before_kill]
            real = reader.read_nowait

            def limited(blob: Any, index: int, buffer: memoryview) -> bool:
                allowed[0] -= 1
                return allowed[0] >= 0 and real(blob, index, buffer)

            hold = trio.Event()

            def blocked(*args: Any, **options: Any) -> None:
                """What `read_nowait` refuses is read in a thread: this one waits until the child is dead."""
                trio.from_thread.run(hold.wait)

            reader.read_nowait = limited  # type: ignore[method-assign]
            real_read, reader.read = reader.read, blocked  # type: ignore[method-assign]
            addr = str(node.host.listen_addrs()[0].with_peer(node.peer_id))
            args = [sys.executable, "-c", CHILD, str(tmp_path / "b"), addr, str(cid), str(dest)]
            child = await trio.lowlevel.open_process(args, stdout=subprocess.PIPE)
            await _until(child, f"progress {before_kill * CHUNK_BYTES}")
            child.send_signal(signal.SIGKILL)
            await child.wait()
            assert not dest.exists()
            assert part_path(dest, cid).exists()
            hold.set()
            allowed[0] = 1 << 30
            reader.read = real_read  # type: ignore[method-assign]
            sent = node.blobs.server.sent_bytes
            child = await trio.lowlevel.open_process(args, stdout=subprocess.PIPE)
            missing = (total - before_kill) * CHUNK_BYTES
            await _until(child, f"result {missing} {before_kill * CHUNK_BYTES}")
            await child.wait()
            assert node.blobs.server.sent_bytes - sent == missing

    run(main, seconds=60)
    assert dest.read_bytes() == source.read_bytes()


async def _until(child: trio.Process, line: str) -> None:
    assert child.stdout is not None
    seen = b""
    async for data in child.stdout:
        seen += data
        if line.encode() + b"\n" in seen:
            return
    raise AssertionError(f"{line!r} did not come: {seen[-500:]!r}")


def test_parts_are_hashed_again_and_holes_are_skipped(tmp_path: Path) -> None:
    content = random.Random(2).randbytes(6 * CHUNK_BYTES + 100)
    manifest, cid = manifest_of(content)
    path = part_path(tmp_path / "x", cid)
    part = PartFile(path, manifest)
    for index in (0, 2, 6):
        piece = content[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
        assert part.verify_and_write(index, memoryview(piece))
    assert not part.verify_and_write(3, memoryview(bytes(CHUNK_BYTES)))
    part.close()
    with path.open("r+b") as file:
        file.seek(2 * CHUNK_BYTES)
        file.write(b"rot")
    again = PartFile(path, manifest)
    assert again.adopt() == CHUNK_BYTES + 100
    assert list(again.have) == [0, 6]
    again.close()


def test_a_part_that_is_too_long_or_too_short(tmp_path: Path) -> None:
    content = random.Random(3).randbytes(2 * CHUNK_BYTES)
    manifest, cid = manifest_of(content)
    for length in (3 * CHUNK_BYTES, CHUNK_BYTES, 10):
        path = part_path(tmp_path / "x", cid)
        path.write_bytes((content + bytes(CHUNK_BYTES))[:length])
        part = PartFile(path, manifest)
        assert part.adopt() == min(length, 2 * CHUNK_BYTES) // CHUNK_BYTES * CHUNK_BYTES
        for index in list(part.have.missing()):
            part.write(index, memoryview(content[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]))
        part.publish(tmp_path / "x")
        part.close()
        assert (tmp_path / "x").read_bytes() == content


def test_a_part_is_not_opened_through_a_link(tmp_path: Path) -> None:
    manifest, cid = manifest_of(b"x" * 100)
    (tmp_path / "victim").write_bytes(b"precious")
    path = part_path(tmp_path / "x", cid)
    path.symlink_to(tmp_path / "victim")
    with pytest.raises(StorageError):
        PartFile(path, manifest)
    assert (tmp_path / "victim").read_bytes() == b"precious"


def test_names_that_are_nearly_too_long(tmp_path: Path) -> None:
    manifest, cid = manifest_of(b"x" * 100)
    part = PartFile(part_path(tmp_path / ("n" * 255), cid), manifest)
    part.publish(tmp_path / ("n" * 255))
    part.close()


def test_a_file_over_the_process_limit(tmp_path: Path) -> None:
    manifest, cid = manifest_of(bytes(2 * CHUNK_BYTES))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (CHUNK_BYTES, hard))
    try:
        with pytest.raises(StorageFull, match="process limit"):
            PartFile(part_path(tmp_path / "x", cid), manifest)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


READ_ONLY = """
import os, sys
from pathlib import Path
from lattica.blobs import BlobStore
from lattica.errors import StorageError
if os.geteuid() == 0:  # root may write everywhere
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    BlobStore(Path(sys.argv[1]))
except StorageError as error:
    print(error)
"""


def test_a_store_in_a_read_only_directory() -> None:
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o555)
        home = f"{directory}/blobs"
        out = subprocess.run([sys.executable, "-c", READ_ONLY, home], capture_output=True, text=True, check=False)
        assert out.stdout.strip() == f"no permission for {home}", out.stderr


def test_a_store_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    import sqlite3

    BlobStore(tmp_path).close()
    database = sqlite3.connect(tmp_path / "catalog.sqlite")
    database.execute("PRAGMA user_version=99")
    database.close()
    with pytest.raises(StorageError, match="newer version"):
        BlobStore(tmp_path)


@contextmanager
def store_of_many(directory: Path) -> Iterator[tuple[BlobStore, list[Shared]]]:
    """A store with 300 shared files, whose catalog has some dozens of pages."""
    source = directory.with_name("sources")
    source.mkdir()
    with closing(BlobStore(directory)) as store:
        shared = []
        for number in range(300):
            (source / f"file{number}").write_bytes(b"%d " % number * 200)
            shared.append(share_path(store, source / f"file{number}", stop=threading.Event()))
        yield store, shared


def _cut(to: float) -> Callable[[bytes], bytes]:
    return lambda data: data[: int(len(data) * to)]


def _noise(at: float, size: int) -> Callable[[bytes], bytes]:
    def damage(data: bytes) -> bytes:
        start = int(len(data) * at)
        return (data[:start] + random.Random(1).randbytes(size) + data[start + size :])[: len(data)]

    return damage


def _one_leaf(data: bytes) -> bytes:
    """The last page that holds rows only (SQLite's file format: 10 is a leaf of an index)."""
    at = max(start for start in range(4096, len(data), 4096) if data[start] == 10)
    return data[:at] + random.Random(1).randbytes(4096) + data[at + 4096 :]


@pytest.mark.parametrize(
    ("damage", "some_left"),
    [
        (lambda data: b"garbage" * 1000, False),
        (lambda data: data[:50], False),
        (lambda data: data[:4096], False),
        (lambda data: data[:6000], False),
        (_cut(0.4), None),
        (_cut(0.9), None),
        (_noise(0.0, 16), False),
        (_noise(0.5, 6000), None),
        (_noise(0.9, 6000), None),
        (_one_leaf, True),
    ],
)
def test_a_damaged_catalog_is_replaced_and_what_can_be_read_is_kept(
    tmp_path: Path, damage: Callable[[bytes], bytes], some_left: bool | None
) -> None:
    with store_of_many(tmp_path / "blobs") as (_, shared):
        pass
    catalog = tmp_path / "blobs" / "catalog.sqlite"
    damaged = damage(catalog.read_bytes())
    catalog.write_bytes(damaged)
    with closing(BlobStore(tmp_path / "blobs")) as store:
        left = store.list()
        assert f"catalog.sqlite.damaged-1; {len(left)} entries could be read" in (store.catalog.damaged or "")
        if some_left is not None:  # else it depends on which pages are inner ones, and that on the length of paths
            assert (len(left) > 200) is some_left
        assert {blob.cid for blob in left} <= {one.cid for one in shared}
        for number, one in enumerate(shared):
            again = share_path(store, tmp_path / "sources" / f"file{number}", stop=threading.Event())
            assert again == one
            assert store.blob_manifest(store.require(one.cid)).size == one.bytes
    with closing(BlobStore(tmp_path / "blobs")) as store:
        assert store.catalog.damaged is None
        assert len(store.list()) == len(shared)
    assert catalog.with_name("catalog.sqlite.damaged-1").read_bytes() == damaged


@pytest.mark.parametrize("cut", [False, True])
def test_a_catalog_whose_log_is_missing_says_so(tmp_path: Path, cut: bool) -> None:
    with store_of_many(tmp_path / "blobs"):
        (tmp_path / "killed").mkdir()
        for name in ("catalog.sqlite", "catalog.sqlite-shm") + (() if cut else ("catalog.sqlite-wal",)):
            shutil.copyfile(tmp_path / "blobs" / name, tmp_path / "killed" / name)
    with closing(BlobStore(tmp_path / "killed")) as store:
        assert (len(store.list()) < 300) is cut
        assert ("catalog.sqlite-wal" in (store.catalog.damaged or "")) is cut


def test_rows_of_a_catalog_that_make_no_sense_are_skipped(tmp_path: Path) -> None:
    import sqlite3

    with store_of_many(tmp_path / "blobs") as (store, shared):
        pass
    changes = [
        ("kind", "folly"),
        ("size", -1),
        ("chunks", 1 << 60),
        ("chunks", "many"),
        ("have", b"1234"),
        ("cid", b"x"),
        ("path", b"x"),
    ]
    with closing(sqlite3.connect(tmp_path / "blobs" / "catalog.sqlite")) as database, database:
        for (column, value), one in zip(changes, shared, strict=False):
            key = one.cid.multihash.to_bytes()
            database.execute(f"UPDATE blobs SET {column} = ? WHERE multihash = ?", (value, key))
        key = shared[-1].cid.multihash.to_bytes()
        database.execute("UPDATE blobs SET identity = 'a b' WHERE multihash = ?", (key,))
    with closing(BlobStore(tmp_path / "blobs")) as store:
        assert {blob.cid for blob in store.list()} == {one.cid for one in shared[len(changes) :]}


def test_a_temporary_store_leaves_nothing_behind() -> None:
    with BlobStore.open(None) as store:
        directory = store.directory
        assert directory.is_dir()
    assert not directory.exists()


def test_a_temporary_store_that_was_swept_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept: list[Path] = []
    make = tempfile.mkdtemp

    def make_and_sweep(**options: str) -> str:
        path = make(dir=tmp_path, **options)
        if not swept:
            swept.append(Path(path))
            os.rmdir(path)
        return path

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_sweep)
    with BlobStore.open(None) as store:
        assert store.directory.is_dir()
        assert store.directory.parent == tmp_path
        assert store.directory not in swept


HOLDER = """
import sys
from lattica.blobs import BlobStore
with BlobStore.open(None) as store:
    print(store.directory, flush=True)
    sys.stdin.read()
"""


def test_temporary_stores_of_killed_processes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no others: those of processes that run, of this one, and what only looks like one."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path / "elsewhere")
    children = []
    for _ in range(2):
        command = [sys.executable, "-c", HOLDER]
        child = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        children.append((child, Path(child.stdout.readline().strip())))
    (killed, abandoned), (running, held) = children
    killed.kill()
    killed.communicate()
    assert (abandoned / "catalog.sqlite").exists()
    with BlobStore.open(None) as first, BlobStore.open(None) as second:
        assert not abandoned.exists()
        for directory in (held, first.directory, second.directory):
            assert (directory / "catalog.sqlite").exists()
    running.communicate()
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere", f"{PREFIX}link"}


@pytest.mark.parametrize("place", ["disk", "memory"])
@pytest.mark.parametrize("aligned", [True, False])
def test_a_large_file_is_right_however_it_is_written(tmp_path: Path, place: str, aligned: bool) -> None:
    """Past the page cache where memory, length and file system allow it, through it where not."""
    if place == "memory" and not os.access("/dev/shm", os.W_OK):
        pytest.skip("no /dev/shm to write to")
    data = random.Random(7).randbytes((64 << 20) + 4097)
    chunks = [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]
    manifest, _ = manifest_of(data)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if place == "memory" else tmp_path) as folder:
        part = PartFile(Path(folder) / "part", manifest)
        buffers = ChunkBuffers()
        for index in random.Random(8).sample(range(len(chunks)), len(chunks)):
            size = len(chunks[index])
            view = buffers.take(size) if aligned else memoryview(bytearray(size + 1))[1:]
            view[:] = chunks[index]
            assert part.verify_and_write(index, view)
            part.have.add(index)
            if aligned:
                buffers.give_back(view)
        part.publish(Path(folder) / "whole")
        part.close()
        assert (Path(folder) / "whole").read_bytes() == data
