"""The head start on hole punching (`lattica_protocols.early_punch`): who opened a relayed connection names its
addresses at once, who accepted it opens its NAT for them, and the first dials without waiting for DCUtR.

Whom anything is sent to, and how much, is decided as for every punch (`HolePuncher`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final
from weakref import WeakSet

import trio

from lattica.errors import LatticaError
from lattica.negotiate import LazyStream
from lattica_protocols import early_punch
from lattica_protocols.early_punch import PROTOCOL_ID, can_dial_early
from lattica_protocols.errors import ProtocolError
from lattica_protocols.limits import DCUTR_MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from lattica.host import Host
    from lattica.interfaces import Connection, Stream
    from lattica_protocols.dcutr import Target
    from lattica_protocols.multiaddr import Multiaddr
    from lattica_protocols.nat.behaviour import NatBehaviour

log = logging.getLogger("lattica.punch")

OFFER_SECONDS: Final = 2.0
"""For both messages. Later than this DCUtR has done it."""


class EarlyPunch:
    """Both parts of it. The arguments are the hole puncher's: our addresses and NATs, whom to send to, and sending."""

    def __init__(
        self,
        host: Host,
        *,
        candidates: Callable[[], list[Multiaddr]],
        behaviour: Callable[[], NatBehaviour | None],
        choose: Callable[[Connection, Sequence[Multiaddr]], list[Target]],
        open_nat: Callable[[Sequence[Target]], None],
    ) -> None:
        self._host = host
        self._candidates = candidates
        self._behaviour = behaviour
        self._choose = choose
        self._open_nat = open_nat
        self._answered: WeakSet[Connection] = WeakSet()

    def start(self) -> None:
        """Answer partners."""
        self._host.handle(PROTOCOL_ID, self._answer)

    async def offer(self, relayed: Connection) -> list[Target]:
        """A's part: where to dial QUIC now. Nothing where the partner does not take part, or it would be in vain."""
        known = self._host.peerstore.protocols(relayed.peer_id)
        if known and PROTOCOL_ID not in known:
            return []
        try:
            with trio.fail_after(OFFER_SECONDS):
                stream = LazyStream(await relayed.open_stream(), PROTOCOL_ID)
                try:
                    await stream.send_frame(early_punch.encode_offer(self._candidates(), self._behaviour()))
                    data = await stream.receive_frame(DCUTR_MAX_MESSAGE_BYTES)
                finally:
                    stream.reset()
            partner = early_punch.decode_offer_untrusted(data)
        except (LatticaError, ProtocolError, trio.TooSlowError) as error:
            log.debug("early_punch_declined peer=%s error=%s", relayed.peer_id.short(), error)
            return []
        if not can_dial_early(self._behaviour(), partner.nat):
            return []
        return [t for t in self._choose(relayed, partner.addrs) if t.proven and t.addr.has("udp")]

    async def _answer(self, stream: Stream) -> None:
        """B's part, once for each relayed connection."""
        relayed = stream.connection
        if relayed.path != "relay" or relayed.direction != "inbound" or relayed in self._answered:
            stream.reset()
            return
        self._answered.add(relayed)
        with trio.fail_after(OFFER_SECONDS):
            partner = early_punch.decode_offer_untrusted(await stream.receive_frame(DCUTR_MAX_MESSAGE_BYTES))
            if not can_dial_early(partner.nat, self._behaviour()):
                stream.reset()
                return
            self._open_nat([target for target in self._choose(relayed, partner.addrs) if target.proven])
            await stream.send_frame(early_punch.encode_offer(self._candidates(), self._behaviour()))
            await stream.aclose()
