"""A simulated internet on an event heap: hosts, NATs, carriers, delay, loss. No sockets, no trio, no real time.

    net = SimulatedInternet(seed=7, loss=0.2)
    home = net.box("apdf")                                # behind=net.box("sym") would put a carrier between
    alice = net.host("alice", behind=home, delay=0.01)    # 10 ms from her line to the core
    server = net.host("server")
    alice.attach(machine, on_event=print)                 # any machine with sockets: StunClient, Discovery, Puncher
    net.run(5.0)

Everything random comes from the seed, so a run replays. Time is `net.now`, in seconds. One way between two hosts on the
core takes the sum of their delays and up to `jitter` more; hosts in one network see each other directly after
`LAN_DELAY`. Each box and each of the `core_hops` routers takes one from a packet's TTL, and it dies at zero.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final, Protocol

from lattica.testing.nat_boxes import BOXES, Box, BoxKind, Packet
from lattica_protocols.nat.behaviour import Mapping
from lattica_protocols.stun import SocketAddr
from lattica_protocols.stun_client import Datagram

LAN_DELAY: Final = 0.0002
"""Seconds inside a home or a carrier's access network."""
_FIRST_PORT: Final = 40000

OnDatagram = Callable[[bytes, SocketAddr], None]


class DatagramMachine(Protocol):
    """A machine that uses UDP sockets by number: it opens one by sending from it."""

    def receive_datagram(self, socket: int, data: bytes, source: SocketAddr, now: float) -> object: ...
    def handle_timer(self, now: float) -> object: ...
    def next_timeout(self) -> float | None: ...
    def poll_transmit(self) -> list[Datagram]: ...
    def next_event(self) -> object | None: ...


class _Network:
    """Hosts and boxes that reach each other without translation: the core, or what is behind a box."""

    def __init__(self, gateway: Gateway | None, prefix: str) -> None:
        self.gateway = gateway
        self.members: dict[str, SimHost | Gateway] = {}
        self._addresses = (f"{prefix}.{high}.{low}" for high in range(256) for low in range(1, 255))

    def join(self, member: SimHost | Gateway) -> str:
        address = next(self._addresses)
        self.members[address] = member
        return address


class Gateway:
    """A box in its place: `inside` are those behind it."""

    def __init__(self, kind: BoxKind, outside: _Network, rng: random.Random, prefix: str) -> None:
        self.outside = outside
        self.box = Box(kind, outside.join(self), rng)
        self.inside = _Network(self, prefix)

    @property
    def address(self) -> str:
        """Its address outside."""
        return self.box.address

    @property
    def routes(self) -> bool:
        """Whether the addresses behind it are public ones: a firewall."""
        return self.box.kind.mapping is Mapping.NONE


class SimHost:
    """A computer. Made by `SimulatedInternet.host`."""

    def __init__(self, net: SimulatedInternet, name: str, network: _Network, delay: float) -> None:
        self.net = net
        self.name = name
        self.network = network
        self.delay = delay
        self.addresses = [network.join(self)]
        self.sent = 0
        self._sockets: dict[SocketAddr, OnDatagram] = {}
        self._ports = itertools.count(_FIRST_PORT)

    @property
    def address(self) -> str:
        return self.addresses[0]

    def add_address(self) -> str:
        """Give it one more."""
        self.addresses.append(self.network.join(self))
        return self.addresses[-1]

    def bind(self, on_datagram: OnDatagram, *, address: str | None = None, port: int | None = None) -> SocketAddr:
        """Open a UDP socket; `on_datagram(data, source)` is called for what arrives. Returns its address.

        `OSError` when another one has it.
        """
        local = (address or self.address, next(self._ports) if port is None else port)
        if local in self._sockets:
            raise OSError(f"{local} is in use")
        self._sockets[local] = on_datagram
        return local

    def close(self, local: SocketAddr) -> None:
        """Close a socket; its NAT mapping stays until it expires."""
        self._sockets.pop(local, None)

    def send(self, local: SocketAddr, to: SocketAddr, data: bytes, ttl: int | None = None) -> None:
        """Send a datagram from a socket of ours. `ttl`: the hops it may take, 64 when left out."""
        self.sent += 1
        self.net.transmit(Packet(local, to, data, 64 if ttl is None else ttl), self)

    def deliver(self, packet: Packet) -> None:
        on_datagram = self._sockets.get(packet.to)
        if on_datagram is not None:
            on_datagram(packet.data, packet.source)

    def attach(
        self,
        machine: DatagramMachine,
        on_event: Callable[[object], None] | None = None,
        *,
        local: SocketAddr | None = None,
        take_over: AttachedMachine | None = None,
    ) -> AttachedMachine:
        """Run a machine on this host from now on: its sockets get ports of their own, its timers are kept.

        `local`: the address of its socket 0, which is not open any more: the NAT mappings go on. `take_over`: a machine
        that ends here and leaves its socket 0 to this one.
        """
        return AttachedMachine(self, machine, on_event, take_over, local)


