"""Checks about this daemon and the network in front of it: each a function of `Facts`, `None` when it does not apply.

A new check is a function here (or in a file of its own) and a line in `CHECKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lattica_daemon.doctor.facts import Facts, Finding, Link, is_private, is_shared_space
from lattica_daemon.doctor.port_mapping import check_port_mapping
from lattica_protocols.nat.behaviour import Filtering, Mapping, Ports
from lattica_protocols.nat.classify import MIN_OBSERVERS

if TYPE_CHECKING:
    from lattica_protocols.multiaddr import Multiaddr

Check = Callable[[Facts], Finding | None]

_DEPENDENT = (Mapping.ADDRESS_DEPENDENT, Mapping.ADDRESS_AND_PORT_DEPENDENT)
_WEB_PORTS = (80, 443)
_LISTEN_ELSEWHERE = (
    "set listen.addrs (or --listen) to an address that others can reach, as /ip4/0.0.0.0/tcp/4101 and "
    "/ip4/0.0.0.0/udp/4101/quic-v1"
)


def check_listening(facts: Facts) -> Finding:
    """Whether there is a socket that anybody could connect to."""
    evidence = tuple(str(addr) for addr in facts.listening)
    if not facts.listening:
        return Finding("listen", False, "this daemon listens nowhere", "set listen.addrs, or remove it", evidence)
    if _on_loopback_only(facts):
        detail = "this daemon listens on the loopback address only"
        return Finding("listen", False, detail, _LISTEN_ELSEWHERE, evidence)
    kinds = {target[0] for addr in facts.listening if (target := addr.host_port()) is not None}
    if "udp" not in kinds:
        fix = "add /ip4/0.0.0.0/udp/4101/quic-v1 to listen.addrs"
        return Finding("listen", False, "no QUIC address is listened on: half of hole punching is UDP", fix, evidence)
    return Finding("listen", True, f"listening on {facts.ports}", evidence=evidence)


def check_observers(facts: Facts) -> Finding:
    """Whether enough others could be asked how they see us."""
    evidence = tuple(f"{ip}:{port}" for ip, port in facts.observers)
    count = len({ip for ip, _ in facts.observers})
    if count >= MIN_OBSERVERS:
        return Finding("observers", True, f"{count} peers or servers can tell how they see us", evidence=evidence)
    told = "nobody" if not count else "only one peer or server" if count == 1 else f"only {count} peers or servers"
    fix = f"connect to more public peers (--bootstrap): {MIN_OBSERVERS} make the verdict on the NAT safe"
    return Finding("observers", None if count else False, f"{told} can tell how others see us", fix, evidence)


def check_udp(facts: Facts) -> Finding | None:
    """Whether UDP gets out and back at all."""
    if not facts.observers:
        return None
    if not facts.behaviour.udp_blocked:
        seen = ", ".join(f"{ip}:{port}" for ip, port in facts.behaviour.seen)
        return Finding("udp", True, "UDP gets out and answers come back", evidence=(f"seen at {seen}",) if seen else ())
    tcp = sorted({_place(link.remote) for link in facts.links if link.path == "tcp"})
    asked = ", ".join(f"{ip}:{port}" for ip, port in facts.observers)
    evidence = [f"no answer to STUN requests over UDP from {asked}"]
    detail = "UDP is blocked: QUIC and UDP hole punching cannot work"
    if tcp:
        evidence.append(f"over TCP connected with {', '.join(tcp[:4])}")
        detail += ", while TCP works"
    fix = (
        f"allow outgoing UDP and its answers in the firewall in front of this machine (at least from {facts.ports}); "
        "until then connections are direct over TCP where that can be punched, else relayed"
    )
    return Finding("udp", False, detail, fix, tuple(evidence))


def check_tcp_ports(facts: Facts) -> Finding | None:
    """Whether TCP seems to get out to web ports only."""
    ports = [t[2] for a in facts.links if a.path == "tcp" and a.direction == "outbound" and (t := a.remote.host_port())]
    if not facts.behaviour.udp_blocked or not ports or any(port not in _WEB_PORTS for port in ports):
        return None
    detail = "all connections go to TCP port 443 or 80; with UDP blocked, this looks like a network for the web only"
    fix = "relays on TCP 443 carry the traffic; to be direct, allow outgoing TCP to other ports"
    return Finding("tcp-ports", None, detail, fix, tuple(f"connected to TCP port {p}" for p in sorted(set(ports))))


def check_nat(facts: Facts) -> Finding:
    """What the NAT does, and what that means for hole punching."""
    known = facts.behaviour
    evidence = known.evidence
    if known.udp_blocked:
        return Finding("nat", None, "what the NAT does cannot be told while UDP is blocked", evidence=evidence)
    if known.mapping is Mapping.UNKNOWN:
        return Finding("nat", None, "what the NAT does is not known", "see the check on observers", evidence)
    forward = f"forward {facts.ports} to this machine in the router, or turn on UPnP, NAT-PMP or PCP there"
    if known.mapping is Mapping.NONE:
        return Finding("nat", True, "no address translation: our own address is the public one", evidence=evidence)
    if known.mapping in _DEPENDENT:
        return Finding("nat", False, f"symmetric NAT: {_symmetric(facts)}", forward, evidence)
    seen = "" if known.mapped is None else f", seen by all at {known.mapped[0]}:{known.mapped[1]}"
    detail = f"the NAT keeps one public port for each of ours{seen}: hole punching works with most peers"
    return Finding("nat", True, detail, evidence=evidence)


def _symmetric(facts: Facts) -> str:
    allocation = facts.behaviour.allocation
    on = "address" if facts.behaviour.mapping is Mapping.ADDRESS_DEPENDENT else "address and port"
    told = f"the public port is another one for each {on} that we talk to"
    if allocation.ports is Ports.SEQUENTIAL:
        return f"{told}, counted up by {allocation.step}: it can be predicted for most partners"
    if allocation.ports is Ports.BLOCK:
        return f"{told}, out of {allocation.low} to {allocation.high}: guessing it takes a second with an easy partner"
    return f"{told}: direct connections with partners behind strict NATs need many guesses or a mapped port"


def check_firewall(facts: Facts) -> Finding | None:
    """Whether unasked packets come in at a public address."""
    known = facts.behaviour
    if known.udp_blocked or known.mapping is not Mapping.NONE or known.filtering is Filtering.UNKNOWN:
        return None
    if known.filtering is Filtering.ENDPOINT_INDEPENDENT:
        return Finding("firewall", True, "unasked packets come in: anybody can connect", evidence=known.evidence[1:])
    fix = f"open {facts.ports} for incoming packets in the firewall of this machine or its network"
    detail = "the address is public, but a firewall drops what nobody here asked for"
    return Finding("firewall", False, detail, fix, known.evidence[1:])


def check_double_nat(facts: Facts) -> Finding | None:
    """Whether a second NAT stands behind the first, where a port forwarded in one's own router does not help."""
    known = facts.behaviour
    if known.mapping is Mapping.NONE or not facts.routers:
        return None
    evidence = tuple(f"router {i}: {ip or 'silent'}" for i, ip in enumerate(facts.routers, 1))
    inner = [ip for ip in facts.routers if ip is not None and is_private(ip)]
    own_carrier = [str(ip) for ip in facts.own_ips if is_shared_space(str(ip))]
    carrier = own_carrier + [ip for ip in inner if is_shared_space(ip)]
    if carrier:
        detail = f"behind the carrier's NAT (CGN): {carrier[0]} is an address of the carrier's inner network"
        fix = "ask the provider for a public IPv4 address, or use IPv6; forwarding a port at home does not help"
        return Finding("double-nat", False, detail, fix, evidence)
    if len(inner) > 1:
        detail = f"two routers with private addresses in a row ({inner[0]} and {inner[1]}): most likely two NATs"
        fix = "make the inner router a bridge or access point, or forward the port in both"
        return Finding("double-nat", False, detail, fix, evidence)
    return Finding("double-nat", True, "one NAT only, as far as the first routers tell", evidence=evidence)


