"""How a session outlives its path: what was sent and not acknowledged is kept, and sent again on the next path.

The control stream is a stream of bytes that goes on over another stream of the transport. Each side counts the bytes
of the control stream it took in, and knows which detached tails are here. It tells by ACK now and then, and by RESUME
when a new stream takes over:

    ack head      u64 bytes of the control stream | tails
    resume head   16 bytes session | u32 epoch | u64 bytes of the control stream | tails
    tails         u32 id: every tail with a lower one is here | u16 count | so many u32: further tails that are here

little-endian. Counts are those of whoever sends the frame: what it received. Ids are compared in a circle of 2^32.

Nothing is copied: buffers are kept by reference until they are acknowledged. What both ends may keep is bounded:
the sender waits (`Sent.full`) as for a peer that does not read, and the receiver holds no more than a set of ids.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import (
    RPC_MAX_UNACKED,
    RPC_MAX_UNACKED_TAIL_BYTES,
    RPC_MAX_UNACKED_TAILS,
)
from lattica_protocols.rpc.frames import Buffer

FEATURE: Final = "resume"
"""In HELLO: this side acknowledges, and its sessions can be resumed."""

_ACK: Final = struct.Struct("<QIH")
_RESUME: Final = struct.Struct("<16sI")
_IDS: Final = 1 << 32
_HALF: Final = 1 << 31

MAX_RESUME_HEAD: Final = _RESUME.size + _ACK.size + 4 * RPC_MAX_UNACKED_TAILS

Tail = tuple[int, int, Sequence[Buffer]]
"""`(tail id, length, buffers)`"""


@dataclass(frozen=True, slots=True)
class Account:
    """What one side received."""

    control_bytes: int = 0
    tails_below: int = 0
    """Every tail with a lower id is here."""
    tails: tuple[int, ...] = ()
    """Others that are here."""

    def encode(self) -> bytes:
        """The head of an ACK."""
        fixed = _ACK.pack(self.control_bytes, self.tails_below, len(self.tails))
        return fixed + struct.pack(f"<{len(self.tails)}I", *self.tails) if self.tails else fixed


@dataclass(frozen=True, slots=True)
class Resume:
    """The first frame of a stream that takes over, and the answer to it."""

    session: bytes
    epoch: int
    """Which stream of the session this is: higher than that of any before. The answer has the same."""
    account: Account

    def encode(self) -> bytes:
        """The head of a RESUME."""
        return _RESUME.pack(self.session, self.epoch) + self.account.encode()


def decode_ack_head_untrusted(head: bytes) -> Account:
    """The head of an ACK."""
    if len(head) < _ACK.size:
        raise RemoteProtocolError("an ACK is cut short")
    control_bytes, below, count = _ACK.unpack_from(head)
    if count > RPC_MAX_UNACKED_TAILS or len(head) != _ACK.size + 4 * count:
        raise RemoteProtocolError(f"an ACK that names {count} tails has {len(head)} bytes")
    return Account(control_bytes, below, struct.unpack_from(f"<{count}I", head, _ACK.size))


def decode_resume_head_untrusted(head: bytes) -> Resume:
    """The head of a RESUME."""
    if len(head) < _RESUME.size:
        raise RemoteProtocolError("a RESUME is cut short")
    session, epoch = _RESUME.unpack_from(head)
    return Resume(session, epoch, decode_ack_head_untrusted(head[_RESUME.size :]))


class Received:
    """The receiving half of an account."""

    __slots__ = ("_above", "_below", "control_bytes", "owed")

    def __init__(self) -> None:
        self.control_bytes = 0
        self._below = 0
        self._above: set[int] = set()
        self.owed = 0
        """Bytes received since the last account was given. With `control_bytes` the machine's to count: it is on its
        hot path."""

    def add_tail(self, tail_id: int, length: int) -> None:
        """A whole tail is here. `RemoteProtocolError` when it was before, or is far ahead of one that is missing."""
        self.owed += length
        ahead = (tail_id - self._below) % _IDS
        if ahead >= _HALF or tail_id in self._above:
            raise RemoteProtocolError(f"tail {tail_id} came again")
        if ahead >= RPC_MAX_UNACKED_TAILS:
            raise RemoteProtocolError(f"tail {tail_id} came before tail {self._below}")
        if ahead:
            self._above.add(tail_id)
            return
        self._below = (tail_id + 1) % _IDS
        while self._below in self._above:
            self._above.remove(self._below)
            self._below = (self._below + 1) % _IDS

    def account(self) -> Account:
        """What is here. The other side is taken to hear of it."""
        self.owed = 0
        return Account(self.control_bytes, self._below, tuple(self._above))


class Sent:
    """The sending half: what the other side may still want again."""

    __slots__ = ("_acked", "_buffers", "_next_tail_id", "_tails", "_total", "full", "tail_bytes")

    def __init__(self) -> None:
        self._total = 0
        """Bytes of the control stream so far."""
        self._acked = 0
        """Bytes before the first buffer that is kept."""
        self._buffers: deque[Buffer] = deque()
        self._tails: dict[int, Tail] = {}
        """In the order in which they are to be sent."""
        self._next_tail_id = 0
        self.tail_bytes = 0
        """Of tails that are kept."""
        self.full = False
        """The other side has to acknowledge something before more is made for it."""

    @property
    def control_bytes(self) -> int:
        """Bytes of the control stream that are kept."""
        return self._total - self._acked

    def _weigh(self) -> None:
        self.full = (
            self._total - self._acked > RPC_MAX_UNACKED
            or self.tail_bytes > RPC_MAX_UNACKED_TAIL_BYTES
            or len(self._tails) >= RPC_MAX_UNACKED_TAILS
        )

    def may_send_tail(self, tail_id: int) -> bool:
        """Whether a tail is near enough to the oldest that is not acknowledged."""
        oldest = next(iter(self._tails), tail_id)
        return (tail_id - oldest) % _IDS < RPC_MAX_UNACKED_TAILS

    def add_control(self, buffers: Sequence[Buffer]) -> None:
        """These bytes of the control stream are on their way."""
        self._total += sum(map(len, buffers))
        self._buffers += buffers
        if self._total - self._acked > RPC_MAX_UNACKED:
            self.full = True

    def add_tail(self, tail: Tail) -> None:
        """This tail goes out, in the order of ids."""
        self._tails[tail[0]] = tail
        self._next_tail_id = (tail[0] + 1) % _IDS
        self.tail_bytes += tail[1]
        self._weigh()

    def acknowledge(self, account: Account) -> None:
        """Let go of what is there. An account that is older than one we had changes nothing: the ACKs of a path that
        was lost come again behind the RESUME. `RemoteProtocolError` when it has what was never sent."""
        if account.control_bytes > self._total:
            raise RemoteProtocolError("an ACK of bytes that were not sent")
        buffers = self._buffers
        while buffers and self._acked + len(buffers[0]) <= account.control_bytes:
            self._acked += len(buffers.popleft())
        self._acknowledge_tails(account)
        self._weigh()

    def replay(self, account: Account) -> list[Buffer]:
        """What the other side misses of the control stream, after `acknowledge` of the same account.
        `RemoteProtocolError` when it misses what it acknowledged before."""
        missing = list(self._buffers)
        skip = account.control_bytes - self._acked
        if skip < 0:
            raise RemoteProtocolError("a RESUME that wants what was acknowledged")
        if skip:
            missing[0] = memoryview(missing[0])[skip:]
        return missing

    def tails(self) -> list[Tail]:
        """Tails that the other side does not have, as far as it said, oldest first."""
        return list(self._tails.values())

    def clear(self) -> None:
        """Nobody will ask for anything any more."""
        self._buffers.clear()
        self._tails.clear()
        self._acked = self._total
        self.tail_bytes = 0
        self.full = False

    def _acknowledge_tails(self, account: Account) -> None:
        ahead = (self._next_tail_id - account.tails_below) % _IDS
        if ahead >= _HALF:
            raise RemoteProtocolError("an ACK of tails that were not sent")
        tails = self._tails
        while tails:
            tail_id = next(iter(tails))
            if 0 < (account.tails_below - tail_id) % _IDS < _HALF:
                self._let_go(tail_id)
            else:
                break
        for tail_id in account.tails:
            if (self._next_tail_id - tail_id - 1) % _IDS >= _HALF:
                raise RemoteProtocolError(f"an ACK of tail {tail_id}, which was not sent")
            if tail_id in tails:
                self._let_go(tail_id)

    def _let_go(self, tail_id: int) -> None:
        self.tail_bytes -= self._tails.pop(tail_id)[1]


class Resumption:
    """Both halves, as one side of a session keeps them."""

    __slots__ = ("received", "sent")

    def __init__(self) -> None:
        self.received = Received()
        self.sent = Sent()

    def resume(self, account: Account) -> tuple[list[Buffer], list[Tail]]:
        """The other side is at `account`: what to send first on the new stream, and the tails to send again."""
        self.sent.acknowledge(account)
        return self.sent.replay(account), self.sent.tails()
