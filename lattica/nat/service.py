"""STUN on the node's own UDP sockets, and what it tells about the NATs in front of us.

Every node answers STUN at the port where it speaks QUIC, and at one more port for each address family, so that others
can see what their NAT lets in. What it asks itself leaves from the QUIC port, whose mapping is the one that matters.
"""

from __future__ import annotations

import ipaddress
import logging
import random
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import trio

from lattica.errors import ConnectError
from lattica.listen_addrs import interface_ips
from lattica.nat.runner import DatagramMachine, MachineRun, plain_address
from lattica.nat.udp_port import UdpPort
from lattica.transports.quic_engine import Address
from lattica_protocols.nat.behaviour import Filtering, NatBehaviour, Ports
from lattica_protocols.nat.discovery import BehaviourKnown, Discovery, Observer
from lattica_protocols.nat.punch_plan import Side
from lattica_protocols.nat.sampler import SAMPLES, PortSampler, Sampled
from lattica_protocols.stun import SocketAddr
from lattica_protocols.stun_client import Answered, StunClient
from lattica_protocols.stun_server import StunReply, StunServer

if TYPE_CHECKING:
    from lattica.transports.quic import QuicTransport
    from lattica.transports.quic_endpoint import Endpoint
    from lattica_protocols.multiaddr import Multiaddr

log = logging.getLogger("lattica.nat")

_SAMPLE_ATTEMPTS = 2
_ADDRESSES_FOR = 60.0
"""Seconds that the list of our own addresses is used before it is read again."""


