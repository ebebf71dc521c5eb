"""Streams of QUIC connections: their ends, back pressure, sinks, and bounds."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
from quic_pair import echo, open_pair, read_all
from waiting import until

from lattica.errors import ConnectionLost, StreamReset
from lattica.transports.quic_connection import QuicLink
from lattica.transports.quic_stream import HIGH_WATER_BYTES, QuicStream
from lattica_protocols.limits import MAX_QUIC_STREAMS, QUIC_CONNECTION_WINDOW_BYTES, QUIC_STREAM_WINDOW_BYTES

Run = Callable[..., Any]


def test_half_close(run: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair:
            stream, other = await pair.streams()
            await stream.send_all(b"question")
            await stream.close_write()
            await stream.close_write()
            with pytest.raises(StreamReset):
                stream.write(b"more")
            assert await read_all(other) == b"question"
            await other.send_all(b"answer")
            await other.close_write()
            assert await read_all(stream) == b"answer"
            assert stream.connection.stream_count() == other.connection.stream_count() == 0

    run(main)


def test_reset_ends_both_directions(run: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair:
            stream, other = await pair.streams()
            other.write(b"never read")
            stream.reset()
            stream.reset()
            for end in (stream, other):
                with pytest.raises(StreamReset):
                    await read_all(end)
                with pytest.raises(StreamReset):
                    end.write(b"x")
                with pytest.raises(StreamReset):
                    await end.send_all(b"x")
                end.reset()
            await until(lambda: stream.connection.stream_count() == other.connection.stream_count() == 0)

    run(main)


def test_peer_that_stops_reading(run: Run) -> None:
    """Rust sends STOP_SENDING when it drops a read half, while it may still write."""

    async def main() -> None:
        async with open_pair() as pair:
            stream, other = await pair.streams()
            stream.stop_lingering()
            await until(lambda: other._peer_stopped)
            with pytest.raises(StreamReset, match="stopped reading"):
                other.write(b"x")
            await other.close_write()
            stream.write(b"still")
            assert await other.receive_exactly(5) == b"still"

    run(main)


def test_closed_stream_throws_away_what_comes(run: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair:
            stream, other = await pair.streams()
            await other.aclose()
            assert await stream.receive_some() == b""
            with pytest.raises(StreamReset, match="stopped reading"):
                await stream.send_all(bytes(32 * 1024 * 1024))
            assert other._buffered == 0
            stream.reset()
            await until(lambda: not other.connection.stream_count())

    run(main)


def test_back_pressure(run: Run) -> None:
    """A reader that does not read holds up the sender, and one window at most waits on its side."""

    async def main() -> None:
        async with open_pair() as pair:
            stream, other = await pair.streams()
            data = random.Random(2).randbytes(QUIC_STREAM_WINDOW_BYTES * 2)
            finished = trio.Event()

            async def send() -> None:
                await stream.send_all(data)
                await stream.close_write()
                finished.set()

            pair.nursery.start_soon(send)
            await until(lambda: other._buffered == QUIC_STREAM_WINDOW_BYTES - 1)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert not finished.is_set()
            assert other._buffered == QUIC_STREAM_WINDOW_BYTES - 1
            assert stream.queued_bytes() < 2 * HIGH_WATER_BYTES
            assert await read_all(other) == data
            await finished.wait()

    run(main)


def test_stalled_streams_do_not_exceed_the_connection_window(run: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair:
            ours, theirs = await pair.connect()
            for _ in range(6):
                stream = await ours.open_stream()
                pair.nursery.start_soon(ignore_loss, stream.send_all, bytes(QUIC_STREAM_WINDOW_BYTES))
            await until(lambda: buffered(theirs) == QUIC_CONNECTION_WINDOW_BYTES)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert buffered(theirs) == QUIC_CONNECTION_WINDOW_BYTES

    run(main)


def test_reset_streams_give_their_window_back(run: Run) -> None:
    """Bytes nobody read must not eat up the connection's window."""

    async def main() -> None:
        async with open_pair() as pair:
            ours, theirs = await pair.connect()
            for number in range(12):
                stream = await ours.open_stream()
                with trio.move_on_after(5) as scope:
                    await stream.send_all(bytes(4 * 1024 * 1024))
                assert not scope.cancelled_caught
                other = await theirs.accept_stream()
                (stream if number % 2 else other).reset()
            pair.nursery.start_soon(echo, theirs)
            stream = await ours.open_stream()
            stream.write(b"on")
            assert await stream.receive_exactly(2) == b"on"

    run(main)


