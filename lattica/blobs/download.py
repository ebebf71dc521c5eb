"""Fetches one blob: the runtime around the `Fetch` machine.

Tasks, all in one nursery: the search for sources; two that take whole chunks, have them hashed and written in
worker threads, and tell the machine; a clock for the machine and for progress; one that syncs the file now and
then. Reading the network has no task here: sources report from the tasks of their connections.

Back-pressure: when `PAUSE_CHUNKS` whole chunks wait for a thread, all sources are paused until half of them are
done, so that a disk slower than the network costs a few buffers and not the memory of the machine.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from lattica.blobs.part import PartFile, part_path
from lattica.blobs.places import PERIOD, Places
from lattica.blobs.reader import verify_blob
from lattica.blobs.search import ContentRouting, SourceSearch
from lattica.blobs.source_stream import ChunkBuffers, SourceStream
from lattica.blobs.store import BLOB, Blob, BlobStore
from lattica.errors import ContentCorrupt, ContentNotFound, LatticaError, StorageError
from lattica.host import PeerConnected
from lattica_protocols.blobs.fetch import Completed, Fetch, RequestChunks, SourceDropped, Starved
from lattica_protocols.blobs.manifest import (
    BlobManifest,
    FolderManifest,
    Manifest,
    check_object_untrusted,
    decode_manifest_untrusted,
)
from lattica_protocols.cid import RAW
from lattica_protocols.errors import ProtocolError, RemoteProtocolError
from lattica_protocols.limits import CHUNK_BYTES, MAX_OBJECT_BYTES

if TYPE_CHECKING:
    from lattica.host import Host
    from lattica_protocols.blobs.chunk_set import ChunkRange
    from lattica_protocols.cid import Cid
    from lattica_protocols.multihash import Multihash
    from lattica_protocols.peer_id import PeerId

log = logging.getLogger("lattica.blobs")

VERIFY_TASKS = 2
"""Threads that hash and write. One keeps up with 1.5 GB/s; the second covers for a write that the disk holds up."""
VERIFY_BATCH = 4
"""Chunks a thread takes at a time when they have piled up: a hand-over costs about 0.1 ms."""
BULK_APART_BYTES = 64 << 20
"""A source of so much gets a connection set apart for it: its handshake is paid back, and calls do not wait so long."""
PAUSE_CHUNKS = 12
TICK = 0.1
"""Seconds between looks at the clock for the machine and between reports of progress."""
SYNC_INTERVAL = 1.0
"""Seconds between writing the file back and noting what is there."""
PATIENCE = 30.0
"""Seconds without a new chunk, while no source has any that is missing, before a fetch gives up."""
LOOK_AROUND_INTERVAL = 60.0
"""Seconds between rounds of asking while all is well: others may have it, too, by now."""
SEARCH_INTERVAL = 3.0
"""Seconds between rounds of asking while sources are missing."""
ANOTHER_SECONDS = 1.0
"""How long a manifest or a page is waited for before one more source is asked for it."""
OBJECT_SECONDS = 300.0
"""How long one source may take for it: 16 MiB at 56 kB/s."""


@dataclass(frozen=True, slots=True)
class FetchProgress:
    """Bytes of the content: all of it, what is on disk, what came over the network, and from how many sources now."""

    total_bytes: int
    done_bytes: int
    fetched_bytes: int
    sources: int


@dataclass(frozen=True, slots=True)
class FetchResult:
    """What a fetch did. `fetched_bytes` came over the network, `reused_bytes` were on this machine."""

    cid: Cid
    bytes: int
    seconds: float
    sources: int
    fetched_bytes: int
    reused_bytes: int


@dataclass(slots=True)
class Environment:
    """What all downloads of a node share."""

    host: Host
    routing: ContentRouting | None
    store: BlobStore
    announce: Callable[[Multihash], None]
    """Tell the network, some time soon, that we have (a part of) a blob."""
    threads: trio.CapacityLimiter
    """For hashing and writing."""


class Download:
    """One blob. `run` once; it may be cancelled at any time and leaves a part file that the next one continues."""

    def __init__(
        self,
        env: Environment,
        cid: Cid,
        dest: Path | None,
        *,
        named: Sequence[PeerId] = (),
        hints: Sequence[PeerId] = (),
    ) -> None:
        """`named` are asked besides those found; when one of `hints` has it, nobody else is looked for at first."""
        self.cid = cid
        self.dest = dest
        self.buffers = ChunkBuffers()
        self.givers: set[PeerId] = set()
        """Peers whose bytes were used."""
        self.fetched_bytes = 0
        self.reused_bytes = 0
        self._env = env
        self._hints = list(hints)
        self._search = SourceSearch(env.host, env.routing, cid, self, self._source_found, named)
        self._searching = False
        self._asking_again = 0
        """Sources whose connection was lost, and which are looked for."""
        self._search_started = False
        self._search_again = trio.Event()
        self._changed = trio.Event()
        self._queue: deque[tuple[SourceStream, int, memoryview]] = deque()
        self._verifiers = trio.lowlevel.ParkingLot()
        self._paused = False
        self._machine: Fetch[SourceStream] | None = None
        self._manifest: BlobManifest | None = None
        self._part: PartFile | None = None
        self._blob: Blob | None = None
        self._failure: LatticaError | None = None
        self._progress_at = 0.0
        self._nursery: trio.Nursery | None = None

    # -- what the service calls -----------------------------------------------------------------------------
    async def run(self) -> Manifest | bytes:
        """Fetch. A file is at `dest` (or in the store) afterwards; of a folder only the manifest was fetched.

        Returns the manifest, or the bytes of a raw block. Errors: `ContentNotFound`, `StorageError`, `StorageFull`.
        """
        failure: LatticaError | None = None
        result: Manifest | bytes = b""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                try:
                    result = await self._run()
                except LatticaError as error:
                    failure = error
                nursery.cancel_scope.cancel()
        finally:
            self._end()
        if failure is not None:
            raise failure
        return result

    def progress(self) -> FetchProgress:
        """Where it stands. All zero before the manifest is known."""
        if self._manifest is None:
            return FetchProgress(0, 0, 0, 0)
        done = self.reused_bytes + self.fetched_bytes
        return FetchProgress(self._manifest.size, done, self.fetched_bytes, len(self._search.active))

    def peers(self) -> list[PeerId]:
        """Peers that have some of it, for the files of a folder."""
        return list(self._search.active)

    # -- the plan -------------------------------------------------------------------------------------------
    async def _run(self) -> Manifest | bytes:
        manifest = await self._local_manifest()
        if manifest is None:
            data = await self._get_object(self.cid.multihash)
            if self.cid.codec == RAW:
                return data
            manifest = await self._read_manifest(data)
        if isinstance(manifest, FolderManifest):
            return manifest
        self._manifest = manifest
        await self._fetch_file(manifest)
        return manifest

    async def _local_manifest(self) -> Manifest | None:
        blob = self._env.store.get(self.cid.multihash)
        if blob is None or blob.kind not in (BLOB, "folder"):
            return None
        try:
            return await trio.to_thread.run_sync(self._env.store.manifest, blob)
        except ContentCorrupt as error:
            log.warning("manifest_damaged cid=%s error=%s", self.cid, error)
            return None

    async def _read_manifest(self, data: bytes) -> Manifest:
        """Parse manifest bytes whose hash is right, fetch its pages, keep all of it."""
        objects = [(self.cid.multihash, data)]
        try:
            manifest = await trio.to_thread.run_sync(decode_manifest_untrusted, data)
            if isinstance(manifest, BlobManifest) and manifest.pages is not None:
                for page in manifest.page_hashes():
                    objects.append((page, await self._get_object(page)))
                manifest = manifest.with_pages([page for _, page in objects[1:]])
        except RemoteProtocolError as error:
            # The hash is right: whoever made this content id made it of something that is no manifest.
            raise ContentCorrupt(f"{self.cid} does not name a manifest we can read: {error}") from None
        await trio.to_thread.run_sync(self._env.store.put_objects, objects)
        return manifest

    async def _get_object(self, multihash: Multihash) -> bytes:
        """From any source; its hash is checked. While it does not come, another source is asked every second: one that
        is slow, or never answers, must not hold up the fetch."""
        tried: set[SourceStream] = set()
        found: list[bytes] = []
        asked = answered = 0

        async def ask(source: SourceStream) -> None:
            nonlocal answered
            data = None
            with trio.move_on_after(OBJECT_SECONDS):
                data = await source.get_object(multihash, MAX_OBJECT_BYTES)
            answered += 1
            try:
                if data is not None:
                    check_object_untrusted(multihash, data)
                    self.givers.add(source.peer)
                    found.append(data)
            except RemoteProtocolError as error:
                self._reject(source, str(error))
            self._notify()

        self._start_search()
        async with trio.open_nursery() as nursery:
            while not found:
                source = next((s for s in self._search.active.values() if s not in tried), None)
                if source is not None:
                    tried.add(source)
                    asked += 1
                    nursery.start_soon(ask, source)
                elif asked == answered and not self._is_searching():
                    break
                before = answered
                with trio.move_on_after(ANOTHER_SECONDS):
                    await self._wait_changed()
                    while asked > answered == before:
                        await self._wait_changed()
            nursery.cancel_scope.cancel()
        if not found:
            raise ContentNotFound(f"nobody has {self.cid}: {self._search.describe()}")
        return found[0]

    async def _fetch_file(self, manifest: BlobManifest) -> None:
        if await self._already_in_place(manifest):
            return
        await self._open_part(manifest)
        part = self._part
        assert part is not None
        if not part.have.complete:
            await self._fetch_chunks(manifest, part)
        await self._publish(manifest, part)

    # -- what is on this machine ----------------------------------------------------------------------------
    async def _already_in_place(self, manifest: BlobManifest) -> bool:
        """Whether the destination is the file that the store serves from, and all of it is right."""
        blob = self._env.store.get(self.cid.multihash)
        if blob is None or not blob.complete or blob.path is None or blob.writing:
            return False
        if self.dest is not None and not await trio.to_thread.run_sync(_same_file, self.dest, blob.path):
            return False
        report = await trio.to_thread.run_sync(verify_blob, self._env.store, blob)
        if report.dropped or not blob.complete:
            return False
        self.reused_bytes = manifest.size
        return True

    async def _open_part(self, manifest: BlobManifest) -> None:
        """Make or continue the part file, and take into it whatever this machine already has."""
        store = self._env.store
        known = store.get(self.cid.multihash)
        old_path = None if known is None else known.path
        target = self.dest or store.data_directory / str(self.cid)
        if target.is_dir():
            raise StorageError(f"{target} is a directory: name a file in it")
        if target.exists() and not target.is_file():  # a rename would put the file in place of the device
            raise StorageError(f"{target} is no regular file and stays what it is: name another")
        path = part_path(target, self.cid)
        part = self._part = await trio.to_thread.run_sync(PartFile, path, manifest)
        seeds = [p for p in (old_path, target) if p is not None and p != path]

        self.reused_bytes = await self._gather(part, seeds)
        if known is None or not known.complete or known.path is None or not part.have.complete:
            have = part.have
            blob = self._blob = await trio.to_thread.run_sync(
                lambda: store.add(self.cid, BLOB, manifest.size, have, path=path, owned=True)
            )
            blob.writing, blob.verified = True, have

    async def _gather(self, part: PartFile, seeds: Sequence[Path]) -> int:
        """Take what is on this machine, in a thread that ends soon after we are cancelled. Bytes taken."""
        taken = 0
        failure: LatticaError | None = None

        def work() -> int:
            total = part.adopt()
            for seed in seeds:
                if not part.have.complete:
                    total += part.seed(seed)
            return total

        async def stop_when_cancelled() -> None:
            try:
                await trio.sleep_forever()
            finally:
                part.stop()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop_when_cancelled)
            try:
                taken = await trio.to_thread.run_sync(work)
            except LatticaError as error:
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return taken

    # -- the network ----------------------------------------------------------------------------------------
    async def _fetch_chunks(self, manifest: BlobManifest, part: PartFile) -> None:
        machine = self._machine = Fetch(manifest.chunk_count, rng=self._env.host.rng, have=part.have)
        self._progress_at = trio.current_time()
        assert self._nursery is not None
        for source in list(self._search.active.values()):
            self._attach(source)
        for _ in range(VERIFY_TASKS):
            self._nursery.start_soon(self._verify, part)
        self._nursery.start_soon(self._tick)
        self._nursery.start_soon(self._sync, part)
        self._start_search()
        while not machine.complete:
            if self._failure is not None:
                raise self._failure
            if not self._search.active and not self._is_searching():
                quiet = trio.current_time() - self._progress_at
                if not self.fetched_bytes or quiet > PATIENCE:
                    raise self._not_found(manifest, machine)
                self._search_again.set()
            elif machine.starved and not self._is_waiting() and trio.current_time() - self._progress_at > PATIENCE:
                raise self._not_found(manifest, machine)
            await self._wait_changed()

    def _not_found(self, manifest: BlobManifest, machine: Fetch[SourceStream]) -> ContentNotFound:
        described = self._search.describe()
        if machine.chunks_left == manifest.chunk_count:
            return ContentNotFound(f"nobody has {self.cid}: {described}")
        return ContentNotFound(
            f"nobody who can be reached has the last {machine.chunks_left} of {manifest.chunk_count} chunks of "
            f"{self.cid} ({described}); what is here stays, fetch again to continue"
        )

    def _start_search(self) -> None:
        if not self._search_started:
            self._search_started = self._searching = True
            assert self._nursery is not None
            self._nursery.start_soon(self._search_rounds)
            self._nursery.start_soon(self._follow_paths)
            self._nursery.start_soon(self._make_room)

    def _is_searching(self) -> bool:
        return self._searching or self._asking_again > 0 or self._is_waiting()

    def _is_waiting(self) -> bool:
        return bool(self._search.waiting)

    async def _make_room(self) -> None:
        """Every few seconds, let peers that wait take the places of sources that give little."""
        places = Places(self._search)
        while True:
            await trio.sleep(PERIOD)
            if self._paused:
                continue  # by us: the disk is behind
            for source in places.make_room():
                log.info("source_displaced peer=%s cid=%s", source.peer.short(), self.cid)
            self._let_in()

    def _let_in(self) -> None:
        if self._search.waiting and self._nursery is not None:
            self._asking_again += 1
            self._nursery.start_soon(self._ask_waiting)

    async def _ask_waiting(self) -> None:
        await self._search.let_in()
        self._asking_again -= 1
        self._notify()

    async def _ask_again(self, peer: PeerId) -> None:
        await self._search.ask_again(peer)
        self._asking_again -= 1
        self._notify()

    async def _follow_paths(self) -> None:
        """Take sources to better connections: from a relay to a direct one, and to one set apart for bulk."""
        with self._env.host.subscribe() as events:
            async for event in events:
                if isinstance(event, PeerConnected):
                    source = self._search.active.get(event.peer)
                    if source is not None and source.gains_by(event.connection) and self._nursery is not None:
                        self._nursery.start_soon(self._search.replace, source, event.connection)

    async def _search_rounds(self) -> None:
        hints, self._hints = self._hints, []
        while True:
            self._searching = True
            self._search_again = trio.Event()
            await self._search.run_round(hints)
            hints = []
            self._searching = False
            self._notify()
            with trio.move_on_after(LOOK_AROUND_INTERVAL):
                await self._search_again.wait()
            await trio.sleep(SEARCH_INTERVAL)

    def _attach(self, source: SourceStream) -> None:
        """Let the machine use a source."""
        machine, manifest = self._machine, self._manifest
        if machine is None or manifest is None or source.attached or source.closed:
            return
        assert source.have is not None
        try:
            source.set_manifest(manifest.chunk_count, manifest.chunk_size)
        except ProtocolError as error:
            self._reject(source, str(error))
            return
        source.attached = True
        machine.add_source(source, source.have, trio.current_time())
        if machine.chunks_left * CHUNK_BYTES >= BULK_APART_BYTES and self._nursery is not None:
            self._nursery.start_soon(self._env.host.dial_for_bulk, source.peer)
        self._pump()

    def _reject(self, source: SourceStream, reason: str) -> None:
        log.warning("source_rejected peer=%s cid=%s reason=%s", source.peer.short(), self.cid, reason)
        self._search.rejected.add(source.peer)
        source.reset()

    # -- SourceOwner: called from the tasks of connections ----------------------------------------------------
    def _source_found(self, source: SourceStream) -> None:
        self._attach(source)
        best = self._env.host.connection(source.peer, "bulk")
        if best is not None and source.gains_by(best) and self._nursery is not None:
            self._nursery.start_soon(self._search.replace, source, best)  # it came up while the source was asked
        self._notify()

    def source_progressed(self, source: SourceStream) -> None:
        if self._machine is not None:
            self._machine.receive_progress(source, trio.current_time())

    def chunk_came(self, source: SourceStream, index: int, buffer: memoryview) -> None:
        machine = self._machine
        if machine is None or not machine.receive_chunk(source, index, len(buffer), trio.current_time()):
            self.buffers.give_back(buffer)
        else:
            self._queue.append((source, index, buffer))
            self._verifiers.unpark()
            if len(self._queue) >= PAUSE_CHUNKS and not self._paused:
                self._paused = True
                for each in self._search.active.values():
                    each.pause()
        self._pump()

    def chunk_gone(self, source: SourceStream, index: int) -> None:
        if self._machine is not None:
            self._machine.receive_gone(source, index, trio.current_time())
            self._pump()

    def source_grew(self, source: SourceStream, ranges: list[ChunkRange]) -> None:
        if self._machine is not None:
            self._machine.receive_more(source, ranges, trio.current_time())
            self._pump()

    def source_closed(self, source: SourceStream) -> None:
        if self._search.active.get(source.peer) is source:
            del self._search.active[source.peer]
            if source.lost and self._nursery is not None:
                self._asking_again += 1
                self._nursery.start_soon(self._ask_again, source.peer)
        if self._machine is not None:
            self._machine.remove_source(source, trio.current_time())
            self._pump()
        self._let_in()
        self._notify()

    def waits_for(self, source: SourceStream) -> bool:
        return self._machine is not None and self._machine.waits_for(source)

    # -- the machine ----------------------------------------------------------------------------------------
    def _pump(self) -> None:
        """Do what the machine wants done."""
        machine = self._machine
        assert machine is not None
        for command in machine.poll_commands():
            if isinstance(command, RequestChunks):
                command.source.request(command.ranges)
            else:
                command.source.cancel(command.ranges)
        while (event := machine.next_event()) is not None:
            if isinstance(event, SourceDropped):
                if event.liar:
                    self._reject(event.source, event.reason)
                else:
                    event.source.reset()
            elif isinstance(event, Starved):
                self._search_again.set()
            else:
                assert isinstance(event, Completed)
                self._notify()

    async def _tick(self) -> None:
        machine = self._machine
        assert machine is not None
        while True:
            await trio.sleep(TICK)
            machine.handle_timer(trio.current_time())
            self._pump()
            self._notify()

    async def _verify(self, part: PartFile) -> None:
        """Take whole chunks, have them hashed and written, tell the machine."""
        while True:
            while not self._queue:
                await self._verifiers.park()
            batch = [self._queue.popleft() for _ in range(min(VERIFY_BATCH, len(self._queue)))]

            def work(batch: list[tuple[SourceStream, int, memoryview]] = batch) -> list[bool]:
                return [part.verify_and_write(index, buffer) for _, index, buffer in batch]

            try:
                good = await trio.to_thread.run_sync(work, limiter=self._env.threads)
            except LatticaError as error:
                self._failure = error
                self._notify()
                return
            for (source, index, buffer), right in zip(batch, good, strict=True):
                self._chunk_checked(part, source, index, len(buffer), right)
                self.buffers.give_back(buffer)
            self._pump()
            if self._paused and len(self._queue) <= PAUSE_CHUNKS // 2:
                self._paused = False
                for each in list(self._search.active.values()):
                    each.resume()

    def _chunk_checked(self, part: PartFile, source: SourceStream, index: int, size: int, right: bool) -> None:
        machine, now = self._machine, trio.current_time()
        assert machine is not None
        if not right:
            machine.chunk_corrupt(source, index, now)
            return
        if index not in part.have:
            first = len(part.have) == 0
            part.have.add(index)
            self.fetched_bytes += size
            self._progress_at = now
            self.givers.add(source.peer)
            if self._blob is not None:
                for watcher in self._blob.watchers:
                    watcher([index])
                if first:
                    self._env.announce(self.cid.multihash)
        machine.chunk_verified(index, now)

    async def _sync(self, part: PartFile) -> None:
        """Write back as we go: the sync before the rename is then a matter of milliseconds."""
        while True:
            await trio.sleep(SYNC_INTERVAL)

            def work() -> None:
                part.sync()
                if self._blob is not None:
                    self._env.store.save(self._blob)

            try:
                await trio.to_thread.run_sync(work)
            except LatticaError as error:
                self._failure = error
                self._notify()
                return

    # -- the end ----------------------------------------------------------------------------------------------
    async def _publish(self, manifest: BlobManifest, part: PartFile) -> None:
        store = self._env.store
        target = self.dest or store.data_directory / str(self.cid)
        identity = await trio.to_thread.run_sync(part.publish, target)
        blob = store.get(self.cid.multihash)
        if blob is not self._blob and blob is not None and blob.complete:
            return  # a copy of what the store serves from elsewhere
        if blob is not None:
            blob.writing = False
        self._blob = None
        await trio.to_thread.run_sync(
            lambda: store.add(
                self.cid,
                BLOB,
                manifest.size,
                part.have,
                path=target,
                owned=self.dest is None,
                identity=identity,
                verified=True,
            )
        )

    def _end(self) -> None:
        """Close everything; the part file stays for the next attempt."""
        machine, self._machine = self._machine, None
        self._search.waiting.clear()
        for source in list(self._search.active.values()):
            source.reset()
        if self._part is not None:
            self._part.close()
        if self._blob is not None:
            self._blob.writing, self._blob.verified = False, None
            self._env.store.save(self._blob)
        if machine is not None:
            self._queue.clear()

    def _notify(self) -> None:
        self._changed.set()

    async def _wait_changed(self) -> None:
        await self._changed.wait()
        self._changed = trio.Event()


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False