def check_ipv6(facts: Facts) -> Finding | None:
    """Whether a public IPv6 address is of any use from outside."""
    public = [ip for ip in facts.own_ips if ip.version == 6 and ip.is_global]
    listening = [addr for addr in facts.listening if addr.value("ip6") is not None]
    if not public:
        return None
    evidence = tuple(str(ip) for ip in public)
    if not listening:
        fix = "add /ip6/::/tcp/4101 and /ip6/::/udp/4101/quic-v1 to listen.addrs"
        return Finding("ipv6", False, "there is public IPv6, but nothing listens on it", fix, evidence)
    came = [str(a.remote) for a in facts.links if a.direction == "inbound" and _is_public_six(a)]
    tried = {str(addr): verdict for addr, verdict in facts.verdicts.items() if addr.value("ip6") is not None}
    reached = [addr for addr, verdict in tried.items() if verdict == "public"]
    if reached:
        detail = "peers tried, and connected to us over IPv6"
        return Finding("ipv6", True, detail, evidence=(*evidence, f"at {reached[0]}"))
    if came:
        return Finding("ipv6", True, "peers connect to us over IPv6", evidence=(*evidence, f"from {came[0]}"))
    fix = f"open {facts.ports} for IPv6 in the router's firewall: most drop what comes in, as behind a NAT"
    if "private" in tried.values():
        detail = "there is public IPv6, but peers that tried could not connect over it"
        return Finding("ipv6", False, detail, fix, (*evidence, *(f"{addr}: {value}" for addr, value in tried.items())))
    return Finding("ipv6", None, "there is public IPv6, but nobody has connected over it", fix, evidence)


