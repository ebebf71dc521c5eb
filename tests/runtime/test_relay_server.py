"""A relay under load and abuse: what it holds, how it shares, what it answers to garbage. Real TCP, bare circuits."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from test_relay import QUIC, TCP, addr_of, relay_node

from lattica.errors import ConnectError, ConnectionLost, StreamReset
from lattica.interfaces import Connection, Stream
from lattica.node import Node, NodeConfig, open_node
from lattica.relay.requests import open_circuit, reserve
from lattica.relay.splice import CROWDED_BYTES, CROWDED_HIGH_WATER, HIGH_WATER
from lattica_protocols.limits import (
    RELAY_CROWDED_WINDOW_BYTES,
    RELAY_MANY_CIRCUITS,
    RELAY_MAX_HELD,
    RELAY_MAX_MESSAGE_BYTES,
    RELAY_MAX_WINDOW_BYTES,
)
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.relay.admission import RelayLimits
from lattica_protocols.relay.messages import (
    HOP_PROTOCOL,
    STOP_PROTOCOL,
    HopMessage,
    HopType,
    RelayPeer,
    Status,
    StopMessage,
    stop_status,
)

Handler = Callable[[Stream], Awaitable[None]]
LATE_SECONDS = 0.05
"""By which a relay holds up what it carries."""


@asynccontextmanager
async def bare_node(relay: Node, handler: Handler | None = None) -> AsyncIterator[tuple[Node, Connection]]:
    """A node connected with the relay; with `handler` it has a reservation, and circuits to it go there."""
    async with open_node(NodeConfig(listen=[], relay_use="never", punch=False)) as node:
        via = await node.host.connect(None, [Multiaddr.parse(addr_of(relay))])
        await node.wait_identified(relay.peer_id)
        await relay.wait_identified(node.peer_id)
        if handler is not None:
            taken = handler

            async def serve(stream: Stream) -> None:
                await stream.receive_frame(RELAY_MAX_MESSAGE_BYTES)
                await stream.send_frame(stop_status(Status.OK))
                await taken(stream)

            node.host.handle(STOP_PROTOCOL, serve)
            await reserve(node.host, via)
        yield node, via


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.aclose()


async def deaf(stream: Stream) -> None:
    await trio.sleep_forever()


async def open_to(source: tuple[Node, Connection], target: tuple[Node, Connection]) -> Stream:
    return (await open_circuit(source[0].host, source[1], target[0].peer_id)).stream


@pytest.mark.parametrize("listen", [TCP, QUIC])
def test_bytes_and_ends_go_through_as_they_are(run, listen: str) -> None:
    async def main() -> None:
        async with relay_node(listen) as relay, bare_node(relay, echo) as b, bare_node(relay) as a:
            stream = await open_to(a, b)
            payload = bytes(range(256)) * 40_000
            async with trio.open_nursery() as nursery:

                async def send() -> None:
                    await stream.send_all(payload)
                    await stream.close_write()

                nursery.start_soon(send)
                assert await stream.receive_exactly(len(payload)) == payload
            assert await stream.receive_some() == b""
            while relay.relay_server.table.circuits:
                await trio.lowlevel.checkpoint()
            assert relay.relay_server.circuits.carried_bytes == 2 * len(payload)
            assert len(relay.relay_server.circuits) == relay.relay_server.circuits.held == 0

    run(main)


@pytest.mark.parametrize("listen", [TCP, QUIC])
def test_a_target_that_takes_nothing_stops_its_source_only(run, listen: str) -> None:
    async def main() -> None:
        async with relay_node(listen) as relay, bare_node(relay, deaf) as b, bare_node(relay, echo) as c:
            async with bare_node(relay) as a:
                stalled = await open_to(a, b)
                with trio.move_on_after(2.0):
                    while True:
                        await stalled.send_all(bytes(256 * 1024))
                ledger = relay.relay_server.circuits
                assert HIGH_WATER <= ledger.held <= HIGH_WATER + 2 * RELAY_MAX_WINDOW_BYTES
                other = await open_to(a, c)
                await other.send_all(b"still here")
                assert await other.receive_exactly(10) == b"still here"
                stalled.reset()
                while len(ledger) > 1:
                    await trio.lowlevel.checkpoint()
                assert ledger.held < HIGH_WATER

    run(main)


def test_windows_shrink_as_circuits_become_many(run) -> None:
    async def main() -> None:
        async with relay_node(relay_limits=RelayLimits(circuits_per_source=100)) as relay:
            async with bare_node(relay, deaf) as b, bare_node(relay) as a:
                streams = [await open_to(a, b) for _ in range(60)]
                with trio.move_on_after(3.0):
                    async with trio.open_nursery() as nursery:
                        for stream in streams:
                            nursery.start_soon(stream.send_all, bytes(8 * 1024 * 1024))
                ledger = relay.relay_server.circuits
                ledger.make_room()
                assert len(ledger) == 60  # nobody had to go
                assert ledger.held <= RELAY_MAX_HELD

    run(main)


def test_a_crowd_whose_targets_take_nothing_holds_little(run) -> None:
    async def main() -> None:
        count = RELAY_MANY_CIRCUITS + 16
        async with relay_node(relay_limits=RelayLimits(circuits_per_source=100)) as relay:
            async with bare_node(relay, deaf) as b, bare_node(relay) as a, bare_node(relay) as c:
                streams = [await open_to(source, b) for source in (a, c) for _ in range(count // 2)]
                with trio.move_on_after(3.0):
                    async with trio.open_nursery() as nursery:
                        for stream in streams:
                            nursery.start_soon(stream.send_all, bytes(4 * 1024 * 1024))
                ledger = relay.relay_server.circuits
                for circuit in ledger:
                    for half in circuit.halves:
                        half.look()
                assert ledger.held >= CROWDED_BYTES  # they were stopped, and not just slow
                most = CROWDED_BYTES + count * (RELAY_CROWDED_WINDOW_BYTES + CROWDED_HIGH_WATER)
                assert ledger.held <= most
                assert all(not circuit.over.is_set() for circuit in ledger)

    run(main)


def test_a_circuit_ends_at_its_limits(run) -> None:
    async def main() -> None:
        limits = RelayLimits(circuit_bytes=100_000, circuit_seconds=1)
        async with relay_node(relay_limits=limits) as relay, bare_node(relay, echo) as b, bare_node(relay) as a:
            opened = await open_circuit(a[0].host, a[1], b[0].peer_id)
            assert opened.limit is not None
            assert (opened.limit.duration, opened.limit.data) == (1, 100_000)
            await opened.stream.send_all(bytes(200_000))
            with pytest.raises((StreamReset, ConnectionLost)):
                await opened.stream.receive_exactly(200_000)
            slow = await open_to(a, b)
            with pytest.raises((StreamReset, ConnectionLost)):
                await slow.receive_exactly(1)

    run(main)


def test_a_capped_relay_gives_every_circuit_the_same(run) -> None:
    """One source with three circuits against one with a single one; the targets take all they get."""

    async def main() -> None:
        received: dict[int, int] = {}

        async def count(stream: Stream) -> None:
            number = (await stream.receive_exactly(1))[0]
            buffer = bytearray(65536)
            while size := await stream.receive_into(buffer):
                received[number] = received.get(number, 0) + size

        async with relay_node(relay_bytes_per_second=4e6) as relay, bare_node(relay, count) as target:
            async with bare_node(relay) as greedy, bare_node(relay) as modest:
                streams = [await open_to(greedy, target) for _ in range(3)] + [await open_to(modest, target)]

                async def push(number: int, stream: Stream) -> None:
                    await stream.send_all(bytes([number]))
                    while True:
                        await stream.send_all(bytes(65536))

                started = trio.current_time()
                with trio.move_on_after(4.0):
                    async with trio.open_nursery() as nursery:
                        for number, stream in enumerate(streams):
                            nursery.start_soon(push, number, stream)
                rate = sum(received.values()) / (trio.current_time() - started)
                # The first windows come in one go, before anybody can be stopped: 4 x 256 KiB and what they grew.
                assert 2e6 < rate < 7e6
                assert max(received.values()) < 2 * min(received.values())

    run(main)


async def ask(node: Node, via: Connection, frame: bytes) -> HopMessage:
    stream = await node.host.open_stream(via.peer_id, HOP_PROTOCOL, connection=via)
    await stream.send_frame(frame)
    return HopMessage.decode_untrusted(await stream.receive_frame(RELAY_MAX_MESSAGE_BYTES))


def test_garbage_is_answered_and_costs_nothing(run) -> None:
    async def main() -> None:
        async with relay_node() as relay, bare_node(relay) as (node, via):
            for frame, status in [
                (b"\xff\xff\xff", Status.MALFORMED_MESSAGE),
                (HopMessage(type=HopType.CONNECT).encode(), Status.MALFORMED_MESSAGE),
                (HopMessage(type=HopType.CONNECT, peer=RelayPeer(id=b"x")).encode(), Status.MALFORMED_MESSAGE),
                (HopMessage(type=HopType.STATUS).encode(), Status.UNEXPECTED_MESSAGE),
                (HopMessage().encode(), Status.UNEXPECTED_MESSAGE),
                (HopMessage(type=1, peer=RelayPeer.make(node.peer_id)).encode(), Status.PERMISSION_DENIED),
                (HopMessage(type=1, peer=RelayPeer.make(relay.peer_id)).encode(), Status.NO_RESERVATION),
            ]:
                assert (await ask(node, via, frame)).status == status
            stream = await node.host.open_stream(via.peer_id, HOP_PROTOCOL, connection=via)
            stream.write(b"\xff\xff\x7f")  # a length of two million
            with pytest.raises(StreamReset):
                await stream.receive_exactly(1)
            assert (await ask(node, via, HopMessage(type=0).encode())).status == Status.OK
            assert not relay.relay_server.table.circuits

    run(main)


def test_targets_that_refuse_or_say_nonsense(run) -> None:
    async def main() -> None:
        answers: list[bytes | None] = [
            stop_status(Status.PERMISSION_DENIED),
            b"\xff",
            StopMessage(type=0).encode(),
            None,
        ]

        async def nonsense(stream: Stream) -> None:
            await stream.receive_frame(RELAY_MAX_MESSAGE_BYTES)
            answer = answers.pop(0)
            if answer is None:
                stream.reset()
            else:
                await stream.send_frame(answer)

        async with relay_node() as relay, bare_node(relay, deaf) as b, bare_node(relay) as (node, via):
            b[0].host.handle(STOP_PROTOCOL, nonsense)
            while answers:
                with pytest.raises(ConnectError, match="cannot reach the peer"):
                    await open_circuit(node.host, via, b[0].peer_id)
            assert not relay.relay_server.table.circuits
            assert len(relay.relay_server.circuits) == 0

    run(main)


@pytest.mark.parametrize("does", ["changes", "repeats", "drops"])
def test_a_relay_that_meddles_with_bytes_is_found_out(run, does: str) -> None:
    """The circuit is the relay's, what is inside is not: meddling ends the connection, it changes no answer."""

    async def main() -> None:
        from test_relay import circuit_to, hidden_node

        async with relay_node() as relay, hidden_node(relay) as b:
            b.rpc.serve("math", {"double": lambda x: 2 * x})
            async with open_node(NodeConfig(listen=[], relay_use="never", punch=False)) as a:
                connection = await a.host.connect(None, [circuit_to(b)])
                assert await a.rpc.call(b.peer_id, "math.double", 4) == 8
                (splice,) = relay.relay_server.circuits
                half: Any = splice.halves[0]
                honest = half.data_received

                def lie(data: memoryview) -> None:
                    half.data_received = honest
                    if does == "changes":
                        data[len(data) // 2] ^= 1
                    if does != "drops":
                        honest(data)
                    if does == "repeats":
                        honest(data)

                half.data_received = lie
                with trio.move_on_after(0.5):  # what is dropped is noticed by what follows
                    assert await a.rpc.call(b.peer_id, "math.double", 5) == 10
                assert await a.rpc.call(b.peer_id, "math.double", 6) == 12
                await connection.closed.wait()
                assert await a.rpc.call(b.peer_id, "math.double", 7) == 14  # over a new circuit

    run(main)


def test_a_relay_that_delays_changes_nothing_else(run) -> None:
    async def main() -> None:
        from test_relay import circuit_to, hidden_node

        async with relay_node() as relay, hidden_node(relay) as b, trio.open_nursery() as nursery:
            b.rpc.serve("math", {"double": lambda x: 2 * x})
            async with open_node(NodeConfig(listen=[], relay_use="never", punch=False)) as a:
                connection = await a.host.connect(None, [circuit_to(b)])
                (splice,) = relay.relay_server.circuits
                half: Any = splice.halves[0]
                honest = half.data_received
                held, kept = trio.open_memory_channel[bytes](1000)

                async def late() -> None:
                    async for data in kept:
                        await trio.sleep(LATE_SECONDS)
                        honest(memoryview(data))

                nursery.start_soon(late)
                half.data_received = lambda data: held.send_nowait(bytes(data))
                started = trio.current_time()
                assert await a.rpc.call(b.peer_id, "math.double", 5) == 10
                assert trio.current_time() - started >= LATE_SECONDS
                assert not connection.closed.is_set()
                nursery.cancel_scope.cancel()

    run(main)
