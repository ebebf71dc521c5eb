"""Calls, streams and a large fetch between two daemons behind NATs, while the relay turns into a direct path and while
that one dies without a word. Nothing is lost, nothing runs twice, nothing fails."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import trio
from lab_daemons import LabDaemon
from nat_lab import Lab, LabBox
from waiting import until

import lattica
from lattica.client.async_items import ItemReader
from lattica.rpc import client_streaming

NATTED = '[relay]\nuse = "always"\n[discovery]\nmode = "client"\n'
PACE = 0.02
"""Seconds from one item of a stream to the next."""
FETCH_BYTES = 1 << 30
DIRECT_BEFORE_CUT = 100 << 20
NOTICED_SECONDS = 6.5
SLACK = 0.3
"""Of the clocks of two processes, and of a machine with two cores for all of this."""
GAP_SECONDS = NOTICED_SECONDS + 2.0
"""Without an answer: until the dead path is noticed, and the session resumed over the relay."""


class Work:
    """The worker behind one daemon."""

    def __init__(self) -> None:
        self.asked: Counter[int] = Counter()

    async def echo(self, number: int, value: Any) -> Any:
        self.asked[number] += 1
        return [number, value]

    async def count(self, n: int) -> AsyncIterator[Any]:
        for i in range(n):
            yield [i, bytes(100_000 if i % 10 == 0 else 100)]
            await trio.sleep(PACE)

    @client_streaming
    async def collect(self, items: ItemReader) -> list[int]:
        return [item[0] async for item in items]


class Load:
    """What runs from one daemon to the other, until `stop`."""

    def __init__(self, client: lattica.AsyncClient, peer: str) -> None:
        self.client, self.peer = client, peer
        self.stop = False
        self.calls = self.items = 0
        self.longest_gap = 0.0
        self._answered_at = time.monotonic()

    def _answered(self) -> None:
        now = time.monotonic()
        self.longest_gap, self._answered_at = max(self.longest_gap, now - self._answered_at), now

    async def unary(self, first: int, size: int) -> None:
        number = first
        while not self.stop:
            value = np.full(size, number % 251, np.uint8)
            answer = await self.client.call(self.peer, "work.echo", number, value)
            assert answer[0] == number
            assert (answer[1] == value).all()
            number += 1
            self.calls += 1
            self._answered()

    async def down(self) -> None:
        expected = 0
        async with aclosing(self.client.stream(self.peer, "work.count", 1 << 30)) as items:
            async for number, _ in items:
                assert number == expected
                expected += 1
                self.items += 1
                if self.stop:
                    return

    async def up(self) -> None:
        async with self.client.open_call(self.peer, "work.collect", receives=False) as call:
            sent = 0
            while not self.stop:
                await call.send([sent, bytes(100_000 if sent % 10 == 0 else 100)])
                sent += 1
                await trio.sleep(PACE)
            assert await call.result() == list(range(sent))
            self.items += sent


def cut(lab: Lab, one: LabBox, other: LabBox) -> None:
    """The core drops what goes directly between two boxes."""
    a, b = (host.address for host in (one, other))
    lab.core.nft(
        f"table ip cut {{ chain forward {{ type filter hook forward priority 0;\n"
        f"ip saddr {a} ip daddr {b} drop\nip saddr {b} ip daddr {a} drop\n}}\n}}\n"
    )


def log_times(daemon: LabDaemon, event: str, since: datetime) -> list[float]:
    """Seconds from `since` to the lines of an event."""
    times = [line.split(" ", 1)[0] for line in daemon.process.log().splitlines() if re.search(rf"\b{event}\b", line)]
    return [s for s in ((datetime.fromisoformat(t) - since).total_seconds() for t in times) if s >= 0]


def test_nothing_is_lost_when_paths_come_and_go(run: Callable[..., Any], tmp_path: Path) -> None:
    lab = Lab()
    daemons: list[LabDaemon] = []
    try:
        for i in range(3):
            known = [part for each in daemons for part in ("--bootstrap", each.address())]
            daemons.append(LabDaemon(lab.public_host(), tmp_path / f"relay{i}", "--relay", *known))
        bootstrap = [part for each in daemons for part in ("--bootstrap", each.address())]
        boxes = [lab.box("apdf"), lab.box("apdf")]
        a, b = (
            LabDaemon(box.host(), tmp_path / name, *bootstrap, settings=NATTED)
            for box, name in zip(boxes, "ab", strict=True)
        )
        daemons += [a, b]
        a.wait_reserved()
        b.wait_reserved()
        relayed = next(addr for addr in b.json("id")["addrs"] if "/ip4/198.18." in addr and "/p2p-circuit" in addr)
        content = tmp_path / "content.bin"
        with open(content, "wb") as file:
            block = os.urandom(1 << 20)
            for i in range(FETCH_BYTES >> 20):
                file.write(i.to_bytes(8, "big") + block[8:])
        cid = b.json("share", str(content))["cid"]
        run(main, lab, a, b, boxes, f"{relayed}/p2p/{b.peer_id}", cid, tmp_path, seconds=240)
        with open(content, "rb") as one, open(tmp_path / "copy.bin", "rb") as other:
            while block := one.read(1 << 24):
                assert other.read(1 << 24) == block
    finally:
        for daemon in daemons:
            daemon.stop()


async def main(
    lab: Lab, a: LabDaemon, b: LabDaemon, boxes: list[LabBox], address: str, cid: str, tmp_path: Path
) -> None:
    fetched: list[Any] = []

    async def fetch() -> None:
        command = ("--json", "get", cid, "-o", str(tmp_path / "copy.bin"))
        fetched.append(await trio.to_thread.run_sync(lambda: a.process.cli_process(*command, seconds=200)))

    async with lattica.aconnect(a.process.home) as client, lattica.aconnect(b.process.home) as worker:
        work = Work()
        await worker.serve("work", work)
        a.json("peer", "connect", address)
        load = Load(client, b.peer_id)

        def logs() -> str:
            return "".join(each.process.log()[-20_000:] for each in (a, b))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.unary, 0, 10)
            nursery.start_soon(load.unary, 1 << 20, 300_000)
            nursery.start_soon(load.down)
            nursery.start_soon(load.up)
            nursery.start_soon(fetch)
            direct = await until(lambda: _bytes(a, b, {"tcp", "quic"}) > DIRECT_BEFORE_CUT, 60, logs)
            assert not fetched, "the fetch was over before the path was cut"
            cut(lab, boxes[0], boxes[1])
            cut_at, calls = datetime.now().astimezone(), load.calls
            load.longest_gap = 0.0
            await until(lambda: not (a.paths(b) | b.paths(a)) & {"tcp", "quic"}, 30, logs)
            gone = (datetime.now().astimezone() - cut_at).total_seconds()
            await until(lambda: load.calls > calls + 200 and fetched, 180, logs)
            load.stop = True
        assert fetched[0].returncode == 0, fetched[0].stderr + a.process.log()
        assert a.paths(b) == {"relay"}
        noticed = [min(log_times(each, "session_suspended", cut_at), default=None) for each in (a, b)]
        print(  # noqa: T201
            f"\ndirect after {direct:.1f} s; dead path left after {noticed} s, all of them after {gone:.1f} s; "
            f"longest gap {load.longest_gap:.1f} s; {load.calls} calls, {load.items} items"
        )
        assert set(work.asked.values()) == {1}, "a call ran twice"
        assert sum(work.asked.values()) == load.calls
        assert min(s for s in noticed if s is not None) <= NOTICED_SECONDS + SLACK
        assert load.longest_gap <= GAP_SECONDS
        assert log_times(a, "session_resumed", cut_at.replace(year=2000)), "the session never left the relay"


def _bytes(daemon: LabDaemon, other: LabDaemon, paths: set[str]) -> int:
    peers = daemon.json("peers")
    return sum(p["received_bytes"] for p in peers if p["peer_id"] == other.peer_id and p["path"] in paths)
