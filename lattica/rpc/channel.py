"""A machine and the way its bytes go: what the peer-to-peer runtime, the local socket and the clients share.

Nothing in this module waits or knows an event loop. A channel is given bytes; it hands events to the owners of the
calls and writes what the machine has to say. `Turn` keeps writes together: while a channel hands out events, output
of every channel in the same turn is held back and written once at the end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

from lattica_protocols.errors import LocalProtocolError
from lattica_protocols.rpc.calls import Call
from lattica_protocols.rpc.connection import RpcConnection
from lattica_protocols.rpc.frames import (
    REQUEST,
    RESOURCE_EXHAUSTED,
    Buffer,
)

if TYPE_CHECKING:
    from lattica_protocols.peer_id import PeerId


class Speaker(Protocol):
    """What code that runs a call needs of its channel, whatever the channel is made of."""

    @property
    def machine(self) -> RpcConnection: ...

    @property
    def peer(self) -> PeerId:
        """Who is at the other end."""

    def flush(self) -> None: ...

    def congested(self) -> bool:
        """The other end reads slower than we write."""

    async def writable(self) -> None:
        """Wait until it has caught up, or the channel is closed."""


class Turn:
    """Channels that have output to write when the current turn is over."""

    def __init__(self) -> None:
        self._depth = 0
        self._waiting: list[Channel] = []

    def begin(self) -> None:
        self._depth += 1

    def end(self) -> None:
        self._depth -= 1
        if not self._depth and self._waiting:
            self.write_waiting()

    def add(self, channel: Channel) -> bool:
        """Remember the channel. False when no turn is running: it should write at once."""
        if not self._depth and not self._defer(channel):
            return False
        if not channel.output_waits:
            channel.output_waits = True
            self._waiting.append(channel)
        return True

    def write_waiting(self) -> None:
        """Write the output of every channel that was remembered."""
        waiting, self._waiting = self._waiting, []
        for channel in waiting:
            channel.output_waits = False
            channel.write_output()

    def _defer(self, channel: Channel) -> bool:
        """Outside of a turn: whether `write_waiting` will be called soon, and the channel should wait for it."""
        return False


RequestHandler: TypeAlias = "Callable[[Channel, Call, bytes, Buffer], None]"
"""Takes a REQUEST: the channel it came on, the call, the arguments' head and tail, not decoded."""


class Channel(ABC):
    """One machine, driven."""

    def __init__(self, machine: RpcConnection, on_request: RequestHandler, turn: Turn | None = None) -> None:
        self.machine = machine
        self.output_waits = False
        """The turn will write for us."""
        self._on_request = on_request
        self._turn = turn if turn is not None else Turn()

    # -- what a subclass gives ----------------------------------------------------------------------------
    @abstractmethod
    def _write(self, buffers: Sequence[Buffer]) -> None:
        """Queue bytes for the control stream."""

    @abstractmethod
    def _write_detached(self, tail_id: int, length: int, buffers: Sequence[Buffer]) -> None:
        """Send a detached tail its own way."""

    @abstractmethod
    def now(self) -> float:
        """The clock of this channel's deadlines."""

    @abstractmethod
    def deadlines_changed(self) -> None:
        """The machine may want its timer earlier than before."""

    # -- driving ------------------------------------------------------------------------------------------
    def receive(self, data: Buffer) -> None:
        """Bytes of the control stream. `RemoteProtocolError`: reset it, then call `lost`."""
        self.machine.receive_data(data, self.now())
        self.dispatch()

    def dispatch(self) -> None:
        """Hand out the machine's events, then write."""
        machine, turn = self.machine, self._turn
        turn.begin()
        try:
            while events := machine.poll_events():
                for kind, call, head, tail in events:
                    if kind == REQUEST:
                        self._on_request(self, call, head, tail)
                    elif call.owner is not None:
                        call.owner.on_frame(kind, call, head, tail)
            self.flush()
        finally:
            turn.end()
        self.deadlines_changed()

    def flush(self) -> None:
        """Write the machine's output, at the end of the turn when one is running."""
        if not self._turn.add(self):
            self.write_output()

    def write_output(self) -> None:
        """Write the machine's output now."""
        machine = self.machine
        output = machine.poll_transmit()
        if output:
            self._write(output)
            for tail_id, length, buffers in machine.poll_detached():
                self._write_detached(tail_id, length, buffers)

    def expire(self) -> None:
        """The time of `machine.next_timeout()` has come."""
        self.machine.handle_timer(self.now())
        self.dispatch()

    def lost(self, reason: str) -> None:
        """The control stream is gone: every call ends. Safe to call twice."""
        self.machine.connection_lost(reason)
        self.dispatch()


class Relay:
    """Owner of both halves of a forwarded call: passes the frames of each to the other."""

    __slots__ = ("inbound", "outbound", "source", "target")

    def __init__(self, source: Channel, inbound: Call, target: Channel, outbound: Call) -> None:
        self.source, self.inbound = source, inbound
        self.target, self.outbound = target, outbound

    def on_frame(self, kind: int, call: Call, head: bytes, tail: Buffer) -> None:
        forwards = call is self.inbound
        channel, half = (self.target, self.outbound) if forwards else (self.source, self.inbound)
        try:
            channel.machine.relay(half, kind, head, tail)
        except LocalProtocolError as error:  # over a limit of the next hop: the call ends on both sides
            self.target.machine.cancel(self.outbound)
            self.source.machine.fail(self.inbound, RESOURCE_EXHAUSTED, "ResourceExhausted", str(error))
            self.target.flush()
            self.source.flush()
        channel.flush()
        if self.inbound.over and self.outbound.over:
            self.inbound.owner = self.outbound.owner = None  # no cycle for the garbage collector


def splice(source: Channel, inbound: Call, head: bytes, tail: Buffer, target: Channel, route: bytes = b"") -> None:
    """Pass a REQUEST that came on `source` on to `target`, and from now on every frame of the call both ways.

    `head` and `tail` are those of the REQUEST, not decoded. `route`: see the request head in `specs/rpc.md`.
    When `target` takes no more calls, the caller gets RESOURCE_EXHAUSTED.
    """
    if inbound.over:
        return
    try:
        if not target.machine.can_open():
            raise LocalProtocolError("the next hop takes no more calls")
        outbound = target.machine.forward(inbound, head, tail, route=route, now=target.now())
    except LocalProtocolError as error:
        source.machine.fail(inbound, RESOURCE_EXHAUSTED, "ResourceExhausted", str(error))
        source.flush()
        return
    inbound.owner = outbound.owner = Relay(source, inbound, target, outbound)
    target.flush()
    if outbound.deadline is not None:
        target.deadlines_changed()
