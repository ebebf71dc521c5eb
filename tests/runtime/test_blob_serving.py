"""Serving over a stream that keeps references as long as the interface allows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import trio

from lattica.blobs import BlobService, BlobStore
from lattica.blobs.reader import ChunkReader
from lattica.blobs.serve import Server
from lattica.blobs.sharing import Shared
from lattica.testing import MemoryNetwork, open_memory_host
from lattica_protocols.blobs.source import BlobSource, ChunkReceived
from lattica_protocols.limits import CHUNK_BYTES

HIGH_WATER = 256 * 1024


class LazyWriter:
    """The laziest stream that `Stream` allows: bytes are taken from the buffers only when `drain` has to."""

    def __init__(self, connection: Any, requests: list[bytes]) -> None:
        self.connection = connection
        self.sent = bytearray()
        self._requests = requests
        self._queue: list[memoryview] = []

    def write(self, *buffers: Any) -> None:
        self._queue.extend(memoryview(b) for b in buffers)

    def _take(self, keep: int) -> None:
        while self._queue and (extra := sum(map(len, self._queue)) - keep) > 0:
            view = self._queue.pop(0)
            self.sent += view[:extra]
            if len(view) > extra:
                self._queue.insert(0, view[extra:])

    async def drain(self) -> None:
        self._take(HIGH_WATER - 1)
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        await trio.lowlevel.checkpoint()
        return self._requests.pop(0) if self._requests else b""

    async def aclose(self) -> None:
        self._take(0)
        await trio.lowlevel.checkpoint()


def test_a_small_chunk_between_large_ones_overwrites_nothing(run, tmp_path: Path) -> None:
    """The last chunk of a file is small, and the requests come in any order. `drain` returns while 256 KiB wait."""
    content = os.urandom(2 * CHUNK_BYTES + 85_000)
    received: dict[int, bytes] = {}

    async def main() -> None:
        (tmp_path / "model").write_bytes(content)
        async with open_memory_host(MemoryNetwork(), 1) as host:
            with BlobStore.open(tmp_path / "home") as store:
                shared: Shared = await BlobService(host, None, store).share(tmp_path / "model")
                source = BlobSource(lambda n: memoryview(bytearray(n)))
                source.want(0, shared.cid.multihash)
                want = b"".join(source.poll_transmit())
                source.set_chunk_sizes(0, 3, lambda i: min(CHUNK_BYTES, len(content) - i * CHUNK_BYTES))
                for first in (0, 2, 1):
                    source.request_chunks(0, [(first, 1)])

                class Connection:
                    peer_id = host.peer_id

                stream = LazyWriter(Connection(), [want, b"".join(source.poll_transmit())])
                await Server(store, ChunkReader(store)).handle(stream)  # type: ignore[arg-type]
                source.receive_data(stream.sent)
                while (event := source.next_event()) is not None:
                    if isinstance(event, ChunkReceived):
                        received[event.index] = bytes(event.buffer)

    run(main)
    assert sorted(received) == [0, 1, 2]
    assert b"".join(received[i] for i in range(3)) == content
