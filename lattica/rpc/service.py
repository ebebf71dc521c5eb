"""The RPC service of a node: calls to peers, and services that peers can call.

    rpc = RpcService(host)
    rpc.serve("expert", Expert())
    y = await rpc.call(peer, "expert.forward", x, timeout=5)
    async for token in rpc.stream(peer, "expert.generate", "hi"): ...
    async with rpc.open_call(peer, "expert.chat") as call:
        await call.send("hello")
        await call.end()
        async for answer in call: ...

There is one session with a peer, opened by whoever calls first and used by both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import trio

from lattica.errors import DeadlineExceeded
from lattica.host import NetworkChanged, PeerConnected
from lattica.interfaces import Stream
from lattica.rpc.batch import BatchingTurn
from lattica.rpc.buffers import POOLED_OVER, TailPool
from lattica.rpc.channel import Channel, Speaker
from lattica.rpc.client import ItemStream, OpenCall, SessionOver, unary_call
from lattica.rpc.methods import Method, Style, methods_of
from lattica.rpc.paths import SessionPaths
from lattica.rpc.peer_channel import PeerChannel
from lattica.rpc.pool import TaskPool
from lattica.rpc.server import InboundCall
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import RPC_MAX_SESSIONS, RPC_MAX_VALUE
from lattica_protocols.rpc.calls import Call
from lattica_protocols.rpc.connection import DEFAULT_LIMITS, RpcConnection, RpcLimits
from lattica_protocols.rpc.frames import (
    HEADER,
    HEADER_SIZE,
    HELLO,
    PROTOCOL_ID,
    RESUME,
    SERVICE_NOT_FOUND,
    Buffer,
    decode_hello_head_untrusted,
)
from lattica_protocols.rpc.resume import FEATURE, MAX_RESUME_HEAD

if TYPE_CHECKING:
    from lattica.host import Host
    from lattica_protocols.peer_id import PeerId

DefaultHandler: TypeAlias = Callable[[Channel, Call, bytes, Buffer], bool]
"""Takes a REQUEST for a service that is not here, undecoded. True: the call is its own now."""

MAX_HELLO: Final = 1024
"""Bytes of a HELLO's head: ours has about 60."""
HELLO_SECONDS: Final = 10.0
"""It travels with the stream's first data; this is for paths that lose packets."""
IDLE_SECONDS: Final = 150.0
"""A session without calls is closed after one to two of these; opening a new one costs one round trip."""
TRIM_SECONDS: Final = 5.0
"""Memory of tails is given back when none of its size came for so long."""
WORKER_THREADS: Final = 16
"""Plain `def` handlers that run at once."""


