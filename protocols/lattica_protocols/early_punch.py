"""A head start on hole punching, without I/O: `/lattica/punch/early/1`, on a relayed connection, before DCUtR is done.

Each message is `uvarint(length) || protobuf`, a CONNECT as in `dcutr.py`:

    A, who opened the relayed connection          B, who accepted it
      CONNECT(A's addresses)   ------------------->   opens its NAT for them, by datagrams that die behind it
      dials QUIC at once       <-------------------   CONNECT(B's addresses)

DCUtR begins with B and has both sides send at the same moment, four ways across the relay after A was ready. This takes
two and needs no common moment: B's NAT is open before A's first packet leaves, and A's opens with it. It works where a
packet of A can pass B's filter (`passes`), which is most pairs; the punch goes on meanwhile as ever, so nothing is lost
where it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from lattica_protocols.dcutr import Partner, PunchMessage, PunchType, partner_untrusted
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.nat.punch_plan import passes
from lattica_protocols.nat.report import NatReport

if TYPE_CHECKING:
    from lattica_protocols.multiaddr import Multiaddr
    from lattica_protocols.nat.behaviour import NatBehaviour

PROTOCOL_ID: Final = "/lattica/punch/early/1"


def encode_offer(addrs: Sequence[Multiaddr], nat: NatBehaviour | None) -> bytes:
    """Either side's message, without its length prefix. `nat`: what our NATs do; `None`: not known."""
    report = None if nat is None else NatReport.of(nat)
    return PunchMessage(type=PunchType.CONNECT, addrs=tuple(addr.to_bytes() for addr in addrs), nat=report).encode()


def decode_offer_untrusted(data: bytes) -> Partner:
    """What the other side said."""
    message = PunchMessage.decode_untrusted(data)
    if message.type != PunchType.CONNECT:
        raise RemoteProtocolError("the offer of an early punch is no CONNECT")
    return partner_untrusted(message)


def can_dial_early(dialler: NatBehaviour | None, accepter: NatBehaviour | None) -> bool:
    """Whether a packet of A gets to B when B's NAT alone was opened before. What is not known is hoped for."""
    if dialler is None or accepter is None:
        return True
    return not (dialler.udp_blocked or accepter.udp_blocked) and passes(dialler, accepter)
