"""Who else in this network speaks libp2p: asked now and then, answered when others ask.

    question   PTR _p2p._udp.local
    answer     PTR _p2p._udp.local -> NAME._p2p._udp.local
               TXT NAME._p2p._udp.local: dnsaddr=/ip4/192.168.1.5/tcp/4101/p2p/PEER, one for each address

NAME is random: it tells nothing, and does not survive a restart. We ask at the start, some times more soon, then every
five minutes, and tell of ourselves unasked at the start and when our addresses change.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import MDNS_MAX_ADDRS, MDNS_MAX_PEERS
from lattica_protocols.mdns.dns import ANY, PTR, TXT, decode_packet_untrusted, encode_answer, encode_query
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId

SERVICE: Final = "_p2p._udp.local"
GROUP: Final = ("224.0.0.251", 5353)
TTL: Final = 120
"""Seconds that an answer holds: RFC 6762, section 10, for records with a host's address."""
ASK_TIMES: Final = (0.0, 1.0, 4.0, 20.0)
"""After the start; multicast is lost easily, in wireless networks above all."""
ASK_SECONDS: Final = 300.0
ANSWER_DELAY: Final = (0.02, 0.12)
"""So that not all answer at once (RFC 6762, section 6)."""
ANSWER_PACE: Final = 1.0
"""At most one answer in so many seconds, whoever asks how often (RFC 6762, section 6)."""
TOLD_AGAIN: Final = 60.0
"""Until the same peer is reported again."""
_NAME_CHARS: Final = 40
_KEY: Final = b"dnsaddr="
_MAX_TEXT: Final = 255


@dataclass(frozen=True, slots=True)
class PeerFound:
    """Somebody said that `peer` is at `addrs` (without `/p2p`). Nothing of that is proven."""

    peer: PeerId
    addrs: tuple[Multiaddr, ...]


class Mdns:
    """See the top of the file."""

    def __init__(self, peer: PeerId, rng: random.Random, now: float) -> None:
        letters = string.ascii_lowercase + string.digits
        self.name = "".join(rng.choice(letters) for _ in range(_NAME_CHARS)) + "." + SERVICE
        self.garbled = 0
        """Datagrams that were no DNS."""
        self._peer = peer
        self._rng = rng
        self._addrs: tuple[Multiaddr, ...] = ()
        self._ask_at = [now + after for after in ASK_TIMES]
        self._answer_at: float | None = None
        self._answered_at = float("-inf")
        self._told: dict[PeerId, float] = {}
        self._out: list[bytes] = []
        self._events: list[PeerFound] = []

    def set_addrs(self, addrs: Sequence[Multiaddr], now: float) -> None:
        """Where others in this network find us."""
        wanted = tuple(addr.without_peer() for addr in addrs)[:MDNS_MAX_ADDRS]
        if wanted != self._addrs:
            self._addrs = wanted
            self._answer_soon(now)

    def ask(self, now: float) -> None:
        """Ask anew: the network is another one."""
        self._told.clear()
        self._ask_at = [now + after for after in ASK_TIMES]
        self._answer_soon(now)

    def receive_datagram(self, data: bytes, now: float) -> None:
        """Something came from the group, or to our port."""
        try:
            packet = decode_packet_untrusted(data)
        except RemoteProtocolError:
            self.garbled += 1
            return
        if not packet.is_response:
            if any(name == SERVICE and kind in (PTR, ANY) for name, kind in packet.questions):
                self._answer_soon(now)
            return
        names = {record.target for record in packet.records if record.type == PTR and record.name == SERVICE}
        found: dict[PeerId, list[Multiaddr]] = {}
        for record in packet.records:
            if record.type == TXT and record.ttl and record.name in names and record.name != self.name:
                for text in record.texts:
                    self._read(text, found)
        for peer, addrs in found.items():
            self._tell(PeerFound(peer, tuple(addrs)), now)

    def handle_timer(self, now: float) -> None:
        if self._answer_at is not None and self._answer_at <= now:
            self._answer_at, self._answered_at = None, now
            if self._addrs:
                self._out.append(self._answer())
        if self._ask_at[0] <= now:
            self._ask_at = [at for at in self._ask_at if at > now] or [now + ASK_SECONDS * self._rng.uniform(0.9, 1.1)]
            self._out.append(encode_query(SERVICE))

    def next_timeout(self) -> float:
        return min(self._ask_at[0], float("inf") if self._answer_at is None else self._answer_at)

    def poll_transmit(self) -> list[bytes]:
        """Each goes to `GROUP`."""
        out, self._out = self._out, []
        return out

    def next_event(self) -> PeerFound | None:
        return self._events.pop(0) if self._events else None

    def _answer_soon(self, now: float) -> None:
        if self._answer_at is None:
            self._answer_at = max(now + self._rng.uniform(*ANSWER_DELAY), self._answered_at + ANSWER_PACE)

    def _answer(self) -> bytes:
        texts = [_KEY + f"{addr}/p2p/{self._peer}".encode("ascii") for addr in self._addrs]
        return encode_answer(SERVICE, self.name, [text for text in texts if len(text) <= _MAX_TEXT], TTL)

    def _read(self, text: bytes, found: dict[PeerId, list[Multiaddr]]) -> None:
        if not text.startswith(_KEY):
            return
        try:
            addr = Multiaddr.parse(text[len(_KEY) :].decode("ascii"))
        except ValueError:
            return
        peer = addr.peer_id()
        if peer is None or peer == self._peer or addr.is_circuit or addr.host_port() is None:
            return
        addrs = found.setdefault(peer, [])
        if len(addrs) < MDNS_MAX_ADDRS:
            addrs.append(addr.without_peer())

    def _tell(self, event: PeerFound, now: float) -> None:
        self._told = {peer: at for peer, at in self._told.items() if at > now - TOLD_AGAIN}
        if event.peer not in self._told and len(self._told) < MDNS_MAX_PEERS:
            self._told[event.peer] = now
            self._events.append(event)