class RpcService:
    """Calls and services of one node."""

    def __init__(self, host: Host, *, limits: RpcLimits = DEFAULT_LIMITS) -> None:
        self.turn = BatchingTurn()
        """To be shared with other channels that calls are forwarded to, so that writes stay together."""
        self.allocate: Callable[[int], Buffer] | None = None
        """Where tails are received into, if not into this node's own memory (a forwarder: into shared memory)."""
        self._tails = TailPool()
        self._trimming = False
        self._host = host
        self._limits = limits
        self._methods: dict[str, Method] = {}
        self._services: dict[str, list[str]] = {}
        self._default: DefaultHandler | None = None
        self._channels: dict[PeerId, PeerChannel] = {}
        self._sessions: dict[tuple[PeerId, bytes], PeerChannel] = {}
        self._paths = SessionPaths(host, lambda peer, session: self._sessions.get((peer, session)))
        self._connecting: dict[PeerId, trio.Lock] = {}
        self._pool = TaskPool(host.nursery)
        self._threads = trio.CapacityLimiter(WORKER_THREADS)
        host.nursery.start_soon(self.turn.run)
        host.nursery.start_soon(self._follow_paths)
        host.nursery.start_soon(self._retire_idle)
        host.handle(PROTOCOL_ID, self._accept)

    # -- services -------------------------------------------------------------------------------------
    def serve(self, name: str, service: object, *, max_value: int = RPC_MAX_VALUE) -> None:
        """Offer the public methods of an object, or a mapping of functions, as `name.method`.

        `max_value`: bytes that the lists, dicts and strings of one call's arguments or of one item may have; arrays
        and bytes do not count. More is refused undecoded: decoding them holds up the event loop.
        See `lattica.rpc.methods` for how they run. `ValueError` when the name is taken or has no methods.
        """
        if not name or name.startswith("_") or len(name.encode()) > 127:
            raise ValueError(f"{name!r} is no name for a service: 1 to 127 bytes, no underscore in front")
        if name in self._services:
            raise ValueError(f"the service {name} is offered already")
        methods = {f"{name}.{method}": found for method, found in methods_of(service, max_value).items()}
        self._methods |= methods
        self._services[name] = sorted(methods)

    def unserve(self, name: str) -> None:
        """Stop offering a service; calls that run finish. Does nothing when there is none of that name."""
        for method in self._services.pop(name, []):
            del self._methods[method]

    def services(self) -> dict[str, list[str]]:
        """Names of the services offered here, each with its methods."""
        return {name: list(methods) for name, methods in self._services.items()}

    def calls_in_flight(self) -> int:
        """Calls of peers that run here or are being forwarded."""
        return sum(channel.machine.inbound_calls for channel in self._sessions.values())

    def set_default_handler(self, handler: DefaultHandler | None) -> None:
        """Who takes calls for services that are not here: a daemon that knows its workers. See `channel.splice`."""
        self._default = handler

    def method(self, name: str) -> Method | None:
        """The method that `"service.method"` names here."""
        return self._methods.get(name)

    def run_method(self, channel: Speaker, call: Call, method: Method, head: bytes, tail: Buffer) -> None:
        """Run a method for a REQUEST that came on any channel; the answer goes back on it."""
        job = InboundCall(channel, call, method, self._threads)
        if not job.prepare(head, tail):
            return
        if method.style is Style.INLINE and not channel.congested():
            job.run_inline()
        else:
            self._pool.start(job)

    # -- calls ------------------------------------------------------------------------------------------
    async def call(
        self, peer: PeerId, method: str, /, *args: object, timeout: float | None = None, **kwargs: object
    ) -> Any:
        """Call `"service.method"` of a peer and wait for the result. `timeout`: seconds, connecting included.

        Values: see `lattica_protocols.rpc.tensors`. What goes out must not change until the call returns.
        Cancelling cancels the handler. Errors: `RemoteError` (the handler raised), `ServiceNotFound`,
        `InvalidArgument`, `ResourceExhausted`, `DeadlineExceeded`, `CallCancelled`, `ConnectionLost` (the peer
        went away while the call ran), `ConnectError` (no connection could be made), `PeerMisbehaved`.
        """
        deadline = None if timeout is None else trio.current_time() + timeout
        while True:
            channel = self._channels.get(peer)
            if channel is None:
                channel = await self.channel(peer, deadline)
            try:
                return await unary_call(channel, method, args, kwargs, deadline)
            except SessionOver:
                await trio.lowlevel.checkpoint()

    def stream(
        self, peer: PeerId, method: str, /, *args: object, timeout: float | None = None, **kwargs: object
    ) -> ItemStream:
        """Call a method that yields, and iterate over what it yields. Leaving the loop cancels the call as soon
        as nobody holds the iterator any more. `timeout`, for all of it, and errors as in `call`."""
        deadline = None if timeout is None else trio.current_time() + timeout
        call = OpenCall(self, peer, method, args, kwargs, sends=False, receives=True, deadline=deadline)
        return ItemStream(call)

    def open_call(
        self,
        peer: PeerId,
        method: str,
        /,
        *args: object,
        sends: bool = True,
        receives: bool = True,
        timeout: float | None = None,
        **kwargs: object,
    ) -> OpenCall:
        """A call that streams, for `async with`. `sends`: we send items; `receives`: the method yields items
        (otherwise it returns one `result()`). `timeout` and errors as in `call`; they are raised where the object is
        used."""
        deadline = None if timeout is None else trio.current_time() + timeout
        return OpenCall(self, peer, method, args, kwargs, sends=sends, receives=receives, deadline=deadline)

    def open_channel(self, peer: PeerId) -> PeerChannel | None:
        """The session with a peer when there is one that takes calls."""
        return self._channels.get(peer)

    async def channel(self, peer: PeerId, deadline: float | None = None) -> PeerChannel:
        """The session with a peer, opened when there is none. Errors: `ConnectError`, `DeadlineExceeded`."""
        lock = self._connecting.setdefault(peer, trio.Lock())
        try:
            with trio.fail_at(float("inf") if deadline is None else deadline):
                async with lock:
                    channel = self._channels.get(peer)
                    if channel is None:
                        stream = await self._host.open_stream(peer, PROTOCOL_ID)
                        channel = await self._start_session(stream)
        except trio.TooSlowError:
            raise DeadlineExceeded(f"the deadline passed before {peer.short()} was connected") from None
        finally:
            if not lock.locked():
                self._connecting.pop(peer, None)
        return channel

    # -- sessions -----------------------------------------------------------------------------------------
    async def _start_session(self, stream: Stream) -> PeerChannel:
        session = self._host.rng.getrandbits(128).to_bytes(16, "little")
        machine = self._machine(initiator=True, session=session)
        channel = self._adopt(stream, machine, session, initiator=True)
        await self._host.nursery.start(self._run, channel)
        self._leave_relay(channel)  # a direct path may have come up while the session was opened
        return channel

    async def _accept(self, stream: Stream) -> None:
        """An inbound stream: a control stream or one for long tails, as its HELLO says, or one that takes a session
        over."""
        try:
            with trio.fail_after(HELLO_SECONDS):
                header = await stream.receive_exactly(HEADER_SIZE)
                body, kind, _, head_length, _ = HEADER.unpack(header)
                limit = {HELLO: MAX_HELLO, RESUME: MAX_RESUME_HEAD}.get(kind, 0)
                if body != head_length or body > limit:
                    raise RemoteProtocolError("the stream does not begin with HELLO or RESUME")
                head = await stream.receive_exactly(body)
        except trio.TooSlowError:
            raise RemoteProtocolError(f"no HELLO within {HELLO_SECONDS:g} s") from None
        if kind == RESUME:
            await self._paths.accept(stream, head)
            return
        hello = decode_hello_head_untrusted(head)
        key = (stream.connection.peer_id, hello.session)
        if hello.bulk:
            session = self._sessions.get(key)
            if session is None:
                raise RemoteProtocolError("a bulk stream of a session that is not here")
            await session.serve_bulk(stream, hello.epoch)
            return
        if not hello.session or key in self._sessions:
            raise RemoteProtocolError("a session without a name, or with one in use")
        if sum(peer == key[0] for peer, _ in self._sessions) >= RPC_MAX_SESSIONS:
            raise RemoteProtocolError(f"more than {RPC_MAX_SESSIONS} sessions")
        machine = self._machine(initiator=False, session=b"")
        machine.receive_data(header + head, trio.current_time())
        await self._run(self._adopt(stream, machine, hello.session, initiator=False))

    def _machine(self, *, initiator: bool, session: bytes) -> RpcConnection:
        return RpcConnection(
            initiator=initiator,
            session=session,
            limits=self._limits,
            features=frozenset({FEATURE}),
            allocate=self._allocate,
        )

    def _adopt(self, stream: Stream, machine: RpcConnection, session: bytes, *, initiator: bool) -> PeerChannel:
        peer = stream.connection.peer_id

        async def open_bulk() -> Stream:
            return await self._host.open_stream(peer, PROTOCOL_ID, stream_class="bulk")

        channel = PeerChannel(stream, machine, session, self._on_request, open_bulk, self.turn, initiator=initiator)
        channel.on_retired = self._retired
        channel.on_resumed = self._resumed
        channel.reopen = self._paths.reopen
        self._sessions[peer, session] = channel
        self._channels.setdefault(peer, channel)
        return channel

    def _retired(self, channel: PeerChannel) -> None:
        if self._channels.get(channel.peer) is channel:
            del self._channels[channel.peer]

    def _resumed(self, channel: PeerChannel) -> None:
        if not channel.machine.going_away:
            self._channels.setdefault(channel.peer, channel)
            self._leave_relay(channel)

    async def _follow_paths(self) -> None:
        """Leave relays behind: when a direct connection comes up, the initiator of each session takes it there."""
        async for event in self._host.subscribe():
            if isinstance(event, PeerConnected) and event.connection.path != "relay":
                for channel in list(self._sessions.values()):
                    if channel.peer == event.peer:
                        self._leave_relay(channel)
            elif isinstance(event, NetworkChanged):
                self._paths.network_changed()

    def _leave_relay(self, channel: PeerChannel) -> None:
        direct = self._host.connection(channel.peer)
        if direct is None or direct.path == "relay" or channel.stream.connection.path != "relay":
            return
        if channel.initiator:
            channel.start(self._paths.leave_relay, channel)
        elif channel.machine.peer is not None and channel.machine.resumption is None:
            channel.retire()

    async def _retire_idle(self) -> None:
        """Close sessions that nobody used for a while, so that they do not keep connections open for ever."""
        seen: dict[PeerChannel, int] = {}
        while True:
            await trio.sleep(IDLE_SECONDS)
            channels = list(self._sessions.values())
            for channel in channels:
                machine = channel.machine
                idle = not machine.outbound_calls and not machine.inbound_calls
                if idle and seen.get(channel) == machine.calls_seen:
                    channel.retire()
            seen = {channel: channel.machine.calls_seen for channel in channels}

    async def _run(self, channel: PeerChannel, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        try:
            await channel.run(task_status)
        finally:
            del self._sessions[channel.peer, channel.session]
            self._retired(channel)

    def _allocate(self, length: int) -> Buffer:
        if self.allocate is not None:
            return self.allocate(length)
        if length > POOLED_OVER and not self._trimming:
            self._trimming = True
            self._host.nursery.start_soon(self._trim_tails)
        return self._tails.allocate(length)

    async def _trim_tails(self) -> None:
        while True:
            await trio.sleep(TRIM_SECONDS)
            self._tails.trim()
            if not self._tails.kept_bytes:
                self._trimming = False
                return

    # -- requests -----------------------------------------------------------------------------------------
    def _on_request(self, channel: Channel, call: Call, head: bytes, tail: Buffer) -> None:
        method = self._methods.get(call.method)
        if method is None:
            if self._default is None or not self._default(channel, call, head, tail):
                self._not_found(channel, call)
            return
        assert isinstance(channel, PeerChannel)
        self.run_method(channel, call, method, head, tail)

    def _not_found(self, channel: Channel, call: Call) -> None:
        service = call.method.rpartition(".")[0]
        if service in self._services:
            message = f"the service {service} has no method {call.method.rpartition('.')[2]}"
        else:
            message = f"no service {service or call.method} is offered here"
        channel.machine.fail(call, SERVICE_NOT_FOUND, "ServiceNotFound", message)
        channel.flush()
