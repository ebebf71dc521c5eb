"""multistream-select 1.0: the two ends of a stream agree on the protocol spoken on it.

Wire: each message is `uvarint(length) || text || "\\n"`, the length counts the newline.

    both send        /multistream/1.0.0          (13 2f6d...300a, 20 bytes), at once, without waiting
    initiator        /some/protocol
    responder        /some/protocol              agreed: what follows belongs to that protocol
                     na                          no; the initiator proposes the next one
    initiator        ls                          responder answers with one message: all its protocols, each
                                                 as `uvarint(length) || name || "\\n"`

An initiator that is *lazy* sends the header, its only proposal and the protocol's first bytes in one flight; the answer
is checked when it comes. After a `na` the stream has to be reset: what was sent along was garbage to the responder.

Both machines: `receive_data(bytes)`, `poll_transmit() -> bytes`, `selected`, `take_leftover()`. They have no timer; a
responder's answer lies in `poll_transmit` until the caller wants to send it, so it may leave together with the
protocol's first answer (but has to be sent at once when the initiator waits for it: see `Responder.peer_waits`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence

from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.limits import MAX_MULTISTREAM_MESSAGE_BYTES, MAX_MULTISTREAM_PROPOSALS
from lattica_protocols.varint import encode_uvarint

MULTISTREAM_PROTOCOL = "/multistream/1.0.0"
NOT_AVAILABLE = "na"
LIST = "ls"


def encode_message(text: str) -> bytes:
    """One message. `LocalProtocolError` when it is over the limit or contains a newline."""
    data = text.encode() + b"\n"
    if len(data) > MAX_MULTISTREAM_MESSAGE_BYTES or "\n" in text:
        raise LocalProtocolError(f"{text[:100]!r} cannot be a protocol name")
    return encode_uvarint(len(data)) + data


_HEADER = encode_message(MULTISTREAM_PROTOCOL)


class MessageBuffer:
    """Cuts what arrives into messages; what was not asked for yet stays."""

    def __init__(self) -> None:
        self._data = bytearray()

    def append(self, data: bytes | bytearray | memoryview) -> None:
        self._data += data

    def next_message_untrusted(self) -> str | None:
        """The next whole message without its newline, None when it is not all there yet."""
        # The length is at most two bytes, as messages are at most 1024: a longer varint is over the limit anyway.
        data = self._data
        if not data:
            return None
        length, start = data[0], 1
        if length >= 0x80:
            if len(data) < 2:
                return None
            length, start = length & 0x7F | data[1] << 7, 2
            if data[1] == 0:
                raise RemoteProtocolError("multistream length is not minimal")
        if not 0 < length <= MAX_MULTISTREAM_MESSAGE_BYTES:
            raise RemoteProtocolError(f"multistream message over {MAX_MULTISTREAM_MESSAGE_BYTES} bytes, or empty")
        if len(data) < start + length:
            return None
        raw = bytes(data[start : start + length])
        del data[: start + length]
        if raw[-1:] != b"\n":
            raise RemoteProtocolError("multistream message without a newline at its end")
        try:
            return raw[:-1].decode()
        except UnicodeDecodeError:
            raise RemoteProtocolError("multistream message is not UTF-8") from None

    def take(self) -> bytes:
        """All bytes that are left."""
        data = bytes(self._data)
        self._data.clear()
        return data

    def __len__(self) -> int:
        return len(self._data)


class Initiator:
    """The side that opened the stream. It proposes `protocols` in order until one is accepted.

    With `lazy` there is exactly one protocol and `selected` is set from the beginning; the caller sends its first bytes
    right behind `poll_transmit()`. The answer is still to be fed in: `confirmed` says that it came. `failed` is True
    when the responder has none of the protocols; after a lazy proposal the stream is then of no use any more.
    """

    def __init__(self, protocols: Sequence[str], *, lazy: bool = False) -> None:
        if not protocols or (lazy and len(protocols) != 1):
            raise LocalProtocolError("multistream needs a protocol to propose, and lazily exactly one")
        self._protocols = list(protocols)
        self._next = 0
        self._buffer = MessageBuffer()
        self._out = bytearray(_HEADER)
        self._header_seen = False
        self.selected: str | None = self._protocols[0] if lazy else None
        self.confirmed = False
        """The responder agreed; whatever it sends from now on belongs to the protocol."""
        self.failed = False
        self._lazy = lazy
        self._propose()

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Bytes of the responder; after it agreed they are kept for `take_leftover`."""
        self._buffer.append(data)
        while not (self.confirmed or self.failed):
            message = self._buffer.next_message_untrusted()
            if message is None:
                return
            self._receive_message(message)

    def poll_transmit(self) -> bytes:
        """What is to be sent now."""
        out = bytes(self._out)
        self._out.clear()
        return out

    def take_leftover(self) -> bytes:
        """Bytes behind the answer: the first ones of the protocol."""
        if not self.confirmed:
            raise LocalProtocolError("the responder has not agreed on a protocol yet")
        return self._buffer.take()

    def _propose(self) -> None:
        self._out += encode_message(self._protocols[self._next])

    def _receive_message(self, message: str) -> None:
        proposal = self._protocols[self._next]
        if not self._header_seen:
            if message != MULTISTREAM_PROTOCOL:
                raise RemoteProtocolError(f"the peer does not speak {MULTISTREAM_PROTOCOL}: {message[:100]!r}")
            self._header_seen = True
        elif message == proposal:
            self.selected = proposal
            self.confirmed = True
        elif message != NOT_AVAILABLE:
            raise RemoteProtocolError(f"the peer answered {message[:100]!r} when asked for {proposal!r}")
        elif self._lazy:
            self.selected = None
            self.failed = True
        elif self._next + 1 < len(self._protocols):
            self._next += 1
            self._propose()
        else:
            self.failed = True


