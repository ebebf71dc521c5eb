"""Both ends of a content stream, connected by hand."""

from __future__ import annotations

import pytest

from lattica_protocols.blobs.chunk_set import ChunkSet
from lattica_protocols.blobs.messages import (
    HEADER,
    Kind,
    encode_frame,
    encode_header,
    encode_ranges,
)
from lattica_protocols.blobs.server import BlobServer, ObjectRequested, WantEnded, WantReceived
from lattica_protocols.blobs.source import (
    BlobSource,
    ChunkReceived,
    GoneReceived,
    HaveReceived,
    MoreReceived,
    ObjectReceived,
    SourceEvent,
)
from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.limits import MAX_QUEUED_CHUNKS, MAX_QUEUED_OBJECTS, MAX_WANTED_BLOBS_PER_STREAM
from lattica_protocols.multihash import BLAKE3, Multihash

NAME = Multihash(BLAKE3, bytes(32))


class Ends:
    """A source and a server; `run` carries what they have to say."""

    def __init__(self) -> None:
        self.buffers: list[bytearray] = []
        self.source = BlobSource(self.take)
        self.server = BlobServer()

    def take(self, length: int) -> memoryview:
        self.buffers.append(bytearray(length))
        return memoryview(self.buffers[-1])

    def to_server(self) -> None:
        for data in self.source.poll_transmit():
            self.server.receive_data(data)

    def to_source(self, *more: bytes, piece: int = 7) -> list[SourceEvent]:
        data = b"".join([*self.server.poll_transmit(), *more])
        events: list[SourceEvent] = []
        for i in range(0, len(data), piece):
            self.source.receive_data(data[i : i + piece])
            while (event := self.source.next_event()) is not None:
                events.append(event)
        return events

    def opened(self, count: int = 4, have: ChunkSet | None = None) -> Ends:
        self.source.want(0, NAME)
        self.to_server()
        assert self.server.next_event() == WantReceived(0, NAME)
        self.server.tell_have(0, have or ChunkSet(count, full=True))
        self.to_source()
        self.source.set_chunk_sizes(0, count, lambda index: 10)
        return self


def chunk(index: int, data: bytes) -> bytes:
    return encode_header(Kind.CHUNK, 0, index, len(data)) + data


def test_chunks_are_served_in_the_order_asked() -> None:
    ends = Ends().opened()
    ends.source.request_chunks(0, [(2, 2), (0, 1)])
    ends.to_server()
    assert ends.server.peek_chunk() == (0, 2)
    order = [ends.server.next_chunk() for _ in range(4)]
    assert order == [(0, 2), (0, 3), (0, 0), None]
    events = ends.to_source(chunk(2, b"2" * 10), chunk(0, b"0" * 10))
    assert [e.index for e in events if isinstance(e, ChunkReceived)] == [2, 0]
    assert bytes(ends.buffers[0]) == b"2" * 10


def test_a_part_grows() -> None:
    part = ChunkSet(4)
    part.add(1)
    ends = Ends()
    ends.source.want(0, NAME)
    ends.to_server()
    ends.server.tell_have(0, part)
    assert ends.to_source() == [HaveReceived(0, part)]
    ends.server.tell_have_more(0, [(2, 2)])
    assert ends.to_source() == [MoreReceived(0, [(2, 2)])]


def test_nothing_is_known() -> None:
    ends = Ends()
    ends.source.want(0, NAME)
    ends.to_server()
    ends.server.tell_have(0, None)
    assert ends.to_source() == [HaveReceived(0, None)]
    with pytest.raises(LocalProtocolError):
        ends.server.tell_have(0, None)


def test_objects() -> None:
    ends = Ends()
    ends.source.request_object(7, NAME, 100)
    ends.source.request_object(8, NAME, 100)
    ends.to_server()
    assert ends.server.next_event() == ObjectRequested(7, NAME)
    ends.server.send_object(8, None)
    ends.server.send_object(7, b"data")
    assert ends.to_source() == [ObjectReceived(8, None), ObjectReceived(7, b"data")]


def test_a_cancelled_chunk_is_thrown_away_when_it_crosses() -> None:
    ends = Ends().opened()
    ends.source.request_chunks(0, [(0, 4)])
    ends.to_server()
    assert ends.server.next_chunk() == (0, 0)
    ends.source.cancel_chunks(0, [(0, 3)])
    assert ends.to_source(chunk(0, b"x" * 10)) == []
    assert ends.buffers == []
    ends.to_server()
    assert [ends.server.next_chunk(), ends.server.next_chunk()] == [(0, 3), None]


def test_long_cancels_of_a_short_queue() -> None:
    ends = Ends().opened(count=100)
    ends.source.request_chunks(0, [(10, 2), (50, 2)])
    ends.to_server()
    ends.server.receive_data(encode_frame(Kind.CANCEL, 0, encode_ranges([(40, 11), (0, 11)])))
    assert [ends.server.next_chunk() for _ in range(3)] == [(0, 11), (0, 51), None]


