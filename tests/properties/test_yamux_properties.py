"""Whatever two yamux sessions write, in whatever pieces it travels, arrives complete and in order; garbage is
blamed on the peer."""

from __future__ import annotations

import struct
from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import YAMUX_INITIAL_WINDOW
from lattica_protocols.yamux import DataReceived, EofReceived, StreamAborted, StreamOpened, YamuxSession
from lattica_protocols.yamux_stream import YamuxStream


class Side:
    """A session, what it received on each stream, and what is on its way to it."""

    def __init__(self, initiator: bool) -> None:
        self.session = YamuxSession(initiator=initiator)
        self.wire: deque[bytes] = deque()
        self.received: dict[int, bytearray] = {}
        self.written: dict[int, bytearray] = {}
        self.ended: set[int] = set()
        self.streams: dict[int, YamuxStream] = {}


class SessionPair(RuleBasedStateMachine):
    """Random writes, transports in random pieces, lazy and eager readers, resets."""

    streams = Bundle("streams")

    def __init__(self) -> None:
        super().__init__()
        self.sides = (Side(True), Side(False))
        self.now = 0.0
        self.reset: set[int] = set()

    @rule(target=streams, side=st.integers(0, 1))
    def open(self, side: int) -> tuple[int, int]:
        stream = self.sides[side].session.open_stream(self.now)
        self.sides[side].streams[stream.id] = stream
        return side, stream.id

    def _stream(self, which: tuple[int, int], flip: bool) -> tuple[Side, YamuxStream] | None:
        opener, stream_id = which
        side = self.sides[opener ^ flip]
        stream = side.streams.get(stream_id)
        return None if stream is None or stream.finished else (side, stream)

    @rule(
        which=streams,
        flip=st.booleans(),
        data=st.binary(min_size=1, max_size=50),
        times=st.sampled_from([1, 1, 30, 1000, 7000]),
    )
    def write(self, which: tuple[int, int], flip: bool, data: bytes, times: int) -> None:
        found = self._stream(which, flip)
        if found is not None and not found[1].fin_due:
            side, stream = found
            payload = data * times
            side.session.write(stream, data, memoryview(payload)[len(data) :])
            side.written.setdefault(stream.id, bytearray()).extend(payload)

    @rule(which=streams, flip=st.booleans())
    def finish(self, which: tuple[int, int], flip: bool) -> None:
        found = self._stream(which, flip)
        if found is not None:
            found[0].session.close_write(found[1])

    @rule(which=streams, flip=st.booleans())
    def abort(self, which: tuple[int, int], flip: bool) -> None:
        found = self._stream(which, flip)
        if found is not None:
            found[0].session.reset(found[1])
            self.reset.add(found[1].id)

    @rule(which=streams, flip=st.booleans(), granting=st.booleans())
    def pause_or_resume(self, which: tuple[int, int], flip: bool, granting: bool) -> None:
        found = self._stream(which, flip)
        if found is not None:
            found[0].session.set_granting(found[1], granting, self.now)

    @rule(which=streams, flip=st.booleans())
    def read(self, which: tuple[int, int], flip: bool) -> None:
        found = self._stream(which, flip)
        if found is not None:
            found[0].session.consume(found[1], found[1].unconsumed, self.now)

    @rule(sender=st.integers(0, 1), size=st.integers(48, 65519))
    def transmit(self, sender: int, size: int) -> None:
        session = self.sides[sender].session
        if session.wants_transmit:
            out = memoryview(bytearray(size))
            end = session.poll_transmit_into(out, 0, size)
            assert end > 0
            self.sides[1 - sender].wire.append(bytes(out[:end]))

    @rule(receiver=st.integers(0, 1), cut=st.integers(1, 70000))
    def deliver(self, receiver: int, cut: int) -> None:
        side = self.sides[receiver]
        self.now += 0.001
        if side.wire:
            data = side.wire.popleft()
            if len(data) > cut:
                side.wire.appendleft(data[cut:])
            self._feed(side, data[:cut])

    def _feed(self, side: Side, data: bytes) -> None:
        side.session.receive_untrusted(memoryview(data), self.now)
        while (event := side.session.next_event()) is not None:
            if isinstance(event, StreamOpened):
                side.streams[event.stream.id] = event.stream
                side.session.accept(event.stream)
            elif isinstance(event, DataReceived):
                received = side.received.setdefault(event.stream.id, bytearray())
                start = len(received)
                received += event.data
                other = self.sides[side is self.sides[0]]
                assert other.written[event.stream.id][start : len(received)] == event.data
            elif isinstance(event, EofReceived):
                side.ended.add(event.stream.id)
            elif isinstance(event, StreamAborted):
                assert event.stream.id in self.reset

    @invariant()
    def windows_hold(self) -> None:
        for me in self.sides:
            for stream in me.session.streams.values():
                assert stream.receive_window >= 0
                assert stream.receive_window + stream.unconsumed + stream.pending_grant <= stream.window
                assert stream.queued == sum(len(piece) for piece in stream.queue)

    def teardown(self) -> None:
        """Let everything through: whatever was not reset arrives completely."""
        for side in self.sides:
            for stream in list(side.session.streams.values()):
                side.session.set_granting(stream, True, self.now)
        busy = True
        while busy:
            busy = False
            for index, side in enumerate(self.sides):
                while side.wire or side.session.wants_transmit:
                    busy = True
                    while side.wire:
                        self._feed(side, side.wire.popleft())
                    for stream in list(side.session.streams.values()):
                        side.session.consume(stream, stream.unconsumed, self.now)
                    self.transmit(index, 65519)
        for me, other in (self.sides, self.sides[::-1]):
            for stream_id, written in me.written.items():
                if stream_id not in self.reset:
                    assert other.received[stream_id] == written
            for stream_id, stream in me.streams.items():
                if stream.fin_due and stream_id not in self.reset:
                    assert stream_id in other.ended