class NatService:
    """One for each node; made before the first address is listened on."""

    def __init__(self, transport: QuicTransport, nursery: trio.Nursery, *, answer: bool = True) -> None:
        self.server = StunServer()
        self.answer = answer
        """Whether strangers' requests are answered."""
        self.behaviour = NatBehaviour()
        """The newest verdict."""
        self.on_seen: Callable[[Multiaddr, SocketAddr, SocketAddr], None] = lambda listen, observer, mapped: None
        """Called by `sample` with each answer: a socket of ours, who was asked, and where it sees that socket."""
        self._transport = transport
        self._nursery = nursery
        self._answering: list[SocketAddr] = []
        self._rng = random.SystemRandom()
        self._runs: list[MachineRun] = []
        self._other_ports: dict[Endpoint, UdpPort] = {}
        self._own_ips: tuple[float, list[str]] = (-_ADDRESSES_FOR, [])
        transport.on_endpoint = self._attach
        for endpoint in transport.endpoints:
            self._attach(endpoint)

    # -- asking -------------------------------------------------------------------------------------------------------
    async def discover(
        self,
        observers: Sequence[Observer],
        *,
        lifetimes: Sequence[float] = (),
        on_known: Callable[[BehaviourKnown], None] = lambda known: None,
    ) -> NatBehaviour:
        """Find out what the NATs in front of us do; about 2 s, or as long as the longest of `lifetimes`.

        `on_known` gets verdicts that are not final, the first after about a round trip. `ConnectError` when there is
        nobody to ask.
        """
        if not observers:
            raise ConnectError("nobody is known who could see our address")
        endpoint = self._transport.endpoint_for(observers[0].addr)
        last: list[BehaviourKnown] = []
        before = self.behaviour

        def on_event(event: object) -> bool:
            assert isinstance(event, BehaviourKnown)
            last[:] = [event]
            self.behaviour = _until_known(event.behaviour, before)
            if not Side(before, ()).is_easy and before.public_ip == event.behaviour.public_ip:
                self.behaviour = replace(self.behaviour, allocation=before.allocation)  # until it is sampled below
            on_known(event)
            return event.final

        locals_ = self._own_address_for(endpoint, observers[0].addr)
        async with trio.open_nursery() as nursery:
            run = MachineRun(endpoint, nursery, on_event)

            def local_of(number: int) -> SocketAddr | None:
                bound = run.local_addr(number)
                return bound if bound is None or locals_ is None else (locals_, bound[1])

            machine = Discovery(
                observers, self._rng, trio.current_time(), local_of=local_of, lifetimes=lifetimes
            )
            await self.run_machine(machine, run)
            self._answering = machine.answering
            nursery.cancel_scope.cancel()
        behaviour = last[-1].behaviour
        if not lifetimes and behaviour.public_ip == before.public_ip:  # measured once, they stay known
            behaviour = replace(behaviour, lives_for=before.lives_for, dies_within=before.dies_within)
        self.behaviour = behaviour
        if not Side(behaviour, ()).is_easy:
            # what observers saw before of the main socket they see again, however long ago its mappings were made
            self.behaviour = behaviour = (await self.sample_ports()).behaviour
        log.info(
            "nat_known mapping=%s filtering=%s ports=%s hairpin=%s mapped=%s",
            behaviour.mapping.value,
            behaviour.filtering.value,
            behaviour.allocation.ports.value,
            behaviour.hairpin,
            behaviour.mapped,
        )
        for line in behaviour.evidence:
            log.debug("nat_evidence what=%s", line)
        return behaviour

    async def sample(self) -> None:
        """Ask those who answered last once more, a round trip: `behaviour.seen` is as of now afterwards.

        The mapping can move: a stray packet that clashes with ours in a Linux box gives our flow another port, and all
        later ones with it, while older flows keep theirs. So several addresses may be true at once.
        """
        if not self._answering:
            await trio.lowlevel.checkpoint()
            return
        seen: Counter[SocketAddr] = Counter()
        left = len(self._answering)

        def on_event(event: object) -> bool:
            nonlocal left
            left -= 1
            if isinstance(event, Answered):
                seen[event.mapped] += 1
                self.on_seen(endpoint.local_addr, event.source, event.mapped)
            return not left

        client = StunClient(self._rng)
        endpoint = self._transport.endpoint_for(self._answering[0])
        for addr in self._answering:
            client.request(0, addr, trio.current_time(), attempts=_SAMPLE_ATTEMPTS)
        async with trio.open_nursery() as nursery:
            await self.run_machine(client, MachineRun(endpoint, nursery, on_event))
        if seen:
            self.behaviour = replace(self.behaviour, seen=tuple(addr for addr, _ in seen.most_common()))

    async def sample_ports(self) -> Side:
        """Our side of a punch as of now: what the NAT gives our QUIC socket, and how it chooses ports. A round trip."""
        known = self.behaviour
        if not self._answering:
            await trio.lowlevel.checkpoint()
            return Side(known, ())
        got: list[Sampled] = []

        def on_event(event: object) -> bool:
            assert isinstance(event, Sampled)
            got.append(event)
            return True

        endpoint = self._transport.endpoint_for(self._answering[0])
        is_easy = Side(known, ()).is_easy
        machine = PortSampler(
            self._answering, self._rng, trio.current_time(), samples=0 if is_easy else SAMPLES
        )
        async with trio.open_nursery() as nursery:
            await self.run_machine(machine, MachineRun(endpoint, nursery, on_event))
        (fresh,) = got
        if is_easy:
            return Side(known, fresh.seen)
        allocation = known.allocation if fresh.allocation.ports is Ports.UNKNOWN else fresh.allocation
        newest = () if fresh.newest is None else (fresh.newest,)
        log.debug("ports_sampled choice=%s last=%s", allocation.ports.value, allocation.last)
        return Side(replace(known, allocation=allocation), newest)

    async def run_machine(self, machine: DatagramMachine[object], run: MachineRun) -> None:
        """Run a machine whose socket 0 is one of the QUIC transport's."""
        self._runs.append(run)
        try:
            await run.run(machine)
        finally:
            self._runs.remove(run)

    # -- answering ----------------------------------------------------------------------------------------------------
    def _attach(self, endpoint: Endpoint) -> None:
        endpoint.on_other_datagram = partial(self._received, endpoint)

    def _received(self, endpoint: Endpoint, data: bytes, addr: Address, source: bytes | None) -> None:
        if self._for_a_run(endpoint, data, addr) or not self.answer:
            return
        local = endpoint.socket.address
        arrived_at = _address_in(source, endpoint.socket.family) or (None if endpoint.socket.is_wildcard else local[0])
        port = self._other_port(endpoint)
        origin = None if arrived_at is None else (arrived_at, local[1])
        reply = self._reply(data, addr, origin, None if port is None else port.address[1])
        if reply is None:
            return
        if port is not None and (reply.other_port or reply.other_ip):
            self._send_from_elsewhere(reply, endpoint, port, arrived_at, addr)
        else:
            endpoint.send_datagram(reply.data, (*reply.to, *addr[2:]), source)

    def _for_a_run(self, endpoint: Endpoint, data: bytes, addr: Address) -> bool:
        for run in self._runs:
            number = run.number_of(endpoint)
            if number is not None and run.receive(number, data, addr):
                return True
        return False

    def attach_punched(self, endpoint: Endpoint) -> None:
        """STUN on the socket of one punched path: the partner may ask; there is no other port to answer from."""

        def received(data: bytes, addr: Address, source: bytes | None) -> None:
            if not self._for_a_run(endpoint, data, addr) and self.answer:
                reply = self._reply(data, addr, None, None)
                if reply is not None:
                    endpoint.send_datagram(reply.data, (*reply.to, *addr[2:]), source)

        endpoint.on_other_datagram = received

    def _received_elsewhere(self, endpoint: Endpoint, data: bytes, addr: Address) -> None:
        """A request at the other port: answered from there, without further choice."""
        reply = self._reply(data, addr, None, None) if self.answer else None
        port = self._other_ports.get(endpoint)
        if reply is not None and port is not None:
            port.send(reply.data, (*reply.to, *addr[2:]))

    def _reply(
        self, data: bytes, addr: Address, origin: SocketAddr | None, other_port: int | None
    ) -> StunReply | None:
        other = None
        if origin is not None and other_port is not None:
            other = (self._other_ip(origin[0]), other_port)
        return self.server.receive_request(data, plain_address(addr), trio.current_time(), origin=origin, other=other)

    def _send_from_elsewhere(
        self, reply: StunReply, endpoint: Endpoint, port: UdpPort, arrived_at: str | None, addr: Address
    ) -> None:
        host = arrived_at
        if reply.other_ip and arrived_at is not None:
            host = self._other_ip(arrived_at)
        source = None if host is None else ipaddress.ip_address(host).packed
        to = (*reply.to, *addr[2:])
        if reply.other_port:
            port.send(reply.data, to, source=source)
        elif source is not None:
            endpoint.send_datagram(reply.data, to, _pktinfo(source))

    def _other_port(self, endpoint: Endpoint) -> UdpPort | None:
        """The further socket beside `endpoint`; opened when it is first needed."""
        port = self._other_ports.get(endpoint)
        if port is None:
            bound = endpoint.socket
            try:
                port = UdpPort(bound.family, bound.address[0], 0, partial(self._received_elsewhere, endpoint))
            except OSError as error:
                log.warning("stun_other_port_missing error=%s", error)
                return None
            self._other_ports[endpoint] = port
            self._nursery.start_soon(port.run)
        return port

    def _other_ip(self, host: str) -> str:
        """Another address of ours that is as public as `host`; itself when there is none."""
        mine = ipaddress.ip_address(host)
        for text in self._ips():
            other = ipaddress.ip_address(text)
            if other == mine or other.is_loopback or mine.is_loopback:
                continue
            if (other.version, other.is_private) == (mine.version, mine.is_private):
                return text
        return host

    def _ips(self) -> list[str]:
        read, ips = self._own_ips
        now = trio.current_time()
        if now - read >= _ADDRESSES_FOR:
            ips = [str(ip) for ip in interface_ips()]
            self._own_ips = now, ips
        return ips

    def _own_address_for(self, endpoint: Endpoint, remote: SocketAddr) -> str | None:
        """The address from which the system would send to `remote`."""
        if not endpoint.socket.is_wildcard:
            return plain_address(endpoint.socket.address)[0]
        with socket.socket(endpoint.socket.family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(remote)  # sends nothing
            except OSError:
                return None
            return plain_address(probe.getsockname())[0]


def _until_known(now: NatBehaviour, before: NatBehaviour) -> NatBehaviour:
    """What is looked at again is as it was before, for the two seconds that takes."""
    if now.public_ip != before.public_ip or now.mapping is not before.mapping:
        return now
    filtering = before.filtering if now.filtering is Filtering.UNKNOWN else now.filtering
    return replace(now, filtering=filtering, hairpin=before.hairpin if now.hairpin is None else now.hairpin)


def _address_in(source: bytes | None, family: socket.AddressFamily) -> str | None:
    """The IP address in what `UdpSocket.receive` returns for answering."""
    if source is None:
        return None
    packed = source[4:8] if family == socket.AF_INET else source[:16]
    return str(ipaddress.ip_address(packed))


def _pktinfo(packed: bytes) -> bytes:
    return bytes(4) + packed + bytes(4) if len(packed) == 4 else packed + bytes(4)
