"""Every box of the lab is what its name says, before a daemon is judged by it: our own probe first, then coturn's."""

from __future__ import annotations

import errno
import socket
import subprocess
from collections.abc import Iterator

import pytest
from coturn_lab import coturn_missing, running_coturn
from nat_lab import Lab, LabBox, LabHost
from netns import Netns
from stun_lab import LabObserver, discover_all

from lattica_protocols.nat.behaviour import Filtering, Mapping, NatBehaviour, Ports

NONE, EIM, ADM, APDM = (
    Mapping.NONE,
    Mapping.ENDPOINT_INDEPENDENT,
    Mapping.ADDRESS_DEPENDENT,
    Mapping.ADDRESS_AND_PORT_DEPENDENT,
)
EIF, ADF, APDF = Filtering.ENDPOINT_INDEPENDENT, Filtering.ADDRESS_DEPENDENT, Filtering.ADDRESS_AND_PORT_DEPENDENT

EXPECTED: dict[str, tuple[Mapping, Filtering, Ports, bool | None]] = {
    # mapping, filtering, ports, hairpin
    "none": (NONE, EIF, Ports.PRESERVED, None),
    "fw": (NONE, APDF, Ports.PRESERVED, None),
    "full": (EIM, EIF, Ports.PRESERVED, True),
    "adf": (EIM, ADF, Ports.PRESERVED, False),
    "apdf": (EIM, APDF, Ports.PRESERVED, False),
    "apdfr": (EIM, APDF, Ports.RANDOM, False),
    "rej": (EIM, APDF, Ports.PRESERVED, False),
    "open": (EIM, APDF, Ports.PRESERVED, False),
    "adm": (ADM, APDF, Ports.RANDOM, None),
    "symf": (APDM, EIF, Ports.RANDOM, None),
    "syma": (APDM, ADF, Ports.RANDOM, None),
    "symseq": (APDM, APDF, Ports.SEQUENTIAL, None),
    "sym": (APDM, APDF, Ports.RANDOM, None),
    "symblk": (APDM, APDF, Ports.BLOCK, None),
    "apdf+apdfr": (EIM, APDF, Ports.RANDOM, False),
    "apdf+sym": (APDM, APDF, Ports.RANDOM, None),
    "apdf+full": (EIM, APDF, Ports.PRESERVED, True),
    "full+full": (EIM, EIF, Ports.PRESERVED, True),
}
BLOCKED = ("noudp", "tcp443")


@pytest.fixture(scope="module")
def lab() -> Lab:
    return Lab()


@pytest.fixture(scope="module")
def observers(lab: Lab) -> list[LabObserver]:
    return [LabObserver(lab) for _ in range(3)]


@pytest.fixture(scope="module")
def hosts(lab: Lab) -> dict[str, LabHost]:
    return {kind: lab.host_behind(kind) for kind in (*EXPECTED, *BLOCKED)}


@pytest.fixture(scope="module")
def found(hosts: dict[str, LabHost], observers: list[LabObserver]) -> dict[str, NatBehaviour]:
    import trio

    return trio.run(discover_all, hosts, observers)


@pytest.mark.parametrize("kind", EXPECTED)
def test_our_verdict(kind: str, found: dict[str, NatBehaviour]) -> None:
    known = found[kind]
    assert (known.mapping, known.filtering, known.allocation.ports, known.hairpin) == EXPECTED[kind], known.evidence


@pytest.mark.parametrize("kind", BLOCKED)
def test_blocked_udp_is_noticed(kind: str, found: dict[str, NatBehaviour]) -> None:
    assert found[kind].udp_blocked


def test_a_block_of_ports_is_learnt(found: dict[str, NatBehaviour]) -> None:
    allocation = found["symblk"].allocation
    covered = min(allocation.high, 32047) - max(allocation.low, 30000)
    assert covered > 1024, "most of the block"
    assert allocation.high - allocation.low < 3 * 2048


def test_two_hosts_behind_one_box(lab: Lab, observers: list[LabObserver]) -> None:
    import trio

    boxes: dict[str, LabBox] = {kind: lab.box(kind) for kind in ("apdf", "apdfr", "full", "sym")}
    hosts = {f"{kind}{i}": box.host() for kind, box in boxes.items() for i in range(2)}
    both = trio.run(discover_all, hosts, observers)
    for kind in boxes:
        first, second = both[f"{kind}0"], both[f"{kind}1"]
        assert first.mapping is second.mapping is EXPECTED[kind][0]
        assert first.filtering is second.filtering is EXPECTED[kind][1]
        assert first.public_ip == second.public_ip
        if first.mapped is not None:
            assert first.mapped != second.mapped


# -- what STUN does not see --------------------------------------------------------------------------------------------
def tcp(netns: Netns, to: tuple[str, int]) -> int:
    """The errno of an attempt to connect; 0: connected."""
    with netns.entered(), socket.socket() as sock:
        sock.settimeout(0.5)
        return sock.connect_ex(to)


