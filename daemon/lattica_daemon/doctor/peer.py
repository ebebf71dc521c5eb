"""Checks about one peer: which path is in use, what was tried to get a direct one, and why that did not work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lattica.punch import PunchReport
from lattica_daemon.doctor.facts import Facts, Finding, Link
from lattica_daemon.doctor.relay_delay import RelayTrips, check_relay_delay
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import PUNCH_MAX_UNPROVEN, PUNCH_PROBES_UNPROVEN
from lattica_protocols.nat.behaviour import Allocation, Filtering, Mapping, NatBehaviour, Ports
from lattica_protocols.nat.punch_plan import Technique, choose_technique, is_hopeless

_TECHNIQUES = {
    "predict": " through a predicted port",
    "birthday": " through a port found by trying many (birthday)",
}
PUNCH_SIDES = ("we are", "the peer is")


@dataclass
class PeerFacts:
    """About one peer, beside what is known of ourselves."""

    own: Facts
    peer: str
    links: tuple[Link, ...] = ()
    known_addrs: tuple[str, ...] = ()
    report: PunchReport | None = None
    theirs: NatBehaviour | None = None
    """What the peer says of its NAT."""
    trips: RelayTrips | None = None
    """With the relay in between, if one is."""
    punch: bool = True
    """Whether the settings allow hole punching."""
    dial_error: str = ""
    """Why no connection came up just now."""

    @property
    def is_direct(self) -> bool:
        return any(link.path != "relay" for link in self.links)


PeerCheck = Callable[[PeerFacts], Finding | None]


def check_path(facts: PeerFacts) -> Finding:
    """What carries the traffic with this peer."""
    evidence = tuple(f"{link.path} {link.direction} {link.remote}" for link in facts.links)
    if facts.is_direct:
        paths = sorted({link.path for link in facts.links if link.path != "relay"})
        return Finding("path", True, f"direct, over {' and '.join(paths)}", evidence=evidence)
    if facts.links:
        return Finding("path", False, "relayed: there is no direct connection", "see the checks below", evidence)
    detail = f"not connected: {facts.dial_error or 'nobody has tried'}"
    known = tuple(f"known address {addr}" for addr in facts.known_addrs[:8])
    return Finding("path", False, detail, "see whether the peer runs, and has a relay or a public address", known)


def check_attempts(facts: PeerFacts) -> Finding | None:
    """What hole punching tried."""
    report = facts.report
    if report is None:
        if facts.is_direct or not facts.links:
            return None
        if not facts.punch:
            return Finding("attempts", False, "hole punching is off in the settings", 'set relay.punch to "on"')
        return Finding("attempts", None, "no direct connection was tried yet", "wait some seconds, and ask again")
    evidence = (
        *(f"tried {what}" for what in report.tried),
        *(f"guessed ports: {guess}" for guess in report.guesses),
        *(f"failed: {error}" for error in report.errors),
    )
    times = f"{report.attempts} attempt{'s' if report.attempts != 1 else ''} at hole punching"
    if report.result:
        seconds = "" if report.seconds is None else f" after {report.seconds:.2f} s"
        how = _TECHNIQUES.get(report.technique, "")
        return Finding("attempts", True, f"a direct path over {report.result}{how}{seconds}, {times}", "", evidence)
    if not report.attempts:
        return Finding("attempts", None, "only the peer's own addresses were dialled, without success", "", evidence)
    return Finding("attempts", False, f"{times} without success", "see the cause", evidence)


def check_claims(facts: PeerFacts) -> Finding | None:
    """Whether the peer is where it says it is."""
    if facts.report is None or not facts.report.unproven:
        return None
    count = len(facts.report.unproven)
    detail = (
        f"the peer names {count} address{'es' if count > 1 else ''} at which nobody sees it, perhaps somebody else's: "
        f"at most {PUNCH_MAX_UNPROVEN} of them get {PUNCH_PROBES_UNPROVEN} small datagrams each, and no more"
    )
    fix = "nothing where the peer has a second way out; else look at listen.announce of that peer"
    return Finding("claims", None, detail, fix, tuple(f"named {addr}" for addr in facts.report.unproven))


def check_cause(facts: PeerFacts) -> Finding | None:
    """Why this pair is relayed, by what both sides' NATs do."""
    if facts.is_direct or not facts.links:
        return None
    own, theirs = facts.own.behaviour, facts.theirs
    evidence = [f"we: {in_words(own)}", f"the peer: {'not known' if theirs is None else in_words(theirs)}"]
    open_port = f"forward {facts.own.ports} on one of the two sides, or turn on UPnP, NAT-PMP or PCP in its router"
    told, fix = why_relayed(own, theirs, open_port)
    return Finding("cause", None if theirs is None else False, told, fix, tuple(evidence))


