"""Fetches the files of a folder: each is a fetch of its own, several side by side, from the peers that have the folder.

Only folders are announced, not each of their files, so the peers that have the folder are looked for once and asked
for every file.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import trio

from lattica.blobs.download import Environment, FetchProgress, FetchResult
from lattica.blobs.files import storage_errors
from lattica.blobs.search import SourceSearch
from lattica.blobs.source_stream import ChunkBuffers, SourceStream
from lattica.blobs.store import FOLDER
from lattica.errors import LatticaError, StorageError
from lattica_protocols.blobs.chunk_set import ChunkSet

if TYPE_CHECKING:
    from lattica_protocols.blobs.chunk_set import ChunkRange
    from lattica_protocols.blobs.manifest import FolderEntry, FolderManifest
    from lattica_protocols.cid import Cid
    from lattica_protocols.peer_id import PeerId

FILES_AT_A_TIME = 8
"""Files fetched side by side: hides the round trips of small ones."""

OnProgress = Callable[[FetchProgress], None]


class FetchFile(Protocol):
    """`BlobService.fetch`."""

    def __call__(
        self, cid: Cid, dest: Path | None, progress: OnProgress, *, hints: Sequence[PeerId]
    ) -> Awaitable[FetchResult]: ...


class FolderFetch:
    """One folder. `run` once, then `result`."""

    def __init__(
        self, env: Environment, fetch: FetchFile, cid: Cid, manifest: FolderManifest, dest: Path | None
    ) -> None:
        self._env = env
        self._fetch = fetch
        self._cid = cid
        self._manifest = manifest
        self._dest = dest
        self._peers: dict[PeerId, None] = {}
        self._peers_known = trio.Event()
        self._running: dict[str, FetchProgress] = {}
        self._results: list[FetchResult] = []
        self._failure: LatticaError | None = None

    async def run(self, peers: Sequence[PeerId], progress: OnProgress | None) -> None:
        """Fetch every file, each atomically; those that are there already are kept. Errors: those of a fetch."""
        if self._dest is not None:
            await trio.to_thread.run_sync(_make_directories, self._dest, self._manifest)
        self._peers.update(dict.fromkeys(peers))
        if self._peers:
            self._peers_known.set()
        async with trio.open_nursery() as background:
            background.start_soon(self._find_peers)
            limiter = trio.Semaphore(FILES_AT_A_TIME)
            async with trio.open_nursery() as nursery:
                for entry in self._manifest.entries:
                    await limiter.acquire()
                    nursery.start_soon(self._fetch_one, entry, limiter, progress, nursery.cancel_scope)
            background.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure
        add = self._env.store.add
        await trio.to_thread.run_sync(
            lambda: add(self._cid, FOLDER, self._manifest.size, ChunkSet(0), path=self._dest)
        )

    def result(self, seconds: float) -> FetchResult:
        """The sums over all files."""
        fetched = sum(result.fetched_bytes for result in self._results)
        reused = sum(result.reused_bytes for result in self._results)
        sources = max((result.sources for result in self._results), default=len(self._peers))
        return FetchResult(self._cid, self._manifest.size, seconds, sources, fetched, reused)

    async def _fetch_one(
        self,
        entry: FolderEntry,
        limiter: trio.Semaphore,
        progress: OnProgress | None,
        scope: trio.CancelScope,
    ) -> None:
        def report(part: FetchProgress) -> None:
            self._running[entry.path] = part
            if progress is not None:
                progress(self._progress())

        try:
            await self._peers_known.wait()
            target = None if self._dest is None else self._dest / entry.path
            result = await self._fetch(entry.cid, target, report, hints=list(self._peers))
            self._running.pop(entry.path, None)
            self._results.append(result)
        except LatticaError as error:
            self._failure = error
            scope.cancel()
        finally:
            limiter.release()

    def _progress(self) -> FetchProgress:
        running = self._running.values()
        done = sum(result.bytes for result in self._results) + sum(part.done_bytes for part in running)
        fetched = sum(result.fetched_bytes for result in self._results) + sum(p.fetched_bytes for p in running)
        return FetchProgress(self._manifest.size, done, fetched, max((p.sources for p in running), default=0))

    async def _find_peers(self) -> None:
        def found(source: SourceStream) -> None:
            self._peers[source.peer] = None
            self._peers_known.set()
            source.reset()

        await SourceSearch(self._env.host, self._env.routing, self._cid, _Nobody(), found).run_round()
        self._peers_known.set()


class _Nobody:
    """Owner of sources that are only asked whether they have a folder."""

    def __init__(self) -> None:
        self.buffers = ChunkBuffers()

    def source_progressed(self, source: SourceStream) -> None: ...
    def chunk_came(self, source: SourceStream, index: int, buffer: memoryview) -> None: ...
    def chunk_gone(self, source: SourceStream, index: int) -> None: ...
    def source_grew(self, source: SourceStream, ranges: list[ChunkRange]) -> None: ...
    def source_closed(self, source: SourceStream) -> None: ...
    def waits_for(self, source: SourceStream) -> bool:
        return False


def _make_directories(dest: Path, manifest: FolderManifest) -> None:
    """The directories of a folder. None of them may be a link that leads elsewhere."""
    if dest.exists() and not dest.is_dir():
        raise StorageError(f"{dest} is a file, and what is fetched is a folder: name another place")
    with storage_errors(dest):
        dest.mkdir(exist_ok=True)
        for parent in sorted({Path(entry.path).parent for entry in manifest.entries}):
            at = dest
            for part in parent.parts:
                at = at / part
                if at.is_symlink():
                    raise StorageError(f"{at} is a link: a folder is not written through links")
                at.mkdir(exist_ok=True)