def check_surroundings(facts: Facts) -> Finding | None:
    """Whether a NAT stands inside this very computer."""
    if facts.surroundings == "wsl":
        fix = "set networkingMode=mirrored under [wsl2] in .wslconfig, or run the daemon on Windows' side of the NAT"
        return Finding("wsl", False, "this is WSL: Windows puts a NAT of its own in front", fix, ("kernel: microsoft",))
    if facts.surroundings == "container" and all(is_private(str(ip)) for ip in facts.own_ips):
        fix = f"use the host's network (--network host), or publish {facts.ports} and set listen.announce"
        ips = tuple(str(ip) for ip in facts.own_ips)
        return Finding("container", False, "a container with a network of its own: one more NAT in front", fix, ips)
    return None


def check_relays(facts: Facts) -> Finding | None:
    """Whether others reach us through relays, where that is needed."""
    if not facts.relays_wanted:
        return None
    evidence = [f"place at {relay}" for relay in facts.reservations]
    evidence += [f"{relay}: {error}" for relay, error in facts.relay_errors.items()]
    count = len(facts.reservations.keys() - facts.silent_relays)
    if count:
        detail = f"others reach us through {count} relay{'s' if count != 1 else ''}"
        return Finding("relays", True, detail, evidence=tuple(evidence))
    if facts.reservations:
        detail = "no relay at which we have a place answers any more: nobody can begin a connection"
        fix = "see whether this machine's network works; name other relays in relay.relays"
        return Finding("relays", False, detail, fix, tuple(evidence))
    fix = "name relays in relay.relays, or bootstrap peers that serve as relays"
    return Finding("relays", False, "no relay gave us a place: nobody can begin a connection", fix, tuple(evidence))


