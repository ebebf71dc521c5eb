"""The windows of a call that streams: how many items and bytes each side may still send, seen from one side.

Both start at what `limits.py` grants a new stream. Receiving uses up one window; what the application consumed is owed
to the sender, and half a window of it goes back in one CREDIT."""

from __future__ import annotations

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import RPC_MAX_CREDIT, RPC_STREAM_BYTES, RPC_STREAM_ITEMS
from lattica_protocols.rpc.frames import CREDIT_HEAD


class Flow:
    """The windows of one call."""

    __slots__ = (
        "local_ended", "owed_bytes", "owed_items", "receive_bytes", "receive_items", "remote_ended",
        "send_bytes", "send_items",
    )  # fmt: skip

    def __init__(self) -> None:
        self.send_items = RPC_STREAM_ITEMS
        self.send_bytes = RPC_STREAM_BYTES
        self.receive_items = RPC_STREAM_ITEMS
        self.receive_bytes = RPC_STREAM_BYTES
        self.owed_items = 0
        """Consumed and not yet granted again."""
        self.owed_bytes = 0
        self.local_ended = False
        self.remote_ended = False

    # -- we send -----------------------------------------------------------------------------------
    def sent(self, nbytes: int) -> None:
        """An ITEM of `nbytes` (head + tail) left."""
        self.send_items -= 1
        self.send_bytes -= nbytes

    def take_credit_untrusted(self, head: bytes, relayed: bool) -> None:
        """A CREDIT came. That of a relayed call is for the sender at the far end: it is checked, and not kept here."""
        if len(head) != CREDIT_HEAD.size:
            raise RemoteProtocolError("a CREDIT of a wrong length")
        items, nbytes = CREDIT_HEAD.unpack(head)
        if self.send_items + items > RPC_MAX_CREDIT or self.send_bytes + nbytes > RPC_MAX_CREDIT:
            raise RemoteProtocolError("more credit than anybody can use")
        if not relayed:
            self.send_items += items
            self.send_bytes += nbytes

    # -- the peer sends ----------------------------------------------------------------------------
    def take_item_untrusted(self, nbytes: int) -> None:
        """An ITEM of `nbytes` (head + tail) came."""
        if self.remote_ended or self.receive_items <= 0 or self.receive_bytes <= 0:
            raise RemoteProtocolError("an item without credit, or after the end")
        self.receive_items -= 1
        self.receive_bytes -= nbytes

    def consumed(self, items: int, nbytes: int) -> bytes | None:
        """The application is done with ITEMs. The head of the CREDIT to send, once that is worth a frame."""
        self.owed_items += items
        self.owed_bytes += nbytes
        if self.owed_items * 2 < RPC_STREAM_ITEMS and self.owed_bytes * 2 < RPC_STREAM_BYTES:
            return None
        head = CREDIT_HEAD.pack(self.owed_items, self.owed_bytes)
        self.owed_items = self.owed_bytes = 0
        return head

    def granted(self, head: bytes) -> int:
        """A CREDIT leaves, ours or one that is passed on: the peer may send so much more. Its bytes."""
        items, nbytes = CREDIT_HEAD.unpack(head)
        self.receive_items += items
        self.receive_bytes += nbytes
        return int(nbytes)
