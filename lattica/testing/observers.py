"""STUN servers of a simulated network, honest and not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from lattica.testing.internet import SimHost, SimulatedInternet
from lattica_protocols.nat.discovery import Observer
from lattica_protocols.stun import Attribute, MessageType, SocketAddr, StunMessage, encode_address, encode_message
from lattica_protocols.stun_server import StunServer

FIRST_PORT: Final = 3478
SECOND_PORT: Final = 3479

Lie = Callable[[SocketAddr], SocketAddr]
"""From the address that was seen to the one that is told."""


class SimObserver:
    """A host that answers STUN at two ports, and with `second_address` at two IP addresses (RFC 5780).

    `lie`: what it says instead of the truth. `silent`: it does not send from its other addresses when asked to.
    """

    def __init__(
        self,
        net: SimulatedInternet,
        name: str,
        *,
        second_address: bool = True,
        lie: Lie | None = None,
        silent: bool = False,
        delay: float = 0.01,
    ) -> None:
        self.host: SimHost = net.host(name, delay=delay)
        if second_address:
            self.host.add_address()
        self.seen: list[SocketAddr] = []
        """Where requests came from."""
        self._server = StunServer()
        self._lie = lie
        self._silent = silent
        for address in self.host.addresses:
            for port in (FIRST_PORT, SECOND_PORT):
                self.host.bind(partial(self._received, (address, port)), address=address, port=port)

    @property
    def observer(self) -> Observer:
        """How a discovery is told of it."""
        return Observer((self.host.address, FIRST_PORT))

    def _received(self, origin: SocketAddr, data: bytes, source: SocketAddr) -> None:
        self.seen.append(source)
        other = (
            next((a for a in self.host.addresses if a != origin[0]), origin[0]),
            SECOND_PORT if origin[1] == FIRST_PORT else FIRST_PORT,
        )
        reply = self._server.receive_request(data, source, self.host.net.now, origin=origin, other=other)
        if reply is None or (self._silent and (reply.other_ip or reply.other_port)):
            return
        sender = (other[0] if reply.other_ip else origin[0], other[1] if reply.other_port else origin[1])
        self.host.send(sender, reply.to, reply.data if self._lie is None else self._told(data, source, self._lie))

    def _told(self, data: bytes, source: SocketAddr, lie: Lie) -> bytes:
        said = encode_address(lie(source), data[8:20])
        return encode_message(StunMessage(MessageType.SUCCESS, data[8:20], ((Attribute.XOR_MAPPED_ADDRESS, said),)))
