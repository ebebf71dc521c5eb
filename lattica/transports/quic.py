"""The QUIC transport: `/ip4|ip6|dns…/…/udp/N/quic-v1`, QUIC version 1 with libp2p's TLS.

Both sides show a certificate that proves their peer id; there is no security or muxer negotiation above it. One UDP
socket per listening address serves inbound and outbound connections alike; outbound ones use a listening socket of
their family where it can reach the peer, so that peers see the port at which we can be reached.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio
from cryptography.hazmat.primitives.asymmetric import ec

from lattica.errors import DialError, LatticaError, WrongPeer
from lattica.interfaces import Listener, OnConnection, Transport
from lattica.transports.quic_admission import Admission
from lattica.transports.quic_connection import HANDSHAKE_TIMEOUT_SECONDS, QuicLink
from lattica.transports.quic_endpoint import Endpoint, new_reset_secret
from lattica.transports.quic_engine import Address, Credentials
from lattica.transports.quic_socket import UdpSocket
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.tls import make_certificate

if TYPE_CHECKING:
    from lattica_protocols.keys import PrivateKey
    from lattica_protocols.multiaddr import Multiaddr
    from lattica_protocols.peer_id import PeerId

_FAMILIES = {
    "ip4": socket.AF_INET,
    "ip6": socket.AF_INET6,
    "dns4": socket.AF_INET,
    "dns6": socket.AF_INET6,
    "dns": socket.AF_UNSPEC,
}
_STAGGER_SECONDS = 0.25
"""Between the addresses of one DNS name (RFC 8305 section 5)."""


class QuicTransport(Transport):
    """See `lattica.interfaces.Transport`. `key` is the node's identity."""

    def __init__(self, nursery: trio.Nursery, key: PrivateKey) -> None:
        self._nursery = nursery
        self._credentials = make_credentials(key)
        self._admission = Admission(self._credentials)
        self._endpoints: list[Endpoint] = []
        self._on_connection: dict[Endpoint, OnConnection] = {}
        self.on_endpoint: Callable[[Endpoint], None] | None = None
        """Called with each socket that is opened from now on: STUN wants its datagrams."""

    @property
    def endpoints(self) -> list[Endpoint]:
        """The sockets that are open, for STUN and hole punching."""
        self._endpoints = [endpoint for endpoint in self._endpoints if not endpoint.closed]
        return self._endpoints

    def can_dial(self, addr: Multiaddr) -> bool:
        return _parse(addr) is not None

    def can_listen(self, addr: Multiaddr) -> bool:
        parsed = _parse(addr)
        return parsed is not None and parsed[0] in ("ip4", "ip6")

    async def listen(self, addr: Multiaddr, on_connection: OnConnection) -> QuicListener:
        """Bind `addr` (port 0: any). `OSError` when that is not possible."""
        parsed = _parse(addr)
        if parsed is None or not self.can_listen(addr):
            raise ValueError(f"{addr} is no address to listen at with QUIC")
        await trio.lowlevel.checkpoint()
        name, host, port = parsed
        endpoint = self._resting_endpoint(host, port) or self._open(_FAMILIES[name], host, port)
        endpoint.accepting = True
        self._on_connection[endpoint] = on_connection
        return QuicListener(self, endpoint)

    async def dial(self, addr: Multiaddr, expected: PeerId | None) -> QuicLink:
        """See `Transport.dial`. Gives up after `HANDSHAKE_TIMEOUT_SECONDS`."""
        parsed = _parse(addr)
        if parsed is None:
            raise DialError(f"{addr} is no QUIC address")
        if expected is None:
            expected = addr.peer_id()
        remotes = await _resolve(addr, *parsed)
        if len(remotes) == 1:
            return await self._dial_one(remotes[0], expected)
        return await self._dial_staggered(addr, remotes, expected)

    def is_dialling(self, remote: Address, expected: PeerId) -> bool:
        """Whether a handshake that we began with `expected` at `remote` goes on."""
        return bool(self._dialled(remote, expected))

    def hurry(self, remote: Address, expected: PeerId) -> None:
        """Send what was sent of such a handshake again: the other side's NAT may have dropped it and be open now."""
        for link in self._dialled(remote, expected):
            link.resend_handshake()

    async def dial_punched(self, endpoint: Endpoint, remote: Address, expected: PeerId) -> QuicLink:
        """Dial from a certain socket, to which the other side's NAT is open."""
        return await self._settled(endpoint.connect(remote, expected))

    def adopt_socket(self, bound: socket.socket, on_connection: OnConnection | None) -> Endpoint:
        """Speak QUIC on a socket that got through a NAT, for one peer: it is neither dialled from nor listened on.

        `on_connection`: accept connections until `stop_accepting`. The socket closes with its last connection.
        """
        endpoint = self._make(UdpSocket(bound.family, *bound.getsockname()[:2], bound=bound))
        endpoint.ends_with_links = True
        if on_connection is not None:
            endpoint.accepting = True
            self._on_connection[endpoint] = on_connection
        self._nursery.start_soon(endpoint.run)
        return endpoint

    def stop_accepting(self, endpoint: Endpoint) -> None:
        """The end of what `adopt_socket` began."""
        endpoint.accepting = False
        self._on_connection.pop(endpoint, None)
        endpoint.close_if_unused()

    def endpoint_for(self, remote: Address) -> Endpoint:
        """The socket from which `remote` is dialled: a listening one of its family that reaches it, else any."""
        usable = [endpoint for endpoint in self.endpoints if _reaches(endpoint, remote)]
        usable.sort(key=lambda endpoint: (not endpoint.accepting, not endpoint.socket.is_wildcard))
        if usable:
            return usable[0]
        if ":" in remote[0]:
            return self._open(socket.AF_INET6, "::", 0)
        return self._open(socket.AF_INET, "0.0.0.0", 0)

    # -- inside -------------------------------------------------------------------------------------------------------
    def _dialled(self, remote: Address, expected: PeerId) -> list[QuicLink]:
        links = [link for endpoint in self.endpoints for link in endpoint.links if link.is_dialling(expected)]
        return [link for link in links if link.remote[:2] == remote[:2]]

    def _open(self, family: socket.AddressFamily, host: str, port: int) -> Endpoint:
        endpoint = self._make(UdpSocket(family, host, port))
        self._endpoints.append(endpoint)
        if self.on_endpoint is not None:
            self.on_endpoint(endpoint)
        self._nursery.start_soon(endpoint.run)
        return endpoint

    def _make(self, socket: UdpSocket) -> Endpoint:
        return Endpoint(socket, self._credentials, self._admission, self._accepted)

    def _resting_endpoint(self, host: str, port: int) -> Endpoint | None:
        """A socket whose listener was closed while connections on it go on."""
        for endpoint in self.endpoints:
            if endpoint.socket.address[:2] == (host, port) and not endpoint.accepting:
                return endpoint
        return None

    def _accepted(self, endpoint: Endpoint, link: QuicLink) -> None:
        on_connection = self._on_connection.get(endpoint)
        if on_connection is None:
            link.abort()
        else:
            self._nursery.start_soon(_serve, on_connection, link)

    def stop_listening(self, endpoint: Endpoint) -> None:
        """Accept no more on `endpoint`; close it when nothing uses it."""
        endpoint.accepting = False
        self._on_connection.pop(endpoint, None)
        if not endpoint.links:
            endpoint.close()

    async def _dial_one(self, remote: Address, expected: PeerId | None) -> QuicLink:
        try:
            link = self.endpoint_for(remote).connect(remote, expected, refusable=True)
        except OSError as error:
            raise DialError(f"no socket to dial {remote[0]} from: {error.strerror}")
        return await self._settled(link)

    async def _settled(self, link: QuicLink) -> QuicLink:
        """The connection when its handshake is over. Errors: `WrongPeer`, `DialError`."""
        try:
            with trio.fail_after(HANDSHAKE_TIMEOUT_SECONDS + 1):
                await link.settled.wait()
        except trio.TooSlowError:
            link.abort(DialError("no answer"))
        except trio.Cancelled:
            link.abort()
            raise
        if link.established and not link.closed.is_set():
            return link
        reason = link.close_error
        if isinstance(reason, WrongPeer):
            raise reason
        raise DialError(f"{link.remote_addr}: {reason or 'the connection was closed'}")

    async def _dial_staggered(self, addr: Multiaddr, remotes: list[Address], expected: PeerId | None) -> QuicLink:
        """Dial the addresses of a name one after the other, without waiting for each; the first answer wins."""
        winners: list[QuicLink] = []
        errors: list[DialError] = []

        async def attempt(remote: Address, failed: trio.Event) -> None:
            try:
                winners.append(await self._dial_one(remote, expected))
                nursery.cancel_scope.cancel()
            except DialError as error:
                errors.append(error)
                failed.set()

        async with trio.open_nursery() as nursery:
            for remote in remotes:
                failed = trio.Event()
                nursery.start_soon(attempt, remote, failed)
                with trio.move_on_after(_STAGGER_SECONDS):
                    await failed.wait()
        for link in winners[1:]:
            link.abort()
        if winners:
            return winners[0]
        raise DialError(f"{addr}: " + "; ".join(str(error) for error in errors))