TestSessionPair = SessionPair.TestCase
TestSessionPair.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=64), max_size=20), st.booleans())
def test_garbage_is_the_peers_fault(pieces: list[bytes], initiator: bool) -> None:
    session = YamuxSession(initiator=initiator)
    try:
        for piece in pieces:
            session.receive_untrusted(memoryview(piece), 0.0)
            while session.next_event() is not None:
                pass
    except RemoteProtocolError:
        return


_frame = st.builds(
    lambda kind, flags, stream, length, body: struct.pack(">BBHII", 0, kind, flags, stream, length) + body,
    st.integers(0, 3),
    st.integers(0, 15),
    st.integers(0, 9),
    st.one_of(st.integers(0, 40), st.integers(0, 2**32 - 1)),
    st.binary(max_size=40),
)


@settings(deadline=None)
@given(st.lists(_frame, max_size=60), st.lists(st.integers(0, 5), max_size=60))
def test_frames_in_any_order_never_hurt_us(frames: list[bytes], actions: list[int]) -> None:
    session = YamuxSession(initiator=False)
    out = memoryview(bytearray(4096))
    held = 0
    mine: list[YamuxStream] = []
    todo = deque(actions)
    try:
        for data in frames:
            session.receive_untrusted(memoryview(data), 0.0)
            while (event := session.next_event()) is not None:
                if isinstance(event, StreamOpened):
                    mine.append(event.stream)
                elif isinstance(event, DataReceived):
                    held += len(event.data)
            action = todo.popleft() if todo else 0
            if action == 1 and session.can_open and not session.go_away_received:
                mine.append(session.open_stream(0.0))
            elif action == 2 and mine and not mine[-1].finished and not mine[-1].fin_due:
                session.write(mine[-1], bytes(5000))
            elif action == 3 and mine:
                session.close_write(mine[-1])
            elif action == 4 and mine:
                session.reset(mine[-1])
            elif action == 5 and session.wants_transmit:
                assert session.poll_transmit_into(out, 0, len(out)) > 0
            assert held <= YAMUX_INITIAL_WINDOW * max(1, len(mine))
    except RemoteProtocolError:
        return
