"""What the parts of the node see of each other: streams, connections and transports.

A `Transport` dials and listens. A `Connection` is one authenticated, encrypted, multiplexed path to one peer.
A `Stream` is one bidirectional byte stream on it. Services (identify, Kademlia, RPC, content) know only these
names, so each of them runs unchanged over TCP, QUIC, a relayed circuit, and the in-memory network of
`lattica.testing`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    import trio

    from lattica_protocols.multiaddr import Multiaddr
    from lattica_protocols.peer_id import PeerId

Buffer: TypeAlias = bytes | bytearray | memoryview
Direction: TypeAlias = Literal["inbound", "outbound"]
Path: TypeAlias = Literal["tcp", "quic", "relay", "memory"]
StreamClass: TypeAlias = Literal["control", "bulk"]


class StreamSink(Protocol):
    """Receives a stream's bytes by call instead of by task: no wake-up, no copy.

    All three are called from the task that reads the connection; they must not block and must not raise
    anything but `RemoteProtocolError` (which resets the stream).
    """

    def data_received(self, data: memoryview) -> None:
        """More bytes. `data` is valid during this call only: the buffer behind it is used again."""

    def eof_received(self) -> None:
        """The peer will send no more. Called at most once."""

    def stream_closed(self, error: Exception | None) -> None:
        """The stream is gone in both directions. Last call. `None` when both sides finished in order."""


class Stream(ABC):
    """One bidirectional byte stream.

    Reading is either by `receive_some`/`receive_into` or, after `set_sink`, by call. Errors: `StreamReset` when
    the peer or we reset it, `ConnectionLost` when the connection under it is gone (both in `lattica.errors`).
    """

    connection: Connection
    protocol: str | None = None
    """The protocol that multistream-select agreed on, `None` before that."""

    # -- sending ------------------------------------------------------------------------------------------
    @abstractmethod
    def write(self, *buffers: Buffer) -> None:
        """Queue bytes without waiting. Whatever is queued in one scheduling turn leaves in one send.

        The buffers are kept by reference and must not change until they were sent. The queue has no bound of its
        own: callers that can produce without limit await `drain` between writes, or use `send_all`.
        """

    def write_now(self, *buffers: Buffer) -> None:
        """`write` by somebody who has gathered already: where it can, it leaves before this returns."""
        self.write(*buffers)

    def write_through(self, data: memoryview) -> None:
        """As `write`, for memory that changes after this call. Sent at once from where it is as far as that goes."""
        self.write(bytes(data))

    @abstractmethod
    async def drain(self, below: int | None = None) -> None:
        """Wait until fewer than `below` bytes of this stream are queued, by default a high-water mark of 256 KiB."""

    @abstractmethod
    async def send_all(self, data: Buffer) -> None:
        """Queue `data` and wait until all of it was consumed (encrypted or copied): it may be changed then."""

    @abstractmethod
    def queued_bytes(self) -> int:
        """Bytes written and not yet consumed by the connection."""

    @abstractmethod
    async def close_write(self) -> None:
        """Finish our direction: the peer reads an end of stream after all that was written."""

    # -- receiving ----------------------------------------------------------------------------------------
    @abstractmethod
    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        """At least one byte, `b""` at the end of the stream. For headers and small messages."""

    @abstractmethod
    async def receive_into(self, buffer: Buffer) -> int:
        """Fill a part of `buffer` with at least one byte; 0 at the end of the stream. One copy, no allocation."""

    @abstractmethod
    def push_back(self, data: bytes) -> None:
        """Put bytes that were read too far back to the front. They go to a sink that is set later, too."""

    @abstractmethod
    def set_sink(self, sink: StreamSink) -> None:
        """From now on deliver by call. What is already buffered is delivered before this returns."""

    @abstractmethod
    def pause_sink(self) -> None:
        """Stop granting the peer more window: at most one stream window more arrives until `resume_sink`."""

    @abstractmethod
    def resume_sink(self) -> None:
        """Grant window again."""

    def limit_window(self, size: int) -> None:  # noqa: B027  # transports without such a limit do nothing
        """Let the peer never have much more than `size` bytes on the way. Without effect where it cannot be set."""

    # -- ending -------------------------------------------------------------------------------------------
    @abstractmethod
    def reset(self) -> None:
        """Abort both directions at once. Safe to call at any time, also twice."""

    @abstractmethod
    async def aclose(self) -> None:
        """Finish our direction and stop reading. What the peer still sends is thrown away."""

    @contextmanager
    def reset_on_error(self) -> Iterator[None]:
        """Reset the stream when the block raises or is cancelled: neither side keeps half of an exchange."""
        try:
            yield
        except BaseException:  # trio.Cancelled is no Exception; raised again, whatever it is
            self.reset()
            raise

    # -- framing used by the libp2p protocols -----------------------------------------------------------------
    async def receive_exactly(self, n: int) -> bytes:
        """Exactly `n` bytes. Raises `StreamReset` when the stream ends before."""
        from lattica.errors import StreamReset

        out = bytearray(n)
        view = memoryview(out)
        filled = 0
        while filled < n:
            got = await self.receive_into(view[filled:])
            if got == 0:
                raise StreamReset(f"the stream ended after {filled} of {n} bytes")
            filled += got
        return bytes(out)

    async def receive_frame(self, max_bytes: int) -> bytes:
        """One message of `uvarint(length) || bytes`. Raises `RemoteProtocolError` when it is over `max_bytes`."""
        from lattica_protocols.errors import RemoteProtocolError

        length = shift = 0
        while True:
            byte = (await self.receive_exactly(1))[0]
            length |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
            if shift > 28:
                raise RemoteProtocolError("length prefix over 4 bytes")
        if length > max_bytes:
            raise RemoteProtocolError(f"message of {length} bytes is over the limit of {max_bytes}")
        return await self.receive_exactly(length)

    async def send_frame(self, payload: Buffer) -> None:
        """Send `uvarint(length) || payload`."""
        from lattica_protocols.varint import encode_uvarint

        self.write(encode_uvarint(len(payload)))
        await self.send_all(payload)


class Connection(ABC):
    """One authenticated path to one peer. The peer id was proven by the handshake."""

    peer_id: PeerId
    local_addr: Multiaddr
    remote_addr: Multiaddr
    """Without `/p2p`. For a relayed path: `<relay addr>/p2p/RELAY/p2p-circuit`."""
    direction: Direction
    path: Path
    opened_at: float
    """trio.current_time() when the handshake was done."""
    sent_bytes: int = 0
    received_bytes: int = 0
    rtt: float | None = None
    """Smoothed round-trip time in seconds, `None` before the first measurement."""
    observed_addr: Multiaddr | None = None
    """Where the peer sees us, as it says by identify; `None` before it did."""
    closed: trio.Event
    """Set once, when the connection is gone, whoever ended it."""
    close_error: Exception | None = None
    """Why it is gone: `None` for an orderly end."""
    for_bulk: bool = False
    """Set apart for bulk: calls take another connection with the same peer, so that they do not queue behind it."""
    on_unread: Callable[[int], None] | None = None
    """Called with a number of bytes that arrived and wait to be read, while they are delivered."""
    _doubted_at: int | None = None
    """What `received_bytes` was when it was doubted."""

    @abstractmethod
    async def open_stream(self) -> Stream:
        """A new stream, before multistream-select. Waits while the peer's limit on streams is reached."""

    @abstractmethod
    async def accept_stream(self) -> Stream:
        """The next stream the peer opens. Raises `ConnectionLost` when the connection is gone."""

    @abstractmethod
    async def aclose(self) -> None:
        """Say goodbye and close. All streams end with `ConnectionLost`. Safe to call twice."""

    @abstractmethod
    def abort(self, error: Exception | None = None) -> None:
        """Close at once, without waiting. Safe to call at any time."""

    def set_apart_for_bulk(self) -> None:
        """From now on it is `for_bulk`."""
        self.for_bulk = True

    def expect(self, waits: Callable[[], bool]) -> None:  # noqa: B027  # nothing to do where nothing can fall silent
        """`waits()` tells whether something of the peer is waited for: its silence then means that the path is dead."""

    def unexpect(self, waits: Callable[[], bool]) -> None:  # noqa: B027
        """Ask `waits` no more. Does nothing when it is not asked."""

    def keep_up(self, every: float) -> None:  # noqa: B027
        """Let no more than `every` seconds pass in silence while nobody waits for the peer. 25 until this is called."""

    def ask(self) -> None:  # noqa: B027
        """Ask the peer for a sign of life, which `received_bytes` tells."""

    def doubt(self) -> None:
        """Something suggests that the path is dead: others are preferred until the peer is heard again. It is asked
        for a sign of life."""
        self._doubted_at = self.received_bytes
        self.ask()

    @property
    def doubtful(self) -> bool:
        """Doubted, and nothing was heard since."""
        return self._doubted_at == self.received_bytes

    def stream_count(self) -> int:
        """Streams open now, both directions."""
        return 0

    def unread(self) -> int:
        """Bytes of all streams that arrived and were not read."""
        return 0


OnConnection: TypeAlias = Callable[[Connection], Awaitable[None]]
"""Called in a task of its own for each inbound connection, after its handshake; the connection lives on after it."""


class Listener(ABC):
    """One bound socket."""

    addrs: list[Multiaddr]
    """Where it listens, with the real port; wildcard addresses are not expanded."""

    @abstractmethod
    async def aclose(self) -> None:
        """Stop accepting. Connections that were accepted stay."""


class Transport(ABC):
    """Dials and listens for one kind of address. Its tasks run in the nursery it was made with."""

    @abstractmethod
    def can_dial(self, addr: Multiaddr) -> bool: ...

    @abstractmethod
    async def dial(self, addr: Multiaddr, expected: PeerId | None) -> Connection:
        """Connect and shake hands. Errors: `DialError` (nobody there, refused, handshake failed),
        `WrongPeer` (another peer id answered: it is named). Cancellable at any point without leaks."""

    @abstractmethod
    def can_listen(self, addr: Multiaddr) -> bool: ...

    @abstractmethod
    async def listen(self, addr: Multiaddr, on_connection: OnConnection) -> Listener: ...