class QuicListener(Listener):
    """See `lattica.interfaces.Listener`."""

    def __init__(self, transport: QuicTransport, endpoint: Endpoint) -> None:
        self._transport = transport
        self.endpoint = endpoint
        """The socket: for STUN and hole punching."""
        self.addrs = [endpoint.local_addr]

    async def aclose(self) -> None:
        self._transport.stop_listening(self.endpoint)
        await trio.lowlevel.checkpoint()


def make_credentials(key: PrivateKey) -> Credentials:
    """A fresh certificate for the identity `key`."""
    certificate_key = ec.generate_private_key(ec.SECP256R1())
    serial = int.from_bytes(os.urandom(16), "big") | 1
    certificate = make_certificate(key, certificate_key, serial=serial, unix_now=time.time())
    return Credentials(certificate, certificate_key, new_reset_secret(key.seed))


async def _serve(on_connection: OnConnection, link: QuicLink) -> None:
    try:
        await on_connection(link)
    except (LatticaError, RemoteProtocolError) as error:
        link.abort(error)


def _parse(addr: Multiaddr) -> tuple[str, str, int] | None:
    """(kind of host, host, port) of a QUIC address without anything behind it but a peer id."""
    parts = addr.without_peer().protocols()
    if [name for name, _ in parts[1:]] != ["udp", "quic-v1"] or parts[0][0] not in _FAMILIES:
        return None
    return parts[0][0], parts[0][1] or "", int(parts[1][1] or 0)


async def _resolve(addr: Multiaddr, name: str, host: str, port: int) -> list[Address]:
    try:
        found = await trio.socket.getaddrinfo(
            host,
            port,
            family=_FAMILIES[name],
            type=socket.SOCK_DGRAM,
            flags=socket.AI_NUMERICHOST if name in ("ip4", "ip6") else 0,
        )
    except OSError as error:
        raise DialError(f"{addr}: {error.strerror}")
    remotes = list(dict.fromkeys(address for *_, address in found))
    if not remotes:
        raise DialError(f"{addr}: the name has no address")
    return remotes  # type: ignore[return-value]  # typeshed knows no family of the tuple


def _reaches(endpoint: Endpoint, remote: Address) -> bool:
    """Whether a datagram from `endpoint` can get to `remote`: same family, and loopback only talks to loopback."""
    local = endpoint.socket.address[0]
    if (":" in local) != (":" in remote[0]):
        return False
    return endpoint.socket.is_wildcard or _is_loopback(local) == _is_loopback(remote[0])


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") or host == "::1"
