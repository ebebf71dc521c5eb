"""Two machines joined without I/O: every kind of call, limits, deadlines, detached tails and forwarding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.rpc import frames
from lattica_protocols.rpc.bulk import BulkReader
from lattica_protocols.rpc.calls import Call
from lattica_protocols.rpc.connection import DEFAULT_LIMITS, Event, RpcConnection
from lattica_protocols.rpc.frames import (
    CANCEL,
    CLIENT_STREAM,
    CREDIT,
    END,
    ERROR,
    FINAL,
    GOAWAY,
    HELLO,
    ITEM,
    PING,
    REQUEST,
    RESPONSE,
    SERVER_STREAM,
)

Cut = Callable[[bytes], list[bytes]]


class Side:
    """A machine, its clock and the events it has had."""

    def __init__(self, **arguments: Any) -> None:
        limits = replace(DEFAULT_LIMITS, **arguments.pop("limits", {}))
        self.machine = RpcConnection(limits=limits, **arguments)
        self.bulk = BulkReader(self.machine)
        self.now = 0.0
        self.held: list[tuple[int, int, bytes]] | None = None
        """With a list: detached tails wait here."""

    def events(self) -> list[Event]:
        return [event for event in self.machine.poll_events() if event[0] != HELLO]

    def event(self) -> Event:
        (only,) = self.events()
        return only

    def kinds(self) -> list[int]:
        return [event[0] for event in self.events()]


def pair(a: dict[str, Any] | None = None, b: dict[str, Any] | None = None) -> tuple[Side, Side]:
    caller = Side(initiator=True, session=b"s" * 16, limits=a or {})
    callee = Side(initiator=False, limits=b or {})
    pump(caller, callee)
    return caller, callee


def move(source: Side, target: Side, cut: Cut = lambda data: [data]) -> None:
    for chunk in cut(b"".join(source.machine.poll_transmit())):
        target.machine.receive_data(chunk, target.now)
    for tail_id, length, buffers in source.machine.poll_detached():
        data = b"".join(buffers)
        assert len(data) == length
        if source.held is not None:
            source.held.append((tail_id, length, data))
        else:
            send_tail(target, tail_id, data, cut)


def send_tail(target: Side, tail_id: int, data: bytes, cut: Cut = lambda data: [data]) -> None:
    for chunk in cut(frames.encode_bulk_header(tail_id, len(data)) + data):
        target.bulk.receive_data(chunk)


def pump(a: Side, b: Side) -> None:
    for _ in range(3):
        move(a, b)
        move(b, a)


def request(a: Side, b: Side, **arguments: Any) -> tuple[Call, Call]:
    """A call, and the same call on the other side."""
    call = a.machine.open_call("test.method", b"\x90", now=a.now, **arguments)
    move(a, b)
    kind, inbound, head, _ = b.event()
    assert (kind, head) == (REQUEST, b"\x90")
    return call, inbound


def raw(side: Side, kind: int, flags: int = 0, call_id: int = 0, head: bytes = b"", tail: bytes = b"") -> None:
    side.machine.receive_data(frames.encode_frame(kind, flags, call_id, head, len(tail)) + tail, side.now)


def error_code(event: Event) -> int:
    assert event[0] == ERROR
    return frames.decode_error_head_untrusted(event[2])[0]


def prelude(method: bytes = b"a.b", args: bytes = b"\x90") -> bytes:
    return frames.encode_request_head(method, args, 0)


# -- unary ----------------------------------------------------------------------------------------------
def test_unary_call_and_answer() -> None:
    a, b = pair()
    call, inbound = request(a, b, route=b"route", deadline=2.5)
    assert (inbound.id, inbound.method, inbound.route, inbound.deadline) == (1, "test.method", b"route", 2.5)
    b.machine.respond(inbound, b"result", [b"tail", b"more"])
    move(b, a)
    assert a.event() == (RESPONSE, call, b"result", b"tailmore")
    assert call.over
    assert inbound.over
    assert a.machine.outbound_calls == b.machine.inbound_calls == 0


def test_both_sides_call_on_one_stream_and_ids_never_meet() -> None:
    a, b = pair()
    ours = [a.machine.open_call("a.b", b"\x90").id for _ in range(3)]
    theirs = [b.machine.open_call("a.b", b"\x90").id for _ in range(3)]
    assert (ours, theirs) == ([1, 3, 5], [2, 4, 6])
    pump(a, b)
    assert a.kinds() == b.kinds() == [REQUEST] * 3


def test_call_ids_wrap_and_leave_out_those_in_use() -> None:
    a, b = pair()
    first = a.machine.open_call("a.b", b"\x90")
    a.machine._next_id = 0xFFFFFFFF
    assert [a.machine.open_call("a.b", b"\x90").id for _ in range(2)] == [0xFFFFFFFF, 3]
    assert first.id == 1
    move(a, b)
    assert len(b.events()) == 3


@pytest.mark.parametrize("size", [1, 2, 3, 7, 12, 13, 100, 5000])
def test_any_chunking_gives_the_same(size: int) -> None:
    a, b = pair({"detach_over": None})
    tail = bytes(range(256)) * 200
    for _ in range(3):
        a.machine.open_call("a.b", b"args", [tail])
        a.machine.open_call("a.b", b"", [b"x"])
        a.machine.open_call("a.b", b"small")
    move(a, b, lambda data: [data[i : i + size] for i in range(0, len(data), size)])
    got = [(head, bytes(tail)) for _, _, head, tail in b.events()]
    assert got == [(b"args", tail), (b"", b"x"), (b"small", b"")] * 3


# -- streams ------------------------------------------------------------------------------------------------
def test_server_stream() -> None:
    a, b = pair()
    call, inbound = request(a, b, flags=SERVER_STREAM)
    b.machine.send_item(inbound, b"one")
    b.machine.send_item(inbound, b"two", [b"tail"])
    b.machine.end(inbound)
    move(b, a)
    events = a.events()
    assert [(kind, head, bytes(tail)) for kind, _, head, tail in events] == [
        (ITEM, b"one", b""),
        (ITEM, b"two", b"tail"),
        (END, b"", b""),
    ]
    assert call.over


def test_client_stream() -> None:
    a, b = pair()
    call, inbound = request(a, b, flags=CLIENT_STREAM)
    a.machine.send_item(call, b"one")
    a.machine.end(call)
    move(a, b)
    assert b.kinds() == [ITEM, END]
    b.machine.respond(inbound, b"sum")
    move(b, a)
    assert a.event()[:3] == (RESPONSE, call, b"sum")


def test_credit_bounds_a_stream_by_items_and_comes_back() -> None:
    a, b = pair()
    call, inbound = request(a, b, flags=CLIENT_STREAM)
    sent = 0
    while call.can_send():
        a.machine.send_item(call, b"x")
        sent += 1
    assert sent == 64
    with pytest.raises(LocalProtocolError, match="credit"):
        a.machine.send_item(call, b"x")
    move(a, b)
    assert len(b.events()) == 64
    b.machine.grant(inbound, 31, 31)
    move(b, a)
    assert a.events() == []  # grants are collected
    b.machine.grant(inbound, 1, 1)
    move(b, a)
    assert a.kinds() == [CREDIT]
    assert call.can_send()


def test_credit_bounds_a_stream_by_bytes() -> None:
    a, b = pair({"detach_over": None})
    call, inbound = request(a, b, flags=CLIENT_STREAM)
    a.machine.send_item(call, b"x", [bytes(5 << 20)])
    assert not call.can_send()
    move(a, b)
    assert b.kinds() == [ITEM]
    b.machine.grant(inbound, 1, (5 << 20) + 1)
    move(b, a)
    assert call.can_send()


def test_sending_without_credit_breaks_the_protocol() -> None:
    a, b = pair()
    _, inbound = request(a, b, flags=CLIENT_STREAM)
    for _ in range(64):
        raw(b, ITEM, 0, inbound.id, b"x")
    with pytest.raises(RemoteProtocolError, match="credit"):
        raw(b, ITEM, 0, inbound.id, b"x")


# -- ends ---------------------------------------------------------------------------------------------------
def test_cancel_reaches_the_callee_and_late_frames_are_ignored() -> None:
    a, b = pair()
    call, inbound = request(a, b, flags=SERVER_STREAM)
    b.machine.send_item(inbound, b"crossing")
    a.machine.cancel(call)
    pump(a, b)
    assert a.events() == []
    assert b.event()[:2] == (CANCEL, inbound)
    b.machine.send_item(inbound, b"late")
    b.machine.end(inbound)
    assert b.machine.poll_transmit() == []


def test_deadline_ends_the_call_on_each_side_by_itself() -> None:
    a, b = pair()
    a.now, b.now = 100.0, 7000.0  # clocks need not agree
    call, inbound = request(a, b, deadline=101.5)
    assert a.machine.next_timeout() == 101.5
    assert b.machine.next_timeout() == 7001.5
    a.machine.handle_timer(101.4)
    assert a.events() == []
    a.machine.handle_timer(101.5)
    assert error_code(a.event()) == frames.DEADLINE_EXCEEDED
    b.machine.handle_timer(7001.5)
    assert b.event()[:2] == (CANCEL, inbound)
    pump(a, b)
    assert a.events() == b.events() == []
    assert call.over
    assert a.machine.next_timeout() is None


def test_deadlines_of_finished_calls_do_not_pile_up() -> None:
    a, b = pair()
    for n in range(5000):
        call = a.machine.open_call("a.b", b"\x90", deadline=n + 60.0, now=float(n))
        move(a, b)
        b.machine.respond(b.event()[1], b"\xc0")
        move(b, a)
        assert a.event()[1] is call
    assert len(a.machine._deadlines._heap) < 600
    assert len(b.machine._deadlines._heap) < 600


def test_lost_connection_ends_every_call() -> None:
    a, b = pair()
    call, inbound = request(a, b)
    for side in (a, b):
        side.machine.connection_lost("gone")
        side.machine.connection_lost("gone")
    assert error_code(a.event()) == frames.CONNECTION_LOST
    assert b.event()[:2] == (CANCEL, inbound)
    assert call.over
    with pytest.raises(LocalProtocolError):
        a.machine.open_call("a.b", b"")


def test_ping_and_goaway() -> None:
    a, b = pair()
    a.machine.ping(b"12345678")
    pump(a, b)
    assert a.event() == (PING, a.machine.session_call, b"12345678", b"")
    call, inbound = request(a, b)
    b.machine.go_away()
    move(b, a)
    assert a.kinds() == [GOAWAY]
    with pytest.raises(LocalProtocolError):
        a.machine.open_call("a.b", b"")
    b.machine.respond(inbound, b"done")
    move(b, a)
    assert a.event()[:2] == (RESPONSE, call)


# -- limits -------------------------------------------------------------------------------------------------
def test_a_call_over_the_limit_is_refused_alone() -> None:
    a, b = pair(b={"calls": 2})
    for _ in range(2):
        request(a, b)
    assert not a.machine.can_open()
    call = a.machine.open_call("a.b", b"\x90")
    pump(a, b)
    event = a.event()
    assert event[1] is call
    assert error_code(event) == frames.RESOURCE_EXHAUSTED
    assert b.events() == []


@pytest.mark.parametrize("detach_over", [None, 1000])
def test_a_tail_over_the_limit_is_thrown_away_and_answered(detach_over: int | None) -> None:
    a, b = pair({"detach_over": detach_over}, {"tail": 50_000})
    a.machine.outbox.peer_tail = 1 << 30  # as if we had not been told
    call = a.machine.open_call("a.b", b"\x90", [bytes(60_000)])
    other = a.machine.open_call("a.b", b"\x90", [bytes(40_000)])
    pump(a, b)
    event = a.event()
    assert (event[1], error_code(event)) == (call, frames.RESOURCE_EXHAUSTED)
    assert b.event()[1].id == other.id


@pytest.mark.parametrize("detach_over", [None, 1000])
def test_a_result_over_the_limit_fails_our_call(detach_over: int | None) -> None:
    a, b = pair({"tail": 50_000}, {"detach_over": detach_over})
    b.machine.outbox.peer_tail = 1 << 30
    call, inbound = request(a, b)
    b.machine.respond(inbound, b"x", [bytes(60_000)])
    pump(a, b)
    event = a.event()
    assert (event[1], error_code(event)) == (call, frames.RESOURCE_EXHAUSTED)
    request(a, b)


def test_bytes_held_for_calls_are_bounded_and_come_free() -> None:
    a, b = pair({"detach_over": None}, {"held": 100_000})
    first = a.machine.open_call("a.b", b"\x90", [bytes(60_000)])
    second = a.machine.open_call("a.b", b"\x90", [bytes(60_000)])
    pump(a, b)
    assert error_code(a.event()) == frames.RESOURCE_EXHAUSTED
    assert second.over
    b.machine.respond(b.event()[1], b"\xc0")
    pump(a, b)
    assert a.event()[1] is first
    a.machine.open_call("a.b", b"\x90", [bytes(60_000)])
    pump(a, b)
    assert b.kinds() == [REQUEST]
    assert b.machine._held == 60_064


def test_our_own_limits_are_errors_of_ours() -> None:
    a, b = pair(b={"tail": 1000})
    with pytest.raises(LocalProtocolError, match="limit"):
        a.machine.open_call("a.b", b"\x90", [bytes(1001)])
    with pytest.raises(LocalProtocolError, match="head"):
        a.machine.open_call("a.b", bytes(65_530))
    with pytest.raises(LocalProtocolError, match="has 1 to 255 bytes, not 256"):
        a.machine.open_call("m" * 256, b"")
    with pytest.raises(LocalProtocolError, match="a route has at most 255 bytes"):
        a.machine.open_call("a.b", b"", route=bytes(256))
    assert a.machine.poll_transmit() == []
    assert a.machine.outbound_calls == 0
    request(a, b)


# -- detached tails -------------------------------------------------------------------------------------------
def test_long_tails_leave_the_control_stream() -> None:
    a, b = pair({"detach_over": 100})
    call = a.machine.open_call("a.b", b"\x90", [b"y" * 50, b"z" * 51])
    control = b"".join(a.machine.poll_transmit())
    assert len(control) < 60
    ((tail_id, length, buffers),) = a.machine.poll_detached()
    b.machine.receive_data(control, 0.0)
    assert b.events() == []
    send_tail(b, tail_id, b"".join(buffers), lambda data: [data[:5], data[5:20], data[20:]])
    kind, inbound, _, tail = b.event()
    assert (kind, inbound.id, bytes(tail), length) == (REQUEST, call.id, b"y" * 50 + b"z" * 51, 101)


def test_tails_may_come_before_their_frames_and_items_keep_their_order() -> None:
    a, b = pair({"detach_over": 10})
    call, _ = request(a, b, flags=CLIENT_STREAM)
    a.held = []
    for text in (b"0" * 20, b"1", b"2" * 20, b"3", b"4" * 20):
        a.machine.send_item(call, b"i", [text])
    a.machine.end(call)
    control = b"".join(a.machine.poll_transmit())
    tails = [(tail_id, b"".join(buffers)) for tail_id, _, buffers in a.machine.poll_detached()]
    send_tail(b, *tails[2])
    b.machine.receive_data(control, 0.0)
    assert b.events() == []
    send_tail(b, *tails[1])
    assert b.events() == []
    send_tail(b, *tails[0])
    assert [bytes(tail[:1]) for _, _, _, tail in b.events()] == [b"0", b"1", b"2", b"3", b"4", b""]


def test_tails_of_calls_that_are_over_are_thrown_away() -> None:
    a, b = pair({"detach_over": 10})
    a.held = []
    call = a.machine.open_call("a.b", b"\x90", [bytes(100)])
    move(a, b)
    a.machine.cancel(call)
    move(a, b)
    assert b.events() == []  # it was never announced
    assert b.machine.expect_tail(a.held[0][0], 100) is None
    send_tail(b, a.held[0][0], a.held[0][2])
    assert b.machine._held == 0
    assert b.machine._tails._unwanted == {}


@pytest.mark.parametrize(
    ("tail_id", "length", "what"), [(0, 99, "announced were"), (7, 1 << 31, "limit"), (9, 60_001, "hold")]
)
def test_tails_that_lie(tail_id: int, length: int, what: str) -> None:
    a, b = pair({"detach_over": 10}, {"held": 60_000})
    a.held = []
    a.machine.open_call("a.b", b"\x90", [bytes(100)])
    move(a, b)
    with pytest.raises(RemoteProtocolError, match=what):
        b.machine.expect_tail(tail_id, length)


def test_early_tails_are_bounded() -> None:
    _, b = pair()
    for tail_id in range(256):
        send_tail(b, tail_id, b"x")
    with pytest.raises(RemoteProtocolError, match="twice"):
        send_tail(b, 5, b"x")
    with pytest.raises(RemoteProtocolError, match="too many"):
        b.machine.receive_tail(256, b"x")


# -- rules ------------------------------------------------------------------------------------------------
def test_the_first_frame_is_hello() -> None:
    side = Side(initiator=False)
    with pytest.raises(RemoteProtocolError, match="HELLO"):
        raw(side, REQUEST, 0, 1, prelude())


@pytest.mark.parametrize(
    ("kind", "flags", "call_id", "head", "what"),
    [
        (REQUEST, 0, 2, prelude(), "not the caller"),
        (REQUEST, 0, 0, prelude(), "not the caller"),
        (REQUEST, 0, 1, prelude(), "in use"),
        (REQUEST, 0, 3, b"\0\0\0\0\0\0", "cut short"),
        (REQUEST, 0, 3, b"\0\0\0\0\0\0a", "do not fit"),
        (REQUEST, 0, 3, b"\0\0\0\0\0\x05a", "do not fit"),
        (REQUEST, 0, 3, prelude(b"\xff\xfe"), "UTF-8"),
        (RESPONSE, FINAL, 1, b"", "from the caller"),
        (ERROR, FINAL, 1, b"", "from the caller|caller sent"),
        (ITEM, 0, 1, b"", "does not stream"),
        (END, 0, 1, b"", "does not stream"),
        (CREDIT, 0, 1, bytes(8), "does not stream"),
        (frames.BULK, 0, 1, b"", "BULK"),
        (HELLO, 0, 0, b"", "HELLO"),
        (PING, 0, 0, bytes(65), "ping"),
        (77, 0, 0, b"", "unknown"),
        (REQUEST, frames.DETACHED, 3, prelude(), "detached"),
    ],
)
def test_frames_that_break_a_rule(kind: int, flags: int, call_id: int, head: bytes, what: str) -> None:
    a, b = pair()
    request(a, b)
    with pytest.raises(RemoteProtocolError, match=what):
        raw(b, kind, flags, call_id, head)


def test_unknown_frames_marked_ignorable_are_skipped() -> None:
    a, b = pair()
    raw(b, 77, frames.IGNORABLE, 9, b"future", b"tail" * 100)
    raw(b, 78, frames.IGNORABLE, 9, b"future", bytes(65_535))
    request(a, b)
    with pytest.raises(RemoteProtocolError, match="tail"):
        b.machine.receive_data(frames.encode_frame(78, frames.IGNORABLE, 9, b"", 65_536), 0.0)


def test_a_head_longer_than_its_body() -> None:
    _, b = pair()
    with pytest.raises(RemoteProtocolError, match="longer"):
        b.machine.receive_data(frames.HEADER.pack(4, PING, 0, 5, 0) + bytes(5), 0.0)


# -- forwarding ---------------------------------------------------------------------------------------------
class Chain:
    """caller -> [left | right] -> callee: the two in the middle are a forwarder."""

    def __init__(self, right: dict[str, Any] | None = None) -> None:
        self.caller, self.left = pair()
        self.right, self.callee = pair(right)
        self.halves: dict[Call, tuple[Side, Call]] = {}

    def run(self) -> None:
        for _ in range(6):
            move(self.caller, self.left)
            self._relay(self.left)
            move(self.right, self.callee)
            move(self.callee, self.right)
            self._relay(self.right)
            move(self.left, self.caller)

    def _relay(self, side: Side) -> None:
        for kind, call, head, tail in side.events():
            if kind == REQUEST:
                half = self.right.machine.forward(call, head, tail, route=b"origin", now=0.0)
                self.halves[call] = (self.right, half)
                self.halves[half] = (self.left, call)
            else:
                other, half = self.halves[call]
                other.machine.relay(half, kind, head, tail)


@pytest.mark.parametrize("size", [0, 10, 100_000])
def test_a_forwarded_call(size: int) -> None:
    chain = Chain()
    call = chain.caller.machine.open_call("a.b", b"args", [bytes(size)] if size else [], flags=SERVER_STREAM)
    chain.run()
    _, inbound, head, tail = chain.callee.event()
    assert (inbound.route, inbound.method, inbound.flags, head) == (b"origin", "a.b", SERVER_STREAM, b"args")
    assert bytes(tail) == bytes(size)
    sent = received = 0
    while sent < 500:
        while inbound.can_send() and sent < 500:
            chain.callee.machine.send_item(inbound, b"%d" % sent)
            sent += 1
        chain.run()
        assert sent - received <= 64
        for kind, _, head, _ in chain.caller.events():
            assert kind == ITEM
            assert head == b"%d" % received
            received += 1
            chain.caller.machine.grant(call, 1, len(head))
        chain.run()
        assert set(chain.callee.kinds()) <= {CREDIT}
    chain.callee.machine.end(inbound)
    chain.run()
    assert chain.caller.kinds() == [END]
    for side in (chain.caller, chain.left, chain.right, chain.callee):
        assert side.machine._calls == {}
        assert side.machine._held == 0


def test_a_forwarded_call_that_is_cancelled_or_fails() -> None:
    chain = Chain()
    call = chain.caller.machine.open_call("a.b", b"args", deadline=3.0)
    chain.run()
    inbound = chain.callee.event()[1]
    assert inbound.deadline == pytest.approx(3.0)
    chain.caller.machine.cancel(call)
    chain.run()
    assert chain.callee.event()[:2] == (CANCEL, inbound)

    call = chain.caller.machine.open_call("a.b", b"args")
    chain.run()
    chain.callee.machine.fail(chain.callee.event()[1], frames.HANDLER_RAISED, "ValueError", "no")
    chain.run()
    assert frames.decode_error_head_untrusted(chain.caller.event()[2]) == (6, "ValueError", "no")

    call = chain.caller.machine.open_call("a.b", b"args")
    chain.run()
    chain.callee.events()
    chain.right.machine.connection_lost("worker died")
    chain._relay(chain.right)
    move(chain.left, chain.caller)
    assert error_code(chain.caller.event()) == frames.CONNECTION_LOST
    assert call.over


def test_a_forwarder_stops_a_sender_without_credit() -> None:
    chain = Chain()
    call = chain.caller.machine.open_call("a.b", b"args", flags=CLIENT_STREAM)
    chain.run()
    for _ in range(64):
        raw(chain.left, ITEM, 0, call.id, b"x")
    with pytest.raises(RemoteProtocolError, match="credit"):
        raw(chain.left, ITEM, 0, call.id, b"x")
