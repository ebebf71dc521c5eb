"""What stands between this machine and the internet, and why connections are as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lattica.errors import InvalidArgument
from lattica_daemon.control.arguments import read_peer
from lattica_daemon.doctor import examine, examine_peer
from lattica_daemon.doctor.facts import gather_facts
from lattica_daemon.doctor.machine import check_reachable
from lattica_daemon.doctor.peer import why_relayed
from lattica_daemon.doctor.port_mapping import check_port_mapping, mapping_to_plain
from lattica_protocols.limits import NAT_MAX_LIFETIMES
from lattica_protocols.nat.behaviour import Filtering, Mapping, NatBehaviour

if TYPE_CHECKING:
    from lattica.nat.guesser import Guess
    from lattica.punch import PunchReport
    from lattica_daemon.daemon import Daemon
    from lattica_protocols.peer_id import PeerId
    from lattica_protocols.stun import SocketAddr

MAX_LIFETIME = 600.0
"""Seconds of silence that a mapping can be tested for: twice the five minutes that RFC 4787 recommends."""


class NatControl:
    """Methods about NATs and paths."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def nat(self, fresh: bool = False, lifetimes: list[float] | None = None) -> dict[str, Any]:
        """The verdict on our NATs, and what was tried with each peer; see `lattica nat --json`.

        `fresh`: ask again now, 2 s. `lifetimes`: seconds of silence after which mappings are looked at again, which
        takes as long as the longest.
        """
        node = self._daemon.node
        silences = _read_lifetimes(lifetimes)
        if silences:
            await node.discover_nat(lifetimes=silences)
        known = NatBehaviour() if node.nat is None else node.nat.behaviour
        facts = await gather_facts(node, fresh=not silences and (fresh or known == NatBehaviour()))
        known = facts.behaviour
        reachable = check_reachable(facts)
        mapping, mapped = facts.port_mapping, check_port_mapping(facts)
        return {
            "mapping": known.mapping.value,
            "certain": known.certain,
            "filtering": known.filtering.value,
            "hairpin": known.hairpin,
            "udp_blocked": known.udp_blocked,
            "ports": _ports(known),
            "lifetime": {"lives_for": known.lives_for, "dies_within": known.dies_within},
            "public_addrs": _public_addrs(self._daemon, known),
            "observers": _observers(known, facts.observers),
            "evidence": list(known.evidence),
            "reachability": {True: "public", False: "private", None: "unknown"}[reachable.ok],
            "reachability_detail": reachable.detail,
            "port_mapping": None if mapping is None else mapping_to_plain(mapping, facts.verdicts),
            "port_mapping_detail": "" if mapped is None else mapped.detail,
            "port_mapping_evidence": [] if mapped is None else list(mapped.evidence),
            "reservations": facts.reservations,
            "peers": self._peers(),
        }

    async def doctor(self, peer: str | None = None) -> list[dict[str, Any]]:
        """`[{check, ok, detail, fix, evidence}]` about this daemon, or about the path to one peer."""
        node = self._daemon.node
        if peer is None:
            return [finding.to_plain() for finding in await examine(node)]
        target = read_peer(peer)
        if target == node.peer_id:
            raise InvalidArgument("this is our own peer id; leave it out to examine this daemon")
        return [finding.to_plain() for finding in await examine_peer(node, target)]

    def _peers(self) -> list[dict[str, Any]]:
        """Peers that are, or were, connected over a relay."""
        node = self._daemon.node
        reports = node.punch.reports
        relayed = dict.fromkeys(c.peer_id for c in node.host.connections() if c.path == "relay")
        return [self._peer(peer, reports.get(peer)) for peer in {**relayed, **dict.fromkeys(reports)}]

    def _peer(self, peer: PeerId, report: PunchReport | None) -> dict[str, Any]:
        best = self._daemon.node.host.connection(peer)
        return {
            "peer_id": str(peer),
            "path": "" if best is None else best.path,
            "attempts": 0 if report is None else report.attempts,
            "tried": [] if report is None else list(report.tried),
            "errors": [] if report is None else list(report.errors),
            "unproven": [] if report is None else list(report.unproven),
            "guesses": [] if report is None else [_guess(guess) for guess in report.guesses],
            "technique": "" if report is None else report.technique,
            "result": "" if report is None else report.result,
            "why": "" if best is None or best.path != "relay" else self._why(report),
            "seconds": None if report is None or report.seconds is None else round(report.seconds, 3),
        }

    def _why(self, report: PunchReport | None) -> str:
        """Why the pair is relayed, from what both sides say of their NATs."""
        node = self._daemon.node
        if report is None or report.partner is None or node.nat is None:
            return ""
        return why_relayed(node.nat.behaviour, report.partner)[0]


def _guess(guess: Guess) -> dict[str, Any]:
    return {
        "technique": guess.technique.value,
        "opened_sockets": guess.opened_sockets,
        "probes": guess.probes,
        "seconds": round(guess.seconds, 3),
        "running": guess.running,
        "direct": guess.direct,
        "error": guess.error,
        "text": str(guess),
    }


def _ports(known: NatBehaviour) -> dict[str, Any]:
    allocation = known.allocation
    return {
        "choice": allocation.ports.value,
        "low": allocation.low,
        "high": allocation.high,
        "step": allocation.step,
        "last": allocation.last,
    }


def _public_addrs(daemon: Daemon, known: NatBehaviour) -> list[str]:
    """Where others find us without a relay, as far as observers agree on it."""
    host = daemon.node.host
    addrs = [str(addr) for addr in host.announce]
    if known.mapped is not None:
        family = "ip6" if ":" in known.mapped[0] else "ip4"
        addrs.append(f"/{family}/{known.mapped[0]}/udp/{known.mapped[1]}/quic-v1")
    if known.mapping is Mapping.NONE and known.filtering is Filtering.ENDPOINT_INDEPENDENT:
        addrs += [str(a) for a in host.listen_addrs() if not a.is_circuit and str(a.ip()) == known.public_ip]
    return list(dict.fromkeys(addrs))


def _observers(known: NatBehaviour, asked: tuple[SocketAddr, ...]) -> list[dict[str, Any]]:
    """Each with what it saw, `None` for one that did not answer."""
    saw = dict(known.observed)
    named = ((observer, saw.get(observer)) for observer in dict.fromkeys([*asked, *saw]))
    return [{"observer": _text(who), "sees": None if mapped is None else _text(mapped)} for who, mapped in named]


def _text(addr: SocketAddr) -> str:
    return f"[{addr[0]}]:{addr[1]}" if ":" in addr[0] else f"{addr[0]}:{addr[1]}"


def _read_lifetimes(values: object) -> tuple[float, ...]:
    if values is None:
        return ()
    if not isinstance(values, list) or len(values) > NAT_MAX_LIFETIMES:
        raise InvalidArgument(f"lifetimes are a list of up to {NAT_MAX_LIFETIMES} numbers")
    if not all(isinstance(value, int | float) and 1 <= value <= MAX_LIFETIME for value in values):
        raise InvalidArgument(f"a lifetime is 1 to {MAX_LIFETIME:g} seconds")
    return tuple(float(value) for value in values)