def test_gone() -> None:
    ends = Ends().opened()
    ends.source.request_chunks(0, [(1, 1)])
    ends.to_server()
    ends.server.next_chunk()
    ends.server.tell_gone(0, 1)
    assert ends.to_source() == [GoneReceived(0, 1)]


def test_done_forgets_the_blob_and_its_queue() -> None:
    ends = Ends().opened()
    ends.source.request_chunks(0, [(0, 4)])
    ends.source.done(0)
    ends.to_server()
    assert ends.server.next_event() == WantEnded(0)
    assert ends.server.next_chunk() is None
    assert ends.to_source(chunk(0, b"x" * 10)) == []  # was under way


def test_a_cut_off_chunk_gives_its_buffer_back() -> None:
    ends = Ends().opened()
    ends.source.request_chunks(0, [(0, 1)])
    ends.to_source(chunk(0, b"x" * 10)[:20])
    unfinished = ends.source.take_unfinished()
    assert unfinished is not None
    assert unfinished.obj is ends.buffers[0]
    assert ends.source.take_unfinished() is None


BAD_FOR_THE_SOURCE = {
    "a chunk that was not asked for": chunk(3, b"x" * 10),
    "a chunk of the wrong size": chunk(0, b"x" * 9),
    "a chunk over the limit": encode_header(Kind.CHUNK, 0, 0, (1 << 20) + 1),
    "an object that was not asked for": encode_frame(Kind.DATA, 5, b"x", flags=1),
    "a request": encode_frame(Kind.WANT, 0, NAME.to_bytes()),
    "an unknown kind": HEADER.pack(0xFF, 0, 0, 0, 0, 0),
    "reserved bytes": HEADER.pack(Kind.GONE, 0, 1, 0, 0, 0),
    "another number of chunks": encode_frame(Kind.HAVE, 0, arg=5, flags=2),
    "a bitmap of the wrong length": encode_frame(Kind.HAVE, 0, b"\x00\x00", arg=4, flags=1),
    "unknown flags": encode_frame(Kind.HAVE, 0, arg=4, flags=3),
    "ranges beyond the end": encode_frame(Kind.HAVE_MORE, 0, encode_ranges([(3, 2)])),
    "ranges that overlap": encode_frame(Kind.HAVE_MORE, 0, encode_ranges([(0, 4), (0, 4)])),
    "half a range": encode_frame(Kind.HAVE_MORE, 0, b"\x00" * 7),
}


@pytest.mark.parametrize("wire", BAD_FOR_THE_SOURCE.values(), ids=BAD_FOR_THE_SOURCE.keys())
def test_what_a_source_may_not_send(wire: bytes) -> None:
    ends = Ends().opened()
    ends.source.request_chunks(0, [(0, 1)])
    with pytest.raises(RemoteProtocolError):
        ends.to_source(wire, piece=1)


BAD_FOR_THE_SERVER = {
    "chunks of an unknown blob": encode_frame(Kind.CHUNKS, 9, encode_ranges([(0, 1)])),
    "chunks beyond the end": encode_frame(Kind.CHUNKS, 0, encode_ranges([(4, 1)])),
    "an empty range": encode_frame(Kind.CHUNKS, 0, encode_ranges([(1, 0)])),
    "no range": encode_frame(Kind.CHUNKS, 0),
    "a number that is in use": encode_frame(Kind.WANT, 0, NAME.to_bytes()),
    "no multihash": encode_frame(Kind.WANT, 1, b"\x1e\x05abc"),
    "a chunk": chunk(0, b"x"),
    "a long request": encode_header(Kind.OBJECT, 0, 0, 10_000),
    "done twice": encode_frame(Kind.DONE, 0) * 2,
}


@pytest.mark.parametrize("wire", BAD_FOR_THE_SERVER.values(), ids=BAD_FOR_THE_SERVER.keys())
def test_what_a_client_may_not_send(wire: bytes) -> None:
    ends = Ends().opened()
    with pytest.raises(RemoteProtocolError):
        ends.server.receive_data(wire)


def test_the_servers_queues_are_bounded() -> None:
    ends = Ends().opened(count=MAX_QUEUED_CHUNKS + 1)
    ends.server.receive_data(encode_frame(Kind.CHUNKS, 0, encode_ranges([(0, MAX_QUEUED_CHUNKS)])))
    with pytest.raises(RemoteProtocolError):
        ends.server.receive_data(encode_frame(Kind.CHUNKS, 0, encode_ranges([(5, 1)])))
    wants = [encode_frame(Kind.WANT, 1 + n, NAME.to_bytes()) for n in range(MAX_WANTED_BLOBS_PER_STREAM)]
    objects = [encode_frame(Kind.OBJECT, n, NAME.to_bytes()) for n in range(MAX_QUEUED_OBJECTS + 1)]
    for flood in (wants, objects):
        with pytest.raises(RemoteProtocolError):
            Ends().opened().server.receive_data(b"".join(flood))
