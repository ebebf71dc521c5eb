"""yamux (`/yamux/1.0.0`): many streams over one reliable, ordered byte channel.

Wire: a 12-byte header, all numbers big-endian, then `length` bytes of data if the type is 0.

    u8  version   0
    u8  type      0 data, 1 window update, 2 ping, 3 go away
    u16 flags     1 SYN opens a stream, 2 ACK accepts it, 4 FIN half-closes it, 8 RST aborts it
    u32 stream    0 for ping and go away; odd ids are opened by the side that dialled, even ones by the other
    u32 length    data: bytes that follow; window update: bytes added to the window; ping: opaque value;
                  go away: 0 normal, 1 protocol error, 2 internal error

SYN, ACK, FIN and RST stand on data or window update frames. We put SYN and ACK on the first frame that leaves
anyway, and send FIN in a frame of its own, because go-yamux acts on the flags of a frame before it reads its
data. A stream begins with a window of 256 KiB in each direction, which window updates extend; there is no
window for the whole session.

What breaks what: a peer that breaks the framing, overruns a window, uses our ids, or floods us with pings or
streams that are reset at once ends the session (`RemoteProtocolError`). One that opens more streams than we
serve, or sends data on a stream after its FIN, loses that stream (RST). Frames for streams that are gone are
skipped: they were on their way.

Order of sending, for each call of `poll_transmit_into` (one Noise message): control frames, then streams with
little to send (flags, window updates, up to 8 KiB of data), then one share of a stream with much to send,
round-robin. So a small message waits for at most one share of bulk data. When small traffic alone fills the
messages, every fourth begins with bulk.

Growing windows: what the reader took is measured over a round trip or more. While a window is smaller than twice the
bytes of one round trip at that rate, and three Noise messages, it may be the brake, so it is doubled, up to 16 MiB a
stream and 64 MiB a connection. No larger than that: what is in flight beyond it stands in a queue somewhere, and small
messages behind it. A session that has no small messages may be given more (`allowance`): its sender then goes on while
the receiver has no processor.
(The rule of go-yamux and quic-go, a time for half a window, takes one quick burst out of the kernel's buffers for a
quick path, and doubles for good.)
"""

from __future__ import annotations

import struct
from collections import deque
from typing import Final, NamedTuple, TypeAlias

from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.limits import (
    YAMUX_ACK_BACKLOG,
    YAMUX_INITIAL_WINDOW,
    YAMUX_MAX_CONTROL_FRAMES,
    YAMUX_MAX_EXTRA_WINDOWS,
    YAMUX_MAX_INBOUND_STREAMS,
    YAMUX_MAX_WINDOW,
    YAMUX_MIN_WINDOW,
    YAMUX_PING_BURST,
    YAMUX_PINGS_PER_SECOND,
)
from lattica_protocols.yamux_stream import FLAG_ACK, FLAG_FIN, FLAG_RST, FLAG_SYN, Buffer, YamuxStream

PROTOCOL_ID: Final = "/yamux/1.0.0"
HEADER_BYTES: Final = 12

TYPE_DATA: Final = 0
TYPE_WINDOW_UPDATE: Final = 1
TYPE_PING: Final = 2
TYPE_GO_AWAY: Final = 3

GO_AWAY_NORMAL: Final = 0
GO_AWAY_PROTOCOL_ERROR: Final = 1
GO_AWAY_INTERNAL_ERROR: Final = 2

SMALL_SHARE: Final = 8192
"""A stream with no more than this queued is served before bulk."""
_BULK_TURN: Final = 4
_IN_MESSAGES: Final = 3 * 65536
"""Bytes that a path holds besides what its round trip tells: a Noise message is used when all of it is there, at a
relay and at the end, and a ping is too small to wait for that. On a slow line these are most of what is under way."""
_SHORTEST_MEASUREMENT: Final = 0.002
"""Seconds over which a rate is measured at least: several turns of both ends' schedulers, so that one burst is no
rate."""
_MAX_U32: Final = 2**32 - 1
_KNOWN_FLAGS: Final = FLAG_SYN | FLAG_ACK | FLAG_FIN | FLAG_RST

