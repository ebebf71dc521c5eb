"""Files by their content id, and the store."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from lattica.errors import DeadlineExceeded, InvalidArgument
from lattica_daemon.control.arguments import read_cid, read_peer
from lattica_daemon.control.job import Progress, report_while

if TYPE_CHECKING:
    from lattica.blobs import BlobInfo, FetchProgress
    from lattica_daemon.daemon import Daemon

ANNOUNCE_TIMEOUT = 10.0
"""Seconds that `share` waits for the network to know of it: whoever gets the content id then finds it at once."""


class ContentControl:
    """Methods about content."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    # -- share and fetch ------------------------------------------------------------------------------------
    async def share(self, path: str, copy: bool = False) -> AsyncIterator[Progress]:
        """Add a file or folder to the store and announce it; it is served from where it is unless `copy`.

        Ends with `{cid, bytes, chunks, seconds, announced}`; `announced` is how many peers keep the record.
        """
        file = _absolute(path)
        progress: Progress = {"state": "hashing", "bytes": 0, "total": 0}
        node = self._daemon.node

        def count(done: int, total: int) -> None:
            progress.update(bytes=done, total=total)

        async def work() -> Progress:
            started = trio.current_time()
            shared = await node.blobs.share(file, copy=copy, progress=count)
            seconds = trio.current_time() - started
            progress["state"] = "announcing"
            announced = 0
            with trio.move_on_after(ANNOUNCE_TIMEOUT):
                announced = await node.kad.provide(shared.cid.multihash.to_bytes())
            return {
                "cid": str(shared.cid),
                "bytes": shared.bytes,
                "chunks": shared.chunks,
                "seconds": round(seconds, 4),
                "announced": announced,
            }

        async with aclosing(report_while(self._daemon.nursery, progress, work)) as reports:
            async for report in reports:
                yield report

    async def fetch(
        self, cid: str, path: str, peers: Sequence[str] = (), timeout: float | None = None
    ) -> AsyncIterator[Progress]:
        """Fetch to `path` from whoever has it, and from `peers`; goes on where an earlier fetch stopped.

        Ends with `{cid, path, bytes, seconds, sources, fetched_bytes, reused_bytes}`.
        """
        wanted, target = read_cid(cid), _absolute(path)
        sources = [read_peer(peer) for peer in peers]
        progress: Progress = {"state": "searching", "bytes": 0, "total": 0, "sources": 0}
        node = self._daemon.node

        def follow(now: FetchProgress) -> None:
            state = "fetching" if now.sources else "searching"
            progress.update(state=state, bytes=now.done_bytes, total=now.total_bytes, sources=now.sources)

        async def work() -> Progress:
            try:
                with trio.fail_after(float("inf") if timeout is None else timeout):
                    done = await node.blobs.fetch(wanted, target, follow, sources=sources)
            except trio.TooSlowError:
                raise DeadlineExceeded(
                    f"{wanted} was not complete after {timeout:g} s; what is here is kept for the next fetch"
                ) from None
            return {
                "cid": str(done.cid),
                "path": str(target),
                "bytes": done.bytes,
                "seconds": round(done.seconds, 4),
                "sources": done.sources,
                "fetched_bytes": done.fetched_bytes,
                "reused_bytes": done.reused_bytes,
            }

        async with aclosing(report_while(self._daemon.nursery, progress, work)) as reports:
            async for report in reports:
                yield report

    async def providers(self, cid: str) -> list[dict[str, Any]]:
        """Who has it, from the network; this peer too when it has all of it: `[{peer_id, addrs}]`."""
        wanted = read_cid(cid)
        node = self._daemon.node
        found = [
            {"peer_id": str(peer), "addrs": [str(addr) for addr in addrs]}
            for peer, addrs in await node.blobs.providers(wanted)
        ]
        own = node.blobs.store.get(wanted.multihash)
        if own is not None and own.complete:
            addrs = [str(addr) for addr in node.host.advertised_addrs()]
            found.append({"peer_id": str(node.peer_id), "addrs": addrs})
        return found

    # -- the store ------------------------------------------------------------------------------------------
    async def blobs_list(self) -> list[dict[str, Any]]:
        """Everything in the store, oldest first."""
        return [_describe(blob) for blob in self._daemon.node.blobs.list()]

    async def blobs_pin(self, cid: str) -> dict[str, Any]:
        """Keep it when the store is collected."""
        wanted = read_cid(cid)
        await self._daemon.node.blobs.pin(wanted)
        return {"cid": str(wanted), "pinned": True}

    async def blobs_unpin(self, cid: str) -> dict[str, Any]:
        """Let it go at the next collection."""
        wanted = read_cid(cid)
        await self._daemon.node.blobs.unpin(wanted)
        return {"cid": str(wanted), "pinned": False}

    async def blobs_remove(self, cid: str) -> dict[str, Any]:
        """Forget it; a file that was shared in place stays: `{cid, bytes}` with the bytes freed."""
        wanted = read_cid(cid)
        return {"cid": str(wanted), "bytes": await self._daemon.node.blobs.remove(wanted)}

    async def blobs_gc(self) -> dict[str, Any]:
        """Remove what is neither pinned nor being fetched: `{blobs, bytes, removed}`."""
        removed, freed = await self._daemon.node.blobs.gc()
        return {"blobs": len(removed), "bytes": freed, "removed": [str(cid) for cid in removed]}

    async def blobs_verify(self, cid: str = "") -> AsyncIterator[Progress]:
        """Hash one blob or all. Ends with `{chunks, corrupt, damaged: [cid]}`; damaged chunks count as missing now."""
        wanted = read_cid(cid) if cid else None
        progress: Progress = {"state": "verifying", "bytes": 0, "total": 0}

        def count(done: int, total: int) -> None:
            progress.update(bytes=done, total=total)

        async def work() -> Progress:
            reports = await self._daemon.node.blobs.verify(wanted, progress=count)
            return {
                "chunks": sum(report.chunks for report in reports),
                "corrupt": sum(len(report.dropped) for report in reports),
                "damaged": [str(report.cid) for report in reports if report.dropped],
            }

        async with aclosing(report_while(self._daemon.nursery, progress, work)) as reports:
            async for report in reports:
                yield report


def _describe(blob: BlobInfo) -> dict[str, Any]:
    return {
        "cid": str(blob.cid),
        "kind": blob.kind,
        "bytes": blob.bytes,
        "complete": blob.complete,
        "pinned": blob.pinned,
        "path": None if blob.path is None else str(blob.path),
        "chunks": blob.chunks,
        "chunks_present": blob.chunks_present,
    }


def _absolute(path: object) -> Path:
    """The caller's working directory is not ours."""
    if not isinstance(path, str) or not os.path.isabs(path):
        raise InvalidArgument(f"{path!r} is not an absolute path")
    return Path(path)
