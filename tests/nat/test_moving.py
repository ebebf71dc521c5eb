"""Daemons that move while calls, streams and a fetch run between them: from one network into another, and with a box
that forgets its mappings or gets another public address. Each end in turn; nothing is lost, runs twice or fails.

`a` dials QUIC, so only its moves can be followed (RFC 9000 section 9); when `b` moves a path dies, and the session goes
on over another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import trio
from lab_daemons import LabDaemon
from nat_lab import Lab, LabBox
from test_paths import NATTED, Load, Work
from waiting import until

import lattica

FETCH_BYTES = 256 << 20
FETCHED_BEFORE = 16 << 20
"""Then the ground moves."""
CALLS_AFTER = 100
GAP_SECONDS = 10.0
"""Without an answer. A dead path is noticed within 6.5 s, the rest is for a place at a relay and a session there."""
FETCH_SECONDS = 90


class Moving:
    """Two daemons behind boxes of their own, directly connected."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.lab = Lab()
        relays: list[LabDaemon] = []
        for i in range(3):
            known = [part for each in relays for part in ("--bootstrap", each.address())]
            relays.append(LabDaemon(self.lab.public_host(), folder / f"relay{i}", "--relay", *known))
            stack.callback(relays[-1].stop)
        known = [part for each in relays for part in ("--bootstrap", each.address())]
        self.boxes: dict[str, LabBox] = {}
        self.daemons: dict[str, LabDaemon] = {}
        for name in "ab":
            self.boxes[name] = self.lab.box("apdf")
            self.daemons[name] = LabDaemon(self.boxes[name].host(), folder / name, *known, settings=NATTED)
            stack.callback(self.daemons[name].stop)
        for daemon in self.daemons.values():
            daemon.wait_reserved()

    def logs(self) -> str:
        return "".join(daemon.process.log()[-20_000:] for daemon in self.daemons.values())

    def into_another_network(self, name: str) -> None:
        """As from the Wi-Fi at home into a mobile network: another interface, other addresses, another NAT."""
        netns = self.daemons[name].host.netns
        self.boxes[name] = self.lab.box("adf")
        netns.ip("link del eth0")
        self.boxes[name].plug(netns, "eth0")

    def other_ports(self, name: str) -> None:
        """Its NAT forgets all mappings, and makes others."""
        self.boxes[name].rebind(kind="apdfr")

    def other_address(self, name: str) -> None:
        self.boxes[name].rebind(new_address=True)


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moving]:
    with ExitStack() as stack:
        yield Moving(tmp_path_factory.mktemp("moving"), stack)


@pytest.mark.parametrize("who", ["a", "b"])
@pytest.mark.parametrize("how", [Moving.into_another_network, Moving.other_ports, Moving.other_address])
def test_nothing_is_lost_when_an_end_moves(
    run: Callable[..., Any], moving: Moving, tmp_path: Path, how: Callable[[Moving, str], None], who: str
) -> None:
    """`a` calls and fetches, `b` serves."""
    content = tmp_path / "content.bin"
    content.write_bytes(os.urandom(FETCH_BYTES))
    cid = moving.daemons["b"].json("share", str(content))["cid"]
    run(move, moving, cid, tmp_path / "copy.bin", lambda: how(moving, who), seconds=150)
    assert (tmp_path / "copy.bin").read_bytes() == content.read_bytes()


async def move(moving: Moving, cid: str, copy: Path, happens: Callable[[], None]) -> None:
    a, b = moving.daemons.values()
    fetched: list[Any] = []

    async def fetch() -> None:
        command = ("--json", "get", cid, "-o", str(copy))
        fetched.append(await trio.to_thread.run_sync(lambda: a.process.cli_process(*command, seconds=FETCH_SECONDS)))

    async with lattica.aconnect(a.process.home) as client, lattica.aconnect(b.process.home) as worker:
        work = Work()
        await worker.serve("work", work)
        if a.paths(b) == {"relay"}:
            a.json("peer", "disconnect", b.peer_id)
        await client.call(b.peer_id, "work.echo", -1, None, timeout=30)
        await until(lambda: a.paths(b) & {"tcp", "quic"}, 30, moving.logs)
        load = Load(client, b.peer_id)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.unary, 0, 10)
            nursery.start_soon(load.unary, 1 << 20, 300_000)
            nursery.start_soon(load.down)
            nursery.start_soon(load.up)
            nursery.start_soon(fetch)
            await until(
                lambda: _written(copy) > FETCHED_BEFORE and load.calls > 10 and load.items > 10, 30, moving.logs
            )
            assert not fetched, "the fetch was over before anything moved"
            load.longest_gap, calls = 0.0, load.calls
            happens()
            await until(lambda: fetched and load.calls > calls + CALLS_AFTER, FETCH_SECONDS, moving.logs)
            load.stop = True
        print(  # noqa: T201
            f"\nlongest gap {load.longest_gap:.1f} s, {load.calls} calls, {load.items} items; "
            f"now over {', '.join(sorted(a.paths(b)))}"
        )
    assert fetched[0].returncode == 0, fetched[0].stderr + moving.logs()
    assert set(work.asked.values()) == {1}, "a call ran twice"
    assert sum(work.asked.values()) == load.calls + 1
    assert load.longest_gap <= GAP_SECONDS, moving.logs()


def _written(copy: Path) -> int:
    """Bytes that are on the disk of a copy that is being fetched."""
    return sum(part.stat().st_blocks * 512 for part in copy.parent.glob(f"*{copy.name}*"))
