"""The receiving half of a bulk stream: BULK frames whose tails go straight into the machine's buffers.

    u32 length | u8 kind = 8 | u8 flags = 0 | u16 0 | u32 tail id | tail

The HELLO before the first BULK frame tells which session the stream belongs to; the runtime has read it
already.
"""

from __future__ import annotations

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.rpc.connection import RpcConnection
from lattica_protocols.rpc.frames import BULK, Buffer
from lattica_protocols.rpc.inbox import FrameReader


class BulkReader:
    """Feeds one bulk stream into its session."""

    __slots__ = ("_machine", "_reader")

    def __init__(self, machine: RpcConnection) -> None:
        self._machine = machine
        self._reader = FrameReader(self._frame, self._open_tail)

    def receive_data(self, data: Buffer) -> None:
        """Bytes of the bulk stream. Look at the machine's events after it."""
        self._reader.receive_data(data)

    def _open_tail(self, kind: int, tail_id: int, length: int) -> Buffer | None:
        if kind != BULK:
            raise RemoteProtocolError(f"frame of kind {kind} on a bulk stream")
        return self._machine.expect_tail(tail_id, length)

    def _frame(self, kind: int, flags: int, tail_id: int, head: bytes, tail: Buffer | None, length: int) -> None:
        if kind != BULK or head:
            raise RemoteProtocolError(f"frame of kind {kind} on a bulk stream")
        if tail is None or not length:
            self._machine.drop_tail(tail_id)
        else:
            self._machine.receive_tail(tail_id, tail)
