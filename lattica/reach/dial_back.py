"""One dial on somebody's behalf: from a socket and an identity made for it, so that neither is met in any other part.

An inbound connection of ours at the client would otherwise become one of the paths between us, and be closed under the
streams that took it; and a NAT that has seen our usual port would let the dial in where it stops strangers.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import trio

from lattica.errors import ConnectionLost, LatticaError
from lattica.negotiate import select_protocol
from lattica.transports.quic import QuicTransport
from lattica.transports.tcp import TcpTransport
from lattica_protocols.autonat.messages import DIAL_BACK_PROTOCOL, DialBack, DialBackResponse, DialStatus
from lattica_protocols.errors import ProtocolError
from lattica_protocols.keys import PrivateKey
from lattica_protocols.limits import AUTONAT_MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from lattica.interfaces import Connection
    from lattica_protocols.multiaddr import Multiaddr
    from lattica_protocols.peer_id import PeerId

DIAL_SECONDS: Final = 10.0
"""For the connection: as for any other dial."""
SAY_SECONDS: Final = 5.0
"""For the stream on it."""
_GOODBYE_SECONDS: Final = 0.5


async def dial_back(addr: Multiaddr, peer: PeerId, nonce: int | None) -> DialStatus:
    """Connect with `peer` at `addr`, tell it `nonce` (`None`: nothing is told), and close again."""
    status = DialStatus.DIAL_ERROR
    key = PrivateKey.generate(os.urandom(32))
    async with trio.open_nursery() as nursery:
        transport = QuicTransport(nursery, key) if addr.has("udp") else TcpTransport(key, nursery)
        connection: Connection | None = None
        try:
            with trio.fail_after(DIAL_SECONDS):
                connection = await transport.dial(addr.without_peer(), peer)
            status = DialStatus.OK if nonce is None else DialStatus.DIAL_BACK_ERROR
            if nonce is not None:
                with trio.fail_after(SAY_SECONDS):
                    await _say(connection, nonce)
                status = DialStatus.OK
        except (LatticaError, ProtocolError, OSError, trio.TooSlowError):
            pass  # what went wrong is no business of the client's
        if connection is not None:
            with trio.move_on_after(_GOODBYE_SECONDS):
                await connection.aclose()
        nursery.cancel_scope.cancel()
    return status


async def _say(connection: Connection, nonce: int) -> None:
    stream = await connection.open_stream()
    await select_protocol(stream, [DIAL_BACK_PROTOCOL])
    await stream.send_frame(DialBack(nonce=nonce).encode())
    await stream.close_write()
    try:
        DialBackResponse.decode_untrusted(await stream.receive_frame(AUTONAT_MAX_MESSAGE_BYTES))
    except ConnectionLost:
        pass  # it heard us, or it would not have closed in order; go-libp2p does