_header = struct.Struct(">BBHII")
_pack = _header.pack
_pack_into = _header.pack_into
_unpack_from = struct.Struct(">III").unpack_from
"""Version, type and flags as one number: it is 0 for plain data."""


# -- events --------------------------------------------------------------------------------------------------
class StreamOpened(NamedTuple):
    """The peer opened a stream. Answer with `accept` or `reset`."""

    stream: YamuxStream


class DataReceived(NamedTuple):
    """`data` is a view into what was given to `receive_untrusted`. Call `consume` when it was used up."""

    stream: YamuxStream
    data: memoryview


class EofReceived(NamedTuple):
    """The peer finished its direction."""

    stream: YamuxStream


class StreamAcknowledged(NamedTuple):
    """The peer accepted a stream of ours."""

    stream: YamuxStream


class StreamAborted(NamedTuple):
    """The stream is gone. `reason` is for people."""

    stream: YamuxStream
    reason: str


class StreamFinished(NamedTuple):
    """Both directions ended in order."""

    stream: YamuxStream


class PingAnswered(NamedTuple):
    """Our ping came back."""

    round_trip: float


class GoAwayReceived(NamedTuple):
    """The peer accepts no more streams. Code 0: in order."""

    code: int


Event: TypeAlias = (
    StreamOpened
    | DataReceived
    | EofReceived
    | StreamAcknowledged
    | StreamAborted
    | StreamFinished
    | PingAnswered
    | GoAwayReceived
)


