"""A session whose path is lost at any byte: nothing lost, duplicated or reordered; and the parsers of its frames."""

from __future__ import annotations

from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import RPC_ACK_ALONE_AFTER, RPC_MAX_UNACKED_TAILS
from lattica_protocols.rpc import frames, resume
from lattica_protocols.rpc.bulk import BulkReader
from lattica_protocols.rpc.calls import Call
from lattica_protocols.rpc.connection import RpcConnection, RpcLimits
from lattica_protocols.rpc.frames import CLIENT_STREAM, SERVER_STREAM

BULK_STREAMS = 2


class Side:
    """A machine, and what it has on the way over one path: bytes of the control stream and of bulk streams."""

    def __init__(self, *, initiator: bool) -> None:
        self.machine = RpcConnection(
            initiator=initiator,
            session=b"s" * 16 if initiator else b"",
            limits=RpcLimits(detach_over=300),
            features=frozenset({resume.FEATURE}),
        )
        self.control = bytearray()
        self.bulk: list[bytearray] = [bytearray() for _ in range(BULK_STREAMS)]
        self.readers: list[BulkReader] = []
        self.received: list[bytes] = []
        self.call: Call | None = None
        self.has_path = True
        self.new_readers()

    def new_readers(self) -> None:
        self.readers = [BulkReader(self.machine) for _ in range(BULK_STREAMS)]

    def take_output(self) -> None:
        for buffer in self.machine.poll_transmit():
            if self.has_path:
                self.control += buffer
        for tail in self.machine.poll_detached():
            if self.has_path:
                self.send_tail(tail)

    def send_tail(self, tail: resume.Tail) -> None:
        tail_id, length, buffers = tail
        self.bulk[tail_id % BULK_STREAMS] += frames.encode_bulk_header(tail_id, length) + b"".join(buffers)

    def take_events(self) -> None:
        for kind, call, _, tail in self.machine.poll_events():
            if kind == frames.REQUEST:
                self.call = call
            elif kind == frames.ITEM:
                self.received.append(bytes(tail))
                self.machine.grant(call, 1, len(tail))
            assert kind not in (frames.ERROR, frames.CANCEL)


class ResumedSession(RuleBasedStateMachine):
    """Both sides stream items to each other, of all sizes, while paths come and go."""

    @initialize()
    def connect(self) -> None:
        self.sides = (Side(initiator=True), Side(initiator=False))
        self.sent: tuple[list[bytes], list[bytes]] = ([], [])
        self.count = 0
        caller = self.sides[0]
        caller.call = caller.machine.open_call("a.b", b"\x90", flags=CLIENT_STREAM | SERVER_STREAM)
        for _ in range(2):  # without a HELLO there is no session yet
            for number in (0, 1):
                self.sides[number].take_output()
                self.deliver(number, 1 << 20)

    def resumption(self, side: Side) -> resume.Resumption:
        assert side.machine.resumption is not None
        return side.machine.resumption

    @rule(number=st.integers(0, 1), size=st.integers(0, 2000))
    def send(self, number: int, size: int) -> None:
        side = self.sides[number]
        if side.call is None or not side.call.can_send():
            return
        self.count += 1
        item = self.count.to_bytes(4, "big") + bytes(size)
        self.sent[number].append(item)
        side.machine.send_item(side.call, b"", (item,))
        side.take_output()

    @rule(number=st.integers(0, 1), nbytes=st.integers(1, 3000))
    def deliver(self, number: int, nbytes: int) -> None:
        source, target = self.sides[number], self.sides[1 - number]
        chunk = bytes(source.control[:nbytes])
        del source.control[:nbytes]
        if chunk:
            target.machine.receive_data(chunk, 0.0)
        target.take_events()
        target.take_output()

    @rule(number=st.integers(0, 1), stream=st.integers(0, BULK_STREAMS - 1), nbytes=st.integers(1, 3000))
    def deliver_bulk(self, number: int, stream: int, nbytes: int) -> None:
        source, target = self.sides[number], self.sides[1 - number]
        chunk = bytes(source.bulk[stream][:nbytes])
        del source.bulk[stream][:nbytes]
        if chunk:
            target.readers[stream].receive_data(chunk)
        target.take_events()
        target.take_output()

    @rule(number=st.integers(0, 1))
    def acknowledge(self, number: int) -> None:
        """Now and then, as after `RPC_ACK_ALONE_AFTER` bytes."""
        self.resumption(self.sides[number]).received.owed = RPC_ACK_ALONE_AFTER
        self.sides[number].take_output()

    @precondition(lambda self: self.sides[0].has_path)
    @rule()
    def cut(self) -> None:
        """What is on the way is gone, whole frames or half ones."""
        for side in self.sides:
            side.control.clear()
            for stream in side.bulk:
                stream.clear()
            side.has_path = False
            side.new_readers()

    @precondition(lambda self: not self.sides[0].has_path)
    @rule()
    def take_over(self) -> None:
        accounts = [self.resumption(side).received.account() for side in self.sides]
        for side, account in zip(self.sides, reversed(accounts), strict=True):
            head = resume.Resume(b"s" * 16, 1, account).encode()
            control, tails = self.resumption(side).resume(resume.decode_resume_head_untrusted(head).account)
            side.has_path = True
            for buffer in control:
                side.control += buffer
            for tail in tails:
                side.send_tail(tail)
            side.take_output()

    @rule()
    def drain(self) -> None:
        """Everything arrives: then everything is there, and once the other side says so nothing is kept."""
        if not self.sides[0].has_path:
            self.take_over()
        for _ in range(6):
            for number in (0, 1):
                self.deliver(number, 1 << 24)
                for stream in range(BULK_STREAMS):
                    self.deliver_bulk(number, stream, 1 << 24)
        assert self.sides[1].received == self.sent[0]
        assert self.sides[0].received == self.sent[1]
        for number in (0, 1):
            self.acknowledge(1 - number)
            self.deliver(1 - number, 1 << 24)
            sent = self.resumption(self.sides[number]).sent
            assert sent.tail_bytes == 0
            assert sent.tails() == []

    @invariant()
    def nothing_wrong_so_far(self) -> None:
        for number in (0, 1):
            received = self.sides[1 - number].received
            assert received == self.sent[number][: len(received)]


