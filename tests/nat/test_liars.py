"""Those whom a daemon relies on lie, refuse or fall silent: the verdict stays right, and doctor tells what was seen."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from lab_daemons import LabDaemon, wait_until
from nat_lab import Lab, LabHost

from lattica_protocols.stun import Attribute, MessageType, StunMessage, encode_address, encode_message

RELAY_LISTEN = ("--listen", "/ip4/0.0.0.0/tcp/443", "--listen", "/ip4/0.0.0.0/udp/4101/quic-v1")
NATTED = '[relay]\nuse = "always"\n[discovery]\nmode = "client"\nmdns = "off"\n'
LIE = ("203.0.113.99", 9)


class Liar:
    """A STUN server that says it sees us elsewhere. `forged`: under transaction ids that nobody asked with, often."""

    def __init__(self, host: LabHost, *, forged: bool) -> None:
        with host.netns.entered():
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((host.address, 3478))
        self._forged = forged
        self.asked = 0
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            data, source = self._socket.recvfrom(2048)
            if not data:
                return
            if len(data) < 20:
                continue
            self.asked += 1
            ids = [os.urandom(12) for _ in range(20)] if self._forged else [data[8:20]]
            for transaction in ids:
                said = encode_address(LIE, transaction)
                message = StunMessage(MessageType.SUCCESS, transaction, ((Attribute.XOR_MAPPED_ADDRESS, said),))
                self._socket.sendto(encode_message(message), source)

    def close(self) -> None:
        self._socket.sendto(b"", self._socket.getsockname())
        self._thread.join()
        self._socket.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start_relays(lab: Lab, folder: Path, stack: ExitStack, count: int) -> list[LabDaemon]:
    relays: list[LabDaemon] = []
    for i in range(count):
        known = [part for relay in relays for part in ("--bootstrap", relay.address())]
        relays.append(LabDaemon(lab.public_host(), folder / f"relay{i}", "--relay", *known, listen=RELAY_LISTEN))
        stack.callback(relays[-1].stop)
    return relays


def check(daemon: LabDaemon, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(finding for finding in daemon.json("doctor") if finding["check"] == name)
    return found


@pytest.mark.parametrize("forged", [False, True], ids=["another address", "forged transaction ids"])
def test_a_lying_stun_server_moves_nobody(stack: ExitStack, tmp_path: Path, forged: bool) -> None:
    lab = Lab()
    relays = start_relays(lab, tmp_path, stack, 3)
    host = lab.public_host()
    liar = Liar(host, forged=forged)
    stack.callback(liar.close)
    bootstrap = [part for relay in relays for part in ("--bootstrap", relay.address())]
    settings = NATTED + f'stun_servers = ["{host.address}:3478"]\n'
    box = lab.box("apdf")
    daemon = LabDaemon(box.host(), tmp_path / "daemon", *bootstrap, settings=settings)
    stack.callback(daemon.stop)
    daemon.wait_reserved()
    wait_until(lambda: len(daemon.json("nat")["observers"]) >= 4, 20.0, daemon.process.log)
    found = daemon.json("nat", "--fresh")
    assert liar.asked
    assert (found["mapping"], found["filtering"]) == ("endpoint-independent", "address-and-port-dependent")
    assert found["public_addrs"] == [f"/ip4/{box.address}/udp/4101/quic-v1"]
    assert not any(LIE[0] in addr for addr in daemon.json("id")["addrs"])
    saw = {entry["observer"]: entry["sees"] for entry in found["observers"]}
    assert saw[f"{host.address}:3478"] == (None if forged else f"{LIE[0]}:{LIE[1]}")
    verdict = check(daemon, "nat")
    assert verdict["ok"] is True
    told = f"{host.address} sees {LIE[0]}:{LIE[1]}"
    assert any(told in line for line in verdict["evidence"]) is not forged, verdict


def test_relays_that_refuse_are_named(stack: ExitStack, tmp_path: Path) -> None:
    """A peer that once was a relay and is none now."""
    lab = Lab()
    none = LabDaemon(lab.public_host(), tmp_path / "none", "--no-relay", listen=RELAY_LISTEN)
    stack.callback(none.stop)
    settings = NATTED.replace("[discovery]", f'relays = ["{none.address()}"]\n[discovery]')
    daemon = LabDaemon(lab.host_behind("apdf"), tmp_path / "daemon", settings=settings)
    stack.callback(daemon.stop)
    wait_until(lambda: check(daemon, "relays")["evidence"], 20.0, daemon.process.log)
    found = check(daemon, "relays")
    assert found["ok"] is False
    assert "no relay gave us a place" in found["detail"]
    assert any(none.peer_id in line and "is no relay" in line for line in found["evidence"])
    assert found["fix"]
