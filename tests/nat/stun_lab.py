"""Our STUN machines on real sockets in the hosts of the lab."""

from __future__ import annotations

import random
import socket
from functools import partial

import trio
from nat_lab import Lab, LabHost

from lattica.nat.udp_port import UdpPort
from lattica.transports.quic_engine import Address
from lattica_protocols.nat.behaviour import NatBehaviour
from lattica_protocols.nat.discovery import BehaviourKnown, Discovery, Observer
from lattica_protocols.stun import SocketAddr
from lattica_protocols.stun_client import Datagram
from lattica_protocols.stun_server import StunServer

PORTS = (3478, 3479)


class LabObserver:
    """A public host with two addresses that answers STUN at two ports of each."""

    def __init__(self, lab: Lab) -> None:
        self.host = lab.public_host(2)
        self._server = StunServer(rate=1e6, burst=1e6)
        self._ports: dict[SocketAddr, UdpPort] = {}

    @property
    def observer(self) -> Observer:
        return Observer((self.host.address, PORTS[0]))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            with self.host.netns.entered():
                for address in (self.host.address, *self.host.more):
                    for number in PORTS:
                        origin = (address, number)
                        self._ports[origin] = UdpPort(socket.AF_INET, *origin, partial(self._received, origin))
            for port in self._ports.values():
                nursery.start_soon(port.run)
            task_status.started()

    def _received(self, origin: SocketAddr, data: bytes, source: Address) -> None:
        address = next(a for a in (self.host.address, *self.host.more) if a != origin[0])
        other = (address, PORTS[origin[1] == PORTS[0]])
        reply = self._server.receive_request(data, source[:2], trio.current_time(), origin=origin, other=other)
        if reply is not None:
            sender = (other[0] if reply.other_ip else origin[0], other[1] if reply.other_port else origin[1])
            self._ports[sender].send(reply.data, reply.to)


class LabMachine:
    """Runs a machine with sockets in a host of the lab."""

    def __init__(self, host: LabHost) -> None:
        self.host = host
        self.ports: dict[int, UdpPort] = {}
        self.events: list[object] = []
        self._machine: Discovery | None = None
        self._wakeup = trio.Event()

    def local_of(self, number: int) -> SocketAddr | None:
        port = self.ports.get(number)
        return None if port is None else (self.host.address, port.address[1])

    async def run(self, machine: Discovery) -> None:
        self._machine = machine
        async with trio.open_nursery() as nursery:
            while True:
                for datagram in machine.poll_transmit():
                    self._send(datagram, nursery)
                while (event := machine.next_event()) is not None:
                    self.events.append(event)
                due = machine.next_timeout()
                if due is None:
                    break
                self._wakeup = trio.Event()
                with trio.move_on_at(due):
                    await self._wakeup.wait()
                machine.handle_timer(trio.current_time())
            nursery.cancel_scope.cancel()

    def _send(self, datagram: Datagram, nursery: trio.Nursery) -> None:
        number = datagram.socket
        if number not in self.ports:
            with self.host.netns.entered():
                self.ports[number] = UdpPort(socket.AF_INET, "0.0.0.0", 0, partial(self._received, number))
            nursery.start_soon(self.ports[number].run)
        self.ports[number].send(datagram.data, datagram.to, ttl=datagram.ttl)

    def _received(self, number: int, data: bytes, source: Address) -> None:
        assert self._machine is not None
        self._machine.receive_datagram(number, data, source[:2], trio.current_time())
        self._wakeup.set()


async def discover(host: LabHost, observers: list[LabObserver], lifetimes: tuple[float, ...] = ()) -> NatBehaviour:
    """What a host of the lab finds out about what is in front of it."""
    run = LabMachine(host)
    rng = random.SystemRandom()
    known = [o.observer for o in observers]
    await run.run(Discovery(known, rng, trio.current_time(), local_of=run.local_of, lifetimes=lifetimes))
    last = run.events[-1]
    assert isinstance(last, BehaviourKnown)
    assert last.final
    return last.behaviour


async def discover_all(hosts: dict[str, LabHost], observers: list[LabObserver]) -> dict[str, NatBehaviour]:
    """The same for many at once."""
    found: dict[str, NatBehaviour] = {}

    async def one(name: str) -> None:
        found[name] = await discover(hosts[name], observers)

    async with trio.open_nursery() as outer:
        for observer in observers:
            await outer.start(observer.run)
        async with trio.open_nursery() as nursery:
            for name in hosts:
                nursery.start_soon(one, name)
        outer.cancel_scope.cancel()
    return found