def why_relayed(own: NatBehaviour, theirs: NatBehaviour | None, open_port: str = "") -> tuple[str, str]:
    """The reason, and what would help. `open_port`: how a port is opened for this pair."""
    blocked = [side for side, known in zip(PUNCH_SIDES, (own, theirs), strict=True) if known and known.udp_blocked]
    if blocked:
        fix = "allow outgoing UDP there; a TCP port forwarded on the other side makes TCP direct"
        return f"UDP is blocked where {' and '.join(blocked)}: only TCP can be direct", fix
    if theirs is None:
        return "the peer does not tell what its NAT does; the attempts are all there is to go by", open_port
    technique = choose_technique(own, theirs)
    hard = [side for side, known in zip(PUNCH_SIDES, (own, theirs), strict=True) if _is_symmetric(known)]
    where = f"behind a symmetric NAT: {' and '.join(hard)}" if hard else ""
    if technique is Technique.SIMPLE:
        fix = "run `lattica doctor` again after the next attempt; if it stays so, forward a port on one side"
        return "these NATs can be punched, and it did not work: a firewall may drop more than it seems", fix
    if technique is Technique.PREDICT:
        return f"{where}; its ports are counted up and can be predicted, which fails when others use it, too", open_port
    if technique is Technique.BIRTHDAY:
        told = f"{where}; the other side lets in only whom it sent to: the port has to be guessed, which takes seconds"
        return told, open_port
    told = f"{where}: neither side can know which port the other will use"
    if is_hopeless(own, theirs):
        told += "; both are certain of that, so the pair stays relayed, and only quick attempts are made"
    return told, open_port


def _is_symmetric(known: NatBehaviour) -> bool:
    return known.mapping in (Mapping.ADDRESS_DEPENDENT, Mapping.ADDRESS_AND_PORT_DEPENDENT)


def in_words(known: NatBehaviour) -> str:
    """One line."""
    if known.udp_blocked:
        return "UDP blocked"
    return (
        f"mapping {known.mapping.value}, filtering {known.filtering.value}, ports {known.allocation.ports.value}"
    )


def check_delay(facts: PeerFacts) -> Finding | None:
    """Whether the relay in between holds back what it carries."""
    return None if facts.is_direct else check_relay_delay(facts.trips)


CHECKS: Sequence[PeerCheck] = (check_path, check_attempts, check_claims, check_cause, check_delay)


# -- what daemons tell each other about their NATs ---------------------------------------------------------------------
def behaviour_to_plain(known: NatBehaviour) -> dict[str, Any]:
    """What a peer may know: what hole punching would show it anyway, no addresses."""
    return {
        "mapping": known.mapping.value,
        "filtering": known.filtering.value,
        "ports": known.allocation.ports.value,
        "udp_blocked": known.udp_blocked,
        "certain": known.certain,
    }


def behaviour_untrusted(value: object) -> NatBehaviour:
    """The reverse, from a peer."""
    if not isinstance(value, dict):
        raise RemoteProtocolError("a NAT is described by a map")
    try:
        return NatBehaviour(
            mapping=Mapping(value.get("mapping")),
            filtering=Filtering(value.get("filtering")),
            allocation=Allocation(Ports(value.get("ports"))),
            udp_blocked=value.get("udp_blocked") is True,
            certain=value.get("certain") is True,
        )
    except (ValueError, TypeError) as error:
        raise RemoteProtocolError(f"not a description of a NAT: {error}") from None
