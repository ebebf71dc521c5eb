"""From relayed to direct over loopback, with real sockets: the dance, reversal, and that nothing is lost meanwhile.

Loopback has no NATs; what is tested here is that each side does its part and that paths change under running calls.
Real NATs are the business of tests/nat.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import ifaddr
import pytest
import trio
import trio.testing
from natted_nodes import circuit_to, natted_node, natted_pair, until_direct
from test_relay import QUIC, TCP, relay_node

from lattica.errors import StreamReset
from lattica.host import Host
from lattica.negotiate import LazyStream
from lattica.transports.quic_endpoint import Endpoint as QuicEndpoint
from lattica_protocols.dcutr import PROTOCOL_ID, PunchExchange
from lattica_protocols.early_punch import PROTOCOL_ID as EARLY_PROTOCOL_ID
from lattica_protocols.early_punch import decode_offer_untrusted, encode_offer
from lattica_protocols.multiaddr import Multiaddr

OWN = Multiaddr.parse("/ip4/127.0.0.1/udp/9/quic-v1")
ITEMS_PAUSE = 0.001
"""Seconds after every hundred items: a stream lasts until the path has changed under it."""


class Counter:
    async def count(self, n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i
            if i % 100 == 0:
                await trio.sleep(ITEMS_PAUSE)

    async def echo(self, x: int) -> int:
        return x


@pytest.mark.parametrize(("listen", "path"), [(QUIC, "quic"), (TCP, "tcp")], ids=["udp", "tcp"])
def test_a_punch_needs_nothing_but_the_relay(run, listen: str, path: str) -> None:
    async def main() -> None:
        async with natted_pair(listen) as pair:
            a, b = pair.a, pair.b
            assert len(a.punch.candidates()) == 1  # what the relay sees of the socket we listen on
            await pair.start_punching()
            started = trio.current_time()
            await pair.connect()
            assert await until_direct(b, a) == await until_direct(a, b) == path
            assert trio.current_time() - started < 3
            assert b.punch.reports[a.peer_id].attempts == 1
            assert str(b.punch.candidates()[0]) in " ".join(a.punch.reports[b.peer_id].tried)

    run(main)


def test_addresses_are_listed_without_looking_at_the_interfaces_for_each_connection(
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That takes a fifth of a millisecond each time, while a punch waits."""
    looks = 0

    def counted() -> Any:
        nonlocal looks
        looks += 1
        return real()

    real = ifaddr.get_adapters
    listen = ["/ip4/0.0.0.0/tcp/0"]

    async def main() -> None:
        async with relay_node(TCP) as relay, natted_node(relay, listen) as node:
            for _ in range(5):
                await node.host.dial(relay.peer_id, relay.host.listen_addrs())
            while sum(c.observed_addr is not None for c in node.host.connections()) < 6:
                await trio.lowlevel.checkpoint()
            monkeypatch.setattr("ifaddr.get_adapters", counted)
            assert node.punch.candidates()
            assert looks <= len(listen)

    run(main)


