"""Content over the in-memory network: real hosts, real files, a directory of providers instead of the DHT."""

from __future__ import annotations

import itertools
import os
import random
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from lattica.blobs import BlobService, BlobStore, FetchProgress
from lattica.blobs import download as download_module
from lattica.blobs.part import PartFile, part_path
from lattica.blobs.service import ANNOUNCEMENTS_AT_A_TIME
from lattica.errors import (
    ContentCorrupt,
    ContentNotFound,
    FileChanged,
    InvalidArgument,
    LatticaError,
    StorageError,
    StorageFull,
)
from lattica.host import Host
from lattica.interfaces import Stream
from lattica.testing import MemoryNetwork, open_memory_host
from lattica_protocols.blobs import PROTOCOL
from lattica_protocols.blobs.chunk_set import ChunkSet
from lattica_protocols.blobs.messages import Kind, encode_header
from lattica_protocols.blobs.server import BlobServer, ObjectRequested, WantReceived
from lattica_protocols.cid import RAW, Cid
from lattica_protocols.limits import CHUNK_BYTES
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.multihash import SHA2_256, Multihash
from lattica_protocols.peer_id import PeerId

Run = Callable[..., Any]


class Directory:
    """Provider records, one place for all."""

    def __init__(self) -> None:
        self.records: dict[bytes, dict[PeerId, list[Multiaddr]]] = {}
        self.hidden: set[PeerId] = set()
        """Peers whose records nobody finds."""
        self.changed = trio.Event()
        self.providing = self.most_providing = 0
        """Records that are being written: now, and at most until now."""

    def of(self, host: Host) -> DirectoryClient:
        return DirectoryClient(self, host)

    async def wait_for(self, cid: Cid, count: int = 1) -> None:
        while len(self.records.get(cid.multihash.to_bytes(), {})) < count:
            self.changed = trio.Event()
            await self.changed.wait()


class DirectoryClient:
    def __init__(self, directory: Directory, host: Host) -> None:
        self._directory = directory
        self._host = host

    async def provide(self, key: bytes) -> int:
        self._directory.providing += 1
        self._directory.most_providing = max(self._directory.most_providing, self._directory.providing)
        await trio.lowlevel.checkpoint()
        self._directory.providing -= 1
        self._directory.records.setdefault(key, {})[self._host.peer_id] = self._host.listen_addrs()
        self._directory.changed.set()
        return 1

    async def stop_providing(self, key: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self._directory.records.get(key, {}).pop(self._host.peer_id, None)

    def provided(self) -> list[bytes]:
        return []

    async def find_providers(self, key: bytes, count: int) -> AsyncIterator[tuple[PeerId, Sequence[Multiaddr]]]:
        for peer, addrs in list(self._directory.records.get(key, {}).items())[:count]:
            await trio.lowlevel.checkpoint()
            if peer != self._host.peer_id and peer not in self._directory.hidden:
                yield peer, addrs


class World:
    """Hosts with content services."""

    def __init__(self, tmp: Path, stack: AsyncExitStack, nursery: trio.Nursery) -> None:
        self.network = MemoryNetwork()
        self.directory = Directory()
        self.tmp = tmp
        self._stack = stack
        self._nursery = nursery
        self._seed = 0

    async def host(self) -> Host:
        self._seed += 1
        return await self._stack.enter_async_context(open_memory_host(self.network, self._seed))

    async def service(self, home: str | None = None, *, routing: bool = True) -> BlobService:
        host = await self.host()
        directory = self.tmp / (home or f"home{self._seed}")
        store = self._stack.enter_context(BlobStore.open(directory))
        service = BlobService(host, self.directory.of(host) if routing else None, store)
        self._nursery.start_soon(service.run)
        return service

    def file(self, name: str, size: int, seed: int = 0) -> Path:
        path = self.tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.Random(seed).randbytes(size))
        return path


@asynccontextmanager
async def world(tmp: Path) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        yield World(tmp, stack, nursery)
        nursery.cancel_scope.cancel()


def peer_of(service: BlobService) -> PeerId:
    return service._host.peer_id


