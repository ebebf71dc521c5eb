"""A large fetch gets a TCP connection of its own beside the one that calls use, where one can be had."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from test_blob_paths import after_chunks

import lattica.blobs.download as download_module
import lattica.host as host_module
from lattica.errors import ConnectError
from lattica.interfaces import Connection
from lattica.node import Node, NodeConfig, open_node
from lattica.session import Session
from lattica.transports.muxed import BULK_ALLOWANCE, MuxedConnection
from lattica_protocols.keys import PrivateKey
from lattica_protocols.limits import CHUNK_BYTES
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId

Run = Callable[..., Any]
TCP = "/ip4/127.0.0.1/tcp/0"
CHUNKS = 48
CONTENT = b"".join(bytes([i]) * CHUNK_BYTES for i in range(CHUNKS))


class Echo:
    async def echo(self, data: bytes) -> bytes:
        return data


@asynccontextmanager
async def two_nodes(tmp_path: Path) -> AsyncIterator[tuple[Node, Node, str]]:
    """One shares `CONTENT` and answers calls, two has called it once: they have one TCP connection."""
    async with (
        open_node(NodeConfig(home=tmp_path / "one", listen=[TCP])) as one,
        open_node(NodeConfig(home=tmp_path / "two", listen=[TCP])) as two,
    ):
        one.rpc.serve("echo", Echo())
        await two.host.connect(one.peer_id, one.host.listen_addrs())
        await two.wait_identified(one.peer_id)
        source = tmp_path / "source.bin"
        source.write_bytes(CONTENT)
        assert await two.rpc.call(one.peer_id, "echo.echo", b"x", timeout=10) == b"x"
        yield one, two, str((await one.blobs.share(source)).cid)


def test_bulk_and_calls_use_two_connections(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module, "BULK_APART_BYTES", CHUNKS * CHUNK_BYTES)
    monkeypatch.setattr(host_module, "BULK_IDLE", 0.2)

    async def main() -> None:
        async with two_nodes(tmp_path) as (one, two, cid):
            (first,) = two.host.connections(one.peer_id)
            half = after_chunks(monkeypatch, CHUNKS // 2)
            calls = 0

            async def call() -> None:
                nonlocal calls
                await half.wait()
                (apart,) = [c for c in two.host.connections(one.peer_id) if c.for_bulk]
                assert two.host.connection(one.peer_id, "bulk") is apart
                assert two.host.connection(one.peer_id) is first
                assert isinstance(apart, MuxedConnection)
                assert isinstance(first, MuxedConnection)
                assert apart.session.allowance == BULK_ALLOWANCE > first.session.allowance
                before = apart.sent_bytes + apart.received_bytes, first.received_bytes
                assert await two.rpc.call(one.peer_id, "echo.echo", b"y" * 9000, timeout=10) == b"y" * 9000
                assert first.received_bytes - before[1] >= 9000
                calls += 1

            async with trio.open_nursery() as nursery:
                nursery.start_soon(call)
                await two.blobs.fetch(cid, tmp_path / "copy.bin")
            assert calls == 1
            assert (tmp_path / "copy.bin").read_bytes() == CONTENT
            apart = next((c for c in two.host.connections(one.peer_id) if c.for_bulk), None)
            assert apart is not None
            assert apart.received_bytes > CHUNKS // 2 * CHUNK_BYTES > first.received_bytes
            with trio.fail_after(10):
                await apart.closed.wait()  # nobody uses it any more
            assert not first.closed.is_set()

    run(main)


def test_where_tcp_cannot_be_dialled_a_fetch_stays(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_module, "BULK_APART_BYTES", CHUNKS * CHUNK_BYTES)

    async def main() -> None:
        async with two_nodes(tmp_path) as (one, two, cid):
            dials = 0

            async def refuse(peer: PeerId, addrs: Sequence[Multiaddr]) -> Connection:
                nonlocal dials
                dials += 1
                raise ConnectError("nobody there")

            monkeypatch.setattr(two.host, "_dial", refuse)
            for _ in range(2):
                await two.blobs.fetch(cid, tmp_path / "copy.bin")
                assert (tmp_path / "copy.bin").read_bytes() == CONTENT
                await two.blobs.remove(cid)
                (tmp_path / "copy.bin").unlink()
            assert dials == 1  # and not again before some time went by
            assert len(two.host.connections(one.peer_id)) == 1

    run(main)


def test_small_content_takes_the_connection_that_is_there(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with two_nodes(tmp_path) as (one, two, cid):
            await two.blobs.fetch(cid, tmp_path / "copy.bin")
            assert len(two.host.connections(one.peer_id)) == 1

    run(main)


class Up(Connection):
    """A connection that is only looked at."""

    def __init__(self, path: Any, rtt: float | None, *, for_bulk: bool = False) -> None:
        self.path, self.rtt, self.for_bulk, self.closed = path, rtt, for_bulk, trio.Event()

    async def open_stream(self) -> Any: ...
    async def accept_stream(self) -> Any: ...
    async def aclose(self) -> None: ...
    def abort(self, error: Exception | None = None) -> None: ...


@pytest.mark.parametrize("turned", [False, True])
def test_which_connection_of_a_session_is_best(turned: bool) -> None:
    session = Session(PeerId.from_public_key(PrivateKey.generate(b"s" * 32).public_key))

    def best(stream_class: Any, *connections: Connection) -> Connection | None:
        session.connections = list(reversed(connections) if turned else connections)
        return session.best(stream_class)

    shared, apart = Up("tcp", 0.0004), Up("tcp", 0.0001, for_bulk=True)
    assert best("control", shared, apart) is shared
    assert best("bulk", shared, apart) is apart
    assert best("control", apart) is apart
    near, far = Up("quic", 0.010), Up("tcp", 0.040)
    assert best("control", near, far) is near
    assert best("bulk", near, far) is far
    relayed = Up("relay", 0.001)
    assert best("control", relayed, far) is far


def test_measurements_within_a_millisecond_do_not_move_calls() -> None:
    session = Session(PeerId.from_public_key(PrivateKey.generate(b"s" * 32).public_key))
    old = Up("tcp", 0.0009)
    session.connections = [old, Up("tcp", 0.0001)]
    assert session.best("control") is old
