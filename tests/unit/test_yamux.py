"""The yamux machine alone: opening, ending, windows, order of sending, and every rule a peer can break."""

from __future__ import annotations

import struct

import pytest

from lattica_protocols import yamux
from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.limits import (
    YAMUX_ACK_BACKLOG,
    YAMUX_INITIAL_WINDOW,
    YAMUX_MAX_CONTROL_FRAMES,
    YAMUX_MAX_INBOUND_STREAMS,
    YAMUX_MAX_WINDOW,
    YAMUX_PING_BURST,
)
from lattica_protocols.yamux import (
    DataReceived,
    EofReceived,
    Event,
    GoAwayReceived,
    PingAnswered,
    StreamAborted,
    StreamAcknowledged,
    StreamFinished,
    StreamOpened,
    YamuxSession,
)
from lattica_protocols.yamux_stream import YamuxStream

SYN, ACK, FIN, RST = 1, 2, 4, 8
Frame = tuple[int, int, int, int, bytes]


def frame(kind: int, flags: int, stream: int, length: int, body: bytes = b"") -> bytes:
    return struct.pack(">BBHII", 0, kind, flags, stream, length) + body


def message(session: YamuxSession, size: int = 65519) -> bytes:
    out = memoryview(bytearray(size))
    return bytes(out[: session.poll_transmit_into(out, 0, size)])


def output(session: YamuxSession) -> bytes:
    out = b""
    while session.wants_transmit:
        out += message(session)
    return out


def frames(data: bytes) -> list[Frame]:
    found = []
    while data:
        _, kind, flags, stream, length = struct.unpack(">BBHII", data[:12])
        body = data[12 : 12 + length] if kind == 0 else b""
        data = data[12 + len(body) :]
        found.append((kind, flags, stream, length, body))
    return found


def events(session: YamuxSession) -> list[Event]:
    found = []
    while (event := session.next_event()) is not None:
        found.append(event)
    return found


def feed(session: YamuxSession, data: bytes, now: float = 0.0) -> list[Event]:
    session.receive_untrusted(memoryview(data), now)
    return events(session)


def pair() -> tuple[YamuxSession, YamuxSession]:
    return YamuxSession(initiator=True), YamuxSession(initiator=False)


def opened(alice: YamuxSession, bob: YamuxSession) -> tuple[YamuxStream, YamuxStream]:
    """A stream of Alice that Bob accepted."""
    stream = alice.open_stream(0.0)
    (event,) = feed(bob, output(alice))
    assert isinstance(event, StreamOpened)
    bob.accept(event.stream)
    assert feed(alice, output(bob)) == [StreamAcknowledged(stream)]
    return stream, event.stream


def data_of(found: list[Event]) -> bytes:
    return b"".join(bytes(event.data) for event in found if isinstance(event, DataReceived))


# -- opening -------------------------------------------------------------------------------------------------
def test_the_first_data_opens_the_stream() -> None:
    alice, bob = pair()
    stream = alice.open_stream(0.0)
    alice.write(stream, b"hello", b" world")
    sent = output(alice)
    assert frames(sent) == [(0, SYN, 1, 11, b"hello world")]
    first, second = feed(bob, sent)
    assert isinstance(first, StreamOpened)
    assert second == DataReceived(first.stream, memoryview(b"hello world"))


def test_a_stream_without_data_opens_with_a_window_update() -> None:
    alice, _ = pair()
    alice.open_stream(0.0)
    assert frames(output(alice)) == [(1, SYN, 1, 0, b"")]


def test_ids_are_odd_for_the_initiator_and_even_for_the_other() -> None:
    alice, bob = pair()
    assert [alice.open_stream(0.0).id for _ in range(3)] == [1, 3, 5]
    assert [bob.open_stream(0.0).id for _ in range(3)] == [2, 4, 6]


def test_the_acknowledgement_travels_with_the_answer() -> None:
    alice, bob = pair()
    alice.write(alice.open_stream(0.0), b"ask")
    (event, _) = feed(bob, output(alice))
    assert isinstance(event, StreamOpened)
    bob.accept(event.stream)
    bob.write(event.stream, b"answer")
    assert frames(output(bob)) == [(0, ACK, 1, 6, b"answer")]


def test_no_more_streams_than_the_backlog_wait_for_acceptance() -> None:
    alice, bob = pair()
    for _ in range(YAMUX_ACK_BACKLOG):
        alice.open_stream(0.0)
    assert not alice.can_open
    with pytest.raises(LocalProtocolError):
        alice.open_stream(0.0)
    event = feed(bob, output(alice))[0]
    assert isinstance(event, StreamOpened)
    bob.accept(event.stream)
    feed(alice, output(bob))
    assert alice.can_open


