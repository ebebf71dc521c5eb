"""What `lattica doctor` and `lattica nat` say about port mapping, for each state that it can be in."""

from __future__ import annotations

import pytest

from lattica.portmap import PortMapStatus
from lattica.portmap.route import parse_routes
from lattica_daemon.doctor.facts import Facts, Finding
from lattica_daemon.doctor.port_mapping import check_port_mapping, mapping_to_plain
from lattica_protocols.autonat.reach import Verdict
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.nat.behaviour import NatBehaviour
from lattica_protocols.portmap.mapping import Lease, Port, ProtocolReport

PORT = Port("tcp", 4101)
ADDR = Multiaddr.parse("/ip4/45.1.2.3/tcp/4101")


def report(**more: object) -> ProtocolReport:
    return ProtocolReport("upnp", tried=True, **more)  # type: ignore[arg-type]


def finding(status: PortMapStatus, **more: object) -> Finding:
    found = check_port_mapping(Facts(port_mapping=status, **more))  # type: ignore[arg-type]
    assert found is not None
    assert found.check == "port-mapping"
    assert found.ok is not False or found.fix
    return found


def mapped(outside: str = "45.1.2.3") -> PortMapStatus:
    lease = Lease(PORT, outside, 4101, 3600.0, 0.0, "pcp")
    return PortMapStatus("mapped", "", "192.168.1.1", (PORT,), (lease,), (), 0.1, (3600.0,))


def asked(report: ProtocolReport) -> PortMapStatus:
    return PortMapStatus("failed", "", "192.168.1.1", (PORT,), (), (report,))


@pytest.mark.parametrize(
    ("status", "ok", "word"),
    [
        (PortMapStatus("off", "port mapping is off in the settings"), None, "off"),
        (PortMapStatus("no-router"), None, "no IPv4 router"),
        (PortMapStatus("asking", gateway="192.168.1.1"), None, "being asked"),
        (asked(report(error="no answer")), None, "neither PCP nor NAT-PMP nor UPnP"),
        (asked(report(answered=True, error="UPnP error 606")), False, "maps no port: UPnP: UPnP error 606"),
        (asked(report(answered=True, error="it stands behind another NAT")), False, "another NAT"),
        (asked(report(answered=True, error="not XML", garbled=1, last_garbled="not XML")), False, "makes no sense"),
        (asked(report(error="no answer", garbled=3, last_garbled="3 bytes")), False, "makes no sense: UPnP: 3 bytes"),
        (asked(report(error="no answer", ignored=3, last_ignored="forged")), None, "neither"),
    ],
)
def test_nothing_is_mapped(status: PortMapStatus, ok: bool | None, word: str) -> None:
    found = finding(status)
    assert found.ok is ok
    assert word in found.detail
    assert mapping_to_plain(status, {}) is None


@pytest.mark.parametrize(
    ("outside", "verdict", "seen", "ok", "word"),
    [
        ("45.1.2.3", "public", "45.1.2.3", True, "others get in"),
        ("45.1.2.3", "unknown", "45.1.2.3", None, "nobody has tried"),
        ("45.1.2.3", "private", "45.1.2.3", False, "nobody gets in there"),
        ("45.1.2.3", "private", "46.9.9.9", False, "others see us at 46.9.9.9"),
        ("10.0.0.2", "unknown", "45.1.2.3", False, "double NAT"),
        ("100.64.0.2", "unknown", "45.1.2.3", False, "double NAT"),
    ],
)
def test_something_is_mapped(outside: str, verdict: Verdict, seen: str, ok: bool | None, word: str) -> None:
    found = finding(mapped(outside), verdicts={ADDR: verdict}, behaviour=NatBehaviour(seen=((seen, 4101),)))
    assert found.ok is ok
    assert word in found.detail
    assert any(f"{outside}:4101" in line for line in found.evidence)
    plain = mapping_to_plain(mapped(outside), {ADDR: verdict})
    assert plain is not None
    assert plain["ports"][0]["addr"] == (str(ADDR) if outside == "45.1.2.3" else None)


def test_no_need_is_no_finding() -> None:
    assert check_port_mapping(Facts(port_mapping=PortMapStatus("not-needed", "public"))) is None


def test_a_port_that_is_missing_is_named() -> None:
    status = mapped()
    more = PortMapStatus("mapped", "", "", (PORT, Port("udp", 4101)), status.leases, (), 0.1, status.rest)
    assert "udp 4101" in finding(more, verdicts={ADDR: "public"}).detail


ROUTES = """Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT
eth0 00000000 0101A8C0 0003 0 0 100 00000000 0 0 0
eth1 00000000 0102A8C0 0003 0 0 50 00000000 0 0 0
tun0 00000000 00000000 0001 0 0 0 00000000 0 0 0
eth0 0001A8C0 00000000 0001 0 0 100 00FFFFFF 0 0 0
"""


def test_the_best_default_route_is_found() -> None:
    assert parse_routes(ROUTES) == "192.168.2.1"
    assert parse_routes("Iface\n") is None
