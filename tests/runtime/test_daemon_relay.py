"""Three real daemons: two that nobody can reach, and a relay between them that is killed and comes back."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemon_processes import Process
from waiting import wait_until


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[str], Process]]:
    made: list[Process] = []

    def process(name: str) -> Process:
        made.append(Process(tmp_path / name))
        return made[-1]

    yield process
    for one in made:
        one.stop()


def start_hidden(process: Process, relay: str) -> Process:
    """A daemon that listens nowhere: others reach it through `relay` or not at all."""
    process.home.mkdir()
    settings = f'[listen]\naddrs = []\n[discovery]\nbootstrap = ["{relay}"]\n'
    (process.home / "config.toml").write_text(settings)
    process.start(listen=())
    wait_until(lambda: process.json("status")["relay"]["reservations"] != {})
    return process


def test_two_hidden_daemons_meet_at_a_relay(make: Callable[[str], Process], tmp_path: Path) -> None:
    relay = make("relay").start("--relay")
    assert relay.json("status")["relay"]["serving"]
    address = relay.address
    one, two = (start_hidden(make(name), address) for name in ("one", "two"))
    file = tmp_path / "weights.bin"
    file.write_bytes(os.urandom(3 << 20))
    cid = one.json("share", str(file))["cid"]
    # found in the DHT by its id, and then dialled at the only address it has
    assert two.json("get", cid, "-o", str(tmp_path / "copy.bin"))["bytes"] == 3 << 20
    assert (tmp_path / "copy.bin").read_bytes() == file.read_bytes()
    paths = {peer["peer_id"]: peer["path"] for peer in two.json("peers")}
    assert paths[one.peer_id] == "relay"
    carried = relay.json("status")["relay"]
    assert carried["carried_bytes"] > 3 << 20
    assert carried["reservations_given"] == 2
    # kill -9, and a new start at the same address: both find their way back without being told
    port = address.split("/")[4]
    relay.signal(signal.SIGKILL)
    relay.wait()
    wait_until(lambda: one.json("status")["relay"]["reservations"] == {})
    relay.start("--relay", listen=("--listen", f"/ip4/127.0.0.1/tcp/{port}"))
    for process in (one, two):
        wait_until(lambda process=process: process.json("status")["relay"]["reservations"] != {})
    assert two.json("peer", "connect", one.peer_id)["path"] == "relay"