class AttachedMachine:
    """What connects a machine to its host. `detach` ends it and closes its sockets."""

    def __init__(
        self,
        host: SimHost,
        machine: DatagramMachine,
        on_event: Callable[[object], None] | None = None,
        take_over: AttachedMachine | None = None,
        local: SocketAddr | None = None,
    ) -> None:
        self.host = host
        self.machine = machine
        self.events: list[object] = []
        self.sockets: dict[int, SocketAddr] = {}
        self._on_event = on_event
        self._timer: float | None = None
        self._detached = False
        if take_over is not None:
            local = take_over.socket(0)
            take_over.detach()
        if local is not None:
            self._bind(0, local)
        self.pump()

    def socket(self, number: int) -> SocketAddr:
        """The local address of the machine's socket of that number; opens it."""
        if number not in self.sockets:
            self._bind(number, None)
        return self.sockets[number]

    def pump(self) -> None:
        """Call after using a verb of the machine."""
        if self._detached:
            return
        for datagram in self.machine.poll_transmit():
            self.host.send(self.socket(datagram.socket), datagram.to, datagram.data, datagram.ttl)
        while (event := self.machine.next_event()) is not None:
            self.events.append(event)
            if self._on_event is not None:
                self._on_event(event)
        due = self.machine.next_timeout()
        if due is not None and (self._timer is None or due < self._timer or self._timer <= self.host.net.now):
            self._timer = due
            self.host.net.at(due, self._fire)

    def detach(self) -> None:
        self._detached = True
        for local in self.sockets.values():
            self.host.close(local)

    def _bind(self, number: int, local: SocketAddr | None) -> None:
        self.sockets[number] = self.host.bind(
            lambda data, source: self._received(number, data, source),
            address=None if local is None else local[0],
            port=None if local is None else local[1],
        )

    def _received(self, number: int, data: bytes, source: SocketAddr) -> None:
        if not self._detached:
            self.machine.receive_datagram(number, data, source, self.host.net.now)
            self.pump()

    def _fire(self) -> None:
        if not self._detached:
            self.machine.handle_timer(self.host.net.now)
            self.pump()