def udp(netns: Netns, port: int = 0) -> socket.socket:
    with netns.entered():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("0.0.0.0", port))
    sock.settimeout(0.5)
    return sock


def test_which_tcp_ports_a_box_lets_out(lab: Lab, hosts: dict[str, LabHost]) -> None:
    server = lab.public_host()
    refused, dropped = errno.ECONNREFUSED, errno.EAGAIN
    tried = {(kind, port): tcp(hosts[kind].netns, (server.address, port)) for kind in BLOCKED for port in (443, 4101)}
    assert tried == {
        ("noudp", 443): refused,
        ("noudp", 4101): refused,
        ("tcp443", 443): refused,
        ("tcp443", 4101): dropped,
    }


@pytest.mark.parametrize(("kind", "answer"), [("rej", errno.ECONNREFUSED), ("apdf", errno.EAGAIN)])
def test_a_rejecting_box_says_so(lab: Lab, kind: str, answer: int) -> None:
    assert tcp(lab.public_host().netns, (lab.box(kind).address, 4101)) == answer


@pytest.mark.parametrize(("kind", "poisoned"), [("open", True), ("rej", False), ("apdf", False)])
def test_a_stray_packet_poisons(lab: Lab, kind: str, poisoned: bool) -> None:
    """One that comes before our own to the same place has our own leave from another port."""
    box, stranger = lab.box(kind), lab.public_host()
    with udp(stranger.netns, 5000) as outside, udp(box.host().netns, 6000) as inside:
        outside.sendto(b"stray", (box.address, 6000))
        inside.sendto(b"hello", (stranger.address, 5000))
        outside.settimeout(0.5)
        while True:
            try:
                data, source = outside.recvfrom(100)
            except ConnectionRefusedError:
                continue  # the stray's rejection
            assert data == b"hello"
            break
        assert (source != (box.address, 6000)) is poisoned


@pytest.mark.parametrize(("kind", "passes"), [("full", True), ("apdf", False)])
def test_two_homes_of_one_carrier(lab: Lab, observers: list[LabObserver], kind: str, passes: bool) -> None:
    """Whether they reach each other by the carrier's public address, which is a hairpin."""
    carrier, server = lab.box(kind, carrier=True), lab.public_host()
    homes = [lab.box("apdf", carrier).host() for _ in range(2)]
    with udp(server.netns, 5000) as seeing, udp(homes[0].netns, 6000) as a, udp(homes[1].netns, 6001) as b:
        places = []
        for sock in (a, b):
            sock.sendto(b"where", (server.address, 5000))
            places.append(seeing.recvfrom(100)[1])
        assert {place[0] for place in places} == {carrier.address}
        for _ in range(2):
            a.sendto(b"from a", places[1])
            b.sendto(b"from b", places[0])
        if passes:
            assert {a.recvfrom(100)[0], b.recvfrom(100)[0]} == {b"from a", b"from b"}
        else:
            with pytest.raises(TimeoutError):
                a.recvfrom(100)
            with pytest.raises(TimeoutError):
                b.recvfrom(100)


def test_two_hosts_in_one_lan_see_each_other(lab: Lab) -> None:
    home = lab.box("apdf")
    with udp(home.host().netns) as a, udp((other := home.host()).netns, 6000) as b:
        a.sendto(b"hello", (other.address, 6000))
        assert b.recvfrom(100)[0] == b"hello"


# -- an independent judge: coturn's server and its own client -------------------------------------------------------
@pytest.fixture(scope="module")
def coturn(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabHost]:
    missing = coturn_missing()
    if missing is not None:
        pytest.skip(missing)
    with running_coturn(lab, tmp_path_factory.mktemp("coturn")) as host:
        yield host


@pytest.fixture(scope="module")
def judged(coturn: LabHost, hosts: dict[str, LabHost]) -> dict[str, str]:
    """What coturn's tool says in each host; all at once, since it takes 6 s."""
    tool = ["turnutils_natdiscovery", "-m", "-f", coturn.address]
    running = {
        kind: hosts[kind].netns.start(tool, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for kind in EXPECTED
    }
    return {kind: process.communicate(timeout=60)[0] for kind, process in running.items()}


MAPPINGS = {
    NONE: "Endpoint Independent Mapping",  # the tool does not compare with the address of the interface
    EIM: "Endpoint Independent Mapping",
    ADM: "Address Dependent Mapping",
    APDM: "Address and Port Dependent Mapping",
}
FILTERS = {
    EIF: "Endpoint Independent Filtering",
    ADF: "Address Dependent Filtering",
    APDF: "Address and Port Dependent Filtering",
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_coturns_verdict(kind: str, judged: dict[str, str]) -> None:
    mapping, filtering = EXPECTED[kind][:2]
    verdicts = [line.strip() for line in judged[kind].splitlines() if line.endswith("!")]
    assert verdicts == [f"NAT with {MAPPINGS[mapping]}!", f"NAT with {FILTERS[filtering]}!"], judged[kind]
