"""A whole peer: host, transports, identify, ping, Kademlia, RPC, content and spaces, assembled.

    async with lattica.open_node(lattica.NodeConfig(home=Path("~/.local/state/lattica").expanduser())) as node:
        node.rpc.serve("expert", Expert())
        cid = (await node.blobs.share(Path("model.safetensors"))).cid

`latticad` is this plus settings, the local socket and a life cycle.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import trio

from lattica.blobs import BlobService, BlobStore
from lattica.datastore import Datastore
from lattica.errors import ConfigError, ConnectError, LatticaError, PathLost
from lattica.host import Gate, Host, PeerIdentified, open_host
from lattica.identify import PROTOCOL_VERSION, IdentifyService
from lattica.identify import TIMEOUT as IDENTIFY_TIMEOUT
from lattica.identity_file import load_or_create_key
from lattica.interfaces import Transport
from lattica.kad import KadService
from lattica.listen_addrs import interface_ips
from lattica.mdns import MdnsService
from lattica.nat import NatService
from lattica.nat.watch import NatWatch
from lattica.peerstore import PERMANENT, PeerInfo
from lattica.ping import PingService
from lattica.portmap import PortMapService
from lattica.punch import HolePuncher
from lattica.reach import DialServer, InterfaceWatch, KeepAlives, ObservedAddresses, ReachService
from lattica.relay import RelayClient, RelayServer
from lattica.relay.client import RELAY_KEY
from lattica.relay.need import watch_need
from lattica.replica import SpaceService, SpaceStore
from lattica.rpc import RpcService
from lattica.transports.circuit import CircuitTransport
from lattica.transports.quic import QuicTransport
from lattica.transports.tcp import TcpTransport
from lattica_protocols.keys import PrivateKey
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.nat.behaviour import NatBehaviour
from lattica_protocols.peer_id import PeerId
from lattica_protocols.relay.admission import RelayLimits

log = logging.getLogger("lattica.node")

DEFAULT_LISTEN = (
    "/ip4/0.0.0.0/tcp/4101",
    "/ip6/::/tcp/4101",
    "/ip4/0.0.0.0/udp/4101/quic-v1",
    "/ip6/::/udp/4101/quic-v1",
)
"""One port for both transports, so that one rule in a firewall is enough. 4001 is left to kubo on the same machine."""
KAD_PROTOCOL = "/lattica/kad/1.0.0"
BOOTSTRAP_RETRY = (1.0, 60.0)
"""Seconds before a bootstrap peer that could not be reached is tried again: doubling from the first to the second."""

STRANDED_SECONDS = 1.0
"""After which an address that is gone is not waited for: what ran over it goes on over another path."""


@dataclass
class NodeConfig:
    """What a node can be told. Addresses are multiaddr texts."""

    home: Path | None = None
    """Directory of the identity, the database and the content store; `None`: nothing survives the block."""
    key: PrivateKey | None = None
    """The identity; default: the one in `home`, or a new one."""
    listen: Sequence[str] = DEFAULT_LISTEN
    announce: Sequence[str] = ()
    """Addresses to tell others instead of those we listen on."""
    bootstrap: Sequence[str] = ()
    """Peers to know from the start, each with `/p2p/PEER_ID`."""
    kad_protocol: str = KAD_PROTOCOL
    kad_mode: Literal["auto", "server", "client"] = "auto"
    kad_accept_any: bool = False
    """Store values of any key unvalidated, as the Rust lattica network does."""
    protocol_version: str = PROTOCOL_VERSION
    stun_servers: Sequence[str] = ()
    """HOST:PORT of STUN servers to ask besides our peers. What they say is trusted."""
    transports: Sequence[Literal["tcp", "quic"]] = ("tcp", "quic")
    autonat_serve: bool = True
    """Try for others whether they can be reached. Costs a dial each, at most 60 a minute."""
    relay_serve: bool = False
    """Carry other peers' connections. Of use only at a peer that others can reach."""
    relay_limits: RelayLimits = field(default_factory=RelayLimits)
    relay_bytes_per_second: float | None = None
    """For all circuits together, both ways added; `None`: as much as there is."""
    relay_use: Literal["auto", "always", "never"] = "auto"
    """Hold reservations at relays, so that others reach us through them; auto: when nobody reaches us otherwise."""
    relays: Sequence[str] = ()
    """Relays to ask first, each with `/p2p/PEER_ID`; others are found through connected peers and the DHT."""
    mdns: bool = True
    """Find peers in the local network, and be found (libp2p's mDNS); not where only loopback is listened on."""
    port_mapping: bool = True
    """Have the router lead ports to us (PCP, NAT-PMP, UPnP) where our own address is a private one."""
    punch: bool = True
    """Look for direct connections with peers that are connected over a relay."""
    gate: Gate | None = None
    """Who may connect, from the first moment on: why a peer may not, or `None`."""