def test_a_stream_that_ends_before_it_was_accepted_frees_its_place() -> None:
    alice, _ = pair()
    for _ in range(YAMUX_ACK_BACKLOG):
        stream = alice.open_stream(0.0)
    alice.reset(stream)
    assert alice.can_open


def test_too_many_streams_are_reset_one_by_one() -> None:
    _, bob = pair()
    for number in range(YAMUX_MAX_INBOUND_STREAMS):
        feed(bob, frame(1, SYN, 2 * number + 1, 0))
    assert not bob.wants_transmit
    refused = 2 * YAMUX_MAX_INBOUND_STREAMS + 1
    assert feed(bob, frame(0, SYN, refused, 3, b"abc")) == []
    assert frames(output(bob)) == [(1, RST, refused, 0, b"")]
    assert len(bob.streams) == YAMUX_MAX_INBOUND_STREAMS


def test_ids_may_come_out_of_order() -> None:
    _, bob = pair()
    assert [type(event) for event in feed(bob, frame(1, SYN, 7, 0) + frame(1, SYN, 3, 0))] == [StreamOpened] * 2


# -- ending --------------------------------------------------------------------------------------------------
def test_half_close_and_finish() -> None:
    alice, bob = pair()
    a, b = opened(alice, bob)
    alice.write(a, b"last")
    alice.close_write(a)
    sent = output(alice)
    assert frames(sent) == [(0, 0, 1, 4, b"last"), (0, FIN, 1, 0, b"")]
    assert feed(bob, sent) == [DataReceived(b, memoryview(b"last")), EofReceived(b)]
    bob.write(b, b"still here")
    bob.close_write(b)
    assert feed(alice, output(bob)) == [
        DataReceived(a, memoryview(b"still here")),
        EofReceived(a),
        StreamFinished(a),
    ]
    assert events(bob) == [StreamFinished(b)]
    assert alice.streams == bob.streams == {}
    with pytest.raises(LocalProtocolError):
        alice.write(a, b"more")


def test_fin_and_data_in_one_frame_come_in_order() -> None:
    alice, bob = pair()
    _, b = opened(alice, bob)
    assert feed(bob, frame(0, FIN, 1, 3, b"end")) == [DataReceived(b, memoryview(b"end")), EofReceived(b)]


def test_reset_drops_what_is_queued() -> None:
    alice, bob = pair()
    a, b = opened(alice, bob)
    alice.write(a, bytes(100))
    alice.reset(a)
    alice.reset(a)
    sent = output(alice)
    assert frames(sent) == [(1, RST, 1, 0, b"")]
    (event,) = feed(bob, sent)
    assert isinstance(event, StreamAborted)
    assert event.stream is b
    assert b.is_reset


def test_a_stream_reset_before_it_was_opened_sends_nothing() -> None:
    alice, _ = pair()
    stream = alice.open_stream(0.0)
    alice.write(stream, b"x")
    alice.reset(stream)
    assert output(alice) == b""


def test_frames_for_streams_that_are_gone_are_skipped() -> None:
    alice, bob = pair()
    _, b = opened(alice, bob)
    bob.reset(b)
    late = frame(0, 0, 1, 4, b"late") + frame(1, 0, 1, 99) + frame(0, FIN, 1, 0) + frame(1, RST, 1, 0)
    assert feed(bob, late) == []
    assert [kind for kind, *_ in frames(output(bob))] == [1]


def test_a_reset_in_the_middle_of_a_frame_skips_the_rest() -> None:
    alice, bob = pair()
    _, b = opened(alice, bob)
    assert data_of(feed(bob, frame(0, 0, 1, 6, b"abc"))) == b"abc"
    bob.reset(b)
    assert feed(bob, b"def" + frame(2, SYN, 0, 7)) == []
    assert frames(output(bob)) == [(1, RST, 1, 0, b""), (2, ACK, 0, 7, b"")]