def check_relayed_paths(facts: Facts) -> Finding | None:
    """Whether relays carry what they are given."""
    altered = [relay for relay, troubles in facts.relay_troubles.items() if troubles.altered]
    silent = [relay for relay, troubles in facts.relay_troubles.items() if troubles.silent]
    evidence = tuple(
        f"through {relay}: {troubles.altered} altered, {troubles.silent} fell silent; the last: {troubles.last}"
        for relay, troubles in facts.relay_troubles.items()
    )
    if altered:
        detail = (
            f"what was sent through {', '.join(altered)} did not arrive as it was sent: the encryption noticed, "
            "nothing of it was used, and the connections were left"
        )
        fix = f"do not use {'this relay' if len(altered) == 1 else 'these relays'}: name others in relay.relays"
        return Finding("relayed-paths", False, detail, fix, evidence)
    if silent:
        detail = f"connections through {', '.join(silent)} fell silent while the relay itself answered; they were left"
        fix = "if it happens again, the relay drops or holds what it should carry: name others in relay.relays"
        return Finding("relayed-paths", False, detail, fix, evidence)
    return None


def check_reachable(facts: Facts) -> Finding:
    """Whether others can connect to us without any help."""
    came = [link for link in facts.links if link.direction == "inbound" and link.path != "relay"]
    outside = [link for link in came if (ip := link.remote.ip()) is not None and not is_private(str(ip))]
    known = facts.behaviour
    if _on_loopback_only(facts):
        by = "others come through relays" if facts.reservations else "nobody on another machine can connect to it"
        listening = tuple(str(addr) for addr in facts.listening)
        detail = f"this daemon listens on the loopback address only: {by}"
        return Finding("reachable", False, detail, _LISTEN_ELSEWHERE, listening)
    tried = tuple(f"{addr}: {verdict}" for addr, verdict in facts.verdicts.items() if verdict != "unknown")
    reached = [_place(addr) for addr, verdict in facts.verdicts.items() if verdict == "public"]
    if facts.reachability == "public" and reached:
        return Finding("reachable", True, f"peers tried, and connected to us at {reached[0]}", evidence=tried)
    if known.mapping is Mapping.NONE and known.filtering is Filtering.ENDPOINT_INDEPENDENT:
        return Finding("reachable", True, "anybody can connect to us", evidence=known.evidence)
    if known.filtering is Filtering.ENDPOINT_INDEPENDENT and known.mapped is not None:
        place = f"{known.mapped[0]}:{known.mapped[1]}"
        return Finding("reachable", True, f"anybody can connect to us at {place} (UDP)", evidence=known.evidence)
    if facts.reachability == "private" or known.udp_blocked or known.mapping is not Mapping.UNKNOWN:
        by = "through relays and hole punching" if facts.reservations else "only where we connect first"
        return Finding("reachable", False, f"strangers cannot connect to us directly; {by}", _first_fix(facts), tried)
    if outside:
        return Finding("reachable", True, "somebody outside connected to us", evidence=(str(outside[0].remote),))
    return Finding("reachable", None, "whether others can connect to us is not known")


def _on_loopback_only(facts: Facts) -> bool:
    return bool(facts.listening) and all(addr.is_loopback for addr in facts.listening)


def _first_fix(facts: Facts) -> str:
    for check in (check_udp, check_double_nat, check_firewall):
        found = check(facts)
        if found is not None and not found.ok and found.fix:
            return found.fix
    return f"forward {facts.ports} to this machine in the router, or turn on UPnP, NAT-PMP or PCP there"


def _place(addr: Multiaddr) -> str:
    target = addr.host_port()
    return str(addr) if target is None else f"{target[1]}:{target[2]}"


def _is_public_six(link: Link) -> bool:
    ip = link.remote.ip()
    return ip is not None and ip.version == 6 and ip.is_global


CHECKS: Sequence[Check] = (
    check_reachable,
    check_listening,
    check_surroundings,
    check_udp,
    check_tcp_ports,
    check_nat,
    check_double_nat,
    check_firewall,
    check_port_mapping,
    check_ipv6,
    check_observers,
    check_relays,
    check_relayed_paths,
)
"""In the order in which they are told: what counts first, then why."""