class SimulatedInternet:
    """See the top of the file. `loss`: of each datagram that crosses the core; `jitter`: seconds."""

    def __init__(self, seed: int = 0, *, loss: float = 0.0, jitter: float = 0.0, core_hops: int = 3) -> None:
        self.rng = random.Random(seed)
        self.loss = loss
        self.jitter = jitter
        self.core_hops = core_hops
        self.now = 0.0
        self.core = _Network(None, "198.51")
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._networks = itertools.count()

    def box(self, kind: str | BoxKind, behind: Gateway | None = None) -> Gateway:
        """A NAT or firewall, on the core or behind another one. `kind`: a name of `BOXES`, or your own."""
        kind = BOXES[kind] if isinstance(kind, str) else kind
        outside = self.core if behind is None else behind.inside
        private = f"10.{next(self._networks)}" if kind.mapping is not Mapping.NONE else f"203.{next(self._networks)}"
        return Gateway(kind, outside, random.Random(self.rng.getrandbits(64)), private)

    def host(self, name: str, behind: Gateway | None = None, *, delay: float = 0.01) -> SimHost:
        """A computer on the core or behind a box; `delay`: seconds one way from it to the core."""
        return SimHost(self, name, self.core if behind is None else behind.inside, delay)

    def at(self, when: float, what: Callable[[], None]) -> None:
        """Call `what` at that time."""
        heapq.heappush(self._heap, (max(when, self.now), next(self._order), what))

    def run(self, seconds: float, *, until: Callable[[], bool] = lambda: False) -> None:
        """Let `seconds` pass, or less: until the condition holds."""
        end = self.now + seconds
        while self._heap and self._heap[0][0] <= end and not until():
            self.now, _, what = heapq.heappop(self._heap)
            what()
        if not until():
            self.now = end

    # -- the way of a packet ------------------------------------------------------------------------------------------
    def transmit(self, packet: Packet, sender: SimHost) -> None:
        self._up(packet, sender.network, sender.delay)

    def _up(self, packet: Packet, network: _Network, delay: float) -> None:
        """From a member of `network` towards its destination."""
        while True:
            if packet.to[0] in network.members and network is not self.core:
                self.at(self.now + LAN_DELAY, partial(self._arrive, packet, network))
                return
            gateway = network.gateway
            if gateway is None:
                self._cross_core(packet, delay)
                return
            hairpin = packet.to[0] == gateway.address and not gateway.routes
            if hairpin and not gateway.box.kind.hairpin:
                return
            translated = gateway.box.outbound(packet, self.now)
            if translated is None or translated.ttl <= 1:
                return
            packet = replace(translated, ttl=translated.ttl - 1)
            if hairpin:
                self.at(self.now + LAN_DELAY, partial(self._enter, packet, gateway))
                return
            network = gateway.outside

    def _cross_core(self, packet: Packet, delay: float) -> None:
        packet = replace(packet, ttl=packet.ttl - self.core_hops)
        if packet.ttl <= 0 or self.rng.random() < self.loss:
            return
        target = self._target(packet.to[0])
        if target is not None:
            delay += self._delay_of(target, packet.to) + self.rng.random() * self.jitter
            self.at(self.now + delay, partial(self._arrive, packet, self.core))

    def _target(self, address: str) -> SimHost | Gateway | None:
        member = self.core.members.get(address)
        if member is not None:
            return member
        for other in self.core.members.values():
            if isinstance(other, Gateway) and other.routes and address in other.inside.members:
                return other
        return None

    def _delay_of(self, member: SimHost | Gateway, to: SocketAddr) -> float:
        """Seconds from the core to the first host behind a box: all in one home have the same line."""
        while isinstance(member, Gateway):
            inside = member.inside.members
            found = inside.get(to[0]) or next(iter(inside.values()), None)
            if found is None:
                return 0.0
            member = found
        return member.delay

    def _arrive(self, packet: Packet, network: _Network) -> None:
        """At a member of `network`, now."""
        member = self._target(packet.to[0]) if network is self.core else network.members.get(packet.to[0])
        if isinstance(member, SimHost):
            member.deliver(packet)
        elif member is not None:
            self._enter(packet, member)

    def _enter(self, packet: Packet, gateway: Gateway) -> None:
        """Through a box, from outside: its tables of this moment decide."""
        translated = gateway.box.inbound(packet, self.now)
        if translated is not None and translated.ttl > 1:
            self._arrive(replace(translated, ttl=translated.ttl - 1), gateway.inside)
