"""Serves one inbound stream of `/lattica/blobs/1`: drives `BlobServer` with what the store has.

A chunk goes from the page cache into one of two buffers and from there, by reference, into the connection: while
the last quarter of one is being encrypted, the next is read. Chunks that need the disk or a hash are read in a
worker thread, so that a cold disk never holds up other streams.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING

import trio

from lattica.blobs.store import BLOB, Blob, BlobStore
from lattica.errors import ContentCorrupt, LatticaError, PeerMisbehaved, ResourceExhausted
from lattica_protocols.blobs.chunk_set import to_ranges
from lattica_protocols.blobs.messages import Kind, encode_header
from lattica_protocols.blobs.server import BlobServer, ObjectRequested, ServerEvent, WantReceived
from lattica_protocols.errors import ProtocolError
from lattica_protocols.limits import CHUNK_BYTES, MAX_SERVED_STREAMS_PER_PEER

if TYPE_CHECKING:
    from lattica.blobs.reader import ChunkReader
    from lattica.interfaces import Stream
    from lattica_protocols.peer_id import PeerId

log = logging.getLogger("lattica.blobs")

SENDING_STREAMS = 24
"""Streams that send chunks at a time, all peers together: each holds two buffers of 1 MiB."""
CHUNKS_PER_TURN = 16
"""After so many a stream that others wait for gives its place to them."""
SEND_TIMEOUT = 30.0
"""Seconds a peer may take to accept one chunk before its stream is reset."""
GROWTH_INTERVAL = 0.1
"""Seconds over which new chunks of a part are gathered into one announcement."""
_OWN_BUFFER_BYTES = 512 * 1024
"""Below this a chunk gets a buffer of its own: `drain` returns while 256 KiB are queued, so that the two
buffers may both still be in use when chunks are small."""


class Server:
    """What all served streams of a node share."""

    def __init__(self, store: BlobStore, reader: ChunkReader) -> None:
        self.store = store
        self.reader = reader
        self.slots = trio.Semaphore(SENDING_STREAMS)
        self.threads = trio.CapacityLimiter(4)
        self.sent_bytes = 0
        self._streams: Counter[PeerId] = Counter()

    async def handle(self, stream: Stream) -> None:
        """The handler of `/lattica/blobs/1`. Ends when the peer finishes its direction."""
        peer = stream.connection.peer_id
        if self._streams[peer] >= MAX_SERVED_STREAMS_PER_PEER:
            raise ResourceExhausted(f"{peer.short()} has {MAX_SERVED_STREAMS_PER_PEER} content streams open")
        self._streams[peer] += 1
        try:
            await _ServedStream(self, stream).run()
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]


class _ServedStream:
    def __init__(self, server: Server, stream: Stream) -> None:
        self._server = server
        self._stream = stream
        self._machine = BlobServer()
        self._blobs: dict[int, Blob] = {}
        self._grown: dict[int, list[int]] = {}
        self._growth = trio.Event()
        self._work = trio.Event()
        self._ended = False
        self._failure: Exception | None = None
        self._watched: list[tuple[Blob, _Watcher]] = []

    async def run(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._announce_growth)
                nursery.start_soon(self._receive)
                try:
                    await self._send()
                except (LatticaError, ProtocolError) as error:
                    self._failure = error
                nursery.cancel_scope.cancel()
            if self._failure is not None:
                raise self._failure
            await self._stream.aclose()
        finally:
            for blob, watcher in self._watched:
                blob.watchers.discard(watcher)

    # -- receiving ----------------------------------------------------------------------------------------
    async def _receive(self) -> None:
        try:
            while data := await self._stream.receive_some(65536):
                self._machine.receive_data(data)
                while (event := self._machine.next_event()) is not None:
                    await self._on_event(event)
                self._work.set()
        except (LatticaError, ProtocolError) as error:
            self._failure = error
        self._ended = True
        self._work.set()

    async def _on_event(self, event: ServerEvent) -> None:
        if isinstance(event, WantReceived):
            self._on_want(event)
        elif isinstance(event, ObjectRequested):
            find = self._server.store.find_object
            data = await trio.to_thread.run_sync(find, event.multihash, limiter=self._server.threads)
            self._machine.send_object(event.request, data)
        else:
            self._blobs.pop(event.blob, None)

    def _on_want(self, event: WantReceived) -> None:
        blob = self._server.store.get(event.multihash)
        if blob is None or (blob.kind == BLOB and len(blob.have) == 0 and not blob.writing and blob.size > 0):
            self._machine.tell_have(event.blob, None)
            return
        self._blobs[event.blob] = blob
        self._machine.tell_have(event.blob, blob.have)
        if not blob.complete:
            watcher = _Watcher(self, event.blob)
            blob.watchers.add(watcher)
            self._watched.append((blob, watcher))

    def note_growth(self, number: int, indices: list[int]) -> None:
        if number in self._blobs:
            self._grown.setdefault(number, []).extend(indices)
            self._growth.set()

    async def _announce_growth(self) -> None:
        while True:
            await self._growth.wait()
            await trio.sleep(GROWTH_INTERVAL)
            self._growth = trio.Event()
            grown, self._grown = self._grown, {}
            for number, indices in grown.items():
                self._machine.tell_have_more(number, to_ranges(sorted(indices)))
            self._work.set()

    # -- sending ------------------------------------------------------------------------------------------
    async def _send(self) -> None:
        while self._failure is None:
            frames = self._machine.poll_transmit()
            if frames:
                self._stream.write(*frames)
                await self._drain()
            elif self._machine.queued_chunks():
                async with self._server.slots:
                    await self._send_turn()
            elif self._ended:
                return
            else:
                await self._work.wait()
                self._work = trio.Event()

    async def _send_turn(self) -> None:
        buffers = [memoryview(bytearray(CHUNK_BYTES)) for _ in range(2)]
        sent = 0
        while (key := self._machine.next_chunk()) is not None:
            number, index = key
            blob = self._blobs.get(number)
            if blob is None:
                continue
            size = min(CHUNK_BYTES, blob.size - index * CHUNK_BYTES)
            shared = size >= _OWN_BUFFER_BYTES
            if await self._send_chunk(
                blob, number, index, buffers[0][:size] if shared else memoryview(bytearray(size))
            ):
                sent += 1
                if shared:
                    buffers.reverse()  # the end of this one may not have been encrypted yet
            if frames := self._machine.poll_transmit():
                self._stream.write(*frames)
            if sent >= CHUNKS_PER_TURN and self._server.slots.value == 0:
                return

    async def _send_chunk(self, blob: Blob, number: int, index: int, view: memoryview) -> bool:
        if index not in blob.have:
            self._machine.tell_gone(number, index)
            return False
        reader = self._server.reader
        if not reader.read_nowait(blob, index, view):
            try:
                await trio.to_thread.run_sync(reader.read, blob, index, view, limiter=self._server.threads)
            except ContentCorrupt as error:
                log.warning("chunk_dropped cid=%s chunk=%d error=%s", blob.cid, index, error)
                self._machine.tell_gone(number, index)
                return False
        self._stream.write(encode_header(Kind.CHUNK, number, index, len(view)), view)
        self._server.sent_bytes += len(view)
        await self._drain()
        return True

    async def _drain(self) -> None:
        with trio.move_on_after(SEND_TIMEOUT) as scope:
            await self._stream.drain()
        if scope.cancelled_caught:
            self._stream.reset()
            raise PeerMisbehaved(f"did not accept a chunk within {SEND_TIMEOUT:g} s")


class _Watcher:
    """Told by a download which chunks of a part came in addition."""

    def __init__(self, stream: _ServedStream, number: int) -> None:
        self._stream = stream
        self._number = number

    def __call__(self, indices: list[int]) -> None:
        self._stream.note_growth(self._number, indices)