ResumedSession.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
test_resumed_session = ResumedSession.TestCase


@given(st.binary(max_size=200))
def test_garbage_heads_raise_nothing_else(data: bytes) -> None:
    for decode in (resume.decode_ack_head_untrusted, resume.decode_resume_head_untrusted):
        try:
            decode(data)
        except RemoteProtocolError:
            continue


accounts = st.builds(
    resume.Account,
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 2**32 - 1), max_size=40).map(tuple),
)


@given(st.binary(min_size=16, max_size=16), st.integers(0, 2**32 - 1), accounts)
def test_resume_round_trips(session: bytes, epoch: int, account: resume.Account) -> None:
    sent = resume.Resume(session, epoch, account)
    assert resume.decode_resume_head_untrusted(sent.encode()) == sent


@given(accounts, st.lists(st.integers(1, 100), max_size=10))
def test_no_account_breaks_the_sender(account: resume.Account, lengths: list[int]) -> None:
    kept = resume.Resumption()
    kept.sent.add_control([bytes(n) for n in lengths])
    for tail_id, length in enumerate(lengths):
        kept.sent.add_tail((tail_id, length, (bytes(length),)))
    try:
        kept.resume(account)
    except RemoteProtocolError:
        pass
    assert kept.sent.tail_bytes == sum(length for _, length, _ in kept.sent.tails())


@given(st.permutations(range(30)), st.integers(0, 2**32 - 1))
def test_tail_ids_wrap_in_any_order(order: list[int], first: int) -> None:
    received, sent = resume.Received(), resume.Sent()
    received._below = sent._next_tail_id = first
    for number in range(30):
        sent.add_tail(((first + number) % 2**32, 7, ()))
    missing = deque(sorted(order))
    for number in order:
        received.add_tail((first + number) % 2**32, 7)
        missing.remove(number)
        sent.acknowledge(received.account())
        assert [tail[0] for tail in sent.tails()] == [(first + n) % 2**32 for n in missing]


def test_a_tail_far_ahead_of_a_missing_one_is_refused() -> None:
    received = resume.Received()
    for tail_id in range(1, RPC_MAX_UNACKED_TAILS):
        received.add_tail(tail_id, 1)
    try:
        received.add_tail(RPC_MAX_UNACKED_TAILS, 1)
    except RemoteProtocolError:
        received.add_tail(0, 1)  # those before are there
        assert received.account() == resume.Account(0, RPC_MAX_UNACKED_TAILS, ())
    else:
        raise AssertionError("a set that grows without bound")
