"""Operations in a row, shorter: what follows from those before is left out.

An operation names its author, its chain and the operation before it, 68 bytes that whoever has that one knows. In a row
(the operations of a message, those of a space on disk) it may stand in the short form. Its signed bytes are made anew
from it, so its id and its signature are those of the full form, and a wrong guess shows as a wrong signature.

    short     = flags u8 || [client: uvarint] || [seq: uvarint] || elapsed: uvarint || [others] || signature 64 || body
    flags     03  kind
              04  the chain's client id is written out; else it is the one that the body, which has items, starts with
              08  `seq` is written: it follows the reader's operation at `seq` - 1 of the chain. Else it follows the
                  last one of the chain that stands before it in the row
              10  it has other parents than that
    elapsed   = its time less that of the one it follows, in seconds
    others    = uvarint count || (uvarint back || [id 32 when back is 0])*          back: places before it in the row

A full operation starts with 98, so a row may have both. The first of a chain in a row is full, or says `seq`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import REPLICA_BATCH_OPERATIONS, REPLICA_MAX_PARENTS
from lattica_protocols.replica.client_ids import client_id
from lattica_protocols.replica.errors import NotYet
from lattica_protocols.replica.graph import Chain
from lattica_protocols.replica.operation import Operation
from lattica_protocols.varint import decode_uvarint_untrusted, encode_uvarint

_KIND, _CLIENT, _SEQ, _OTHERS = 0x03, 0x04, 0x08, 0x10
_FLAGS = 0x1F
_WINDOW = REPLICA_BATCH_OPERATIONS
"""Places back that a parent can be named by: the length of a message."""

Find = Callable[[int, int], Operation | None]
"""The one operation with a client id and a `seq` that is here."""


class Unresolved(NotYet):
    """The operation follows one that is not here."""


class Row(NamedTuple):
    """The operations of a row."""

    operations: list[Operation]
    complete: bool
    """False: there are others that cannot be read, because they follow operations that are not here."""


class RowWriter:
    """Writes operations into one row, in order. One that starts anew in the middle of a row may go on."""

    def __init__(self, find: Find | None = None) -> None:
        """`find`: what the reader probably has beside the row."""
        self._find = find
        self._clients: dict[Chain, tuple[int, bytes]] = {}
        self._last: dict[int, Operation] = {}
        self._recent: deque[bytes] = deque()
        self._place: dict[bytes, int] = {}
        self._length = 0

    def write(self, op: Operation) -> bytes:
        """The next operation of the row."""
        known = self._clients.get(op.chain)
        if known is None:
            number = client_id(*op.chain)
            known = self._clients[op.chain] = number, encode_uvarint(number)
        client, client_bytes = known
        last, outside = self._last.get(client), False
        if last is None and self._find is not None and op.seq:
            last, outside = self._find(client, op.seq - 1), True
        data = op.encoded
        if last is not None and _follows(op, last):
            data = self._short(op, last, client_bytes, outside)
        self._last[client] = op
        self._note(op.id)
        return data

    def _short(self, op: Operation, last: Operation, client: bytes, outside: bool) -> bytes:
        body, flags, named = op.body, int(op.kind), b""
        if not (body.startswith(client, 2) and body[0] == 1 and body[1] < 0x80):
            flags |= _CLIENT
            named = client
        if outside:
            flags |= _SEQ
            named += encode_uvarint(op.seq)
        named += encode_uvarint(op.time - last.time)
        if len(op.parents) > 1:
            flags |= _OTHERS
            named += encode_uvarint(len(op.parents) - 1) + b"".join(map(self._name, op.parents[1:]))
        return b"%c%b%b%b" % (flags, named, op.encoded[-64:], body)

    def _name(self, parent: bytes) -> bytes:
        place = self._place.get(parent)
        return b"\x00" + parent if place is None else encode_uvarint(self._length - place)

    def _note(self, operation: bytes) -> None:
        self._recent.append(operation)
        self._place[operation] = self._length
        self._length += 1
        if len(self._recent) > _WINDOW:
            oldest = self._recent.popleft()
            if self._place.get(oldest) == self._length - 1 - _WINDOW:
                del self._place[oldest]


def _follows(op: Operation, last: Operation) -> bool:
    return op.chain == last.chain and op.seq == last.seq + 1 and op.parents[0] == last.id and op.time >= last.time


class RowReader:
    """Reads the operations of one row, in order."""

    def __init__(self, space: bytes, find: Find | None = None) -> None:
        """`find`: what is here beside the row."""
        self._space = space
        self._find = find
        self._last: dict[int, Operation] = {}
        self._recent: deque[bytes] = deque(maxlen=_WINDOW)
        self._client, self._own = 0, b"\x00"
        """The client id read last, and its bytes."""

    def read_untrusted(self, data: bytes) -> Operation:
        """The next operation of the row: its form is checked, not its signature, unless it was found with `find`.

        Raises `Unresolved` when it follows one that is not here.
        """
        if data and data[0] <= _FLAGS:
            try:
                client, op = self._read_short(data)
            except Unresolved:
                self._recent.append(b"")  # it has its place in the row nevertheless
                raise
        else:
            op = Operation.decode_untrusted(data, self._space)
            client = client_id(*op.chain)
        self._last[client] = op
        self._recent.append(op.id)
        return op

    def _read_short(self, data: bytes) -> tuple[int, Operation]:
        flags, at, seq = data[0], 1, None
        if flags & _CLIENT:
            client, at = decode_uvarint_untrusted(data, at)
        if flags & _SEQ:
            seq, at = decode_uvarint_untrusted(data, at)
        if at < len(data) and data[at] < 0x80:
            elapsed, at = data[at], at + 1
        else:
            elapsed, at = decode_uvarint_untrusted(data, at)
        named: Sequence[bytes | int] = ()
        if flags & _OTHERS:
            named, at = _read_others(data, at)
        start = at + 64
        if start > len(data):
            raise RemoteProtocolError("operation that is cut off")
        if not flags & _CLIENT:
            if data[start : start + 1] != b"\x01" or data[start + 1 : start + 2] >= b"\x80":
                raise RemoteProtocolError("operation in the short form that names no chain")
            if data.startswith(self._own, start + 2):  # that of the one before, most of the time
                client = self._client
            else:
                client, end = decode_uvarint_untrusted(data, start + 2)
                self._client, self._own = client, data[start + 2 : end]
        before = self._last.pop(client, None)  # nothing follows it any more, also when this one cannot be read
        last = before if seq is None else self._find_last(client, seq)
        if last is None:
            raise Unresolved("it follows an operation that is not here")
        op = Operation.following(
            last,
            self._space,
            kind=flags & _KIND,
            others=tuple([each if type(each) is bytes else self._at(each) for each in named]) if named else (),
            elapsed=elapsed,
            body=data[start:],
            signature=data[at:start],
        )
        if seq is not None and not op.check_signature(self._space):
            raise Unresolved("it follows another operation than the one that is here")
        return client, op

    def _find_last(self, client: int, seq: int) -> Operation | None:
        return self._find(client, seq - 1) if self._find is not None and seq else None

    def _at(self, back: object) -> bytes:
        assert isinstance(back, int)
        if back > len(self._recent):
            raise RemoteProtocolError("operation with a parent before the first of its row")
        parent = self._recent[-back]
        if not parent:
            raise Unresolved("one of its parents could not be read")
        return parent


def _read_others(data: bytes, at: int) -> tuple[list[bytes | int], int]:
    count, at = decode_uvarint_untrusted(data, at)
    if not 0 < count < REPLICA_MAX_PARENTS:
        raise RemoteProtocolError(f"operation with {count} other parents")
    named: list[bytes | int] = []
    for _ in range(count):
        back, at = decode_uvarint_untrusted(data, at)
        if back:
            named.append(back)
        else:
            named.append(data[at : at + 32])
            at += 32
    return named, at


def write_row(operations: Iterable[Operation], find: Find | None = None) -> list[bytes]:
    """The operations of a message."""
    writer = RowWriter(find)
    return [writer.write(op) for op in operations]


def read_row_untrusted(row: Iterable[bytes], space: bytes, find: Find | None = None) -> Row:
    """The operations of a message. Their signatures are not checked yet, but where `find` was needed."""
    reader, operations, complete = RowReader(space, find), list[Operation](), True
    for data in row:
        try:
            operations.append(reader.read_untrusted(data))
        except Unresolved:
            complete = False
    return Row(operations, complete)
