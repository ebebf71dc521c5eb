"""The state of one call, seen from one side."""

from __future__ import annotations

from collections import deque
from typing import Protocol

from lattica_protocols.rpc.flow import Flow
from lattica_protocols.rpc.frames import CLIENT_STREAM, SERVER_STREAM, Buffer

BOTH_STREAMS = CLIENT_STREAM | SERVER_STREAM


class CallOwner(Protocol):
    """Takes the events of one call. Must neither wait nor raise."""

    def on_frame(self, kind: int, call: Call, head: bytes, tail: Buffer) -> None: ...


class Waiting:
    """A frame of a call that waits for its detached tail, or behind one that does (`tail` is there then)."""

    __slots__ = ("head", "kind", "length", "tail", "tail_id")

    def __init__(self, kind: int, head: bytes, tail: Buffer | None, tail_id: int, length: int) -> None:
        self.kind = kind
        self.head = head
        self.tail = tail
        self.tail_id = tail_id
        self.length = length


class Call:
    """One call. `owner` and `relayed` are the runtime's to set; everything else is the machine's."""

    __slots__ = (
        "announced", "deadline", "flags", "flow", "held", "id", "method", "outbound", "over", "owner",
        "relayed", "route", "waiting",
    )  # fmt: skip

    def __init__(
        self, call_id: int, outbound: bool, flags: int, method: str, route: bytes, deadline: float | None
    ) -> None:
        self.id = call_id
        self.outbound = outbound
        """We are the caller."""
        self.flags = flags
        """Of the REQUEST: CLIENT_STREAM, SERVER_STREAM, KEYWORDS."""
        self.method = method
        """"service.method"."""
        self.route = route
        """Worker to daemon: the peer to call. Daemon to worker: the peer that calls. Otherwise empty."""
        self.deadline = deadline
        """In the machine's time, `None` for none."""
        self.flow = Flow() if flags & BOTH_STREAMS else None
        self.over = False
        """The last frame was sent or delivered: every verb on the call is a no-op from now on."""
        self.announced = outbound
        """The runtime knows of the call (a REQUEST that waits for its tail is not announced yet)."""
        self.relayed = False
        """Frames of this call are passed on by a forwarder; see the module docstring of `connection`."""
        self.owner: CallOwner | None = None
        """Who gets the events of this call; `None`: nobody any more."""
        self.held = 0
        """Bytes of messages that count against `RPC_MAX_HELD`."""
        self.waiting: deque[Waiting] | None = None

    def can_send(self) -> bool:
        """There is credit for one more ITEM. The last one may be longer than what is left of the bytes."""
        flow = self.flow
        return flow is not None and flow.send_items > 0 and flow.send_bytes > 0

    def __repr__(self) -> str:
        side = "to" if self.outbound else "from"
        return f"<Call {self.id} {side} peer {self.method!r}{' over' if self.over else ''}>"