def test_several_announcements_are_made_at_a_time(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            service = await w.service()
            cids = [(await service.share(w.file(f"{n}.bin", 100, n))).cid for n in range(8)]
            for cid in cids:
                await w.directory.wait_for(cid)
            await trio.testing.wait_all_tasks_blocked()
            w.directory.most_providing = 0
            for cid in cids:
                service.announce(cid.multihash)
            await trio.testing.wait_all_tasks_blocked()
            assert w.directory.most_providing == ANNOUNCEMENTS_AT_A_TIME

    run(main)


def test_a_write_that_the_disk_holds_up_does_not_hold_up_the_others(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, others_wrote = itertools.count(), threading.Event()
    write = PartFile.verify_and_write

    def held_up(part: PartFile, index: int, data: memoryview) -> bool:
        if next(calls) == 0:
            assert others_wrote.wait(20)
        else:
            others_wrote.set()
        return write(part, index, data)

    monkeypatch.setattr(PartFile, "verify_and_write", held_up)

    async def main() -> None:
        async with world(tmp_path) as w:
            alice, bob = await w.service(), await w.service()
            shared = await alice.share(w.file("source.bin", 30 * CHUNK_BYTES))
            await w.directory.wait_for(shared.cid)
            await bob.fetch(shared.cid, tmp_path / "copy.bin")

    run(main)


SIZES = [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 5 * CHUNK_BYTES + 17]


@pytest.mark.parametrize("size", SIZES)
def test_a_file_goes_from_one_to_another(run: Run, tmp_path: Path, size: int) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            alice, bob = await w.service(), await w.service()
            source = w.file("source.bin", size)
            cid, total, chunks = await alice.share(source)
            assert (total, chunks) == (size, -(-size // CHUNK_BYTES))
            await w.directory.wait_for(cid)
            dest = tmp_path / "copy.bin"
            seen: list[FetchProgress] = []
            result = await bob.fetch(cid, dest, seen.append)
            assert dest.read_bytes() == source.read_bytes()
            assert (result.bytes, result.fetched_bytes, result.reused_bytes) == (size, size, 0)
            assert result.sources == 1
            assert seen[-1].done_bytes == size
            assert not part_path(dest, cid).exists()
            # Bob serves it now, from where it was put.
            await w.directory.wait_for(cid, 2)
            info = bob.list()[0]
            assert (info.complete, info.pinned, info.path) == (True, False, dest)
            assert alice.list()[0].pinned
            again = await bob.fetch(cid, dest)
            assert (again.fetched_bytes, again.reused_bytes) == (0, size)
            other = tmp_path / "other.bin"
            again = await bob.fetch(str(cid), other)
            assert (again.fetched_bytes, again.reused_bytes) == (0, size)
            assert other.read_bytes() == source.read_bytes()

    run(main)


def test_many_sources_give_each_a_part(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            source = w.file("source.bin", 40 * CHUNK_BYTES)
            servers = [await w.service() for _ in range(3)]
            for server in servers:
                cid = (await server.share(source)).cid
            await w.directory.wait_for(cid, 3)
            bob = await w.service()
            result = await bob.fetch(cid, tmp_path / "copy.bin")
            assert result.sources == 3
            assert (tmp_path / "copy.bin").read_bytes() == source.read_bytes()
            assert all(server.server.sent_bytes > 0 for server in servers)
            assert sum(server.server.sent_bytes for server in servers) <= 44 * CHUNK_BYTES

    run(main)


def test_connected_peers_are_asked_without_a_directory(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            alice, bob = await w.service(routing=False), await w.service(routing=False)
            cid = (await alice.share(w.file("a.bin", 3 * CHUNK_BYTES))).cid
            await bob._host.connect(peer_of(alice), alice._host.listen_addrs())
            result = await bob.fetch(cid)
            assert result.fetched_bytes == 3 * CHUNK_BYTES
            kept = bob.list()[0]
            assert kept.path is not None
            assert kept.path.parent == bob.store.data_directory
            assert (await bob.fetch(cid)).reused_bytes == 3 * CHUNK_BYTES

    run(main)


def test_nobody_has_it(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            alice, bob, carol = await w.service(), await w.service(), await w.service()
            unknown = Cid.v1(0x0201, 0x1E, bytes(32))
            with pytest.raises(ContentNotFound, match="no peer is connected"):
                await alice.fetch(unknown, tmp_path / "x")
            for other in (bob, carol):
                await alice._host.connect(peer_of(other), other._host.listen_addrs())
            with pytest.raises(ContentNotFound, match=r"asked 2 peers$"):
                await alice.fetch(unknown, tmp_path / "x")
            assert not (tmp_path / "x").exists()
            with pytest.raises(InvalidArgument, match="not a content id"):
                await alice.fetch("garbage", tmp_path / "x")
            with pytest.raises(InvalidArgument, match="codec 0x70"):
                await alice.fetch("QmYwAPJzv5CZsnA625s3Xf2nemtYgPpHdWEz79ojWnPbdG", tmp_path / "x")

    run(main)


def test_a_raw_block_under_sha256(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            alice, bob = await w.service("h1"), await w.service("h2")
            await bob._host.connect(peer_of(alice), alice._host.listen_addrs())
            data = b"a foreign block"
            name = Multihash.of(SHA2_256, data)
            cid = Cid.v1(RAW, SHA2_256, name.digest)
            alice.store.put_objects([(name, data)])
            alice.store.add(cid, "raw", len(data), ChunkSet(0), pinned=True)
            result = await bob.fetch(cid, tmp_path / "block")
            assert result.bytes == len(data)
            assert (tmp_path / "block").read_bytes() == data
            assert (await alice.verify())[0].dropped == []

    run(main)


def test_folders(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            alice, bob = await w.service(), await w.service()
            sizes = {"model/a.bin": 2 * CHUNK_BYTES + 1, "model/deep/er/b.bin": 10, "model/empty": 0, "model/ä": 3}
            for seed, (name, size) in enumerate(sizes.items()):
                w.file(name, size, seed)
            (tmp_path / "model" / "link.bin").symlink_to(tmp_path / "model" / "ä")
            cid, total, _ = await alice.share(tmp_path / "model")
            assert total == sum(sizes.values()) + 3
            await w.directory.wait_for(cid)
            assert len(w.directory.records) == 1
            seen: list[FetchProgress] = []
            result = await bob.fetch(cid, tmp_path / "copy", seen.append)
            assert (result.bytes, result.fetched_bytes) == (total, total - 3)
            assert seen[-1].total_bytes == total
            for name in [*sizes, "model/link.bin"]:
                assert (tmp_path / "copy" / name.removeprefix("model/")).read_bytes() == (tmp_path / name).read_bytes()
            (tmp_path / "copy" / "empty").unlink()
            (tmp_path / "copy" / "a.bin").write_bytes(b"changed")
            again = await bob.fetch(cid, tmp_path / "copy")
            assert again.fetched_bytes == sizes["model/a.bin"]
            assert (tmp_path / "copy" / "a.bin").read_bytes() == (tmp_path / "model" / "a.bin").read_bytes()
            # The files of a pinned folder survive a collection, the fetched ones of an unpinned one do not.
            assert (await alice.gc())[0] == []
            assert len((await bob.gc())[0]) == 5
            assert (tmp_path / "copy" / "a.bin").exists()
            await alice.remove(cid)
            assert alice.list() == []
            assert alice.store.catalog.object_keys() == []

    run(main)


def test_a_folder_is_not_written_through_links(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            alice, bob = await w.service(), await w.service()
            w.file("model/deep/a.bin", 10)
            cid = (await alice.share(tmp_path / "model")).cid
            await w.directory.wait_for(cid)
            (tmp_path / "outside").mkdir()
            (tmp_path / "copy").mkdir()
            (tmp_path / "copy" / "deep").symlink_to(tmp_path / "outside")
            with pytest.raises(StorageError, match="is a link"):
                await bob.fetch(cid, tmp_path / "copy")
            assert list((tmp_path / "outside").iterdir()) == []

    run(main)


class BadServer:
    """Serves one real file, badly: `spoil(index, data)` says what goes out for a chunk, `None` nothing."""

    def __init__(self, service: BlobService, cid: Cid, spoil: Callable[[int, bytes], bytes | None]) -> None:
        self.store = service.store
        self.blob = service.store.require(cid)
        self.spoil = spoil
        self.content = Path(str(self.blob.path)).read_bytes()
        self.asked = 0
        service._host.handle(PROTOCOL, self.handle)

    async def handle(self, stream: Stream) -> None:
        server = BlobServer()
        while data := await stream.receive_some():
            server.receive_data(data)
            while (event := server.next_event()) is not None:
                if isinstance(event, WantReceived):
                    server.tell_have(event.blob, self.blob.have)
                elif isinstance(event, ObjectRequested):
                    server.send_object(event.request, self.store.find_object(event.multihash))
            stream.write(*server.poll_transmit())
            while (key := server.next_chunk()) is not None:
                self.asked += 1
                piece = self.content[key[1] * CHUNK_BYTES : (key[1] + 1) * CHUNK_BYTES]
                out = self.spoil(key[1], piece)
                if out is not None:
                    stream.write(encode_header(Kind.CHUNK, key[0], key[1], len(out)), out)
                    await stream.drain()
        await stream.aclose()


def test_a_liar_is_found_out_and_left(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            honest, liar, bob = [await w.service() for _ in range(3)]
            source = w.file("source.bin", 30 * CHUNK_BYTES)
            cid = (await honest.share(source)).cid
            await liar.share(source)
            bad = BadServer(liar, cid, lambda index, data: bytes(len(data)))
            await w.directory.wait_for(cid, 2)
            result = await bob.fetch(cid, tmp_path / "copy.bin")
            assert (tmp_path / "copy.bin").read_bytes() == source.read_bytes()
            assert bad.asked > 0
            assert result.sources <= 2
            carol = await w.service()
            w.directory.hidden |= {peer_of(honest), peer_of(bob)}
            with pytest.raises(ContentNotFound, match="1 sent wrong bytes"):
                await carol.fetch(cid, tmp_path / "copy2.bin")

    run(main)


def test_sources_that_vanish_or_send_nonsense(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            honest, cutter, shouter, bob = [await w.service() for _ in range(4)]
            source = w.file("source.bin", 30 * CHUNK_BYTES)
            cid = (await honest.share(source)).cid
            await cutter.share(source)
            await shouter.share(source)

            def vanish(index: int, data: bytes) -> bytes | None:
                cutter._host.connections(peer_of(bob))[0].abort()
                return None

            BadServer(cutter, cid, vanish)
            BadServer(shouter, cid, lambda index, data: data + b"more than was asked for")
            await w.directory.wait_for(cid, 3)
            await bob.fetch(cid, tmp_path / "copy.bin")
            assert (tmp_path / "copy.bin").read_bytes() == source.read_bytes()

    run(main)


def test_a_part_is_served_while_it_grows(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            alice, bob, carol = [await w.service() for _ in range(3)]
            source = w.file("source.bin", 12 * CHUNK_BYTES)
            cid = (await alice.share(source)).cid
            gate = trio.Event()
            sent: list[int] = []

            def some(index: int, data: bytes) -> bytes | None:
                sent.append(index)
                return data if len(sent) <= 6 or gate.is_set() else None

            bad = BadServer(alice, cid, some)
            await w.directory.wait_for(cid)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(bob.fetch, cid, tmp_path / "bob.bin")
                await w.directory.wait_for(cid, 2)  # it announces itself with its first chunk
                w.directory.hidden.add(peer_of(alice))
                progress: list[FetchProgress] = []
                half = trio.Event()

                def watch(now: FetchProgress) -> None:
                    progress.append(now)
                    if now.done_bytes == 6 * CHUNK_BYTES:
                        half.set()

                nursery.start_soon(carol.fetch, cid, tmp_path / "carol.bin", watch)
                await half.wait()
                assert all(p.done_bytes <= 6 * CHUNK_BYTES for p in progress)
                gate.set()
                for connection in bob._host.connections(peer_of(alice)):
                    connection.abort()  # the chunks it held back are asked for again
                w.directory.hidden.clear()
            for name in ("bob.bin", "carol.bin"):
                assert (tmp_path / name).read_bytes() == source.read_bytes()
            assert bad.asked >= 12

    run(main, seconds=60)


def test_a_cancelled_fetch_is_continued(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            alice, bob = await w.service(), await w.service("bob")
            source = w.file("source.bin", 20 * CHUNK_BYTES)
            cid = (await alice.share(source)).cid
            await w.directory.wait_for(cid)
            dest = tmp_path / "copy.bin"
            count = [0]

            def some(index: int, data: bytes) -> bytes | None:
                count[0] += 1
                return data if count[0] <= 8 else None

            BadServer(alice, cid, some)
            with trio.CancelScope() as scope:

                def stop(now: FetchProgress) -> None:
                    if now.done_bytes == 8 * CHUNK_BYTES:
                        scope.cancel()

                await bob.fetch(cid, dest, stop)
            assert scope.cancelled_caught
            assert not dest.exists()
            assert part_path(dest, cid).exists()
            alice._host.handle(PROTOCOL, alice.server.handle)
            result = await bob.fetch(cid, dest)
            assert (result.reused_bytes, result.fetched_bytes) == (8 * CHUNK_BYTES, 12 * CHUNK_BYTES)
            assert alice.server.sent_bytes == 12 * CHUNK_BYTES
            assert dest.read_bytes() == source.read_bytes()
            assert not part_path(dest, cid).exists()

    run(main)


def test_a_part_is_continued_at_another_destination_and_damage_is_found(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            alice = await w.service()
            bob = await w.service()
            source = w.file("source.bin", 10 * CHUNK_BYTES)
            content = source.read_bytes()
            cid = (await alice.share(source)).cid
            await w.directory.wait_for(cid)
            # What a crash leaves: a part with the right size, some chunks, one of them damaged, one torn.
            part = part_path(tmp_path / "first.bin", cid)
            with part.open("wb") as file:
                file.truncate(len(content))
                for index in (0, 3, 9):
                    file.seek(index * CHUNK_BYTES)
                    file.write(content[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES])
                file.seek(3 * CHUNK_BYTES + 5)
                file.write(b"damage")
                file.seek(5 * CHUNK_BYTES)
                file.write(content[5 * CHUNK_BYTES : 5 * CHUNK_BYTES + 1000])
            result = await bob.fetch(cid, tmp_path / "first.bin")
            assert result.reused_bytes == 2 * CHUNK_BYTES
            assert (tmp_path / "first.bin").read_bytes() == content
            # An older file at the destination that is mostly the same gives its chunks.
            carol = await w.service()
            dest = tmp_path / "second.bin"
            dest.write_bytes(content[: 4 * CHUNK_BYTES] + b"x" + content[4 * CHUNK_BYTES + 1 :])
            result = await carol.fetch(cid, dest)
            assert (result.reused_bytes, result.fetched_bytes) == (9 * CHUNK_BYTES, CHUNK_BYTES)
            assert dest.read_bytes() == content

    run(main)


def test_two_fetches_share_the_work(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            alice, bob = await w.service(), await w.service()
            source = w.file("source.bin", 10 * CHUNK_BYTES)
            cid = (await alice.share(source)).cid
            await w.directory.wait_for(cid)
            async with trio.open_nursery() as nursery:
                for name in ("one.bin", "one.bin", "two.bin"):
                    nursery.start_soon(bob.fetch, cid, tmp_path / name)
                cancelled = trio.CancelScope()

                async def impatient() -> None:
                    with cancelled:
                        await bob.fetch(cid, tmp_path / "one.bin", lambda now: cancelled.cancel())

                nursery.start_soon(impatient)
            assert alice.server.sent_bytes == 10 * CHUNK_BYTES
            for name in ("one.bin", "two.bin"):
                assert (tmp_path / name).read_bytes() == source.read_bytes()

    run(main)


def test_a_corrupt_chunk_is_not_served_dropped_and_fetched_again(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            alice, bob, carol = [await w.service() for _ in range(3)]
            source = w.file("source.bin", 6 * CHUNK_BYTES)
            content = source.read_bytes()
            cid = (await alice.share(source)).cid
            await w.directory.wait_for(cid)
            await bob.fetch(cid)
            stored = bob.store.require(cid).path
            assert stored is not None
            with stored.open("r+b") as file:
                file.seek(2 * CHUNK_BYTES + 7)
                file.write(b"rot")
            await w.directory.wait_for(cid, 2)
            await carol.fetch(cid, tmp_path / "carol.bin")
            assert (tmp_path / "carol.bin").read_bytes() == content
            (report,) = await bob.verify(cid)
            assert report.dropped in ([2], [])  # found by serving, or by this
            assert not bob.store.require(cid).complete
            result = await bob.fetch(cid)
            assert (result.fetched_bytes, result.reused_bytes) == (CHUNK_BYTES, 5 * CHUNK_BYTES)
            assert (await bob.verify(cid))[0].dropped == []
            final = bob.store.require(cid)
            assert final.complete
            assert final.path is not None
            assert final.path.read_bytes() == content

    run(main)


@pytest.mark.parametrize("damage", ["truncated", "deleted", "rewritten", "same size, mtime put back"])
def test_a_shared_file_that_changes_is_never_served_wrong(run: Run, tmp_path: Path, damage: str) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            alice, bob = await w.service(), await w.service()
            source = w.file("source.bin", 4 * CHUNK_BYTES)
            before = source.stat()
            cid = (await alice.share(source)).cid
            await w.directory.wait_for(cid)
            if damage == "truncated":
                os.truncate(source, CHUNK_BYTES)
            elif damage == "deleted":
                source.unlink()
            else:
                with source.open("r+b") as file:
                    file.seek(CHUNK_BYTES)
                    file.write(bytes(CHUNK_BYTES))
                if damage != "rewritten":
                    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
            with pytest.raises(ContentNotFound):
                await bob.fetch(cid, tmp_path / "copy.bin")
            assert not (tmp_path / "copy.bin").exists()
            have = bob.store.require(cid).have
            assert 1 not in have

    download_module.PATIENCE, patience = 0.5, download_module.PATIENCE
    try:
        run(main)
    finally:
        download_module.PATIENCE = patience


def test_a_copy_is_independent_of_the_original(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            alice, bob = await w.service(), await w.service()
            source = w.file("source.bin", 3 * CHUNK_BYTES)
            content = source.read_bytes()
            cid = (await alice.share(source, copy=True)).cid
            source.unlink()
            await w.directory.wait_for(cid)
            await bob.fetch(cid, tmp_path / "copy.bin")
            assert (tmp_path / "copy.bin").read_bytes() == content
            assert await alice.remove(cid) >= 3 * CHUNK_BYTES
            assert list(alice.store.data_directory.iterdir()) == []
            await bob.pin(cid)
            assert (await bob.gc())[0] == []
            await bob.unpin(cid)
            removed, _ = await bob.gc()
            assert list(removed) == [cid]
            assert (tmp_path / "copy.bin").exists()

    run(main)


def test_a_file_that_changes_while_it_is_shared(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lattica.blobs import sharing

    async def main() -> None:
        async with world(tmp_path) as w:
            alice = await w.service()
            source = w.file("source.bin", 3 * CHUNK_BYTES)
            real = sharing.read_tensors

            def change(fd: int, size: int) -> Any:
                with source.open("ab") as file:
                    file.write(b"more")
                return real(fd, size)

            monkeypatch.setattr(sharing, "read_tensors", change)
            with pytest.raises(FileChanged):
                await alice.share(source)
            assert alice.list() == []

    run(main)


def test_what_cannot_be_shared(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            alice = await w.service()
            with pytest.raises(StorageError, match="No such file"):
                await alice.share(tmp_path / "nothing")
            os.mkfifo(tmp_path / "pipe")
            with pytest.raises(StorageError, match="not a regular file"):
                await alice.share(tmp_path / "pipe")
            w.file("folder/a\\b", 1)
            with pytest.raises(InvalidArgument, match="backslash"):
                await alice.share(tmp_path / "folder")

    run(main)


def test_destinations_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            alice, bob = await w.service(), await w.service()
            cid = (await alice.share(w.file("source.bin", 2 * CHUNK_BYTES))).cid
            await w.directory.wait_for(cid)
            (tmp_path / "dir").mkdir()
            with pytest.raises(StorageError, match="is a directory"):
                await bob.fetch(cid, tmp_path / "dir")
            with pytest.raises(StorageError, match="No such file"):
                await bob.fetch(cid, tmp_path / "missing" / "x.bin")
            pipe = tmp_path / "pipe"
            os.mkfifo(pipe)
            (tmp_path / "link").symlink_to(pipe)
            raw = await bob.fetch(cid, tmp_path / "fetched")  # from here on nothing has to be fetched
            assert raw.bytes == 2 * CHUNK_BYTES
            for place in (pipe, tmp_path / "link"):
                with pytest.raises(StorageError, match="no regular file"):
                    await bob.fetch(cid, place)
            assert pipe.is_fifo()
            folder = tmp_path / "folder"
            folder.mkdir()
            (folder / "a").write_bytes(b"a")
            of_files = (await alice.share(folder)).cid
            with pytest.raises(StorageError, match="is a file"):
                await bob.fetch(of_files, tmp_path / "fetched")

    run(main)


def test_a_disk_that_is_too_small(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from lattica.blobs import part

    def full(fd: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def main() -> None:
        async with world(tmp_path) as w:
            alice, bob = await w.service(), await w.service()
            cid = (await alice.share(w.file("source.bin", 2 * CHUNK_BYTES))).cid
            await w.directory.wait_for(cid)
            with monkeypatch.context() as patch:
                patch.setattr(part, "preallocate", full)
                with pytest.raises(StorageFull, match="no space left"):
                    await bob.fetch(cid, tmp_path / "copy.bin")
            assert not part_path(tmp_path / "copy.bin", cid).exists()
            # The disk fills up in the middle.
            with monkeypatch.context() as patch:
                patch.setattr(part, "write_all", lambda fd, data, offset: full(fd, 0))
                with pytest.raises(StorageFull):
                    await bob.fetch(cid, tmp_path / "copy.bin")
            assert (await bob.fetch(cid, tmp_path / "copy.bin")).bytes == 2 * CHUNK_BYTES

    run(main)


def test_the_store_survives_a_restart(run: Run, tmp_path: Path) -> None:
    async def first() -> Cid:
        async with world(tmp_path) as w:
            alice = await w.service("home")
            return (await alice.share(w.file("source.bin", 2 * CHUNK_BYTES))).cid

    async def second(cid: Cid) -> None:
        async with world(tmp_path) as w:
            alice, bob = await w.service("home"), await w.service()
            await w.directory.wait_for(cid)  # announced again by itself
            await bob.fetch(cid, tmp_path / "copy.bin")
            assert (tmp_path / "copy.bin").read_bytes() == (tmp_path / "source.bin").read_bytes()
            assert alice.list()[0].pinned

    run(second, run(first))


def test_a_damaged_manifest_is_fetched_again(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            alice, bob = await w.service(), await w.service()
            cid = (await alice.share(w.file("source.bin", 2 * CHUNK_BYTES))).cid
            await w.directory.wait_for(cid)
            await bob.fetch(cid, tmp_path / "copy.bin")
            key = cid.multihash.to_bytes()
            bob.store._manifests.clear()
            bob.store.catalog.delete_object(key)
            bob.store.catalog.put_object(key, b"rubbish")
            with pytest.raises(ContentCorrupt):
                bob.store.manifest(bob.store.require(cid))
            result = await bob.fetch(cid, tmp_path / "copy.bin")
            assert result.reused_bytes == 2 * CHUNK_BYTES

    run(main)


def test_sharing_can_be_cancelled(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            alice = await w.service()
            source = w.file("source.bin", 20 * CHUNK_BYTES)
            with trio.CancelScope() as scope:
                await alice.share(source, progress=lambda done, total: scope.cancel())
            assert scope.cancelled_caught

    run(main)
    assert threading.active_count() < 20


def test_a_peer_with_too_many_streams_is_refused(run: Run, tmp_path: Path) -> None:
    from lattica_protocols.limits import MAX_SERVED_STREAMS_PER_PEER

    async def main() -> None:
        async with world(tmp_path) as w:
            alice, bob = await w.service(), await w.service()
            await bob._host.connect(peer_of(alice), alice._host.listen_addrs())
            streams = [
                await bob._host.open_stream(peer_of(alice), PROTOCOL) for _ in range(MAX_SERVED_STREAMS_PER_PEER)
            ]
            extra = await bob._host.open_stream(peer_of(alice), PROTOCOL)
            with pytest.raises(LatticaError):
                await extra.receive_some()
            streams[0].write(bytes(16))
            with pytest.raises(LatticaError):
                await streams[0].receive_some()
            assert alice._host.counters["handler_bugs"] == 0

    run(main)
