"""Kademlia on real hosts over the in-memory network, on the mock clock."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from waiting import elapse

from lattica.datastore import Datastore
from lattica.errors import InvalidRecord, NotFound, StreamReset
from lattica.host import Host
from lattica.identify import IdentifyService
from lattica.kad import KadService
from lattica.testing import MemoryNetwork, open_memory_host
from lattica_protocols.kad.messages import KadMessage, MessageType, PeerAddrs, peer_entry
from lattica_protocols.kad.records import seal_value
from lattica_protocols.keys import PrivateKey
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.multihash import SHA2_256, Multihash
from lattica_protocols.peer_id import PeerId

SLOW_SECONDS = 1.0
"""By which an honest server answers later than the liar."""
UNIX_START = 1_800_000_000.0
PROTOCOL = "/lattica/kad/1.0.0"


def unix_clock() -> float:
    return UNIX_START + trio.current_time() - _origin[0]


_origin = [0.0]


async def bare(main: Callable[[], Awaitable[None]]) -> None:
    """Run `main`; of a failure in 30 nested nurseries raise the one that matters."""
    try:
        await main()
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        raise error from None


def content_key(n: int) -> bytes:
    return Multihash.of(SHA2_256, n.to_bytes(8, "big")).to_bytes()


class Peer:
    def __init__(self, host: Host, kad: KadService) -> None:
        self.host = host
        self.kad = kad
        self.id = host.peer_id
        self.addr = host.listen_addrs()[0]


@contextlib.asynccontextmanager
async def open_peer(
    network: MemoryNetwork, seed: int, path: Path | None = None, **settings: Any
) -> AsyncIterator[Peer]:
    with Datastore.open(path) as datastore:
        async with open_memory_host(network, seed) as host, trio.open_nursery() as nursery:
            kad = KadService(host, datastore, clock=unix_clock, **settings)
            identify = IdentifyService(host)
            nursery.start_soon(lambda: identify.run(unix_now=1))
            nursery.start_soon(kad.run)
            await trio.testing.wait_all_tasks_blocked()
            yield Peer(host, kad)
            nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def open_network(count: int, latency: float = 0.01, **settings: Any) -> AsyncIterator[list[Peer]]:
    """`count` peers; each knows the first one and has bootstrapped from it."""
    _origin[0] = trio.current_time()
    network = MemoryNetwork(latency)
    async with contextlib.AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(open_peer(network, n + 1, **settings)) for n in range(count)]
        for peer in peers[1:]:
            await join(peer, peers[0])
        yield peers


async def join(peer: Peer, other: Peer) -> None:
    await peer.host.connect(other.id, [other.addr])
    await elapse(1)  # of the mock clock: identify in both directions
    assert other.id in peer.kad.table
    assert peer.id in other.kad.table
    await peer.kad.bootstrap()


def test_providers_are_found_by_peers_that_were_not_told(run_mocked: Callable[..., Any]) -> None:
    async def main() -> None:
        async with open_network(30) as peers:
            taken = await peers[5].kad.provide(content_key(1))
            assert taken == 20
            search = peers[23].kad.find_providers(content_key(1))
            found = [provider async for provider in search]
            assert [peer for peer, _ in found] == [peers[5].id]
            assert found[0].addrs == (peers[5].addr,)
            assert search.answered >= 20

    run_mocked(bare, main)


def test_search_stops_at_the_wanted_number(run_mocked: Callable[..., Any]) -> None:
    async def main() -> None:
        async with open_network(12) as peers:
            for peer in peers[:6]:
                await peer.kad.provide(content_key(2))
            found = [p async for p in peers[11].kad.find_providers(content_key(2), 3)]
            assert len({peer for peer, _ in found}) == 3

    run_mocked(bare, main)


def test_a_peer_that_makes_up_providers_does_not_hide_the_real_one(run_mocked: Callable[..., Any]) -> None:
    """It answers before all others, and names more than are wanted."""

    async def main() -> None:
        async with open_network(8) as peers:
            provider, liar, seeker = peers[2], peers[3], peers[7]
            await provider.kad.provide(content_key(2))
            seeker.kad.server.providers.remove(content_key(2), provider.id)
            nobody = [PeerId.from_bytes_untrusted(bytes.fromhex("1220") + bytes([n]) * 32) for n in range(40)]
            made_up = [peer_entry(PeerAddrs(peer, (liar.addr,))) for peer in nobody]

            def lie(request: KadMessage, *_: object) -> KadMessage:
                return KadMessage(type=request.type, key=request.key, provider_peers=made_up)

            def slow(peer: Peer) -> Callable[[Any], Awaitable[None]]:
                async def serve(stream: Any) -> None:
                    await trio.sleep(SLOW_SECONDS)
                    await peer.kad._inbound.serve(stream)

                return serve

            liar.kad.server.answer_untrusted = lie  # type: ignore[method-assign, assignment]
            for peer in peers:
                if peer is not liar:
                    peer.host.handle(PROTOCOL, slow(peer))
            found = [peer async for peer, _ in seeker.kad.find_providers(content_key(2), 20)]
            assert provider.id in found[:6]
            assert len(found) == 20, "the rest are worth a try when there is nothing better"

    run_mocked(bare, main)


def test_nobody_provides_it(run_mocked: Callable[..., Any]) -> None:
    async def main() -> None:
        async with open_network(5) as peers:
            search = peers[1].kad.find_providers(content_key(3))
            assert [p async for p in search] == []
            assert search.asked == search.answered == 4

    run_mocked(bare, main)


def test_alone_and_later_announced(run_mocked: Callable[..., Any]) -> None:
    """What was shared before anybody was there is announced when the first peer comes."""

    async def main() -> None:
        async with open_network(1) as (first,):
            assert await first.kad.provide(content_key(4)) == 0
            network = first.host._transports[0]._network  # type: ignore[attr-defined]
            async with open_peer(network, 99) as second:
                await join(second, first)
                await elapse(5)
                assert [p.peer for p in second.kad.server.providers.get(content_key(4), unix_clock())] == [first.id]

    run_mocked(bare, main)


def test_provider_asks_itself(run_mocked: Callable[..., Any]) -> None:
    """A peer that knows only the provider learns it from the provider, though nobody took a record."""

    async def main() -> None:
        async with open_network(2, mode="server") as peers:
            peers[0].kad.server.provided.add(content_key(5))
            found = [p async for p in peers[1].kad.find_providers(content_key(5))]
            assert [peer for peer, _ in found] == [peers[0].id]

    run_mocked(bare, main)


def test_values(run_mocked: Callable[..., Any]) -> None:
    async def main() -> None:
        async with open_network(25) as peers:
            stored = await peers[3].kad.put_value("model", b"v1")
            assert stored.stored_on == 20
            again = await peers[3].kad.put_value("model", b"v2")
            assert again.sequence > stored.sequence
            found = await peers[17].kad.get_value("model", peers[3].id)
            assert (found.value, found.publisher, found.sequence) == (b"v2", peers[3].id, again.sequence)
            with pytest.raises(NotFound, match=r"asked 2\d peers"):
                await peers[17].kad.get_value("other", peers[3].id)
            with pytest.raises(InvalidRecord, match="not above"):
                await peers[3].kad.put_value("model", b"v0", sequence=1)
            with pytest.raises(InvalidRecord, match="too long"):
                await peers[3].kad.put_value("big", bytes(10_000))
            with pytest.raises(InvalidRecord, match="name"):
                await peers[3].kad.put_value("", b"")

    run_mocked(bare, main)


def test_stale_replicas_are_corrected(run_mocked: Callable[..., Any]) -> None:
    async def main() -> None:
        async with open_network(6) as peers:
            expires = int(unix_clock()) + 3600
            key, old = seal_value(peers[1].host.key, "n", b"old", sequence=1, expires=expires)
            _, new = seal_value(peers[1].host.key, "n", b"new", sequence=2, expires=expires)
            for peer in peers[2:5]:
                peer.kad.server.values.put_untrusted(key, old, peers[1].id, unix_clock())
            peers[0].kad.server.values.put_untrusted(key, new, peers[1].id, unix_clock())
            assert (await peers[5].kad.get_value("n", peers[1].id)).value == b"new"
            await elapse(1)
            for peer in peers[1:5]:
                assert peer.kad.server.values.get(key, unix_clock()) == new

    run_mocked(bare, main)


def test_values_of_foreign_networks(run_mocked: Callable[..., Any]) -> None:
    async def main() -> None:
        async with open_network(3, accept_any=True) as peers:
            assert await peers[0].kad.put_record(b"any key", b"any value") == 2
            assert await peers[2].kad.get_record(b"any key") == b"any value"
        async with open_network(2) as peers:
            with pytest.raises(InvalidRecord, match="namespace"):
                await peers[0].kad.put_record(b"any key", b"any value")

    run_mocked(bare, main)


def test_a_value_is_sent_with_its_publisher(run_mocked: Callable[..., Any]) -> None:
    """Lattica wheels before 1.0.21 end their whole node when it is missing."""

    async def main() -> None:
        async with open_network(2, accept_any=True) as peers:
            seen = []
            answer = peers[1].kad.server.answer_untrusted

            def watch(request: KadMessage, *args: Any) -> KadMessage | None:
                seen.append(request)
                return answer(request, *args)

            peers[1].kad.server.answer_untrusted = watch  # type: ignore[method-assign]
            assert await peers[0].kad.put_record(b"any key", b"any value") == 1
            (put,) = [request.record for request in seen if request.type == MessageType.PUT_VALUE]
            assert put is not None
            assert put.publisher == peers[0].id.to_bytes()

    run_mocked(bare, main)


def test_find_peer(run_mocked: Callable[..., Any]) -> None:
    async def main() -> None:
        async with open_network(24) as peers:
            await peers[2].host.disconnect(peers[20].id)
            assert peers[20].addr in await peers[2].kad.find_peer(peers[20].id)
            unknown = PeerId.from_public_key(PrivateKey.generate(b"?" * 32).public_key)
            assert await peers[2].kad.find_peer(unknown) == []

    run_mocked(bare, main)


def test_clients_stay_out_of_tables_and_are_found(run_mocked: Callable[..., Any]) -> None:
    async def main() -> None:
        async with open_network(4) as peers:
            network = peers[0].host._transports[0]._network  # type: ignore[attr-defined]
            async with open_peer(network, 77, mode="client") as client:
                await client.host.connect(peers[0].id, [peers[0].addr])
                await elapse(1)
                assert client.id not in peers[0].kad.table
                assert client.kad.info()["mode"] == "client"
                assert await client.kad.provide(content_key(6)) == 4
                found = [p async for p in peers[3].kad.find_providers(content_key(6))]
                assert [peer for peer, _ in found] == [client.id]
                assert await peers[2].kad.find_peer(client.id) == [client.addr]

    run_mocked(bare, main)


def test_records_live_for_days(run_mocked: Callable[..., Any]) -> None:
    """Provider records are renewed for as long as the provider runs and end 48 h after it is gone."""

    async def main() -> None:
        async with open_network(2) as peers:
            network = peers[0].host._transports[0]._network  # type: ignore[attr-defined]
            key = content_key(7)
            async with open_peer(network, 55) as provider:
                await join(provider, peers[0])
                await provider.kad.provide(key)
                await provider.kad.put_value("state", b"x")
                await elapse(50 * 3600)
                assert [p.peer async for p in peers[1].kad.find_providers(key)] == [provider.id]
                assert (await peers[1].kad.get_value("state", provider.id)).value == b"x"
                gone = provider.id
            await elapse(49 * 3600)
            assert [p async for p in peers[1].kad.find_providers(key)] == []
            assert all(len(peer.kad.server.providers) == 0 for peer in peers)
            with pytest.raises(NotFound):
                await peers[1].kad.get_value("state", gone)

    run_mocked(bare, main, seconds=10 * 24 * 3600)


def test_stop_providing(run_mocked: Callable[..., Any]) -> None:
    async def main() -> None:
        async with open_network(3) as peers:
            await peers[0].kad.provide(content_key(8))
            await peers[0].kad.stop_providing(content_key(8))
            assert peers[0].kad.provided() == []
            await elapse(49 * 3600)
            assert [p async for p in peers[1].kad.find_providers(content_key(8))] == []

    run_mocked(bare, main, seconds=10 * 24 * 3600)


def test_state_survives_a_restart(run: Callable[..., Any], tmp_path: Path) -> None:
    """On the wall clock, because the datastore works in a thread that the mock clock does not see."""

    async def main() -> None:
        _origin[0] = trio.current_time()
        network = MemoryNetwork()
        path = tmp_path / "lattica.db"
        async with open_peer(network, 1) as other:
            async with open_peer(network, 2, path) as peer:
                await peer.host.connect(other.id, [other.addr])
                while other.id not in peer.kad.table or peer.id not in other.kad.table:
                    await trio.testing.wait_all_tasks_blocked()
                await peer.kad.provide(content_key(9))
                stored = await peer.kad.put_value("v", b"1")
                await other.kad.provide(content_key(10))
            async with open_peer(network, 2, path) as peer:
                await peer.kad.loaded.wait()
                assert peer.kad.provided() == [content_key(9)]
                assert [p.peer for p in peer.kad.server.providers.get(content_key(10), unix_clock())] == [other.id]
                assert (await peer.kad.put_value("v", b"2")).sequence > stored.sequence
                while other.id not in peer.kad.table:  # reconnected without being told where
                    await trio.testing.wait_all_tasks_blocked()

    run(bare, main)


# -- misbehaviour -----------------------------------------------------------------------------------------------------
async def _raw_request(peer: Peer, target: Peer, data: bytes) -> bytes:
    stream = await peer.host.open_stream(target.id, PROTOCOL)
    try:
        await stream.send_frame(data)
        await stream.close_write()
        return await stream.receive_some()
    finally:
        stream.reset()


def test_bad_requests_cost_their_stream_only(run_mocked: Callable[..., Any]) -> None:
    async def main() -> None:
        async with open_network(3) as (good, bad, third):
            foreign = peer_entry(PeerAddrs(third.id, (third.addr,)))
            requests = [
                b"\xff\xff\xff",
                KadMessage(type=9).encode(),
                KadMessage(type=MessageType.FIND_NODE).encode(),
                KadMessage(type=MessageType.ADD_PROVIDER, key=content_key(1), provider_peers=(foreign,)).encode(),
                KadMessage(type=MessageType.GET_PROVIDERS, key=bytes(81)).encode(),
                KadMessage(type=MessageType.PUT_VALUE, key=b"/lattica/x/y").encode(),
                bytes(17_000),
            ]
            for data in requests:
                with pytest.raises(StreamReset):
                    await _raw_request(bad, good, data)
            assert len(good.kad.server.providers) == 0
            assert await bad.kad.find_peer(third.id)
            assert good.host.counters["handler_bugs"] == 0

    run_mocked(bare, main)


def test_flood_is_refused(run_mocked: Callable[..., Any]) -> None:
    async def main() -> None:
        async with open_network(2, latency=0.001) as (good, bad):
            ping = KadMessage(type=MessageType.PING).encode()
            stream = await bad.host.open_stream(good.id, PROTOCOL)

            async def flood() -> None:
                for _ in range(1000):
                    await stream.send_frame(ping)
                    await stream.receive_frame(100)

            with pytest.raises(StreamReset):
                await flood()
            await elapse(60)
            assert await _raw_request(bad, good, ping)
            assert good.kad.info()["requests_refused"] >= 1

    run_mocked(bare, main)


def test_liars_do_not_fail_a_lookup(run_mocked: Callable[..., Any]) -> None:
    """Peers that answer garbage, other types, made-up peers or never: the lookup goes round them."""

    async def main() -> None:
        async with open_network(12) as peers:
            await peers[1].kad.provide(content_key(11))

            async def garbage(stream: Any) -> None:
                await stream.send_frame(b"\x08\x04\x12\xff")

            async def other_type(stream: Any) -> None:
                await stream.send_frame(KadMessage(type=MessageType.PING).encode())

            async def invents(stream: Any) -> None:
                entries = [
                    peer_entry(
                        PeerAddrs(
                            PeerId.from_public_key(PrivateKey.generate(n.to_bytes(32, "big")).public_key),
                            (Multiaddr.parse("/memory/777777"),),
                        )
                    )
                    for n in range(5000, 5200)
                ]
                await stream.send_frame(KadMessage(type=MessageType.GET_PROVIDERS, closer_peers=entries).encode())

            async def silent(stream: Any) -> None:
                await trio.sleep_forever()

            for peer, lie in zip(peers[2:6], (garbage, other_type, invents, silent), strict=True):
                peer.host.handle(PROTOCOL, lie)
            started = trio.current_time()
            found = [p async for p in peers[11].kad.find_providers(content_key(11))]
            assert [peer for peer, _ in found] == [peers[1].id]
            assert trio.current_time() - started < 15

    run_mocked(bare, main)


def test_wrong_arguments(run_mocked: Callable[..., Any]) -> None:
    async def main() -> None:
        async with open_network(1) as (peer,):
            with pytest.raises(ValueError, match="80 bytes"):
                await peer.kad.provide(bytes(81))
            with pytest.raises(NotFound, match="asked 0 peers"):
                await peer.kad.get_value("x")
            with pytest.raises(InvalidRecord):
                await peer.kad.get_value("a\n")

    run_mocked(bare, main)
