"""The daemon as a switchboard between the workers on its machine and the peers of the network.

    worker -> daemon A -> peer stream -> daemon B -> worker

A request of a worker names the peer to call in its route; a request that goes to a worker names the peer that called.
Nothing is decoded on the way but the request's head: call ids are rewritten, and cancellation, deadlines, items,
credit, results and errors pass through in both directions (`lattica.rpc.channel.Relay`). A tail that came from a
worker as shared memory goes to the network from that memory; one that came from the network was received into shared
memory and goes to the worker as that.

Where a request of a worker goes:

| route | service | goes to |
|---|---|---|
| empty | of the daemon for its own machine (`serve_local`), or public | the daemon |
| empty, or this peer | of a worker | that worker |
| another peer | any | that peer |

Several workers may register one service: each call goes to the one with the fewest calls running, in turns among
equals.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from lattica.errors import ConnectError, LatticaError
from lattica.local.memfd import SegmentPool
from lattica.local.server import LocalClient
from lattica.rpc.channel import Channel, splice
from lattica.rpc.methods import Method, methods_of
from lattica.rpc.peer_channel import PeerChannel
from lattica.rpc.status import forward_status_of
from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.limits import LOCAL_MAX_METHODS, LOCAL_MAX_SERVICE_NAME, LOCAL_MAX_SERVICES
from lattica_protocols.peer_id import PeerId
from lattica_protocols.rpc.calls import Call
from lattica_protocols.rpc.frames import CANCEL, INVALID_ARGUMENT, RESOURCE_EXHAUSTED, SERVICE_NOT_FOUND, Buffer
from lattica_protocols.rpc.tensors import decode_args_untrusted, encode_value

if TYPE_CHECKING:
    from lattica.rpc.service import RpcService

REGISTRAR: Final = "local"
"""Through it a worker tells what it offers: `local.register(name, methods)`, `local.unregister(name)`."""
UNREAD_LIMIT: Final = 16 << 20
"""Unsent bytes for a worker above which its calls are refused: it does not keep up."""
_ROUTES_KEPT: Final = 4096


@dataclass(slots=True, eq=False)
class _Worker:
    """One client that offers a service."""

    client: LocalClient
    methods: list[str]


class Forwarder:
    """Routes calls. Give `on_local_request` and `client_gone` to the local server, and it takes the peers' itself."""

    def __init__(
        self, rpc: RpcService, peer_id: PeerId, nursery: trio.Nursery, pool: SegmentPool | None = None
    ) -> None:
        self._rpc = rpc
        self._peer_id = peer_id
        self._own_route = peer_id.to_bytes()
        self._nursery = nursery
        self._methods: dict[str, Method] = {}
        self._local_names: set[str] = {REGISTRAR}
        self._workers: dict[str, list[_Worker]] = {}
        self._by_client: dict[LocalClient, set[str]] = {}
        self._peers: dict[bytes, PeerId] = {}
        self._queues: dict[PeerId, _PeerQueue] = {}
        self.pool = SegmentPool() if pool is None else pool
        """Shared memory for long tails. The local server uses the same, so that nothing is copied on the way."""
        rpc.allocate = self.pool.allocate_tail
        rpc.set_default_handler(self.on_peer_request)

    # -- services -----------------------------------------------------------------------------------------
    def serve_local(self, name: str, service: object) -> None:
        """Offer a service to the clients on this machine only, never to peers."""
        self._local_names.add(name)
        self._methods |= {f"{name}.{method}": found for method, found in methods_of(service).items()}

    def services(self) -> dict[str, list[str]]:
        """What the workers offer: names of services, each with `service.method` names."""
        found: dict[str, set[str]] = {}
        for name, workers in self._workers.items():
            found[name] = {method for worker in workers for method in worker.methods}
        return {name: sorted(methods) for name, methods in found.items()}

    def client_gone(self, client: LocalClient) -> None:
        """A client is gone: its services with it."""
        for name in self._by_client.pop(client, ()):
            self._remove(name, client)

    def _register(self, client: LocalClient, name: str, methods: list[str]) -> None:
        if not name or name.startswith("_") or "." in name or len(name.encode()) > LOCAL_MAX_SERVICE_NAME:
            raise ValueError(f"{name!r} is no name for a service: 1 to {LOCAL_MAX_SERVICE_NAME} bytes, no dot")
        if name in self._local_names or name in self._rpc.services():
            raise ValueError(f"the service {name} is the daemon's own")
        own = self._by_client.setdefault(client, set())
        if len(own) >= LOCAL_MAX_SERVICES or len(methods) > LOCAL_MAX_METHODS:
            raise ValueError("too many services or methods")
        if name in own:
            self._remove(name, client)
        own.add(name)
        self._workers.setdefault(name, []).append(_Worker(client, [f"{name}.{m}" for m in methods]))

    def _unregister(self, client: LocalClient, name: str) -> None:
        if name in self._by_client.get(client, ()):
            self._by_client[client].discard(name)
            self._remove(name, client)

    def _remove(self, name: str, client: LocalClient) -> None:
        left = [worker for worker in self._workers.get(name, ()) if worker.client is not client]
        if left:
            self._workers[name] = left
        else:
            self._workers.pop(name, None)

    # -- requests of peers --------------------------------------------------------------------------------
    def on_peer_request(self, channel: Channel, call: Call, head: bytes, tail: Buffer) -> bool:
        """A peer calls a service that the daemon does not have. True when a worker has it."""
        workers = self._workers.get(call.method.rpartition(".")[0])
        if workers is None:
            return False
        route = channel.peer.to_bytes() if isinstance(channel, PeerChannel) else self._own_route
        self._to_worker(channel, call, head, tail, workers, route)
        return True

    def _to_worker(
        self, channel: Channel, call: Call, head: bytes, tail: Buffer, workers: list[_Worker], route: bytes
    ) -> None:
        worker = workers[0]
        if len(workers) > 1:
            worker = min(workers, key=lambda w: w.client.machine.outbound_calls)
            workers.remove(worker)
            workers.append(worker)
        client = worker.client
        if client.queued_bytes() > UNREAD_LIMIT:
            _fail(channel, call, RESOURCE_EXHAUSTED, "ResourceExhausted", "the worker does not keep up")
            return
        if isinstance(channel, PeerChannel):
            client.answers_to.add(channel)
        splice(channel, call, head, tail, client, route)

    # -- requests of workers ------------------------------------------------------------------------------
    def on_local_request(self, channel: Channel, call: Call, head: bytes, tail: Buffer) -> None:
        """A REQUEST from a client on this machine."""
        assert isinstance(channel, LocalClient)
        route = call.route
        if route and route != self._own_route:
            self._to_peer(channel, call, head, tail, route)
            return
        method = None if route else self._methods.get(call.method)
        if method is not None:
            self._rpc.run_method(channel, call, method, head, tail)
        elif not route and call.method.startswith(f"{REGISTRAR}."):
            self._registrar(channel, call, head, tail)
        else:
            self._to_self(channel, call, head, tail)

    def _to_self(self, channel: LocalClient, call: Call, head: bytes, tail: Buffer) -> None:
        """A client calls what peers can call here."""
        method = self._rpc.method(call.method)
        if method is not None:
            self._rpc.run_method(channel, call, method, head, tail)
        elif not self.on_peer_request(channel, call, head, tail):
            message = f"no service {call.method.rpartition('.')[0] or call.method} is offered here"
            _fail(channel, call, SERVICE_NOT_FOUND, "ServiceNotFound", message)

    def _to_peer(self, channel: Channel, call: Call, head: bytes, tail: Buffer, route: bytes) -> None:
        peer = self._peers.get(route)
        if peer is None:
            try:
                peer = PeerId.from_bytes_untrusted(route)
            except RemoteProtocolError as error:
                _fail(channel, call, INVALID_ARGUMENT, "InvalidArgument", f"no peer id: {error}")
                return
            if len(self._peers) >= _ROUTES_KEPT:
                self._peers.clear()
            self._peers[route] = peer
        queue = self._queues.get(peer)
        if queue is None:
            target = self._rpc.open_channel(peer)
            ready = target is not None and target.machine.peer is not None and not target.machine.suspended
            if target is not None and ready and not target.congested():
                splice(channel, call, head, tail, target)
                return
            queue = self._queues[peer] = _PeerQueue(peer)
            self._nursery.start_soon(self._run_queue, queue)
        queue.requests.append(_Waiting(channel, call, head, tail))

    async def _run_queue(self, queue: _PeerQueue) -> None:
        """Connect to a peer, or wait until it takes more, and pass on what came meanwhile."""
        try:
            while queue.requests:
                target = await self._rpc.channel(queue.peer)
                await target.greeted.wait()
                await target.ready()
                machine = target.machine
                while queue.requests and not target.congested():
                    if machine.going_away or machine.lost or machine.suspended:
                        break  # since it was ready: the rest goes to the session that comes after it
                    queue.requests.popleft().pass_on(target)
                await target.writable()
        except (LatticaError, RemoteProtocolError) as error:
            public = error if isinstance(error, LatticaError) else ConnectError(str(error))
            code, kind, message = forward_status_of(public)
            for waiting in queue.requests:
                _fail(waiting.channel, waiting.call, code, kind, message)
        finally:
            del self._queues[queue.peer]

    def _registrar(self, channel: LocalClient, call: Call, head: bytes, tail: Buffer) -> None:
        try:
            match decode_args_untrusted(head, tail, call.flags):
                case [str(name), list(methods)], {} if all(isinstance(m, str) for m in methods):
                    self._register(channel, name, methods)
                case [str(name)], {}:
                    self._unregister(channel, name)
                case _:
                    raise ValueError("the arguments are a name and its methods")
        except (ValueError, RemoteProtocolError, LocalProtocolError) as error:
            _fail(channel, call, INVALID_ARGUMENT, "InvalidArgument", str(error))
            return
        channel.machine.respond(call, encode_value(None)[0])
        channel.flush()


