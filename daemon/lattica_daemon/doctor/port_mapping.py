"""The check on port mapping: what the router was asked, what it said, and whether what it gave is of use."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lattica.portmap.service import lease_addr
from lattica_daemon.doctor.facts import Facts, Finding
from lattica_protocols.nat.scope import is_local

if TYPE_CHECKING:
    from lattica.portmap import PortMapStatus
    from lattica_protocols.autonat.reach import Verdict
    from lattica_protocols.multiaddr import Multiaddr
    from lattica_protocols.portmap.mapping import ProtocolReport

NAMES = {"pcp": "PCP", "nat-pmp": "NAT-PMP", "upnp": "UPnP"}


def check_port_mapping(facts: Facts) -> Finding | None:
    """Whether the router leads our ports to us, and why not."""
    status = facts.port_mapping
    if status is None or status.phase == "not-needed":
        return None
    name, forward = "port-mapping", f"forward {facts.ports} to this machine in the router by hand"
    if status.phase == "off":
        return Finding(name, None, status.why, 'set listen.port_mapping to "on"')
    if status.phase == "no-router":
        return Finding(name, None, "there is no IPv4 router to ask for a port", "see whether there is a network")
    evidence = (f"router {status.gateway}", *(told(report) for report in status.reports))
    if status.phase == "asking":
        return Finding(name, None, "the router is being asked for ports", "ask again in some seconds", evidence)
    if status.leases:
        return _mapped(facts, status, evidence)
    refused = [report for report in status.reports if report.answered and report.error and not report.is_garbled]
    if refused:
        reason = "; ".join(f"{NAMES[report.protocol]}: {report.error}" for report in refused)
        fix = f"allow UPnP, NAT-PMP or PCP for this machine in the router, or {forward}"
        if "another NAT" in reason:
            fix = "make the inner router a bridge, or ask the provider for a public IPv4 address, or use IPv6"
        return Finding(name, False, f"the router maps no port: {reason}", fix, evidence)
    garbled = [report for report in status.reports if report.is_garbled]
    if garbled:
        what = "; ".join(f"{NAMES[report.protocol]}: {report.last_garbled}" for report in garbled)
        detail = f"what the router answers makes no sense: {what}"
        return Finding(name, False, detail, f"update or restart the router, or {forward}", evidence)
    detail = "the router answers neither PCP nor NAT-PMP nor UPnP"
    return Finding(name, None, detail, f"turn on one of them in the router, or {forward}", evidence)


def _mapped(facts: Facts, status: PortMapStatus, evidence: tuple[str, ...]) -> Finding:
    name = "port-mapping"
    evidence += tuple(
        f"{lease.port} is {lease.external_ip}:{lease.external_port}, by {NAMES[lease.via]}, {rest:.0f} s left"
        for lease, rest in zip(status.leases, status.rest, strict=True)
    )
    outer = status.leases[0].external_ip
    seen = {ip for ip, _ in facts.behaviour.seen}
    if is_local(ipaddress.ip_address(outer)):
        detail = f"mapped, but the router's own address outside, {outer}, is private: another NAT follows (double NAT)"
        fix = "make the inner router a bridge, or forward the port in both; ask a carrier for a public address"
        return Finding(name, False, detail, fix, evidence)
    addrs = [addr for lease in status.leases if (addr := lease_addr(lease)) is not None]
    verdicts = {facts.verdicts.get(addr, "unknown") for addr in addrs}
    other = bool(seen) and outer not in seen
    if other:
        evidence += (f"others see us at {', '.join(sorted(seen))}, the router says {outer}",)
    if "private" in verdicts:
        detail = f"mapped to {outer}, but nobody gets in there"
        detail += f": others see us at {', '.join(sorted(seen))}" if other else ""
        fix = "restart the router; look for a second router or a firewall (also this machine's) on the way"
        return Finding(name, False, detail, fix, evidence)
    if len(status.leases) < len(status.ports):
        missing = {str(port) for port in status.ports} - {str(lease.port) for lease in status.leases}
        error = next((report.error for report in status.reports if report.leases and report.error), "refused")
        detail = f"not mapped: {', '.join(sorted(missing))} ({error})"
        return Finding(name, False, detail, "look at the list of port mappings in the router", evidence)
    via = NAMES[status.leases[0].via]
    if verdicts == {"public"}:
        return Finding(name, True, f"the router leads our ports to us ({via}), and others get in there", "", evidence)
    return Finding(name, None, f"the router leads our ports to us ({via}); nobody has tried them yet", "", evidence)


def told(report: ProtocolReport) -> str:
    """One line about one protocol."""
    out = f"{NAMES[report.protocol]}: "
    if not report.tried:
        return out + "not asked"
    out += report.error or ("answers" if report.answered else "no answer yet")
    if report.external_ip is not None:
        out += f"; address outside {report.external_ip}"
    if report.restarts:
        out += f"; had forgotten our ports {report.restarts} times"
    if report.garbled and not report.is_garbled:
        out += f"; garbled answers: {report.garbled}, the last {report.last_garbled}"
    if report.ignored:
        out += f"; ignored: {report.ignored}, the last {report.last_ignored}"
    return out


def mapping_to_plain(status: PortMapStatus, verdicts: Mapping[Multiaddr, Verdict]) -> dict[str, Any] | None:
    """For `lattica nat --json`; `None` while no port is mapped."""
    if not status.leases:
        return None
    return {
        "protocol": status.leases[0].via,
        "gateway": status.gateway,
        "external_ip": status.leases[0].external_ip,
        "seconds": None if status.seconds is None else round(status.seconds, 3),
        "ports": [
            {
                "transport": lease.port.transport,
                "port": lease.port.number,
                "external_ip": lease.external_ip,
                "external_port": lease.external_port,
                "protocol": lease.via,
                "expires_in": round(rest),
                "addr": None if (addr := lease_addr(lease)) is None else str(addr),
                "verdict": "unknown" if addr is None else verdicts.get(addr, "unknown"),
            }
            for lease, rest in zip(status.leases, status.rest, strict=True)
        ],
    }
