"""multistream-select over a `Stream`: agree on the protocol of a new stream.

The dialler either waits for the answer (one round trip), or, when identify already told that the peer speaks the
protocol, sends its proposal together with the first data (`LazyStream`) and checks the answer when it first reads.
The listener queues its answer without waiting, so that it leaves together with the first bytes of the handler.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

import trio

from lattica.errors import ProtocolNotSupported, StreamReset
from lattica.interfaces import Stream
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.multistream import NOT_AVAILABLE, Initiator, Responder, encode_message

if TYPE_CHECKING:
    from lattica.interfaces import Buffer, StreamSink

_READ_SIZE = 1024
_REFUSAL = encode_message(NOT_AVAILABLE)


async def select_protocol(stream: Stream, protocols: Sequence[str]) -> str:
    """Propose `protocols` in order and wait until one is accepted.

    Errors: `ProtocolNotSupported` when the peer knows none, `RemoteProtocolError` when it breaks the protocol.
    """
    machine = Initiator(protocols)
    while True:
        for chunk in _drain(machine):
            stream.write(chunk)
        if machine.confirmed:
            break
        if machine.failed:
            raise ProtocolNotSupported(f"the peer does not speak {', '.join(protocols)}")
        data = await stream.receive_some(_READ_SIZE)
        if not data:
            raise StreamReset("the peer closed the stream instead of selecting a protocol")
        machine.receive_data(data)
    leftover = machine.take_leftover()
    if leftover:
        stream.push_back(leftover)
    selected = machine.selected
    assert selected is not None
    stream.protocol = selected
    return selected


class RefusalPace:
    """How fast one connection gets its proposals refused.

    Some peers open the next stream the moment a protocol was refused: the Rust lattica wheel asks for its
    `/rpc/stream/1.0.0` 700 times a second. After a few free refusals each one waits twice as long as the one before,
    up to `LONGEST` seconds; a proposal that is accepted starts the count again. Only the refused stream waits.
    """

    FREE = 16
    """More protocols than any peer tries in a row before it finds a common one."""
    FIRST = 0.02
    LONGEST = 5.0
    """Under the time that peers give a negotiation, which is 10 s in rust-libp2p and go-libp2p."""

    def __init__(self) -> None:
        self._refused = 0

    def next_delay(self) -> float:
        """Seconds to wait before the next refusal is sent."""
        self._refused += 1
        doublings = self._refused - self.FREE
        return 0.0 if doublings <= 0 else min(self.LONGEST, self.FIRST * 2.0 ** min(doublings, 16))

    def accepted(self) -> None:
        self._refused = 0


async def accept_protocol(stream: Stream, supported: Container[str], pace: RefusalPace | None = None) -> str:
    """Answer proposals until one is in `supported`, refusals at `pace`. The last answer is queued, not flushed: it
    leaves with the handler's first bytes, or at the end of this scheduling turn."""
    machine = Responder(supported)
    while machine.selected is None:
        data = await stream.receive_some(_READ_SIZE)
        if not data:
            raise StreamReset("the peer closed the stream before it selected a protocol")
        machine.receive_data(data)
        answers = _drain(machine)
        if pace is not None:
            if machine.selected is not None:
                pace.accepted()
            elif any(_REFUSAL in answer for answer in answers):
                await trio.sleep(pace.next_delay())
        for answer in answers:
            stream.write(answer)
    leftover = machine.take_leftover()
    if leftover:
        stream.push_back(leftover)
    stream.protocol = machine.selected
    return machine.selected


def _drain(machine: Initiator | Responder) -> list[bytes]:
    data = machine.poll_transmit()
    return [data] if data else []


class LazyStream(Stream):
    """A stream whose proposal travels with its first data. Reading first consumes the peer's answer.

    When the peer refuses after all (it restarted with other protocols), reading raises `ProtocolNotSupported`
    and the stream is reset.
    """

    def __init__(self, raw: Stream, protocol: str) -> None:
        self._raw = raw
        self._machine: Initiator | None = Initiator([protocol], lazy=True)
        self.connection = raw.connection
        self.protocol = protocol
        for chunk in _drain(self._machine):
            raw.write(chunk)

    def negotiated(self) -> Stream:
        """The stream itself, once the peer's answer was read; until then this object has to stay in between."""
        return self if self._machine is not None else self._raw

    # -- the answer ---------------------------------------------------------------------------------------
    def _receive_answer(self, data: bytes) -> bytes | None:
        """Feed the machine; the bytes that follow the answer once it is complete."""
        machine = self._machine
        assert machine is not None
        machine.receive_data(data)
        if machine.failed:
            self._raw.reset()
            raise ProtocolNotSupported(f"the peer does not speak {self.protocol} any more")
        if not machine.confirmed:
            return None
        self._machine = None
        return machine.take_leftover()

    async def _finish_negotiation(self) -> None:
        while self._machine is not None:
            data = await self._raw.receive_some(_READ_SIZE)
            if not data:
                raise StreamReset("the peer closed the stream instead of selecting a protocol")
            leftover = self._receive_answer(data)
            if leftover:
                self._raw.push_back(leftover)

    # -- reading ------------------------------------------------------------------------------------------
    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        if self._machine is not None:
            await self._finish_negotiation()
        return await self._raw.receive_some(max_bytes)

    async def receive_into(self, buffer: Buffer) -> int:
        if self._machine is not None:
            await self._finish_negotiation()
        return await self._raw.receive_into(buffer)

    def push_back(self, data: bytes) -> None:
        self._raw.push_back(data)

    def set_sink(self, sink: StreamSink) -> None:
        self._raw.set_sink(sink if self._machine is None else _AnswerSink(self, sink))

    def pause_sink(self) -> None:
        self._raw.pause_sink()

    def resume_sink(self) -> None:
        self._raw.resume_sink()

    def limit_window(self, size: int) -> None:
        self._raw.limit_window(size)

    # -- writing and ending -------------------------------------------------------------------------------
    def write(self, *buffers: Buffer) -> None:
        self._raw.write(*buffers)

    def write_now(self, *buffers: Buffer) -> None:
        self._raw.write_now(*buffers)

    def write_through(self, data: memoryview) -> None:
        self._raw.write_through(data)

    async def drain(self, below: int | None = None) -> None:
        await self._raw.drain(below)

    async def send_all(self, data: Buffer) -> None:
        await self._raw.send_all(data)

    def queued_bytes(self) -> int:
        return self._raw.queued_bytes()

    async def close_write(self) -> None:
        await self._raw.close_write()

    def reset(self) -> None:
        self._raw.reset()

    async def aclose(self) -> None:
        await self._raw.aclose()


class _AnswerSink:
    """Takes the answer off the front of a lazy stream, then passes everything through."""

    def __init__(self, stream: LazyStream, sink: StreamSink) -> None:
        self._stream = stream
        self._sink = sink
        self.eof_received = sink.eof_received
        self.stream_closed = sink.stream_closed

    def data_received(self, data: memoryview) -> None:
        if self._stream._machine is None:
            self._sink.data_received(data)
            return
        try:
            leftover = self._stream._receive_answer(bytes(data))
        except ProtocolNotSupported as error:
            raise RemoteProtocolError(str(error)) from None
        if leftover:
            self._sink.data_received(memoryview(leftover))