# -- the head start ----------------------------------------------------------------------------------------------------
def test_the_first_dial_does_not_wait_for_the_punch(run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with natted_pair(QUIC) as pair:
            a, b = pair.a, pair.b
            opened: list[str] = []

            async def hang(*_: object) -> None:
                await trio.sleep_forever()

            monkeypatch.setattr(b.punch, "_initiate", hang)
            b.punch.early_hops = lambda: 2
            monkeypatch.setattr(QuicEndpoint, "send_short_lived", lambda _, data, addr, hops: opened.append(addr))
            await pair.start_punching()
            await pair.connect()
            assert await until_direct(a, b) == await until_direct(b, a) == "quic"
            (direct,) = [c for c in a.host.connections(b.peer_id) if c.path != "relay"]
            assert direct.direction == "outbound"
            (own,) = a.punch.candidates()
            assert own.host_port()[1:] in opened  # B's NAT was opened for A
            report = a.punch.reports[b.peer_id]
            assert report.attempts == 0
            assert report.tried == [f"{b.punch.candidates()[0]} (before the punch)"]

    run(main)


def test_a_partner_without_the_head_start_is_punched(run) -> None:
    async def main() -> None:
        async with natted_pair(QUIC) as pair:
            a, b = pair.a, pair.b
            await pair.start_punching()
            b.host.unhandle(EARLY_PROTOCOL_ID)
            await pair.connect()
            assert await until_direct(a, b) == "quic"
            assert a.punch.reports[b.peer_id].attempts == 1

    run(main)


def test_an_offer_opens_nothing_for_others_and_counts_once(run) -> None:
    """Whoever names somebody else's address has nothing sent there, and a connection is good for one offer."""

    async def main() -> None:
        async with natted_pair(QUIC) as pair:
            a, b = pair.a, pair.b
            opened: list[str] = []
            b.punch._open_nat = lambda targets, hops: opened.extend(str(t.addr) for t in targets)  # type: ignore[method-assign]
            await pair.start_punching(b)
            relayed = await pair.connect()
            offer = encode_offer([Multiaddr.parse("/ip4/203.0.113.9/udp/53/quic-v1"), OWN], None)
            stream = LazyStream(await relayed.open_stream(), EARLY_PROTOCOL_ID)
            await stream.send_frame(offer)
            assert decode_offer_untrusted(await stream.receive_frame(4096)).addrs == tuple(b.punch.candidates())
            assert opened == [str(OWN)]
            again = LazyStream(await relayed.open_stream(), EARLY_PROTOCOL_ID)
            await again.send_frame(offer)
            with pytest.raises(StreamReset):
                await again.receive_frame(4096)
            direct = LazyStream(await (await a.host.connect(pair.relay.peer_id)).open_stream(), EARLY_PROTOCOL_ID)
            await direct.send_frame(offer)
            with pytest.raises(StreamReset):
                await direct.receive_frame(4096)
            assert len(opened) == 1

    run(main)


def test_a_public_partner_is_dialled_back(run) -> None:
    async def main() -> None:
        async with (
            relay_node() as relay,
            natted_node(relay, []) as a,
            natted_node(relay, [TCP], tells=True) as b,
            trio.open_nursery() as nursery,
        ):
            for node in (a, b):
                nursery.start_soon(node.punch.run)
            await b.host.connect(None, [circuit_to(a)])
            assert await until_direct(b, a) == await until_direct(a, b) == "tcp"
            (direct,) = [c for c in a.host.connections(b.peer_id) if c.path != "relay"]
            assert direct.direction == "outbound"  # the one that cannot be reached dialled the one that can
            nursery.cancel_scope.cancel()

    run(main)


def test_calls_and_streams_survive_the_change_of_paths(run, tmp_path: Path) -> None:
    async def main() -> None:
        async with natted_pair(QUIC) as pair:
            a, b = pair.a, pair.b
            b.rpc.serve("counter", Counter())
            await pair.connect()
            assert await a.rpc.call(b.peer_id, "counter.echo", 1) == 1
            channel = a.rpc.open_channel(b.peer_id)
            assert channel is not None
            assert channel.stream.connection.path == "relay"
            received: list[int] = []
            begun = trio.Event()

            async def read() -> None:
                async for i in a.rpc.stream(b.peer_id, "counter.count", 20_000):
                    received.append(i)
                    begun.set()

            async def call(done: trio.Event) -> None:
                for i in range(500):
                    assert await a.rpc.call(b.peer_id, "counter.echo", i) == i
                done.set()

            done = trio.Event()
            async with trio.open_nursery() as work:
                work.start_soon(read)
                await begun.wait()
                assert received[-1] < 20_000 - 1
                for node in (a, b):
                    pair.nursery.start_soon(node.punch.run)
                await until_direct(a, b)
                work.start_soon(call, done)
            assert received == list(range(20_000))
            assert done.is_set()
            channel = a.rpc.open_channel(b.peer_id)
            assert channel is not None
            assert channel.stream.connection.path == "quic"

    run(main)


def test_a_fetch_goes_on_while_the_path_changes(run, tmp_path: Path) -> None:
    async def main() -> None:
        async with natted_pair(TCP, homes=tmp_path) as pair:
            a, b = pair.a, pair.b
            source = tmp_path / "model.bin"
            source.write_bytes(os.urandom(48_000_000))
            shared = await b.blobs.share(source)
            await pair.connect()
            async with trio.open_nursery() as work:
                work.start_soon(partial(a.blobs.fetch, shared.cid, tmp_path / "copy.bin", sources=[b.peer_id]))
                while pair.relay.relay_server.circuits.carried_bytes < 4_000_000:
                    await trio.lowlevel.checkpoint()
                for node in (a, b):
                    pair.nursery.start_soon(node.punch.run)
                assert await until_direct(a, b) == "tcp"
            digests = [hashlib.sha256(path.read_bytes()).digest() for path in (source, tmp_path / "copy.bin")]
            assert digests[0] == digests[1]

    run(main)


def test_a_partner_that_tries_again_is_answered_at_once(run) -> None:
    """It gives an attempt up some milliseconds before we do, as it waited for less of the exchange."""

    async def main() -> None:
        async with natted_pair(QUIC) as pair:
            a, b = pair.a, pair.b
            await pair.start_punching(a)
            await pair.connect()
            while not b.host.connections(a.peer_id):
                await trio.lowlevel.checkpoint()
            (relayed,) = b.host.connections(a.peer_id)
            for _ in range(3):
                stream = LazyStream(await relayed.open_stream(), PROTOCOL_ID)
                exchange = PunchExchange(initiator=True, addrs=[], token=bytes(16), now=trio.current_time())
                await stream.send_frame(exchange.poll_transmit() or b"")
                exchange.receive_untrusted(await stream.receive_frame(4096), trio.current_time())
                await stream.send_frame(exchange.poll_transmit() or b"")
                await stream.aclose()
                assert exchange.punch_at is not None

    run(main)


def test_a_new_relayed_connection_does_not_wait_for_what_was_tried_over_the_old_one(
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with natted_pair(QUIC) as pair:
            a, b = pair.a, pair.b
            begun = trio.Event()

            async def hang(*_: object) -> None:
                begun.set()
                await trio.sleep_forever()

            with monkeypatch.context() as patched:
                patched.setattr(b.punch, "_initiate", hang)
                await pair.start_punching(b)
                first = await pair.connect()
                await begun.wait()
            await first.aclose()
            while b.host.connections(a.peer_id):
                await trio.lowlevel.checkpoint()
            await pair.start_punching(a)
            await pair.connect()
            assert await until_direct(b, a) == "quic"

    run(main)


def test_relays_are_dialled_after_all_addresses_are_listened_on(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relay that is dialled from another port than the one we listen on sees a mapping of no use to partners."""

    async def main() -> None:
        listen = Host.listen

        async def slow(host: Host, addr: Multiaddr) -> Any:
            if str(addr) == TCP:
                await trio.testing.wait_all_tasks_blocked(0.05)
            return await listen(host, addr)

        async with relay_node(TCP) as relay:
            monkeypatch.setattr(Host, "listen", slow)
            async with natted_node(relay, [TCP]) as node:
                assert len(node.punch.candidates()) == 1

    run(main)
