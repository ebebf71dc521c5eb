"""Runs a machine that uses UDP sockets by number, as `StunClient`, `Discovery` and the punching machines do.

Number 0 is a socket of the QUIC transport, shared with everything else on it; the others are opened when the machine
first sends from them and closed with the run, but for one that QUIC takes over (`promote`).
"""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

import trio

from lattica.nat.udp_port import UdpPort
from lattica_protocols.stun import SocketAddr
from lattica_protocols.stun_client import Datagram

if TYPE_CHECKING:
    from lattica.transports.quic_endpoint import Endpoint
    from lattica.transports.quic_engine import Address

log = logging.getLogger("lattica.nat")

Event = TypeVar("Event", covariant=True)


class DatagramMachine(Protocol[Event]):
    """What a machine needs to have; see protocols/README.md."""

    def receive_datagram(self, socket: int, data: bytes, source: SocketAddr, now: float) -> bool: ...
    def handle_timer(self, now: float) -> None: ...
    def next_timeout(self) -> float | None: ...
    def poll_transmit(self) -> list[Datagram]: ...
    def next_event(self) -> Event | None: ...


class MachineRun:
    """One machine and its sockets. `run` in a task; `receive` for what arrives at socket 0."""

    def __init__(
        self,
        endpoint: Endpoint,
        nursery: trio.Nursery,
        on_event: Callable[[object], bool],
    ) -> None:
        """`on_event` returns whether that was the last one."""
        self.endpoint = endpoint
        self.ports: dict[int, UdpPort] = {}
        self._endpoints = {0: endpoint}
        self._nursery = nursery
        self._on_event = on_event
        self._machine: DatagramMachine[object] | None = None
        self._wakeup = trio.Event()
        self._done = False

    def local_addr(self, number: int) -> SocketAddr | None:
        """Where the machine's socket of that number is bound; the address of the interface is not known (wildcard)."""
        if number == 0:
            return plain_address(self.endpoint.socket.address)
        port = self.ports.get(number)
        return None if port is None else plain_address(port.address)

    def number_of(self, endpoint: Endpoint) -> int | None:
        """Which of the machine's sockets that is."""
        return next((number for number, other in self._endpoints.items() if other is endpoint), None)

    def promote(self, number: int, make: Callable[[socket.socket], Endpoint]) -> Endpoint:
        """Let QUIC have the machine's socket `number`; the machine goes on using it, too, and does not close it."""
        endpoint = self._endpoints.get(number)
        if endpoint is None:
            endpoint = self._endpoints[number] = make(self.ports.pop(number).detach())
        return endpoint

    async def run(self, machine: DatagramMachine[object]) -> None:
        """Until the last event, or until the machine has nothing more to wait for. Closes the further sockets."""
        self._machine = machine
        try:
            while True:
                self._pump()
                due = machine.next_timeout()
                if self._done or due is None:
                    return
                self._wakeup = trio.Event()
                with trio.move_on_at(due):
                    await self._wakeup.wait()
                machine.handle_timer(trio.current_time())
        finally:
            self._machine = None
            for port in self.ports.values():
                port.close()

    def receive(self, number: int, data: bytes, addr: Address) -> bool:
        """Whether the datagram was for the machine."""
        if self._machine is None:
            return False
        ours = self._machine.receive_datagram(number, data, plain_address(addr), trio.current_time())
        if ours:
            self._pump()
            self._wakeup.set()
        return ours

    def _pump(self) -> None:
        machine = self._machine
        if machine is None or self._done:
            return
        for datagram in machine.poll_transmit():
            self._send(datagram)
        while not self._done and (event := machine.next_event()) is not None:
            self._done = self._on_event(event)

    def _send(self, datagram: Datagram) -> None:
        endpoint = self._endpoints.get(datagram.socket)
        if endpoint is not None:
            if datagram.ttl is None:
                endpoint.send_datagram(datagram.data, datagram.to)
            else:
                endpoint.send_short_lived(datagram.data, datagram.to, datagram.ttl)
            return
        port = self.ports.get(datagram.socket)
        if port is None:
            try:
                port = self._open(datagram.socket)
            except OSError as error:
                log.warning("socket_missing error=%s", error)
                return
        port.send(datagram.data, datagram.to, ttl=datagram.ttl)

    def _open(self, number: int) -> UdpPort:
        bound = self.endpoint.socket
        port = UdpPort(bound.family, bound.address[0], 0, partial(self._arrived, number))
        self.ports[number] = port
        self._nursery.start_soon(port.run)
        return port

    def _arrived(self, number: int, data: bytes, addr: Address) -> None:
        self.receive(number, data, addr)


def plain_address(addr: Address) -> SocketAddr:
    """Without zone, flow and scope; an IPv6 address in its usual spelling."""
    host = addr[0].partition("%")[0]
    return (str(ipaddress.ip_address(host)) if ":" in host else host), addr[1]