class Responder:
    """The side that accepted the stream. `supported` says which protocols we speak: a container or a predicate.

    `listed` is what an `ls` is answered with; the default is `supported` itself when it can be iterated over.
    """

    def __init__(
        self, supported: Callable[[str], bool] | Container[str], *, listed: Iterable[str] | None = None
    ) -> None:
        self._is_supported = supported if callable(supported) else supported.__contains__
        if listed is None and isinstance(supported, Iterable):
            listed = supported
        self._listed: Iterable[str] = () if listed is None else listed
        self._buffer = MessageBuffer()
        self._out = bytearray(_HEADER)
        self._header_seen = False
        self._proposals = 0
        self.selected: str | None = None

    @property
    def peer_waits(self) -> bool:
        """Whether the answer has to be sent at once: the initiator has sent nothing behind its proposal, so it waits.

        When bytes of the protocol came along, the answer can travel with the protocol's own first bytes.
        """
        return len(self._buffer) == 0

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Bytes of the initiator; after the agreement they are kept for `take_leftover`."""
        self._buffer.append(data)
        while self.selected is None:
            message = self._buffer.next_message_untrusted()
            if message is None:
                return
            self._receive_message(message)

    def poll_transmit(self) -> bytes:
        """What is to be sent: header and answers."""
        out = bytes(self._out)
        self._out.clear()
        return out

    def take_leftover(self) -> bytes:
        """Bytes behind the proposal that was accepted: the first ones of the protocol."""
        if self.selected is None:
            raise LocalProtocolError("no protocol was agreed on yet")
        return self._buffer.take()

    def _receive_message(self, message: str) -> None:
        if not self._header_seen:
            if message != MULTISTREAM_PROTOCOL:
                raise RemoteProtocolError(f"the peer does not speak {MULTISTREAM_PROTOCOL}: {message[:100]!r}")
            self._header_seen = True
            return
        self._proposals += 1
        if self._proposals > MAX_MULTISTREAM_PROPOSALS:
            raise RemoteProtocolError(f"the peer proposed over {MAX_MULTISTREAM_PROPOSALS} protocols")
        if message == LIST:
            names = b"".join(encode_message(name) for name in sorted(self._listed)) + b"\n"
            self._out += encode_uvarint(len(names)) + names
        elif message != NOT_AVAILABLE and self._is_supported(message):
            self.selected = message
            self._out += encode_message(message)
        else:
            self._out += encode_message(NOT_AVAILABLE)
