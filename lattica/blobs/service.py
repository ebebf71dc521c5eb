"""Content for the rest of the node: share files, fetch them by content id, serve them to others.

    async with trio.open_nursery() as nursery:
        service = BlobService(host, kad, store)
        nursery.start_soon(service.run)
        shared = await service.share(Path("model.safetensors"))
        result = await service.fetch(shared.cid, Path("copy.safetensors"))
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from lattica.blobs.download import Download, Environment, FetchProgress, FetchResult
from lattica.blobs.files import rename_durably, storage_errors
from lattica.blobs.folder import FolderFetch
from lattica.blobs.reader import ChunkReader, verify_blob
from lattica.blobs.serve import Server
from lattica.blobs.sharing import Shared, share_path
from lattica.blobs.store import RAW_BLOCK, BlobInfo, BlobStore, VerifyReport
from lattica.errors import InvalidArgument, LatticaError, StorageError
from lattica_protocols.blobs import PROTOCOL
from lattica_protocols.blobs.chunk_set import ChunkSet
from lattica_protocols.blobs.manifest import FolderManifest, Manifest, is_supported
from lattica_protocols.cid import Cid

if TYPE_CHECKING:
    from lattica.blobs.search import ContentRouting
    from lattica.host import Host
    from lattica_protocols.multiaddr import Multiaddr
    from lattica_protocols.multihash import Multihash
    from lattica_protocols.peer_id import PeerId

log = logging.getLogger("lattica.blobs")

HASH_THREADS = 4
"""Threads that hash and write for all fetches together."""
ANNOUNCEMENTS_AT_A_TIME = 4
"""Provider records are written with a lookup each, about 60 requests."""
OnProgress = Callable[[FetchProgress], None]
PROGRESS_INTERVAL = 0.1
"""Seconds between calls of a progress callback."""


@dataclass(eq=False)
class _Job:
    """A fetch that runs; several callers may wait for it. It ends early when the last of them is gone."""

    download: Download
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    done: trio.Event = field(default_factory=trio.Event)
    waiters: int = 0
    manifest: Manifest | bytes | None = None
    error: Exception | None = None
    seconds: float = 0.0


class BlobService:
    """Serves `/lattica/blobs/1` from the moment it is made; `run` announces. Content ids may be given as text."""

    def __init__(self, host: Host, routing: ContentRouting | None, store: BlobStore) -> None:
        self.store = store
        self.reader = ChunkReader(store)
        self.server = Server(store, self.reader)
        self._host = host
        self._routing = routing
        self._jobs: dict[Multihash, _Job] = {}
        self._to_announce: dict[Multihash, None] = {}
        self._announcers = trio.lowlevel.ParkingLot()
        threads = trio.CapacityLimiter(HASH_THREADS)
        self._env = Environment(host, routing, store, self.announce, threads)
        host.handle(PROTOCOL, self.server.handle)

    # -- sharing --------------------------------------------------------------------------------------------
    async def share(
        self, path: Path, *, copy: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> Shared:
        """Hash a file or folder, pin it, serve it, announce it. Returns (content id, bytes, chunks).

        The file is served from where it is; with `copy` the store takes a copy. `progress(done, total)` is called
        with bytes. Errors: `StorageError`, `StorageFull`, `FileChanged`, `InvalidArgument`.
        """
        path = Path(path)
        stop = threading.Event()
        hashed = [0]
        total = await trio.to_thread.run_sync(_size_of, path)

        def count(more: int) -> None:
            hashed[0] += more  # several threads: the last figure may be a chunk short until the end

        async with trio.open_nursery() as nursery:
            if progress is not None:
                nursery.start_soon(_report, lambda: progress(min(hashed[0], total), total))
            failure: LatticaError | None = None
            try:
                shared = await trio.to_thread.run_sync(
                    lambda: share_path(self.store, path, copy=copy, stop=stop, progress=count),
                    abandon_on_cancel=True,
                )
            except LatticaError as error:
                failure = error
            finally:
                stop.set()
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        if progress is not None:
            progress(total, total)
        self.reader.forget(shared.cid.multihash)
        self.announce(shared.cid.multihash)
        return shared

    # -- fetching -------------------------------------------------------------------------------------------
    async def fetch(
        self,
        cid: Cid | str,
        dest: Path | None = None,
        progress: OnProgress | None = None,
        *,
        sources: Sequence[PeerId] = (),
        hints: Sequence[PeerId] = (),
    ) -> FetchResult:
        """Fetch a file to `dest`, or a folder below it, verified, from all who have it; then serve it from there.

        Without `dest` it is kept in the store. `sources` are asked besides those found. What is on this machine
        already is not fetched again, also after a crash. Two fetches of one content id share the work. The result
        appears under its name only when it is complete and on disk.
        Errors: `ContentNotFound`, `ContentCorrupt`, `StorageFull`, `StorageError`, `InvalidArgument`.
        """
        cid = _parse(cid)
        dest = None if dest is None else _absolute(dest)
        started = trio.current_time()
        while (job := self._jobs.get(cid.multihash)) is not None:
            if job.scope.cancel_called:
                await job.done.wait()
            elif job.download.dest == dest:
                break
            else:
                await self._wait(job, progress)  # then copy what it left on this machine
        else:
            job = self._start(cid, dest, sources, hints)
        await self._wait(job, progress)
        if job.error is not None:
            raise job.error
        download, manifest = job.download, job.manifest
        seconds = trio.current_time() - started
        if isinstance(manifest, FolderManifest):
            folder = FolderFetch(self._env, self.fetch, cid, manifest, dest)
            await folder.run([*download.givers, *sources], progress)
            self.announce(cid.multihash)
            return folder.result(trio.current_time() - started)
        if isinstance(manifest, bytes):
            await self._keep_block(cid, manifest, dest)
            size, fetched, reused = len(manifest), len(manifest), 0
        else:
            assert manifest is not None
            size, fetched, reused = manifest.size, download.fetched_bytes, download.reused_bytes
        self.announce(cid.multihash)
        return FetchResult(cid, size, seconds, len(download.givers), fetched, reused)

    def _start(self, cid: Cid, dest: Path | None, named: Sequence[PeerId], hints: Sequence[PeerId]) -> _Job:
        job = _Job(Download(self._env, cid, dest, named=named, hints=hints))
        self._jobs[cid.multihash] = job
        self._host.nursery.start_soon(self._run_job, cid, job)
        return job

    async def _run_job(self, cid: Cid, job: _Job) -> None:
        try:
            with job.scope:
                job.manifest = await job.download.run()
            if job.scope.cancelled_caught:
                job.error = LatticaError("the fetch was cancelled")
        except Exception as error:
            # Whatever it is belongs to those who wait for this fetch, and not to the node: it is raised there.
            job.error = error
        finally:
            if job.manifest is None and job.error is None:
                job.error = LatticaError("the node is closing")
            del self._jobs[cid.multihash]
            self.reader.forget(cid.multihash)
            job.done.set()

    async def _wait(self, job: _Job, progress: OnProgress | None) -> None:
        job.waiters += 1
        try:
            async with trio.open_nursery() as nursery:
                if progress is not None:
                    nursery.start_soon(_report, lambda: progress(job.download.progress()))
                await job.done.wait()
                nursery.cancel_scope.cancel()
        finally:
            job.waiters -= 1
            if not job.waiters:
                job.scope.cancel()
        if progress is not None and job.error is None:
            progress(job.download.progress())

    async def _keep_block(self, cid: Cid, data: bytes, dest: Path | None) -> None:
        """A raw block, whose hash is right: keep it, and write it where it is wanted."""

        def work() -> None:
            self.store.put_objects([(cid.multihash, data)])
            self.store.add(cid, RAW_BLOCK, len(data), ChunkSet(0))
            if dest is not None and dest.exists() and not dest.is_file():
                raise StorageError(f"{dest} is no regular file and stays what it is: name another")
            if dest is not None:
                temporary = dest.with_name(f".{dest.name}.part")
                with storage_errors(dest):
                    temporary.write_bytes(data)
                    rename_durably(temporary, dest)

        await trio.to_thread.run_sync(work)

    async def providers(self, cid: Cid | str, count: int = 20) -> list[tuple[PeerId, list[Multiaddr]]]:
        """Who says that it has `cid`, from the DHT; not ourselves."""
        cid = _parse(cid)
        if self._routing is None:
            return []
        search = self._routing.find_providers(cid.multihash.to_bytes(), count)
        return [(peer, list(addrs)) async for peer, addrs in search]

    # -- the store ------------------------------------------------------------------------------------------
    def list(self) -> Sequence[BlobInfo]:
        """What is in the store, oldest first."""
        return self.store.list()

    async def pin(self, cid: Cid | str) -> None:
        """Keep it through `gc`. `ContentNotFound` when it is not in the store."""
        await trio.to_thread.run_sync(self.store.set_pinned, _parse(cid), True)

    async def unpin(self, cid: Cid | str) -> None:
        """Let `gc` remove it."""
        await trio.to_thread.run_sync(self.store.set_pinned, _parse(cid), False)

    async def remove(self, cid: Cid | str) -> int:
        """Forget it and tell nobody about it any more; bytes freed. A file that was shared in place stays."""
        cid = _parse(cid)
        job = self._jobs.get(cid.multihash)
        if job is not None:
            job.scope.cancel()
            await job.done.wait()
        freed = await trio.to_thread.run_sync(self.store.remove, cid)
        await self._withdraw([cid])
        return freed

    async def gc(self) -> tuple[Sequence[Cid], int]:
        """Forget everything that is neither pinned nor being fetched: what that was, and the bytes freed."""
        removed, freed = await trio.to_thread.run_sync(self.store.collect_garbage)
        await self._withdraw(removed)
        return removed, freed

    async def verify(
        self, cid: Cid | str | None = None, progress: Callable[[int, int], None] | None = None
    ) -> Sequence[VerifyReport]:
        """Hash one blob or all; wrong chunks are dropped, and fetched again by the next fetch.

        `progress(done, total)` counts bytes, after each blob.
        """
        blobs = self.store.blobs() if cid is None else [self.store.require(_parse(cid))]
        total, done = sum(blob.size for blob in blobs), 0
        reports = []
        for blob in blobs:
            if not blob.writing:
                reports.append(await trio.to_thread.run_sync(verify_blob, self.store, blob))
            done += blob.size
            if progress is not None:
                progress(done, total)
        return reports

    async def _withdraw(self, cids: Sequence[Cid]) -> None:
        for cid in cids:
            self.reader.forget(cid.multihash)
            self._to_announce.pop(cid.multihash, None)
            if self._routing is not None:
                await self._routing.stop_providing(cid.multihash.to_bytes())

    # -- announcing -----------------------------------------------------------------------------------------
    def announce(self, multihash: Multihash) -> None:
        """Tell the network, some time soon, that we have (a part of) this."""
        if self._routing is not None:
            self._to_announce[multihash] = None
            self._announcers.unpark()

    async def run(self) -> None:
        """Announce what we have, until cancelled. Files of a folder are found through the folder."""
        if self._routing is None:
            return
        known = set(self._routing.provided())
        in_folders = await trio.to_thread.run_sync(self.store.multihashes_in_folders)
        for blob in self.store.blobs():
            told = blob.multihash.to_bytes() in known or (blob.multihash in in_folders and not blob.pinned)
            if not told and (len(blob.have) or blob.complete):
                self.announce(blob.multihash)
        async with trio.open_nursery() as nursery:
            for _ in range(ANNOUNCEMENTS_AT_A_TIME):
                nursery.start_soon(self._announce_loop, self._routing)

    async def _announce_loop(self, routing: ContentRouting) -> None:
        while True:
            while not self._to_announce:
                await self._announcers.park()
            multihash = next(iter(self._to_announce))
            del self._to_announce[multihash]
            blob = self.store.get(multihash)
            if blob is None or (blob.path is not None and not blob.writing and not blob.path.exists()):
                continue
            try:
                told = await routing.provide(multihash.to_bytes())
                log.debug("announced cid=%s peers=%d", blob.cid, told)
            except LatticaError as error:
                log.info("announce_failed cid=%s error=%s", blob.cid, error)


async def _report(call: Callable[[], None]) -> None:
    while True:
        call()
        await trio.sleep(PROGRESS_INTERVAL)


def _parse(cid: Cid | str) -> Cid:
    if isinstance(cid, str):
        try:
            cid = Cid.parse(cid)
        except ValueError as error:
            raise InvalidArgument(str(error)) from None
    if not is_supported(cid):
        raise InvalidArgument(
            f"{cid} has codec 0x{cid.codec:x} and hash 0x{cid.multihash.code:x}: content here is a blob manifest "
            f"(0x201, BLAKE3) or a raw block (SHA2-256 or BLAKE3)"
        )
    return cid


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))


def _size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a directory; 0 when that cannot be told."""
    try:
        if not path.is_dir():
            return path.stat().st_size
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    except OSError:
        return 0
