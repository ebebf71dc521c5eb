"""Fetches that go on over another path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from test_blob_service import peer_of, world

from lattica.blobs.download import Download
from lattica.blobs.source_stream import SourceStream
from lattica.errors import ConnectionLost, PathLost
from lattica.host import Host
from lattica.testing.memory import MemoryConnection
from lattica_protocols.limits import CHUNK_BYTES

Run = Callable[..., Any]
CHUNKS = 24


def after_chunks(monkeypatch: pytest.MonkeyPatch, count: int) -> trio.Event:
    """Set once so many chunks came, in whatever download."""
    event, came = trio.Event(), 0
    chunk_came = Download.chunk_came

    def counted(self: Download, source: SourceStream, index: int, buffer: memoryview) -> None:
        nonlocal came
        came += 1
        if came == count:
            event.set()
        chunk_came(self, source, index, buffer)

    monkeypatch.setattr(Download, "chunk_came", counted)
    return event


def memory(host: Host) -> list[MemoryConnection]:
    return [c for c in host.connections() if isinstance(c, MemoryConnection)]


@pytest.mark.parametrize("count", [1, 7, 20])
@pytest.mark.parametrize("silent", [True, False])
def test_a_fetch_goes_on_after_its_path_was_lost(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, silent: bool
) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            w.network.latency = 0.005
            alice, bob = await w.service(), await w.service()
            source = w.file("source.bin", CHUNKS * CHUNK_BYTES)
            cid, *_ = await alice.share(source)
            await w.directory.wait_for(cid)
            cut = after_chunks(monkeypatch, count)

            async def lose() -> None:
                await cut.wait()
                ours, theirs = memory(bob._host), memory(alice._host)
                if silent:
                    for connection in ours:
                        connection.cut()
                for connection in (*ours, *theirs) if silent else theirs:
                    connection.abort(PathLost("no answer") if silent else ConnectionLost("gone"))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(lose)
                result = await bob.fetch(cid, tmp_path / "copy.bin")
            assert cut.is_set()
            assert (tmp_path / "copy.bin").read_bytes() == source.read_bytes()
            assert result.fetched_bytes == CHUNKS * CHUNK_BYTES
            assert result.sources == 1

    run(main)


def test_a_fetch_leaves_the_relay(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            w.network.latency = 0.005
            alice, bob = await w.service(), await w.service()
            source = w.file("source.bin", CHUNKS * CHUNK_BYTES)
            cid, *_ = await alice.share(source)
            relayed = await bob._host.connect(peer_of(alice), alice._host.listen_addrs())
            for connection in (*memory(bob._host), *memory(alice._host)):
                connection.path = "relay"
            some = after_chunks(monkeypatch, 3)
            direct: list[Any] = []

            async def upgrade() -> None:
                await some.wait()
                direct.append(await bob._host.dial(peer_of(alice), alice._host.listen_addrs()))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(upgrade)
                result = await bob.fetch(cid, tmp_path / "copy.bin", sources=[peer_of(alice)])
            assert (tmp_path / "copy.bin").read_bytes() == source.read_bytes()
            assert result.fetched_bytes == CHUNKS * CHUNK_BYTES
            assert direct[0].received_bytes > CHUNKS // 2 * CHUNK_BYTES
            assert relayed.received_bytes < CHUNKS * CHUNK_BYTES

    run(main)