class Sink:
    def __init__(self) -> None:
        self.data = bytearray()
        self.ended = False
        self.closed: list[Exception | None] = []

    def data_received(self, data: memoryview) -> None:
        self.data += data

    def eof_received(self) -> None:
        self.ended = True

    def stream_closed(self, error: Exception | None) -> None:
        self.closed.append(error)


def test_sink(run: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair:
            stream, other = await pair.streams()
            await stream.send_all(b"head-body")
            assert await other.receive_some(6) == b"head-b"
            other.push_back(b"-b")
            sink = Sink()
            other.set_sink(sink)
            assert sink.data == b"-body"
            await stream.send_all(b"-tail")
            await stream.close_write()
            await until(lambda: sink.ended)
            assert sink.data == b"-body-tail"
            assert sink.closed == []
            await other.close_write()
            assert sink.closed == [None]

    run(main)


def test_paused_sink_gets_one_window(run: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair:
            stream, other = await pair.streams()
            sink = Sink()
            other.set_sink(sink)
            other.pause_sink()
            size = 2 * QUIC_STREAM_WINDOW_BYTES
            pair.nursery.start_soon(ignore_loss, stream.send_all, bytes(size))
            # The byte that `streams` exchanged before was consumed, but is too little for an update.
            await until(lambda: len(sink.data) == QUIC_STREAM_WINDOW_BYTES - 1)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert len(sink.data) == QUIC_STREAM_WINDOW_BYTES - 1
            other.resume_sink()
            await until(lambda: len(sink.data) == size)

    run(main)


def test_lost_connection_ends_sinks_and_readers(run: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair:
            stream, other = await pair.streams()
            sink = Sink()
            other.set_sink(sink)
            other.write(b"last words")
            await other.close_write()
            await until(lambda: stream._eof)
            await other.connection.aclose()
            await stream.connection.closed.wait()
            assert stream.connection.close_error is None
            assert [type(error) for error in sink.closed] == [ConnectionLost]
            assert await read_all(stream) == b"last words"
            with pytest.raises(ConnectionLost):
                stream.write(b"x")
            with pytest.raises(ConnectionLost):
                await stream.connection.open_stream()
            with pytest.raises(ConnectionLost):
                await stream.connection.accept_stream()

    run(main)


def test_many_streams(run: Run) -> None:
    """More streams than may be open at once: opening waits, and places become free."""

    async def main() -> None:
        async with open_pair() as pair:
            ours, theirs = await pair.connect()
            held = [await ours.open_stream() for _ in range(MAX_QUIC_STREAMS)]
            for stream in held:
                stream.write(b"x")
            with trio.move_on_after(0.1) as scope:
                await ours.open_stream()
            assert scope.cancelled_caught
            pair.nursery.start_soon(echo, theirs)

            async def use(stream: QuicStream) -> None:
                await stream.close_write()
                assert await read_all(stream) == b"x"

            async def one() -> None:
                stream = await ours.open_stream()
                await stream.send_all(b"x")
                await use(stream)

            async with trio.open_nursery() as nursery:
                for _ in range(400):
                    nursery.start_soon(one)
                for stream in held:
                    nursery.start_soon(use, stream)
            assert ours.stream_count() == 0
            await until(lambda: theirs.stream_count() == 0)

    run(main)


def test_streams_that_nobody_accepts_are_bounded(run: Run) -> None:
    """Finished and not to be answered, a stream makes room for the next one at once."""

    async def main() -> None:
        async with open_pair() as pair:
            ours, theirs = await pair.connect()

            async def flood() -> None:
                while True:
                    stream = await ours.open_stream()
                    stream.write(b"x")
                    await stream.close_write()
                    stream.stop_lingering()

            with pytest.raises(ConnectionLost):
                await flood()
            await theirs.closed.wait()
            assert "accepted" in str(theirs.close_error)

    run(main)


def test_reset_streams_are_not_accepted(run: Run) -> None:
    async def main() -> None:
        async with open_pair() as pair:
            ours, theirs = await pair.connect()
            first, second = await ours.open_stream(), await ours.open_stream()
            first.write(b"first")
            await until(lambda: theirs.stream_count() == 1)
            first.reset()
            await until(lambda: theirs.stream_count() == 0)
            second.write(b"second")
            assert await (await theirs.accept_stream()).receive_some() == b"second"

    run(main)


async def ignore_loss(function: Callable[..., Any], *args: Any) -> None:
    try:
        await function(*args)
    except (ConnectionLost, StreamReset):
        pass


def buffered(link: QuicLink) -> int:
    return sum(stream._buffered for stream in link._streams.values())
