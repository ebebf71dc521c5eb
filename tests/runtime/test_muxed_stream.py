"""Streams of a TCP connection: every way to read and write them, back-pressure, cancelling, ending."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.lowlevel
import trio.testing
from tcp_nodes import BOB_ID, Recorder, connected, send_forever

from lattica.errors import StreamReset
from lattica.transports import muxed
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import YAMUX_INITIAL_WINDOW
from lattica_protocols.paths.heartbeat import Pace

Run = Callable[..., Any]


# -- streams -------------------------------------------------------------------------------------------------
def test_bulk_arrives_complete(run: Run) -> None:
    async def main() -> None:
        async with connected() as pair:
            ours, theirs = await pair.streams()
            sent = os.urandom(5_000_000)
            recorder = Recorder()
            theirs.set_sink(recorder)
            for start in range(0, len(sent), 700_000):
                await ours.send_all(memoryview(sent)[start : start + 700_000])
            await ours.close_write()
            await recorder.wait_for(len(sent))
            assert bytes(recorder.data) == sent

    run(main)


def test_reading_by_all_ways(run: Run) -> None:
    async def main() -> None:
        async with connected() as pair:
            ours, theirs = await pair.streams()
            sent = os.urandom(600_000)

            async def send() -> None:
                await ours.send_all(sent)
                await ours.close_write()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                got = bytearray(await theirs.receive_some(10))
                assert 0 < len(got) <= 10
                theirs.push_back(bytes(got))
                got = bytearray()
                buffer = memoryview(bytearray(1000)).cast("I")
                while len(got) < 200_000:
                    size = await theirs.receive_into(buffer)
                    got += buffer.cast("B")[:size]
                theirs.push_back(bytes(got[-5:]))
                del got[-5:]
                recorder = Recorder()
                theirs.set_sink(recorder)
                await recorder.wait_for(600_000 - len(got))
            assert bytes(got + recorder.data) == sent
            await theirs.close_write()
            await recorder.closed.wait()
            assert recorder.log == ["eof", None]
            assert await ours.receive_some() == b""

    run(main)


def test_half_close(run: Run) -> None:
    async def main() -> None:
        async with connected() as pair:
            ours, theirs = await pair.streams()
            ours.write(b"question")
            await ours.close_write()
            with pytest.raises(StreamReset):
                ours.write(b"more")
            assert await theirs.receive_exactly(8) == b"question"
            assert await theirs.receive_some() == b""
            assert await theirs.receive_into(bytearray(5)) == 0
            await theirs.send_all(b"answer")
            await theirs.close_write()
            assert await ours.receive_exactly(6) == b"answer"
            assert await ours.receive_some() == b""
            await trio.testing.wait_all_tasks_blocked()
            assert pair.outbound.stream_count() == pair.inbound.stream_count() == 0

    run(main)


def test_reset(run: Run) -> None:
    async def main() -> None:
        async with connected() as pair:
            ours, theirs = await pair.streams()
            recorder = Recorder()
            ours.set_sink(recorder)
            await ours.send_all(b"x")
            await theirs.receive_exactly(1)
            theirs.reset()
            theirs.reset()
            await recorder.closed.wait()
            (error,) = recorder.log
            assert isinstance(error, StreamReset)
            for stream in (ours, theirs):
                with pytest.raises(StreamReset):
                    stream.write(b"y")
                with pytest.raises(StreamReset):
                    await stream.receive_some()
            assert not pair.outbound.closed.is_set()

    run(main)


def test_a_sink_that_finds_fault_resets_its_stream(run: Run) -> None:
    async def main() -> None:
        class Strict(Recorder):
            def data_received(self, data: memoryview) -> None:
                raise RemoteProtocolError("not like this")

        async with connected() as pair:
            ours, theirs = await pair.streams()
            sink = Strict()
            theirs.set_sink(sink)
            await ours.send_all(b"x")
            await sink.closed.wait()
            assert "not like this" in str(sink.log[0])
            with pytest.raises(StreamReset):
                await ours.receive_some()

    run(main)


def test_a_bug_in_a_sink_costs_its_connection_only(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        class Buggy(Recorder):
            def data_received(self, data: memoryview) -> None:
                raise ZeroDivisionError

        async with connected() as pair:
            ours, theirs = await pair.streams()
            theirs.set_sink(Buggy())
            await ours.send_all(b"x")
            await pair.inbound.closed.wait()
            await pair.alice.transport.dial(pair.bob.addr, BOB_ID)

    run(main)
    assert "connection_bug" in caplog.text


def test_a_peer_that_stops_reading_blocks_the_sender(run: Run) -> None:
    async def main() -> None:
        async with connected() as pair:
            ours, theirs = await pair.streams()
            with trio.move_on_after(0.2) as scope:
                await send_forever(ours)
            assert scope.cancelled_caught
            assert pair.inbound.unread_bytes == YAMUX_INITIAL_WINDOW
            assert ours.queued_bytes() < 300_000
            other, peer_other = await pair.streams()
            await other.send_all(b"others go on")
            assert await peer_other.receive_exactly(12) == b"others go on"
            assert await theirs.receive_exactly(YAMUX_INITIAL_WINDOW) == bytes(YAMUX_INITIAL_WINDOW)
            await ours.drain()

    run(main)


def test_unread_bytes_of_a_connection_are_bounded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lattica.transports.muxed_stream.YAMUX_MAX_BUFFERED", 600_000)

    async def main() -> None:
        async with connected() as pair:
            recorder = Recorder()
            for _ in range(3):
                ours, _ = await pair.streams()
                ours.set_sink(recorder)
                ours.write(bytes(YAMUX_INITIAL_WINDOW))
            await recorder.closed.wait()
            assert isinstance(recorder.log[0], StreamReset)
            assert pair.inbound.unread_bytes == 2 * YAMUX_INITIAL_WINDOW

    run(main)


def test_a_paused_sink(run: Run) -> None:
    async def main() -> None:
        async with connected() as pair:
            ours, theirs = await pair.streams()
            recorder = Recorder()
            theirs.set_sink(recorder)
            theirs.pause_sink()
            ours.write(bytes(3 * YAMUX_INITIAL_WINDOW))
            await recorder.wait_for(YAMUX_INITIAL_WINDOW)
            assert ours.queued_bytes() == 2 * YAMUX_INITIAL_WINDOW
            theirs.resume_sink()
            await recorder.wait_for(3 * YAMUX_INITIAL_WINDOW)

    run(main)


def test_cancelled_sends_leave_the_stream_whole(run: Run) -> None:
    async def main() -> None:
        async with connected() as pair:
            ours, theirs = await pair.streams()
            first, second = bytearray(b"1" * 400_000), bytearray(b"2" * 100_000)
            with trio.move_on_after(0.05) as partly_sent:
                await ours.send_all(first)
            with trio.move_on_after(0.05) as not_sent:
                await ours.send_all(second)
            assert partly_sent.cancelled_caught
            assert not_sent.cancelled_caught
            first.clear()  # ours again: nothing refers to them any more
            second.clear()
            ours.write(b"3")
            await ours.close_write()
            got = bytearray()
            while data := await theirs.receive_some():
                got += data
            assert got == b"1" * 400_000 + b"3"

    run(main)


def test_cancelled_reads_lose_nothing(run: Run) -> None:
    async def main() -> None:
        async with connected() as pair:
            ours, theirs = await pair.streams()
            with trio.move_on_after(0.01):
                await theirs.receive_into(bytearray(10))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(theirs.receive_some)
                await trio.testing.wait_all_tasks_blocked(0.01)
                with pytest.raises(trio.BusyResourceError):
                    await theirs.receive_some()
                nursery.cancel_scope.cancel()
            await ours.send_all(b"kept")
            assert await theirs.receive_exactly(4) == b"kept"

    run(main)


def test_closing_a_stream_throws_away_what_comes(run: Run) -> None:
    async def main() -> None:
        async with connected() as pair:
            ours, theirs = await pair.streams()
            ours.write(b"first")
            assert await theirs.receive_exactly(5) == b"first"
            await theirs.aclose()
            assert await ours.receive_some() == b""
            with pytest.raises(StreamReset):
                await send_forever(ours)  # a peer that never stops is stopped
            assert not pair.inbound.closed.is_set()

    run(main)


def test_a_closed_stream_lingers_for_a_bounded_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muxed, "LINGER_TIMEOUT", 0.02)

    async def main() -> None:
        async with connected(pace=Pace(keep_alive=0.02)) as pair:
            ours, theirs = await pair.streams()
            ours.write(b"x")
            await theirs.aclose()
            recorder = Recorder()
            ours.set_sink(recorder)
            await recorder.closed.wait()
            assert recorder.log[0] == "eof"
            assert isinstance(recorder.log[1], StreamReset)
            assert pair.inbound.stream_count() == 0

    run(main)


def test_streams_wait_while_the_peer_accepts_none(run: Run) -> None:
    async def main() -> None:
        async with connected() as pair:
            for _ in range(256):
                await pair.outbound.open_stream()
            opened = trio.Event()

            async def open_one_more() -> None:
                await pair.outbound.open_stream()
                opened.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(open_one_more)
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert not opened.is_set()
                await pair.inbound.accept_stream()
                await opened.wait()

    run(main)
