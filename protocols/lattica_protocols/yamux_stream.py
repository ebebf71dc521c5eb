"""State of one yamux stream: what is queued to be sent, what the peer may send, and which flags are due.

`yamux.py` has the wire format and the session that owns the streams; only the session changes these objects.

Windows. `send_window` is what the peer allows us to send. `receive_window` is what we still allow the peer to
send. Bytes that arrived and were not consumed yet are `unconsumed`. The target `window` is what we want the
peer to have when nobody lags: `receive_window + unconsumed + pending_grant <= window` always holds, so a peer
can never make us hold more than `window` bytes. A grant is sent when it has grown to half the window, not for
each frame.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Final, TypeAlias

from lattica_protocols.limits import YAMUX_INITIAL_WINDOW, YAMUX_MAX_WINDOW

Buffer: TypeAlias = bytes | bytearray | memoryview

FLAG_SYN: Final = 1
FLAG_ACK: Final = 2
FLAG_FIN: Final = 4
FLAG_RST: Final = 8

_JOIN_UP_TO: Final = 16384
"""Up to here a queue of many pieces is joined and then copied at once: a slice assignment costs more than the
copy."""


class YamuxStream:
    """One stream. Public attributes are for reading; `context` belongs to the application."""

    __slots__ = (
        "accepted",
        "acked",
        "context",
        "fin_due",
        "fin_received",
        "fin_sent",
        "flags_due",
        "granting",
        "id",
        "inbound",
        "is_reset",
        "lane",
        "max_window",
        "measured_bytes",
        "measured_since",
        "pending_grant",
        "queue",
        "queued",
        "receive_window",
        "send_window",
        "sent",
        "syn_sent",
        "unconsumed",
        "window",
    )

    def __init__(self, stream_id: int, *, inbound: bool, now: float) -> None:
        self.id = stream_id
        self.inbound = inbound
        self.context: Any = None
        # sending
        self.queue: deque[bytes | memoryview] = deque()
        self.queued = 0
        """Bytes in `queue`."""
        self.sent = 0
        """Bytes taken out of `queue` since the stream was opened."""
        self.send_window = YAMUX_INITIAL_WINDOW
        self.flags_due = 0 if inbound else FLAG_SYN
        self.syn_sent = inbound
        self.accepted = not inbound
        """We have sent, or are about to send, the ACK."""
        self.acked = inbound
        """The peer has sent its ACK."""
        self.fin_due = False
        self.fin_sent = False
        self.lane: deque[YamuxStream] | None = None
        """The session's ready queue in which the stream stands."""
        # receiving
        self.receive_window = YAMUX_INITIAL_WINDOW
        self.window = YAMUX_INITIAL_WINDOW
        self.max_window = YAMUX_MAX_WINDOW
        """What `window` may grow to."""
        self.unconsumed = 0
        self.pending_grant = 0
        self.granting = True
        self.measured_bytes = 0
        """Taken by the reader since `measured_since`."""
        self.measured_since = now
        self.fin_received = False
        self.is_reset = False

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen on the stream, in either direction."""
        return self.is_reset or (self.fin_sent and self.fin_received)

    @property
    def has_frames(self) -> bool:
        """Whether a frame of this stream could leave now."""
        return bool(
            self.flags_due
            or self.pending_grant
            or (self.queued and self.send_window)
            or (self.fin_due and not self.queued)
        )

    def enqueue(self, buffers: tuple[Buffer, ...]) -> None:
        """Put references to `buffers` at the end of the queue."""
        for buffer in buffers:
            if type(buffer) is bytes:
                size = len(buffer)
            else:
                if type(buffer) is not memoryview:
                    buffer = memoryview(buffer)
                size = buffer.nbytes
                if size and (buffer.ndim != 1 or buffer.format != "B"):
                    buffer = buffer.cast("B")
            if size:
                self.queue.append(buffer)
                self.queued += size

    def copy_out(self, out: memoryview, pos: int, size: int) -> None:
        """Move `size` queued bytes (there are as many) to `out` at `pos`."""
        queue = self.queue
        self.sent += size
        if size == self.queued <= _JOIN_UP_TO:
            out[pos : pos + size] = queue[0] if len(queue) == 1 else b"".join(queue)
            queue.clear()
            self.queued = 0
            return
        self.queued -= size
        while size:
            head = queue[0]
            length = len(head)
            if length > size:
                view = memoryview(head)
                head, queue[0] = view[:size], view[size:]
                length = size
            else:
                queue.popleft()
            out[pos : pos + length] = head
            pos += length
            size -= length

    def withdraw(self, buffer: bytes | memoryview) -> bool:
        """Take a queued buffer back out of the queue, if none of it was sent yet."""
        for index, queued in enumerate(self.queue):
            if queued is buffer:
                del self.queue[index]
                self.queued -= len(buffer)
                return True
        return False

    def own_borrowed(self) -> None:
        """Replace what is left of queued memory that is not `bytes` by copies: it is about to change."""
        for index, buffer in enumerate(self.queue):
            if type(buffer) is memoryview and type(buffer.obj) is not bytes:
                self.queue[index] = bytes(buffer)

    def own_queued(self) -> None:
        """Replace references to the first queued buffer by a copy: its owner wants it back."""
        if self.queue:
            self.queue[0] = bytes(self.queue[0])
