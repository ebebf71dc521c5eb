"""Every box of the lab is what its name says, before a daemon is judged by it: our own probe first, then coturn's."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from nat_lab import Lab, LabBox, LabHost
from stun_lab import PORTS, LabObserver, discover_all

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


# -- an independent judge: coturn's server and its own client -------------------------------------------------------
@pytest.fixture(scope="module")
def coturn(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabHost]:
    if shutil.which("turnserver") is None or shutil.which("turnutils_natdiscovery") is None:
        pytest.skip("coturn is missing (Debian: apt install coturn)")
    folder: Path = tmp_path_factory.mktemp("coturn")
    host = lab.public_host(2)
    command = ["turnserver", "-n", "--no-tls", "--no-dtls", "--no-cli", "--no-auth", "--stun-only"]
    command += ["-L", host.address, "-L", host.more[0], "-p", str(PORTS[0]), "--alt-listening-port", str(PORTS[1])]
    command += ["--log-file", str(folder / "log"), "--pidfile", str(folder / "pid"), "--simple-log"]
    process = host.netns.start(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)
    for _ in range(10):  # the tool waits for an answer itself
        if "RFC 5780" in host.netns.run(["turnutils_natdiscovery", "-m", host.address], seconds=20).stdout:
            break
    else:
        pytest.fail("coturn does not start")
    yield host
    process.kill()
    process.wait()


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