class Node:
    """A running peer and its services."""

    def __init__(
        self, host: Host, config: NodeConfig, datastore: Datastore, store: BlobStore, spaces: SpaceStore
    ) -> None:
        self.host = host
        self.config = config
        self.datastore = datastore
        self.listening = trio.Event()
        """Set when every address of the settings is listened on."""
        self.identify = IdentifyService(host, protocol_version=config.protocol_version)
        self.observed = ObservedAddresses(host)
        self.port_map = PortMapService(host, enabled=config.port_mapping)
        self.mdns = MdnsService(host) if config.mdns else None
        self.reach = ReachService(host)
        self.interfaces = InterfaceWatch(self._interfaces_changed)
        self.dial_server = DialServer(host) if config.autonat_serve else None
        self.ping = PingService(host)
        self.kad = KadService(
            host,
            datastore,
            protocol=config.kad_protocol,
            mode=config.kad_mode,
            accept_any=config.kad_accept_any,
        )
        host.find_addrs = self.kad.find_peer
        self.relay_server = RelayServer(
            host, limits=config.relay_limits, bytes_per_second=config.relay_bytes_per_second
        )
        self.circuits = CircuitTransport(host)
        host.add_transport(self.circuits)
        self.relay_client = RelayClient(
            host,
            self.circuits,
            preferred=[Multiaddr.parse(text) for text in config.relays],
            find=lambda count: self.kad.find_providers(RELAY_KEY, count),
        )
        self.rpc = RpcService(host)
        self.blobs = BlobService(host, self.kad, store)
        self.punch = HolePuncher(
            host,
            self.circuits,
            tcp=next((t for t in host.transports() if isinstance(t, TcpTransport)), None),
            quic=next((t for t in host.transports() if isinstance(t, QuicTransport)), None),
        )
        self.nat = _nat_service(host)
        """STUN and what it tells about our NATs; `None` without QUIC."""
        self.spaces = SpaceService(host, self.kad, spaces)
        self.nat_watch = None if self.nat is None else NatWatch(host, self.nat, config.stun_servers)
        self.keep_alives = KeepAlives(
            host, reached=self.reach.reached, nat=lambda: NatBehaviour() if self.nat is None else self.nat.behaviour
        )
        self._share_what_is_known_of_nats()
        self.bootstrap = [Multiaddr.parse(text) for text in config.bootstrap]

    def _share_what_is_known_of_nats(self) -> None:
        """Discovery tells punching, observed addresses and keep-alives."""
        self.reach.on_known = self.keep_alives.update
        if self.nat is not None:
            self.nat.on_seen = self.observed.stun_answered
        if self.nat_watch is not None:
            watch, punch = self.nat_watch, self.punch
            watch.on_known = self.keep_alives.update
            punch.more_candidates = lambda: [*self.port_map.addrs(), *watch.candidates()]
            punch.refresh = watch.refresh
            punch.opening_hops = watch.opening_hops
            punch.hops_measured = lambda: watch.hops_measured
            punch.early_hops = watch.early_hops
            punch.guess_with(watch.nat)

    @property
    def peer_id(self) -> PeerId:
        return self.host.peer_id

    async def wait_identified(self, peer: PeerId) -> PeerInfo:
        """What `peer` said about itself, once it has. Bounded by the caller's cancel scope.

        `ConnectError` when the node closes.
        """
        with self.host.subscribe() as events:
            info = self.host.peerstore.info(peer)
            if info is not None:
                return info
            async for event in events:
                if isinstance(event, PeerIdentified) and event.peer == peer:
                    return event.info
        raise ConnectError("the node is closing")

    async def discover_nat(self, *, lifetimes: Sequence[float] = ()) -> NatBehaviour:
        """What the NATs in front of us do, as connected peers and `stun_servers` see it. About 2 s.

        `lifetimes`: seconds of silence after which mappings are looked at again, which takes as long.
        Errors: `ConnectError` when nobody can be asked.
        """
        if self.nat is None or self.nat_watch is None:
            raise ConnectError("STUN needs the quic transport")
        return await self.nat.discover(await self.nat_watch.observers(), lifetimes=lifetimes)

    async def find_peer(self, peer: PeerId) -> list[Multiaddr]:
        """Addresses of `peer`: those known, else from the DHT."""
        known = self.host.peerstore.addrs(peer)
        return known or list(await self.kad.find_peer(peer))

    async def _keep_bootstrapped(self, addr: Multiaddr) -> None:
        """Hold a connection with a bootstrap peer: without any we are alone."""
        peer = addr.peer_id()
        assert peer is not None
        self.host.peerstore.add_addrs(peer, [addr], PERMANENT)
        self.host.protect(peer)
        delay = BOOTSTRAP_RETRY[0]
        while True:
            try:
                connection = await self.host.connect(peer)
                with trio.move_on_after(IDENTIFY_TIMEOUT) as identified:
                    await self.wait_identified(peer)
                if not identified.cancelled_caught:
                    await self.kad.bootstrap()
                    delay = BOOTSTRAP_RETRY[0]
                await connection.closed.wait()
            except LatticaError as error:
                log.warning("bootstrap_failed addr=%s error=%s", addr, error)
            await trio.sleep(delay * self.host.rng.uniform(0.5, 1.5))
            delay = min(delay * 2, BOOTSTRAP_RETRY[1])

    def _interfaces_changed(self) -> None:
        """What we found out about how others see us is of the network that we were in."""
        self.host.addrs_changed()  # first: the others ask where we listen
        self.observed.reset()
        self.reach.reset()
        if self.nat_watch is not None:
            self.nat_watch.network_changed()
        self.port_map.network_changed()
        if self.mdns is not None:
            self.mdns.network_changed()
        for connection in self.host.connections():
            connection.doubt()
        self.host.network_changed()
        self.host.nursery.start_soon(self.identify.ask_again)
        self.host.nursery.start_soon(self._drop_stranded)

    async def _drop_stranded(self) -> None:
        """Close TCP connections from an address that we do not have any more; the other end would notice in minutes."""
        await trio.sleep(STRANDED_SECONDS)
        own = set(interface_ips())
        for connection in self.host.connections():
            ip = connection.local_addr.ip()
            if connection.path == "tcp" and ip is not None and ip not in own:
                connection.abort(PathLost(f"our address {ip} is gone"))

    async def _map_ports(self) -> None:
        await self.listening.wait()
        await self.port_map.run()

    async def _find_neighbours(self, mdns: MdnsService) -> None:
        await self.listening.wait()
        await mdns.run()

    async def _serve_as_relay(self) -> None:
        self.relay_server.start()
        await self.kad.provide(RELAY_KEY)

    async def _use_relays(self) -> None:
        # what a relay sees of us is of use to partners only when it is the socket we listen on
        await self.listening.wait()
        await self.relay_client.run()

    async def run(self) -> None:
        """The background work of all services, until cancelled."""
        async with trio.open_nursery() as nursery:
            if self.config.relay_serve:
                nursery.start_soon(self.relay_server.run)
                nursery.start_soon(self._serve_as_relay)
            if self.config.relay_use != "never":
                nursery.start_soon(self._use_relays)
                nursery.start_soon(watch_need, self.host, self.relay_client, self.config.relay_use == "always")
            nursery.start_soon(lambda: self.identify.run(unix_now=int(time.time())))
            nursery.start_soon(self.observed.run)
            nursery.start_soon(self.reach.run)
            nursery.start_soon(self.interfaces.run)
            nursery.start_soon(self.keep_alives.run)
            nursery.start_soon(self._map_ports)
            if self.mdns is not None:
                nursery.start_soon(self._find_neighbours, self.mdns)
            nursery.start_soon(self.kad.run)
            nursery.start_soon(self.blobs.run)
            if self.config.punch:
                nursery.start_soon(self.punch.run)
            nursery.start_soon(self.spaces.run)
            if self.nat_watch is not None:
                nursery.start_soon(self.nat_watch.run)
            for addr in self.bootstrap:
                nursery.start_soon(self._keep_bootstrapped, addr)


