"""The machine of one control stream: many calls in both directions, without I/O.

It turns bytes into events and verbs into bytes; who waits for what is the runtime's affair. The wire stands
in `specs/rpc.md`.

A runtime drives it like this, after every stretch of work::

    machine.receive_data(view, now)              # or a verb, or handle_timer(now)
    for kind, call, head, tail in machine.poll_events():
        ...                                      # call.owner says whose call it is
    stream.write(*machine.poll_transmit())
    for tail_id, length, buffers in machine.poll_detached():
        ...                                      # a bulk stream or a memfd

**Events** are tuples `(kind, call, head, tail)` with the frame kinds as kinds:

    REQUEST   a new inbound call: see `call.method`, `.route`, `.flags`, `.deadline`; head is the arguments
    RESPONSE  the result of our call; the call is over
    ITEM      one message of a stream, either direction. Call `grant` once it was consumed
    END       the other side sends no more ITEMs; for our call: the call is over
    ERROR     our call failed, here or there: head for `decode_error_head_untrusted`. Deadline, lost
              connection and limits come this way too, with their codes
    CANCEL    an inbound call is over: cancelled, past its deadline, or the connection is lost
    CREDIT    a stream may send again: look at `call.can_send()`
    HELLO, PING, GOAWAY   with `machine.session_call`; PING is the answer to ours, head what was sent
    ACK       likewise: the peer has more of what we sent, `resumption.sent` holds less

`head` is bytes, `tail` a buffer that belongs to the receiver of the event (b"" when there is none).

**Forwarding.** A forwarder answers a REQUEST event by `other.forward(call, head, tail, ...)` on the machine
that leads on, which gives the second half. From then on each event of one half goes to the other by
`relay(half, kind, head, tail)`, CREDIT included: the window is between the two ends, and both halves watch
that nobody overdraws it. ERROR and CANCEL events that a machine makes itself (deadline, lost connection,
limits) are passed on the same way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.limits import (
    RPC_ACK_AFTER,
    RPC_ACK_ALONE_AFTER,
    RPC_DETACH_OVER,
    RPC_INITIAL_CALLS,
    RPC_MAX_CALLS,
    RPC_MAX_HEAD,
    RPC_MAX_HELD,
    RPC_MAX_PING,
    RPC_MAX_TAIL,
    RPC_OBJECT_WEIGHT,
)
from lattica_protocols.rpc.calls import BOTH_STREAMS, Call, CallOwner, Waiting
from lattica_protocols.rpc.deadlines import Deadlines, milliseconds_left
from lattica_protocols.rpc.flow import Flow
from lattica_protocols.rpc.frames import (
    ACK,
    BULK,
    CANCEL,
    CLIENT_STREAM,
    CONNECTION_LOST,
    CREDIT,
    DEADLINE_EXCEEDED,
    DETACHED,
    DETACHED_TRAILER,
    END,
    ERROR,
    FINAL,
    GOAWAY,
    HELLO,
    IGNORABLE,
    ITEM,
    KEYWORDS,
    PING,
    REQUEST,
    RESOURCE_EXHAUSTED,
    RESPONSE,
    RESUME,
    SERVER_STREAM,
    VALUE_HEAD,
    Buffer,
    Hello,
    decode_hello_head_untrusted,
    decode_request_head_untrusted,
    encode_error_head,
    encode_hello,
    encode_request,
    encode_request_head,
)
from lattica_protocols.rpc.inbox import FrameReader
from lattica_protocols.rpc.outbox import Outbox
from lattica_protocols.rpc.resume import FEATURE, Resumption, decode_ack_head_untrusted
from lattica_protocols.rpc.tails import DetachedTails

Event: TypeAlias = tuple[int, Call, bytes, Buffer]
"""`(kind, call, head, tail)`"""

_MESSAGES = (RESPONSE, ITEM)
_CONTROLS = (END, ERROR, CANCEL, CREDIT)
_ENDINGS = (RESPONSE, ERROR)
_MISPLACED = {HELLO: "a second HELLO", BULK: "BULK on a control stream", RESUME: "RESUME within a control stream"}


@dataclass(frozen=True, slots=True)
class RpcLimits:
    """What one side of a connection accepts. Reasons: `limits.py`."""

    calls: int = RPC_MAX_CALLS
    """Inbound calls at once. A peer sends up to 64 before it knows the number; below that some are refused."""
    tail: int = RPC_MAX_TAIL
    """Longest tail, bytes."""
    held: int = RPC_MAX_HELD
    """Bytes of messages that the peer can make us hold."""
    detach_over: int | None = RPC_DETACH_OVER
    """Tails longer than this are sent detached; `None`: never, there is no other way to the peer."""


DEFAULT_LIMITS = RpcLimits()


class RpcConnection:
    """One control stream, one side. Every method is synchronous and cheap; none may be called by two threads.

    `initiator`: we opened the stream. `session`: 16 random bytes, from the initiator. `allocate(length)`
    gives the buffer for a tail. A `RemoteProtocolError` out of a `receive_*` method means: reset the stream
    and call `connection_lost`. A `LocalProtocolError` out of a verb means that nothing was sent and the call
    goes on."""

    def __init__(
        self,
        *,
        initiator: bool,
        session: bytes = b"",
        limits: RpcLimits = DEFAULT_LIMITS,
        features: frozenset[str] = frozenset(),
        allocate: Callable[[int], Buffer] = bytearray,
    ) -> None:
        self.limits = limits
        self.peer: Hello | None = None
        """What the other side said in its HELLO."""
        self.peer_calls = RPC_INITIAL_CALLS
        self.going_away = False
        """One side sent GOAWAY: we open no new calls."""
        self.calls_seen = 0
        """Calls so far, both directions: whether the session was used since somebody looked."""
        self.lost = False
        self.suspended = False
        """The runtime's to set: there is no path at the moment, so no call should be opened."""
        self.resumption = Resumption() if FEATURE in features else None
        """What is needed to go on over another path; `None` when one of the sides cannot. See `resume`."""
        self.session_call = Call(0, True, 0, "", b"", None)
        """Stands for the session in events that belong to no call (PING, GOAWAY)."""
        self.outbound_calls = 0
        self.inbound_calls = 0
        self._calls: dict[int, Call] = {}
        self._said_goodbye = False
        self._heard_goodbye = False
        self._parity = 1 if initiator else 0
        self._next_id = 1 if initiator else 2
        self._held = 0
        self._now = 0.0
        self._allocate = allocate
        self._deadlines = Deadlines(self._calls)
        self._tails = DetachedTails()
        self._reader = FrameReader(self._frame, self._open_inline_tail)
        self._events: list[Event] = []
        hello = Hello(session, False, limits.calls, limits.tail, features)
        self.outbox = Outbox(limits.detach_over)
        """What the runtime has not polled yet. A runtime may change its `detach_over` once it knows the peer."""
        self.outbox.add_encoded(encode_hello(hello))

    # -- network -----------------------------------------------------------------------------------
    def receive_data(self, data: Buffer, now: float) -> None:
        """Bytes of the control stream. `data` is not kept and may be used again."""
        self._now = now
        resumption = self.resumption
        if resumption is not None:
            received, nbytes = resumption.received, len(data)
            received.control_bytes += nbytes
            received.owed += nbytes
        self._reader.receive_data(data)

    def expect_tail(self, tail_id: int, length: int) -> Buffer | None:
        """A detached tail is about to arrive: a buffer for it, or None to throw it away as it comes."""
        if not self._tails.wanted(tail_id, length):
            return None
        if length > self.limits.tail:
            raise RemoteProtocolError(f"a tail of {length} bytes is over the limit of {self.limits.tail}")
        if self._tails.early_bytes + length > self.limits.held:
            raise RemoteProtocolError("detached tails without frames hold too many bytes")
        return self._allocate(length)

    def receive_tail(self, tail_id: int, tail: Buffer) -> None:
        """A detached tail is here, from a bulk stream or a file descriptor; it now belongs to the machine."""
        call = self._tails.arrived(tail_id, tail)
        if self.resumption is not None:
            self.resumption.received.add_tail(tail_id, len(tail))
        if call is not None:
            self._deliver_waiting(call)

    def drop_tail(self, tail_id: int) -> None:
        """A tail that `expect_tail` did not want went by."""
        self._tails.dropped(tail_id)
        if self.resumption is not None:
            self.resumption.received.add_tail(tail_id, 0)

    def connection_lost(self, reason: str = "the connection was lost") -> None:
        """Every call ends: ours with ERROR(CONNECTION_LOST), the peer's with CANCEL. Safe to call twice."""
        self.lost = True
        self._tails.clear()
        head = encode_error_head(CONNECTION_LOST, "ConnectionLost", reason)
        for call in list(self._calls.values()):
            call.waiting = None
            self._finish(call)
            if call.outbound:
                self._events.append((ERROR, call, head, b""))
            elif call.announced:
                self._events.append((CANCEL, call, b"", b""))
        self.outbox.clear()
        if self.resumption is not None:
            self.resumption.sent.clear()

    # -- output ------------------------------------------------------------------------------------
    def poll_transmit(self) -> list[Buffer]:
        """Buffers for the control stream, in order. Short output comes as one buffer."""
        resumption, outbox = self.resumption, self.outbox
        if resumption is None:
            return outbox.take_frames()
        owed = resumption.received.owed
        if owed >= RPC_ACK_AFTER and (outbox.unsent or owed >= RPC_ACK_ALONE_AFTER):
            outbox.add(ACK, 0, 0, resumption.received.account().encode())
        frames = outbox.take_frames()
        if frames:
            resumption.sent.add_control(frames)
        return frames

    def poll_detached(self) -> list[tuple[int, int, Sequence[Buffer]]]:
        """`(tail id, length, buffers)` of tails that go another way. After `poll_transmit`, whose frames
        name them."""
        detached = self.outbox.take_detached()
        if detached and self.resumption is not None:
            for tail in detached:
                self.resumption.sent.add_tail(tail)
        return detached

    def poll_events(self) -> list[Event]:
        """All events since the last time."""
        events = self._events
        if events:
            self._events = []
        return events

    def next_event(self) -> Event | None:
        """The next event alone, `None` when there is none."""
        return self._events.pop(0) if self._events else None

    # -- time --------------------------------------------------------------------------------------
    def next_timeout(self) -> float | None:
        """When `handle_timer` wants to be called."""
        return self._deadlines.next_timeout()

    def handle_timer(self, now: float) -> None:
        """End the calls whose deadline has passed, on this side and on the other."""
        for call in self._deadlines.pop_expired(now):
            message = "the deadline of the call has passed"
            head = encode_error_head(DEADLINE_EXCEEDED, "DeadlineExceeded", message)
            if call.outbound:
                self.cancel(call)
                self._events.append((ERROR, call, head, b""))
            else:
                self.outbox.add(ERROR, FINAL, call.id, head)
                self._end_inbound(call)

    # -- verbs of a caller -------------------------------------------------------------------------
    def can_open(self) -> bool:
        """One more call is within what the other side accepts."""
        return self.outbound_calls < self.peer_calls and not (self.going_away or self.lost or self.suspended)

    def open_call(
        self,
        method: str,
        args: bytes,
        tails: Sequence[Buffer] = (),
        *,
        flags: int = 0,
        deadline: float | None = None,
        now: float = 0.0,
        route: bytes = b"",
        owner: CallOwner | None = None,
    ) -> Call:
        """Send a REQUEST. `args` and `tails` come from `tensors.encode_args`; buffers are kept until they are
        sent.

        Raises `LocalProtocolError` when the session is over or a length is over its limit.
        """
        if self.lost or self.going_away:
            raise LocalProtocolError("the session takes no new calls")
        call_id = self._next_id
        while call_id in self._calls or call_id == 0:
            call_id = (call_id + 2) & 0xFFFFFFFF
        try:
            name = method.encode()
        except UnicodeEncodeError:
            raise LocalProtocolError(f"{method!r} is no name for a method: it is not UTF-8") from None
        deadline_ms = 0 if deadline is None else milliseconds_left(deadline, now)
        if tails:
            self.outbox.add(REQUEST, flags, call_id, encode_request_head(name, args, deadline_ms, route), tails)
        else:
            self.outbox.add_encoded(encode_request(flags, call_id, name, args, deadline_ms, route))
        self._next_id = (call_id + 2) & 0xFFFFFFFF
        call = Call(call_id, True, flags, method, route, deadline)
        call.owner = owner
        self._calls[call_id] = call
        self.outbound_calls += 1
        self.calls_seen += 1
        if deadline is not None:
            self._deadlines.add(deadline, call_id)
        return call

    def cancel(self, call: Call) -> None:
        """End our own call: the other side hears of it, no event follows."""
        if not call.over:
            self.outbox.add(CANCEL, FINAL, call.id, b"")
            self._finish(call)

    # -- verbs of a callee -------------------------------------------------------------------------
    def respond(self, call: Call, head: bytes, tails: Sequence[Buffer] = ()) -> None:
        """The result of an inbound call, which is over with it."""
        if not call.over:
            self.outbox.add(RESPONSE, FINAL, call.id, head, tails)
            self._finish(call)

    def fail(self, call: Call, code: int, kind: str, message: str) -> None:
        """End an inbound call with an error."""
        if not call.over:
            self.outbox.add(ERROR, FINAL, call.id, encode_error_head(code, kind, message))
            self._finish(call)

    # -- verbs of both -----------------------------------------------------------------------------
    def send_item(self, call: Call, head: bytes, tails: Sequence[Buffer] = ()) -> None:
        """One message of a stream. Wait for `call.can_send()` first: `LocalProtocolError` without credit."""
        if call.over:
            return
        flow = call.flow
        if flow is None or flow.local_ended or not call.can_send():
            raise LocalProtocolError("no credit to send on this call, or its direction has ended")
        flow.sent(self.outbox.add(ITEM, 0, call.id, head, tails))

    def end(self, call: Call) -> None:
        """No more ITEMs from us. From the callee it ends the call."""
        flow = call.flow
        if call.over or flow is None or flow.local_ended:
            return
        flow.local_ended = True
        self.outbox.add(END, 0 if call.outbound else FINAL, call.id, b"")
        if not call.outbound:
            self._finish(call)

    def grant(self, call: Call, items: int, nbytes: int) -> None:
        """The application consumed ITEMs of `nbytes` (head + tail): the sender may send as many again."""
        flow = call.flow
        if call.over or flow is None or flow.remote_ended:
            return
        credit = flow.consumed(items, nbytes)
        if credit is not None:
            self.outbox.add(CREDIT, 0, call.id, credit)
            self._release(call, flow, credit)

    def ping(self, payload: bytes = b"") -> None:
        """Ask for a sign of life; the answer is a PING event with the same head."""
        self.outbox.add(PING, 0, 0, payload[:RPC_MAX_PING])

    def go_away(self) -> None:
        """Ask for no new calls. Those that run finish. A second time does nothing."""
        if not self._said_goodbye:
            self._said_goodbye = True
            self.going_away = True
            self.outbox.add(GOAWAY, 0, 0, b"")

    def drained(self) -> bool:
        """Both sides sent GOAWAY and no call runs: the stream may end."""
        return self._said_goodbye and self._heard_goodbye and not self._calls

    # -- forwarding --------------------------------------------------------------------------------
    def forward(
        self,
        inbound: Call,
        args: bytes,
        tail: Buffer,
        *,
        route: bytes = b"",
        now: float,
        owner: CallOwner | None = None,
    ) -> Call:
        """Open on this connection the second half of a call that came in on another one. Both are relayed
        from now on.

        `args` and `tail` are those of the REQUEST event, untouched. Errors as in `open_call`.
        """
        call = self.open_call(
            inbound.method, args, (tail,) if len(tail) else (),
            flags=inbound.flags, deadline=inbound.deadline, now=now, route=route, owner=owner,
        )  # fmt: skip
        call.relayed = inbound.relayed = True
        return call

    def relay(self, call: Call, kind: int, head: bytes, tail: Buffer = b"") -> None:
        """Pass on a frame that came as an event of the other half. `call` is the half on this connection."""
        if call.over:
            return
        if kind == CREDIT and call.flow is not None:
            self._release(call, call.flow, head)
        final = kind in (RESPONSE, ERROR, CANCEL) or (kind == END and not call.outbound)
        self.outbox.add(kind, FINAL if final else 0, call.id, head, (tail,) if len(tail) else ())
        if final:
            self._finish(call)

    # -- frames that arrive ------------------------------------------------------------------------
    def _frame(self, kind: int, flags: int, call_id: int, head: bytes, tail: Buffer | None, length: int) -> None:
        call = self._calls.get(call_id)
        if kind == RESPONSE and call is not None and not flags & DETACHED and call.waiting is None:
            if not call.outbound or call.flags & SERVER_STREAM or tail is None or self.peer is None:
                self._refuse_response(call, tail, length)
                return
            call.over = True  # the hot path of `_finish`
            del self._calls[call_id]
            self.outbound_calls -= 1
            self._held -= call.held
            self._events.append((RESPONSE, call, head, tail))
            return
        if self.peer is None:
            self._hello(kind, head)
            return
        tail_id = -1
        if flags & DETACHED:
            tail_id, length = self._detached_trailer(kind, tail)
            tail = None
        if kind == REQUEST:
            self._request(flags, call_id, call, head, tail, tail_id, length)
        elif kind in _MESSAGES:
            if call is None:
                self._stray(tail_id, length)
            else:
                self._message(kind, call, head, tail, tail_id, length)
        elif length:
            if not flags & IGNORABLE or kind <= GOAWAY:
                raise RemoteProtocolError(f"frame of kind {kind} has a tail")
        elif kind in _CONTROLS:
            if call is not None:
                self._control(kind, call, head)
        else:
            self._session_frame(kind, flags, head)

    def _hello(self, kind: int, head: bytes) -> None:
        if kind != HELLO:
            raise RemoteProtocolError(f"the first frame is of kind {kind}, not HELLO")
        hello = decode_hello_head_untrusted(head)
        if hello.bulk:
            raise RemoteProtocolError("a bulk stream's hello on a control stream")
        if FEATURE not in hello.features:
            self.resumption = None
        self.peer = hello
        self.peer_calls, self.outbox.peer_tail = hello.calls, hello.tail
        self._events.append((HELLO, self.session_call, head, b""))

    def _session_frame(self, kind: int, flags: int, head: bytes) -> None:
        if kind == PING:
            if len(head) > RPC_MAX_PING:
                raise RemoteProtocolError(f"a ping has at most {RPC_MAX_PING} bytes")
            if flags & FINAL:
                self._events.append((PING, self.session_call, head, b""))
            else:
                self.outbox.add(PING, FINAL, 0, head)
        elif kind == GOAWAY:
            self.going_away = self._heard_goodbye = True
            self._events.append((GOAWAY, self.session_call, head, b""))
        elif kind == ACK:
            if self.resumption is None:
                raise RemoteProtocolError("an ACK although the sessions cannot be resumed")
            self.resumption.sent.acknowledge(decode_ack_head_untrusted(head))
            self._events.append((ACK, self.session_call, head, b""))
        elif kind in _MISPLACED:
            raise RemoteProtocolError(_MISPLACED[kind])
        elif not flags & IGNORABLE:
            raise RemoteProtocolError(f"unknown frame kind {kind}")

    def _request(
        self,
        flags: int,
        call_id: int,
        call: Call | None,
        head: bytes,
        tail: Buffer | None,
        tail_id: int,
        length: int,
    ) -> None:
        if call is not None or (call_id & 1) == self._parity or call_id == 0:
            raise RemoteProtocolError(f"request with call id {call_id}, which is in use or not the caller's")
        deadline_ms, route, name, args = decode_request_head_untrusted(head)
        try:
            method = str(name, "utf-8")
        except UnicodeDecodeError:
            raise RemoteProtocolError("request head: the method is not UTF-8") from None
        weight = length + RPC_OBJECT_WEIGHT * len(args)
        if length and args[:2] == VALUE_HEAD:  # the arguments' msgpack is in the tail
            weight = RPC_OBJECT_WEIGHT * length
        refusal = self._refusal(tail, tail_id, length, weight)
        if refusal is not None:
            if tail_id >= 0:
                self._tails.discard(tail_id, length)
            self.outbox.add(ERROR, FINAL, call_id, encode_error_head(RESOURCE_EXHAUSTED, "ResourceExhausted", refusal))
            return
        deadline = self._now + deadline_ms / 1000 if deadline_ms else None
        call = Call(call_id, False, flags & (BOTH_STREAMS | KEYWORDS), method, route, deadline)
        call.held = weight
        self._held += weight
        self._calls[call_id] = call
        self.inbound_calls += 1
        self.calls_seen += 1
        if deadline is not None:
            self._deadlines.add(deadline, call_id)
        if tail_id >= 0:
            self._wait(call, REQUEST, args, None, tail_id, length)
        else:
            call.announced = True
            self._events.append((REQUEST, call, args, tail if tail is not None else b""))

    def _refusal(self, tail: Buffer | None, tail_id: int, length: int, weight: int) -> str | None:
        """Why a message is not taken, although it breaks no rule."""
        if self.inbound_calls >= self.limits.calls:
            return f"{self.limits.calls} calls are running"
        if length > self.limits.tail:
            return f"the message has {length} bytes, the limit is {self.limits.tail}"
        if self._held + weight > self.limits.held or (tail is None and tail_id < 0):
            return f"messages of {self._held} bytes are waiting"
        return None

    def _message(self, kind: int, call: Call, head: bytes, tail: Buffer | None, tail_id: int, length: int) -> None:
        """RESPONSE or ITEM, with a detached tail or behind one, or an ITEM in the ordinary way."""
        flow = call.flow
        if kind == RESPONSE:
            if not call.outbound or call.flags & SERVER_STREAM:
                self._refuse_response(call, tail, length)
        elif flow is None or not call.flags & (SERVER_STREAM if call.outbound else CLIENT_STREAM):
            raise RemoteProtocolError("an item on a call that does not stream this way")
        else:
            nbytes = len(head) + length
            flow.take_item_untrusted(nbytes)
            call.held += nbytes
            self._held += nbytes
        if length > self.limits.tail or self._held > self.limits.held or (tail is None and tail_id < 0):
            if tail_id >= 0:
                self._tails.discard(tail_id, length)
            self._abort(call, f"a message of {length} bytes is over the limit")
        elif tail_id >= 0 or call.waiting is not None:
            self._wait(call, kind, head, tail, tail_id, length)
        else:
            self._deliver(kind, call, head, tail if tail is not None else b"")

    def _control(self, kind: int, call: Call, head: bytes) -> None:
        """END, ERROR, CANCEL or CREDIT of a call that runs."""
        flow = call.flow
        if kind == CREDIT:
            if flow is None:
                raise RemoteProtocolError("a CREDIT for a call that does not stream")
            flow.take_credit_untrusted(head, call.relayed)
            self._events.append((CREDIT, call, head, b""))
        elif kind == CANCEL:
            if call.outbound:
                raise RemoteProtocolError("the callee sent CANCEL")
            self._end_inbound(call)
        else:
            if kind == ERROR:
                if not call.outbound:
                    raise RemoteProtocolError("the caller sent ERROR")
            else:
                stream = SERVER_STREAM if call.outbound else CLIENT_STREAM
                if flow is None or flow.remote_ended or not call.flags & stream:
                    raise RemoteProtocolError("an END on a call that does not stream this way, or a second one")
                flow.remote_ended = True
            if call.waiting is not None:
                self._wait(call, kind, head, b"", -1, 0)
            else:
                self._deliver(kind, call, head, b"")

    def _stray(self, tail_id: int, length: int) -> None:
        """A frame for a call that is over: it crossed with the end."""
        if tail_id >= 0:
            self._tails.discard(tail_id, length)

    def _refuse_response(self, call: Call, tail: Buffer | None, length: int) -> None:
        if self.peer is None:
            raise RemoteProtocolError("the first frame is not HELLO")
        if not call.outbound or call.flags & SERVER_STREAM:
            raise RemoteProtocolError("a RESPONSE from the caller, or on a call that streams")
        if tail is None:
            self._abort(call, f"a result of {length} bytes is over the limit of {self.limits.tail}")

    # -- delivery ----------------------------------------------------------------------------------
    def _deliver(self, kind: int, call: Call, head: bytes, tail: Buffer) -> None:
        if kind == REQUEST:
            call.announced = True
        elif kind in _ENDINGS or (kind == END and call.outbound):
            self._finish(call)
        self._events.append((kind, call, head, tail))

    def _wait(self, call: Call, kind: int, head: bytes, tail: Buffer | None, tail_id: int, length: int) -> None:
        """Put a frame in its call's queue: its tail, or that of one before it, is still to come."""
        if call.waiting is None:
            call.waiting = deque()
        frame = Waiting(kind, head, tail, tail_id, length)
        call.waiting.append(frame)
        if tail_id >= 0:
            self._tails.expect(call, frame)
            self._deliver_waiting(call)

    def _deliver_waiting(self, call: Call) -> None:
        waiting = call.waiting
        while waiting and (tail := waiting[0].tail) is not None:
            frame = waiting.popleft()
            if not waiting:
                call.waiting = None
            self._deliver(frame.kind, call, frame.head, tail)

    def _abort(self, call: Call, reason: str) -> None:
        """End a call on both sides because a message was over a limit of ours."""
        head = encode_error_head(RESOURCE_EXHAUSTED, "ResourceExhausted", reason)
        if call.outbound:
            self.cancel(call)
            self._events.append((ERROR, call, head, b""))
        else:
            self.outbox.add(ERROR, FINAL, call.id, head)
            self._end_inbound(call)

    def _end_inbound(self, call: Call) -> None:
        """An inbound call ends before its handler is done."""
        self._finish(call)
        if call.announced:
            self._events.append((CANCEL, call, b"", b""))

    def _finish(self, call: Call) -> None:
        if call.over:
            return
        call.over = True
        del self._calls[call.id]
        if call.outbound:
            self.outbound_calls -= 1
        else:
            self.inbound_calls -= 1
        self._held -= call.held
        call.held = 0
        if call.waiting is not None:
            waiting, call.waiting = call.waiting, None
            for frame in waiting:
                if frame.tail is None:
                    self._tails.discard(frame.tail_id, frame.length)

    def _release(self, call: Call, flow: Flow, credit: bytes) -> None:
        """A CREDIT leaves: what it grants again is no longer held here."""
        freed = min(flow.granted(credit), call.held)
        call.held -= freed
        self._held -= freed

    # -- bytes -------------------------------------------------------------------------------------
    def _open_inline_tail(self, kind: int, call_id: int, length: int) -> Buffer | None:
        """Where a long tail on the control stream goes: nowhere when it will be refused anyway."""
        if not REQUEST <= kind <= ITEM:
            if length > RPC_MAX_HEAD:
                raise RemoteProtocolError(f"frame of kind {kind} has a tail of {length} bytes")
            return None
        if length > self.limits.tail or self._held + length > self.limits.held:
            return None
        call = self._calls.get(call_id)
        if kind in _MESSAGES and call is not None:
            return self._allocate(length)
        if kind == REQUEST and call is None and self.inbound_calls < self.limits.calls:
            return self._allocate(length)
        return None

    def _detached_trailer(self, kind: int, trailer: Buffer | None) -> tuple[int, int]:
        if trailer is None or len(trailer) != DETACHED_TRAILER.size or kind not in (REQUEST, RESPONSE, ITEM):
            raise RemoteProtocolError(f"frame of kind {kind} is not a detached one")
        tail_id, length = DETACHED_TRAILER.unpack(trailer)
        return tail_id, length