class YamuxSession:
    """Both directions of one session.

    `receive_untrusted(data, now)` takes plaintext in pieces of any size; then `next_event()` until it gives
    `None`, before the memory behind `data` is used again. `poll_transmit_into(...)` fills one message while
    `wants_transmit` is true.
    """

    def __init__(
        self,
        *,
        initiator: bool,
        max_inbound_streams: int = YAMUX_MAX_INBOUND_STREAMS,
        max_window: int = YAMUX_MAX_WINDOW,
    ) -> None:
        self._next_id = 1 if initiator else 2
        self._their_parity = 0 if initiator else 1
        self._max_inbound = max_inbound_streams
        self._max_window = max_window
        self.allowance = _IN_MESSAGES
        """Bytes in flight on a stream beyond what the round trip tells."""
        self.streams: dict[int, YamuxStream] = {}
        self.unacknowledged = 0
        """Streams of ours that the peer has not accepted yet."""
        self.round_trip: float | None = None
        """Shortest round trip seen: what the windows are measured against."""
        self.go_away_sent = False
        self.data_sent = 0
        """Bytes of all streams so far: what a peer is expected to react to, unlike the answer to a ping."""
        self.go_away_received = False
        self._inbound = 0
        self._highest_inbound = 0
        self._extra_windows = 0
        self._events: deque[Event] = deque()
        # receiving
        self._partial = bytearray()
        self._body_left = 0
        self._body_stream: YamuxStream | None = None
        self._body_flags = 0
        # sending
        self._control: deque[bytes] = deque()
        self._small: deque[YamuxStream] = deque()
        self._bulk: deque[YamuxStream] = deque()
        self._polls_without_bulk = 0
        # pings
        self._ping_value = 0
        self._ping_sent_at: float | None = None
        self._ping_tokens = float(YAMUX_PING_BURST)
        self._ping_tokens_at: float | None = None

    # -- what the application wants --------------------------------------------------------------------------
    @property
    def can_open(self) -> bool:
        """Whether the peer would take one more stream now."""
        return self.unacknowledged < YAMUX_ACK_BACKLOG

    def open_stream(self, now: float) -> YamuxStream:
        """A new stream. Its SYN leaves with the first data written in the same turn, or alone."""
        if self.go_away_received or self.go_away_sent:
            raise LocalProtocolError("the session is ending: no new streams")
        if not self.can_open:
            raise LocalProtocolError(f"{YAMUX_ACK_BACKLOG} streams wait for the peer to accept them")
        if self._next_id > _MAX_U32:
            raise LocalProtocolError("all stream ids are used: the connection has to be made anew")
        stream = YamuxStream(self._next_id, inbound=False, now=now)
        self._next_id += 2
        self.streams[stream.id] = stream
        self.unacknowledged += 1
        self._schedule(stream)
        return stream

    def accept(self, stream: YamuxStream) -> None:
        """Acknowledge a stream of the peer, with the next frame that leaves on it."""
        if not stream.accepted and not stream.finished:
            stream.accepted = True
            stream.flags_due |= FLAG_ACK
            self._schedule(stream)

    def write(self, stream: YamuxStream, *buffers: Buffer) -> None:
        """Queue references to `buffers`."""
        if stream.fin_due or stream.finished:
            raise LocalProtocolError("our direction of the stream is closed")
        stream.enqueue(buffers)
        if stream.lane is None:
            self._schedule(stream)

    def close_write(self, stream: YamuxStream) -> None:
        """Send FIN after all that is queued."""
        if not stream.fin_due and not stream.finished:
            stream.fin_due = True
            self._schedule(stream)

    def reset(self, stream: YamuxStream) -> None:
        """Abort the stream: RST to the peer, what is queued is dropped. No event follows."""
        if stream.finished:
            return
        if stream.syn_sent:
            self._control.append(_pack(0, TYPE_WINDOW_UPDATE, FLAG_RST, stream.id, 0))
        self._forget(stream)

    def consume(self, stream: YamuxStream, size: int, now: float) -> None:
        """`size` bytes of the stream's data are used up: the peer may send as many more."""
        stream.unconsumed -= size
        if stream.granting and not stream.fin_received and not stream.is_reset:
            self._grant(stream, now)

    def set_granting(self, stream: YamuxStream, granting: bool, now: float) -> None:
        """Stop or resume giving the peer more window."""
        stream.granting = granting
        if granting and not stream.fin_received and not stream.is_reset:
            self._grant(stream, now)

    def limit_window(self, stream: YamuxStream, size: int) -> None:
        """Let the stream's window not grow above `size` bytes. One that is larger, as each is at first, shrinks as the
        peer uses it up."""
        stream.max_window = max(size, YAMUX_MIN_WINDOW)
        window = min(max(stream.window, YAMUX_INITIAL_WINDOW), stream.max_window)
        if not stream.finished:
            self._extra_windows += window - stream.window
            stream.window = window

    def ping(self, now: float) -> bool:
        """Measure the round trip. False while the last ping is still unanswered."""
        if self._ping_sent_at is not None:
            return False
        self._ping_value = (self._ping_value + 1) & _MAX_U32
        self._ping_sent_at = now
        self._control.append(_pack(0, TYPE_PING, FLAG_SYN, 0, self._ping_value))
        return True

    def go_away(self, code: int = GO_AWAY_NORMAL) -> None:
        """Tell the peer that this is the end. Streams that are open go on."""
        if not self.go_away_sent:
            self.go_away_sent = True
            self._control.append(_pack(0, TYPE_GO_AWAY, 0, 0, code))

    def next_event(self) -> Event | None:
        """What happened, oldest first."""
        return self._events.popleft() if self._events else None

    @property
    def has_events(self) -> bool:
        """Whether `next_event` would tell something."""
        return bool(self._events)

    # -- sending ---------------------------------------------------------------------------------------------
    @property
    def wants_transmit(self) -> bool:
        """Whether `poll_transmit_into` would write something."""
        return bool(self._control or self._small or self._bulk)

    def poll_transmit_into(self, out: memoryview, start: int, end: int) -> int:
        """Write frames into `out[start:end]` (at least 48 bytes) and return where they end."""
        pos = start
        control = self._control
        while control and end - pos >= HEADER_BYTES:
            out[pos : pos + HEADER_BYTES] = control.popleft()
            pos += HEADER_BYTES
        if self._bulk and self._polls_without_bulk >= _BULK_TURN - 1:
            pos = self._take_turn(self._bulk, out, pos, end)
        small = self._small
        while small and end - pos > HEADER_BYTES:
            pos = self._take_turn(small, out, pos, end)
        if not self._bulk:
            self._polls_without_bulk = 0
        elif end - pos > HEADER_BYTES:
            pos = self._take_turn(self._bulk, out, pos, end)
        else:
            self._polls_without_bulk += 1
        return pos

    def _take_turn(self, lane: deque[YamuxStream], out: memoryview, pos: int, end: int) -> int:
        """Frames of the first stream in `lane`, as many as fit. Puts it where it belongs afterwards."""
        if lane is self._bulk:
            self._polls_without_bulk = 0
            share = end - pos
        else:
            share = min(end - pos, HEADER_BYTES + SMALL_SHARE)
        stream = lane.popleft()
        stream.lane = None
        flags = stream.flags_due
        if stream.pending_grant or (flags and not (stream.queued and stream.send_window)):
            _pack_into(out, pos, 0, TYPE_WINDOW_UPDATE, flags, stream.id, stream.pending_grant)
            pos += HEADER_BYTES
            share -= HEADER_BYTES
            stream.receive_window += stream.pending_grant
            stream.pending_grant = flags = stream.flags_due = 0
            stream.syn_sent = True
        size = min(stream.queued, stream.send_window, share - HEADER_BYTES)
        if size > 0:
            _pack_into(out, pos, 0, TYPE_DATA, flags, stream.id, size)
            pos += HEADER_BYTES
            stream.copy_out(out, pos, size)
            stream.send_window -= size
            self.data_sent += size
            stream.flags_due = 0
            stream.syn_sent = True
            pos += size
        if stream.fin_due and not stream.queued and not stream.flags_due and end - pos >= HEADER_BYTES:
            _pack_into(out, pos, 0, TYPE_DATA, FLAG_FIN, stream.id, 0)
            pos += HEADER_BYTES
            stream.fin_sent = True
            if stream.fin_received:
                self._finish(stream)
        elif stream.has_frames:
            self._schedule(stream)
        return pos

    def _schedule(self, stream: YamuxStream) -> None:
        """Put the stream into the ready queue it belongs into, unless it stands in one or has nothing to
        send."""
        if stream.lane is None and not stream.finished and stream.has_frames:
            lane = self._small if stream.queued <= SMALL_SHARE else self._bulk
            lane.append(stream)
            stream.lane = lane

    def _grant(self, stream: YamuxStream, now: float) -> None:
        due = stream.window - stream.receive_window - stream.unconsumed
        if due * 2 < stream.window:
            return
        extra = self._growth(stream, due - stream.pending_grant, now)
        self._extra_windows += extra
        stream.window += extra
        stream.pending_grant = due + extra
        self._schedule(stream)

    def _growth(self, stream: YamuxStream, taken: int, now: float) -> int:
        """By how much the window grows, after the reader took `taken` more bytes."""
        stream.measured_bytes += taken
        elapsed = now - stream.measured_since
        round_trip = self.round_trip or 0.0
        if elapsed < max(round_trip, _SHORTEST_MEASUREMENT):
            return 0
        needed = 2 * stream.measured_bytes * round_trip / elapsed + self.allowance
        stream.measured_bytes, stream.measured_since = 0, now
        extra = min(stream.window, min(self._max_window, stream.max_window) - stream.window)
        if stream.window < needed and 0 < extra <= YAMUX_MAX_EXTRA_WINDOWS - self._extra_windows:
            return extra
        return 0

    # -- receiving -------------------------------------------------------------------------------------------
    def receive_untrusted(self, data: memoryview, now: float) -> None:
        """Plaintext from the peer. Raises `RemoteProtocolError`: the session is over then."""
        pos, size = 0, len(data)
        partial = self._partial
        while pos < size:
            if self._body_left:
                take = min(self._body_left, size - pos)
                self._receive_body(data[pos : pos + take])
                pos += take
            elif partial or size - pos < HEADER_BYTES:
                take = min(HEADER_BYTES - len(partial), size - pos)
                partial += data[pos : pos + take]
                pos += take
                if len(partial) == HEADER_BYTES:
                    header = _unpack_from(partial)
                    partial.clear()
                    self._receive_header_untrusted(header, now)
            else:
                header = _unpack_from(data, pos)
                pos += HEADER_BYTES
                version_type_flags, stream_id, length = header
                stream = self.streams.get(stream_id)
                if (
                    stream is not None
                    and not version_type_flags  # plain data, nearly all there is: the same as the long way
                    and 0 < length <= size - pos
                    and length <= stream.receive_window
                    and not stream.fin_received
                ):
                    stream.receive_window -= length
                    stream.unconsumed += length
                    self._events.append(DataReceived(stream, data[pos : pos + length]))
                    pos += length
                else:
                    self._receive_header_untrusted(header, now)

    def _receive_body(self, data: memoryview) -> None:
        self._body_left -= len(data)
        stream = self._body_stream
        if stream is not None:
            self._events.append(DataReceived(stream, data))
        if not self._body_left:
            self._body_stream = None
            if stream is not None and self._body_flags:
                self._receive_end(stream, self._body_flags)

    def _receive_header_untrusted(self, header: tuple[int, int, int], now: float) -> None:
        version_type_flags, stream_id, length = header
        if version_type_flags >> 24:
            raise RemoteProtocolError(f"yamux version {version_type_flags >> 24}")
        kind, flags = version_type_flags >> 16, version_type_flags & 0xFFFF
        if flags & ~_KNOWN_FLAGS:
            raise RemoteProtocolError(f"unknown yamux flags {flags:#x}")
        if kind in (TYPE_PING, TYPE_GO_AWAY):
            if stream_id:
                raise RemoteProtocolError("yamux session frame on a stream")
            if kind == TYPE_PING:
                self._receive_ping_untrusted(flags, length, now)
            elif not self.go_away_received:
                self.go_away_received = True
                self._events.append(GoAwayReceived(length))
            return
        if kind > TYPE_GO_AWAY:
            raise RemoteProtocolError(f"unknown yamux frame type {kind}")
        stream = self._find_stream_untrusted(stream_id, flags, now)
        if kind == TYPE_DATA:
            self._body_left = length
            if stream is not None and length:
                self._begin_body_untrusted(stream, flags, length)
                return
        elif stream is not None and length:
            was_blocked = stream.send_window == 0
            stream.send_window += length
            if stream.send_window > _MAX_U32:
                raise RemoteProtocolError("yamux window over 2**32 - 1")
            if was_blocked and stream.queued:
                self._schedule(stream)
        if stream is not None and flags & (FLAG_FIN | FLAG_RST):
            self._receive_end(stream, flags)

    def _begin_body_untrusted(self, stream: YamuxStream, flags: int, length: int) -> None:
        if length > stream.receive_window:
            raise RemoteProtocolError(f"{length} bytes on a yamux stream, over its window")
        stream.receive_window -= length
        if stream.fin_received:
            self.abort_stream(stream, "the peer sent data after its end of the stream")
            return
        stream.unconsumed += length
        self._body_stream = stream
        self._body_flags = flags & (FLAG_FIN | FLAG_RST)

    def _find_stream_untrusted(self, stream_id: int, flags: int, now: float) -> YamuxStream | None:
        """The frame's stream, opened by it if it says so. `None`: there is none, skip the frame."""
        if stream_id == 0:
            raise RemoteProtocolError("yamux stream frame on stream 0")
        stream = self.streams.get(stream_id)
        theirs = stream_id & 1 == self._their_parity
        if flags & FLAG_SYN:
            if not theirs:
                raise RemoteProtocolError(f"the peer opened the yamux stream {stream_id}, an id of ours")
            if stream is not None:
                raise RemoteProtocolError(f"the peer opened the yamux stream {stream_id} twice")
            return self._open_inbound_untrusted(stream_id, now)
        if stream is None:
            # rust-yamux announces a stream with its first data; one that it drops before that it resets all the same.
            unheard = stream_id > self._highest_inbound if theirs else stream_id >= self._next_id
            if unheard and not (flags & FLAG_RST and theirs):
                raise RemoteProtocolError(f"frame on the yamux stream {stream_id} that was never opened")
            return None
        if flags & FLAG_ACK and not stream.acked:
            stream.acked = True
            self.unacknowledged -= 1
            self._events.append(StreamAcknowledged(stream))
        return stream

    def _open_inbound_untrusted(self, stream_id: int, now: float) -> YamuxStream | None:
        # Ids need not come in order: go-yamux allots them before it sends, from several threads.
        self._highest_inbound = max(self._highest_inbound, stream_id)
        if len(self._control) >= YAMUX_MAX_CONTROL_FRAMES:
            raise RemoteProtocolError("the peer opens streams and does not read the answers")
        if self._inbound >= self._max_inbound or self.go_away_sent:
            self._control.append(_pack(0, TYPE_WINDOW_UPDATE, FLAG_RST, stream_id, 0))
            return None
        stream = YamuxStream(stream_id, inbound=True, now=now)
        self.streams[stream_id] = stream
        self._inbound += 1
        self._events.append(StreamOpened(stream))
        return stream

    def _receive_end(self, stream: YamuxStream, flags: int) -> None:
        if stream.is_reset:
            return
        if flags & FLAG_RST:
            self._forget(stream)
            self._events.append(StreamAborted(stream, "the peer reset the stream"))
        elif not stream.fin_received:
            stream.fin_received = True
            self._events.append(EofReceived(stream))
            if stream.fin_sent:
                self._finish(stream)

    def _receive_ping_untrusted(self, flags: int, value: int, now: float) -> None:
        if flags == FLAG_SYN:
            before = self._ping_tokens_at
            refill = 0.0 if before is None else (now - before) * YAMUX_PINGS_PER_SECOND
            self._ping_tokens_at = now
            self._ping_tokens = min(YAMUX_PING_BURST, self._ping_tokens + refill) - 1
            if self._ping_tokens < 0:
                raise RemoteProtocolError("too many yamux pings")
            self._control.append(_pack(0, TYPE_PING, FLAG_ACK, 0, value))
        elif flags != FLAG_ACK:
            raise RemoteProtocolError(f"yamux ping with the flags {flags:#x}")
        elif self._ping_sent_at is not None and value == self._ping_value:
            round_trip = max(0.0, now - self._ping_sent_at)
            self._ping_sent_at = None
            self.round_trip = round_trip if self.round_trip is None else min(self.round_trip, round_trip)
            self._events.append(PingAnswered(round_trip))

    # -- ends of streams -------------------------------------------------------------------------------------
    def abort_stream(self, stream: YamuxStream, reason: str) -> None:
        """Reset the stream because of what the peer did on it: RST to the peer, `StreamAborted` to us."""
        if not stream.finished:
            self.reset(stream)
            self._events.append(StreamAborted(stream, reason))

    def _finish(self, stream: YamuxStream) -> None:
        self._remove(stream)
        self._events.append(StreamFinished(stream))

    def _forget(self, stream: YamuxStream) -> None:
        stream.is_reset = True
        stream.queue.clear()
        stream.queued = 0
        stream.flags_due = stream.pending_grant = 0
        if stream.lane is not None:
            stream.lane.remove(stream)
            stream.lane = None
        if self._body_stream is stream:
            self._body_stream = None
        self._remove(stream)

    def _remove(self, stream: YamuxStream) -> None:
        if self.streams.pop(stream.id, None) is None:
            return
        self._extra_windows -= stream.window - YAMUX_INITIAL_WINDOW
        if stream.inbound:
            self._inbound -= 1
        elif not stream.acked:
            stream.acked = True
            self.unacknowledged -= 1
