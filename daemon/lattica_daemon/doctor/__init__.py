"""`lattica doctor`: why connections are as they are, in words, with what was seen and what would help."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from lattica.errors import LatticaError
from lattica_daemon.doctor import machine, peer
from lattica_daemon.doctor.facts import Finding, Link, gather_facts
from lattica_daemon.doctor.relay_delay import measure_relay
from lattica_protocols.errors import ProtocolError

if TYPE_CHECKING:
    from lattica.node import Node
    from lattica_protocols.nat.behaviour import NatBehaviour
    from lattica_protocols.peer_id import PeerId

ASK_SECONDS = 3.0
"""For what the peer says of its NAT: over a relay a round trip or two."""
CONNECT_SECONDS = 8.0


async def examine(node: Node) -> list[Finding]:
    """All checks about this daemon; a few seconds."""
    facts = await gather_facts(node)
    return [finding for check in machine.CHECKS if (finding := check(facts)) is not None]


async def examine_peer(node: Node, target: PeerId) -> list[Finding]:
    """All checks about the path to one peer; connects to it when that is not done yet."""
    error = ""
    if not node.host.connections(target):
        try:
            with trio.fail_after(CONNECT_SECONDS):
                await node.host.connect(target)
        except (LatticaError, trio.TooSlowError) as raised:
            error = str(raised) or f"no answer within {CONNECT_SECONDS:g} s"
    facts = peer.PeerFacts(await gather_facts(node), str(target), punch=node.config.punch, dial_error=error)
    if node.host.connections(target):
        facts.theirs = await _ask_nat(node, target)
        facts.trips = await measure_relay(node, target)
    facts.links = tuple(Link(c.path, c.direction, c.remote_addr) for c in node.host.connections(target))
    facts.known_addrs = tuple(str(addr) for addr in node.host.peerstore.addrs(target))
    facts.report = node.punch.reports.get(target)
    return [finding for check in peer.CHECKS if (finding := check(facts)) is not None]


async def _ask_nat(node: Node, target: PeerId) -> NatBehaviour | None:
    """What the peer says of its NAT; None: it does not."""
    with trio.move_on_after(ASK_SECONDS):
        try:
            return peer.behaviour_untrusted(await node.rpc.call(target, "lattica.nat"))
        except (LatticaError, ProtocolError):
            return None
    return None


__all__ = ["Finding", "examine", "examine_peer"]