class _PeerQueue:
    """Requests that wait for a peer."""

    __slots__ = ("peer", "requests")

    def __init__(self, peer: PeerId) -> None:
        self.peer = peer
        self.requests: deque[_Waiting] = deque()


class _Waiting:
    """One of them, with the frames of the call that came after it."""

    __slots__ = ("call", "channel", "frames", "head", "tail")

    def __init__(self, channel: Channel, call: Call, head: bytes, tail: Buffer) -> None:
        self.channel = channel
        self.call = call
        self.head = head
        self.tail = tail
        self.frames: list[tuple[int, bytes, Buffer]] = []
        call.owner = self

    def on_frame(self, kind: int, call: Call, head: bytes, tail: Buffer) -> None:
        if kind == CANCEL:
            self.head = self.tail = b""  # the peer may be long in coming, and nobody waits for it any more
            self.frames.clear()
        else:
            self.frames.append((kind, head, tail))

    def pass_on(self, target: Channel) -> None:
        splice(self.channel, self.call, self.head, self.tail, target)
        for kind, head, tail in self.frames:
            owner = self.call.owner
            if owner is not None and not self.call.over:
                owner.on_frame(kind, self.call, head, tail)


def _fail(channel: Channel, call: Call, code: int, kind: str, message: str) -> None:
    channel.machine.fail(call, code, kind, message)
    channel.flush()
