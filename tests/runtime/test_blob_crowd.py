"""A crowd that says that it has a blob, and takes all places of a fetch without giving anything. One peer tells the
truth. Times are a tenth of the real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from test_blob_service import peer_of, world

from lattica.blobs import download, places
from lattica.interfaces import Stream
from lattica_protocols.blobs import PROTOCOL, fetch
from lattica_protocols.blobs.messages import HEADER, Kind, encode_frame, encode_header
from lattica_protocols.limits import CHUNK_BYTES, MAX_FETCH_SOURCES

DRIBBLE_SECONDS = 0.05
"""Between two bytes of a source that dribbles."""
CHUNKS = 12


class Taker:
    """Serves nothing. What it does instead depends on `manner`."""

    def __init__(self, manner: str, manifest: bytes) -> None:
        self._manner = manner
        self._manifest = manifest

    async def serve(self, stream: Stream) -> None:
        while True:
            kind, _, _, blob, _, length = HEADER.unpack(await stream.receive_exactly(HEADER.size))
            body = await stream.receive_exactly(length) if length else b""
            if kind == Kind.WANT:
                stream.write(encode_frame(Kind.HAVE, blob, arg=CHUNKS, flags=2))
            elif kind == Kind.OBJECT and self._manner != "no manifest":
                stream.write(encode_frame(Kind.DATA, blob, self._manifest, flags=1))
            elif kind == Kind.CHUNKS and self._manner == "a byte now and then":
                index = int.from_bytes(body[:4], "big")
                stream.write(encode_header(Kind.CHUNK, blob, arg=index, length=CHUNK_BYTES))
                while True:
                    stream.write(b"x")
                    await trio.sleep(DRIBBLE_SECONDS)


@pytest.mark.parametrize("manner", ["silent", "a byte now and then", "no manifest"])
def test_a_crowd_that_gives_nothing_makes_room(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manner: str
) -> None:
    monkeypatch.setattr(download, "PERIOD", places.PERIOD / 10)
    monkeypatch.setattr(download, "ANOTHER_SECONDS", download.ANOTHER_SECONDS / 10)
    monkeypatch.setattr(fetch, "STALL_SECONDS", fetch.STALL_SECONDS / 10)

    async def main() -> None:
        async with world(tmp_path) as w:
            honest, victim = await w.service(), await w.service()
            source = w.file("source.bin", CHUNKS * CHUNK_BYTES)
            cid = (await honest.share(source)).cid
            manifest = honest.store.find_object(cid.multihash)
            assert manifest is not None
            await w.directory.wait_for(cid)
            records = w.directory.records[cid.multihash.to_bytes()]
            truth = records.pop(peer_of(honest))
            for _ in range(MAX_FETCH_SOURCES + 4):
                host = await w.host()
                host.handle(PROTOCOL, Taker(manner, manifest).serve)
                records[host.peer_id] = host.listen_addrs()
            records[peer_of(honest)] = truth  # found last
            with trio.fail_after(25):
                await victim.fetch(cid, tmp_path / "copy.bin")
            assert (tmp_path / "copy.bin").read_bytes() == source.read_bytes()

    run(main, seconds=40)


class Given:
    """A source as `Places` sees it."""

    def __init__(self, peer: int) -> None:
        self.peer = peer
        self.received_bytes = 0

    def owes(self) -> bool:
        return True


class Search:
    def __init__(self) -> None:
        self.active = {n: Given(n) for n in range(MAX_FETCH_SOURCES)}
        self.waiting: dict[int, object] = {}
        self.displaced: list[int] = []

    def displace(self, source: Given) -> None:
        self.displaced.append(source.peer)


def test_the_slowest_makes_room_when_none_gives_nothing() -> None:
    search = Search()
    look = places.Places(search)  # type: ignore[arg-type]

    def period() -> list[int]:
        search.displaced.clear()
        for peer, source in search.active.items():
            source.received_bytes = 1_000_000 - 10_000 * ((peer + 5) % MAX_FETCH_SOURCES)
        look.make_room()
        return [*search.displaced]

    assert [period() for _ in range(4)] == [[]] * 4, "nobody waits"
    search.waiting[99] = ()
    assert [period() for _ in range(2)] == [[], [10]]
    for source in search.active.values():
        source.received_bytes = 100_000
    search.active[3].received_bytes = search.active[4].received_bytes = 10
    look.make_room()
    assert search.displaced[1:] == [3], "as many as wait"
    del search.active[3], search.active[4]
    assert [period() for _ in range(2)] == [[], []], "there is room"