def _nat_service(host: Host) -> NatService | None:
    for transport in host.transports():
        if isinstance(transport, QuicTransport):
            return NatService(transport, host.nursery)
    return None


def _check(config: NodeConfig) -> None:
    for name in ("listen", "announce", "bootstrap", "relays"):
        for text in getattr(config, name):
            try:
                addr = Multiaddr.parse(text)
            except ValueError as error:
                raise ConfigError(f"{name}: {error}") from None
            if name in ("bootstrap", "relays") and addr.peer_id() is None:
                raise ConfigError(f"{name}: {text} does not end in /p2p/PEER_ID; `lattica id` there prints it")


def _transports(config: NodeConfig, host: Host) -> list[Transport]:
    made: list[Transport] = []
    if "tcp" in config.transports:
        made.append(TcpTransport(host.key, host.nursery))
    if "quic" in config.transports:
        made.append(QuicTransport(host.nursery, host.key))
    return made


@asynccontextmanager
async def open_node(config: NodeConfig | None = None) -> AsyncIterator[Node]:
    """A running node; leaving the block closes it. Errors: `ConfigError`, `OSError` (an address is in use)."""
    config = config or NodeConfig()
    _check(config)
    home = config.home
    if home is not None:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = config.key
    if key is None:
        key = PrivateKey.generate(os.urandom(32)) if home is None else load_or_create_key(home / "identity.key")
    with (
        Datastore.open(None if home is None else home / "lattica.db") as datastore,
        BlobStore.open(home) as store,
        SpaceStore.open(home) as spaces,
    ):
        async with open_host(
            key,
            lambda host: _transports(config, host),
            announce=[Multiaddr.parse(text) for text in config.announce],
        ) as host:
            if config.gate is not None:
                host.gate = config.gate
            node = Node(host, config, datastore, store, spaces)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(node.run)
                for text in config.listen:
                    await host.listen(Multiaddr.parse(text))
                node.listening.set()
                yield node
                nursery.cancel_scope.cancel()