# -- windows -------------------------------------------------------------------------------------------------
def test_a_receiver_that_does_not_consume_stops_the_sender() -> None:
    alice, bob = pair()
    a, b = opened(alice, bob)
    alice.write(a, bytes(YAMUX_INITIAL_WINDOW + 1000))
    assert len(data_of(feed(bob, output(alice)))) == YAMUX_INITIAL_WINDOW
    assert a.queued == 1000
    assert not alice.wants_transmit
    bob.consume(b, YAMUX_INITIAL_WINDOW // 2 - 1, 10.0)
    assert not bob.wants_transmit, "a window update only for half a window"
    bob.consume(b, 1, 10.0)
    sent = output(bob)
    assert frames(sent) == [(1, 0, 1, YAMUX_INITIAL_WINDOW // 2, b"")]
    feed(alice, sent)
    assert len(data_of(feed(bob, output(alice)))) == 1000


def test_a_paused_stream_gets_no_window() -> None:
    alice, bob = pair()
    a, b = opened(alice, bob)
    bob.set_granting(b, False, 1.0)
    alice.write(a, bytes(2 * YAMUX_INITIAL_WINDOW))
    bob.consume(b, len(data_of(feed(bob, output(alice), 1.0))), 1.0)
    assert not bob.wants_transmit
    bob.set_granting(b, True, 2.0)
    feed(alice, output(bob))
    assert alice.wants_transmit


def test_windows_grow_while_they_are_the_brake() -> None:
    alice, bob = pair()
    a, b = opened(alice, bob)
    bob.round_trip = 0.1
    now = 0.0
    for _ in range(20):
        alice.write(a, bytes((16 << 20) - a.queued))
        received = data_of(feed(bob, output(alice), now))
        bob.consume(b, len(received), now)
        feed(alice, output(bob), now)
        now += 0.1
        assert b.receive_window + b.unconsumed + b.pending_grant <= b.window
    assert b.window == YAMUX_MAX_WINDOW


def test_windows_stay_when_the_peer_is_slow() -> None:
    alice, bob = pair()
    a, b = opened(alice, bob)
    bob.round_trip = 0.1
    for turn in range(1, 20):
        alice.write(a, bytes(YAMUX_INITIAL_WINDOW))
        bob.consume(b, len(data_of(feed(bob, output(alice), turn))), float(turn))
        feed(alice, output(bob), turn)
    assert b.window == YAMUX_INITIAL_WINDOW


def test_a_window_grows_to_what_the_path_holds_and_no_further() -> None:
    """90 MB/s over 20 ms are 1.8 MB in flight: after that the window is not the brake, however quick a burst is."""
    alice, bob = pair()
    a, b = opened(alice, bob)
    bob.round_trip = 0.02
    now = 0.0
    for _ in range(2000):
        alice.write(a, bytes(max(0, 1_800_000 - a.queued)))
        received = len(data_of(feed(bob, output(alice), now)))
        for part in range(4):  # what came at once is read at once
            bob.consume(b, received * (part + 1) // 4 - received * part // 4, now)
        feed(alice, output(bob), now)
        now += max(received / 90e6, 0.02)
    assert 3_600_000 <= b.window < 7_200_000


def test_a_slow_path_has_room_for_whole_messages() -> None:
    """Where 64 KiB take longer than a ping, its round trip alone would keep the first window, and half the rate."""
    alice, bob = pair()
    a, b = opened(alice, bob)
    bob.round_trip = 0.04
    now = 0.0
    for _ in range(100):
        alice.write(a, bytes(max(0, (1 << 20) - a.queued)))
        received = len(data_of(feed(bob, output(alice), now)))
        bob.consume(b, received, now)
        feed(alice, output(bob), now)
        now += max(received / 2.5e6, 0.18)  # three messages at 2.5 MB/s, and a round trip
    assert b.window == 2 * YAMUX_INITIAL_WINDOW


@pytest.mark.parametrize(("allowance", "least", "below"), [(None, 1, 1 << 20), (4 << 20, 4 << 20, 16 << 20)])
def test_a_session_for_bulk_alone_may_have_more_in_flight(allowance: int | None, least: int, below: int) -> None:
    """1 GB/s over 0.1 ms are 100 KB in flight: elsewhere the first window, or twice as much, would do."""
    alice, bob = pair()
    a, b = opened(alice, bob)
    bob.round_trip = 0.0001
    if allowance is not None:
        bob.allowance = allowance
    now = 0.0
    for _ in range(2000):
        alice.write(a, bytes(max(0, 131_072 - a.queued)))
        received = len(data_of(feed(bob, output(alice), now)))
        bob.consume(b, received, now)
        feed(alice, output(bob), now)
        now += received / 1e9
    assert least <= b.window < below


def test_a_window_can_be_limited_below_the_first_one_and_comes_back() -> None:
    alice, bob = pair()
    a, b = opened(alice, bob)
    bob.limit_window(b, YAMUX_INITIAL_WINDOW // 2)
    assert b.receive_window == YAMUX_INITIAL_WINDOW  # what was granted is granted
    carried, in_flight = 0, []
    for _ in range(50):
        size = min(40_000, b.receive_window)
        alice.write(a, bytes(size))
        carried += len(data_of(feed(bob, output(alice))))
        bob.consume(b, size, 0.0)
        feed(alice, output(bob))
        in_flight.append(b.receive_window + b.pending_grant)
    assert carried > 6 * YAMUX_INITIAL_WINDOW
    assert max(in_flight[8:]) <= YAMUX_INITIAL_WINDOW // 2
    bob.limit_window(b, 4 * YAMUX_INITIAL_WINDOW)
    assert b.window == YAMUX_INITIAL_WINDOW
    assert bob._extra_windows == 0
    bob.limit_window(b, 1)
    assert b.window >= 64 * 1024, "never so small that nothing moves"
    bob.reset(b)
    assert bob._extra_windows == 0


def test_all_windows_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yamux, "YAMUX_MAX_EXTRA_WINDOWS", 2 << 20)
    alice, bob = pair()
    bob.round_trip = 1.0
    streams = [opened(alice, bob) for _ in range(12)]
    for turn in range(1, 5):
        for a, b in streams:
            alice.write(a, bytes(b.receive_window))
            bob.consume(b, len(data_of(feed(bob, output(alice)))), float(turn))
            feed(alice, output(bob))
    assert sum(b.window - YAMUX_INITIAL_WINDOW for _, b in streams) == 2 << 20
    for _, b in streams:
        bob.reset(b)
    assert bob._extra_windows == 0


# -- order of sending ----------------------------------------------------------------------------------------
def test_small_messages_are_gathered_and_go_before_bulk() -> None:
    alice, bob = pair()
    bulk, small, other = (opened(alice, bob)[0] for _ in range(3))
    alice.write(bulk, bytes(200_000))
    message(alice)
    alice.write(small, b"s")
    alice.write(other, b"o")
    alice.ping(0.0)
    assert [(kind, stream) for kind, _, stream, _, _ in frames(message(alice))] == [(2, 0), (0, 3), (0, 5), (0, 1)]


def test_bulk_streams_take_turns() -> None:
    alice, bob = pair()
    streams = [opened(alice, bob)[0] for _ in range(3)]
    for stream in streams:
        alice.write(stream, bytes(200_000))
    turns = [frames(message(alice))[0][2] for _ in range(6)]
    assert turns == [1, 3, 5, 1, 3, 5]


def test_small_traffic_does_not_starve_bulk() -> None:
    alice, bob = pair()
    bulk = opened(alice, bob)[0]
    small = [opened(alice, bob)[0] for _ in range(20)]
    alice.write(bulk, bytes(250_000))
    for _ in range(12):
        for stream in small:
            alice.write(stream, bytes(8000 - stream.queued))
        message(alice)
    assert bulk.sent > 100_000


def test_a_message_is_filled_to_the_last_byte_with_bulk() -> None:
    alice, bob = pair()
    stream = opened(alice, bob)[0]
    alice.write(stream, bytes(100_000), b"", bytes(100))
    assert len(message(alice)) == 65519
    assert stream.queued == 100_100 - 65519 + 12


def test_any_buffer_can_be_written() -> None:
    alice, bob = pair()
    stream = opened(alice, bob)[0]
    numbers = memoryview(bytearray(8)).cast("I")
    numbers[0] = 0x01020304
    alice.write(stream, bytearray(b"ab"), memoryview(b"cd"), numbers, memoryview(b""))
    ((_, _, _, length, body),) = frames(output(alice))
    assert length == 12
    assert body == b"abcd" + bytes(numbers)


# -- pings and going away ------------------------------------------------------------------------------------
def test_a_ping_measures_the_round_trip() -> None:
    alice, bob = pair()
    assert alice.ping(1.0)
    assert not alice.ping(1.1), "one at a time"
    feed(bob, output(alice))
    assert feed(alice, output(bob), 1.25) == [PingAnswered(0.25)]
    assert alice.ping(2.0)
    feed(bob, output(alice))
    feed(alice, output(bob), 2.5)
    assert alice.round_trip == 0.25, "the shortest counts"


def test_answers_to_pings_we_did_not_send_are_ignored() -> None:
    alice, _ = pair()
    assert feed(alice, frame(2, ACK, 0, 12345)) == []


def test_pings_are_rate_limited() -> None:
    _, bob = pair()
    feed(bob, frame(2, SYN, 0, 1) * YAMUX_PING_BURST)
    assert len(frames(output(bob))) == YAMUX_PING_BURST
    feed(bob, frame(2, SYN, 0, 1), 1.0)
    with pytest.raises(RemoteProtocolError, match="pings"):
        feed(bob, frame(2, SYN, 0, 1) * YAMUX_PING_BURST, 1.0)


def test_going_away() -> None:
    alice, bob = pair()
    a, b = opened(alice, bob)
    alice.go_away(0)
    alice.go_away(1)
    assert feed(bob, output(alice)) == [GoAwayReceived(0)]
    with pytest.raises(LocalProtocolError):
        bob.open_stream(0.0)
    with pytest.raises(LocalProtocolError):
        alice.open_stream(0.0)
    bob.write(b, b"to the end")
    assert data_of(feed(alice, output(bob))) == b"to the end"
    assert feed(alice, frame(1, SYN, 2, 0)) == []
    assert frames(output(alice))[-1] == (1, RST, 2, 0, b"")
    assert not a.finished


# -- what a peer must not do ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "broken",
    [
        b"\x01" + frame(0, 0, 1, 0)[1:],  # version
        frame(4, 0, 1, 0),  # type
        frame(0, 16, 1, 0),  # flag
        frame(0, 0, 0, 0),  # data on the session
        frame(2, SYN, 1, 0),  # ping on a stream
        frame(2, 0, 0, 0),
        frame(2, SYN | ACK, 0, 0),
        frame(3, 0, 1, 0),  # go away on a stream
        frame(1, SYN, 2, 0),  # our id
        frame(1, SYN, 1, 0),  # opened twice
        frame(0, 0, 99, 0),  # never opened by them
        frame(0, 0, 98, 0),  # never opened by us
        frame(0, 0, 1, YAMUX_INITIAL_WINDOW + 1),  # over the window
        frame(1, 0, 1, 2**32 - 1) + frame(1, 0, 1, 2**32 - 1),  # overflowing window
    ],
)
def test_a_broken_rule_ends_the_session(broken: bytes) -> None:
    alice, bob = pair()
    opened(alice, bob)
    with pytest.raises(RemoteProtocolError):
        bob.receive_untrusted(memoryview(broken), 0.0)


def test_a_stream_that_was_dropped_before_it_was_announced() -> None:
    """rust-yamux puts the SYN on a stream's first data, and a RST on the end of one that never had any."""
    alice, bob = pair()
    opened(alice, bob)
    for kind in (0, 1):
        bob.receive_untrusted(memoryview(frame(kind, RST, 99, 0)), 0.0)
    assert bob.next_event() is None
    with pytest.raises(RemoteProtocolError):
        bob.receive_untrusted(memoryview(frame(0, RST, 98, 0)), 0.0)  # an id of ours


def test_the_window_counts_over_all_frames() -> None:
    alice, bob = pair()
    opened(alice, bob)
    half = frame(0, 0, 1, YAMUX_INITIAL_WINDOW // 2) + bytes(YAMUX_INITIAL_WINDOW // 2)
    feed(bob, half + half)
    with pytest.raises(RemoteProtocolError, match="window"):
        feed(bob, frame(0, 0, 1, 1, b"x"))


def test_data_after_the_end_resets_that_stream_only() -> None:
    alice, bob = pair()
    _, b = opened(alice, bob)
    opened(alice, bob)
    feed(bob, frame(0, FIN, 1, 0))
    (event,) = feed(bob, frame(0, 0, 1, 3, b"abc") + frame(0, FIN, 1, 0))
    assert isinstance(event, StreamAborted)
    assert event.stream is b
    assert frames(output(bob)) == [(1, RST, 1, 0, b"")]
    assert list(bob.streams) == [3]


def test_streams_opened_and_never_read_answers_end_the_session() -> None:
    _, bob = pair()
    for number in range(YAMUX_MAX_CONTROL_FRAMES):
        (event,) = feed(bob, frame(1, SYN, 2 * number + 1, 0))
        assert isinstance(event, StreamOpened)
        bob.reset(event.stream)
    with pytest.raises(RemoteProtocolError, match="does not read"):
        feed(bob, frame(1, SYN, 2 * YAMUX_MAX_CONTROL_FRAMES + 1, 0))
