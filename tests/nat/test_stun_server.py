"""Daemons that know nobody but an outside STUN server, which is not ours: coturn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from coturn_lab import coturn_missing, running_coturn
from lab_daemons import LabDaemon
from nat_lab import Lab
from stun_lab import PORTS
from test_boxes import EXPECTED

from lattica_protocols.nat.behaviour import Mapping, Ports

KINDS = ("none", "full", "adf", "apdf", "apdfr", "adm", "symseq", "sym", "symblk", "apdf+sym")
SETTINGS = '[discovery]\nstun_servers = ["{}:{}"]\nmdns = "off"\n'

pytestmark = pytest.mark.skipif(coturn_missing() is not None, reason=str(coturn_missing()))


@pytest.fixture(scope="module")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, LabDaemon]]:
    lab, folder = Lab(), tmp_path_factory.mktemp("stun")
    with ExitStack() as stack:
        (folder / "coturn").mkdir()
        server = stack.enter_context(running_coturn(lab, folder / "coturn"))
        running = {}
        for kind in KINDS:
            home, settings = folder / kind.replace("+", "-"), SETTINGS.format(server.address, PORTS[0])
            running[kind] = LabDaemon(lab.host_behind(kind), home, settings=settings)
            stack.callback(running[kind].stop)
        yield running


@pytest.mark.parametrize("kind", KINDS)
def test_the_verdict(kind: str, daemons: dict[str, LabDaemon]) -> None:
    mapping, filtering, ports, _ = EXPECTED[kind]
    found = daemons[kind].json("nat", "--fresh")
    assert not found["udp_blocked"]
    assert (found["mapping"], found["filtering"]) == (mapping.value, filtering.value), found["evidence"]
    if mapping is Mapping.NONE or ports in (Ports.PRESERVED, Ports.SEQUENTIAL):
        assert found["ports"]["choice"] == ports.value, found["evidence"]
    assert found["observers"]
