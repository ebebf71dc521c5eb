"""Hosts on the in-memory network: sessions, negotiation, identify, ping, and what goes wrong."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import ifaddr
import pytest
import trio
from waiting import elapse

import lattica.host
from lattica.dialer import SEARCH_DELAY
from lattica.errors import (
    ConnectError,
    ConnectionLost,
    NoAddresses,
    ProtocolNotSupported,
    StreamReset,
    WrongPeer,
)
from lattica.host import Host, PeerConnected, PeerDisconnected, PeerIdentified, open_host
from lattica.identify import AFTER_BURST, ID_PROTOCOL, PUSH_PROTOCOL, IdentifyService
from lattica.interfaces import Connection, Listener, OnConnection, Stream, Transport
from lattica.negotiate import LazyStream
from lattica.ping import PingService
from lattica.testing import MemoryNetwork, open_memory_host
from lattica.transports.tcp import TcpTransport
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.identify import Identify
from lattica_protocols.keys import PrivateKey
from lattica_protocols.limits import IDENTIFY_PUSH_BURST
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId

SEARCH_SECONDS = 0.3
"""What a search for addresses takes."""


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.aclose()


@asynccontextmanager
async def two_hosts(latency: float = 0.0) -> AsyncIterator[tuple[Host, Host]]:
    network = MemoryNetwork(latency)
    async with open_memory_host(network, 1) as one, open_memory_host(network, 2) as two:
        one.peerstore.add_addrs(two.peer_id, two.listen_addrs(), 60)
        yield one, two


def test_a_stream_is_negotiated_and_echoes(run_mocked) -> None:
    async def main() -> None:
        async with two_hosts(0.05) as (one, two):
            two.handle("/echo/1", echo)
            stream = await one.open_stream(two.peer_id, ["/other/1", "/echo/1"])
            assert stream.protocol == "/echo/1"
            await stream.send_all(b"hello")
            assert await stream.receive_exactly(5) == b"hello"
            await stream.close_write()
            assert await stream.receive_some() == b""

    run_mocked(main)


def test_a_known_protocol_costs_one_round_trip(run_mocked) -> None:
    """After identify the proposal travels with the data: one round trip from opening to the answer."""

    async def main() -> None:
        async with two_hosts(0.05) as (one, two):
            two.handle("/echo/1", echo)
            await identified(one, two)
            started = trio.current_time()
            stream = await one.open_stream(two.peer_id, "/echo/1")
            assert isinstance(stream, LazyStream)
            await stream.send_all(b"hello")
            assert await stream.receive_exactly(5) == b"hello"
            assert trio.current_time() - started == pytest.approx(0.1, abs=0.01)

    run_mocked(main)


async def identified(one: Host, two: Host) -> None:
    for host in (one, two):
        host.nursery.start_soon(lambda h=host: IdentifyService(h).run(unix_now=1_700_000_000))
    await trio.testing.wait_all_tasks_blocked()
    events = one.subscribe()
    await one.connect(two.peer_id)
    async for event in events:
        if isinstance(event, PeerIdentified):
            return


def test_a_lazy_proposal_that_is_refused_after_all(run_mocked) -> None:
    async def main() -> None:
        async with two_hosts() as (one, two):
            two.handle("/echo/1", echo)
            await identified(one, two)
            two.unhandle("/echo/1")
            stream = await one.open_stream(two.peer_id, "/echo/1")
            with pytest.raises((ProtocolNotSupported, StreamReset)):
                await stream.receive_some()

    run_mocked(main)


def test_lazy_stream_with_a_sink(run_mocked) -> None:
    class Sink:
        def __init__(self) -> None:
            self.data = b""
            self.ended = trio.Event()

        def data_received(self, data: memoryview) -> None:
            self.data += data

        def eof_received(self) -> None:
            self.ended.set()

        def stream_closed(self, error: Exception | None) -> None:
            pass

    async def main() -> None:
        async with two_hosts(0.01) as (one, two):
            two.handle("/echo/1", echo)
            await identified(one, two)
            stream = await one.open_stream(two.peer_id, "/echo/1")
            sink = Sink()
            stream.set_sink(sink)
            stream.write(b"a" * 1000, b"b" * 1000)
            await stream.close_write()
            await sink.ended.wait()
            assert sink.data == b"a" * 1000 + b"b" * 1000

    run_mocked(main)


def test_nobody_speaks_the_protocol(run_mocked) -> None:
    async def main() -> None:
        async with two_hosts() as (one, two):
            with pytest.raises(ProtocolNotSupported, match="/nothing/1"):
                await one.open_stream(two.peer_id, "/nothing/1")

    run_mocked(main)


def test_unknown_peer_wrong_peer_and_ourselves(run_mocked) -> None:
    async def main() -> None:
        network = MemoryNetwork()
        async with open_memory_host(network, 1) as one, open_memory_host(network, 2) as two:
            async with open_memory_host(network, 3) as three:
                with pytest.raises(NoAddresses):
                    await one.connect(two.peer_id)
                with pytest.raises(WrongPeer, match=str(three.peer_id)):
                    await one.connect(two.peer_id, three.listen_addrs())
                with pytest.raises(ConnectError, match="our own"):
                    await one.connect(one.peer_id)

    run_mocked(main)


def test_a_handler_that_fails_costs_its_stream_only(run_mocked, caplog) -> None:
    async def main() -> None:
        async with two_hosts() as (one, two):

            async def bug(stream: Stream) -> None:
                raise ZeroDivisionError("oops")

            async def complaint(stream: Stream) -> None:
                raise RemoteProtocolError("bad bytes")

            two.handle("/bug/1", bug)
            two.handle("/complaint/1", complaint)
            two.handle("/echo/1", echo)
            for protocol in ("/bug/1", "/complaint/1"):
                stream = await one.open_stream(two.peer_id, protocol)
                with pytest.raises(StreamReset):
                    await stream.receive_some()
            stream = await one.open_stream(two.peer_id, "/echo/1")
            await stream.send_all(b"x")
            assert await stream.receive_some() == b"x"
            assert two.counters["handler_bugs"] == 1
            assert two.counters["streams_failed"] == 1
            assert len(one.connections(two.peer_id)) == 1

    run_mocked(main)
    assert "oops" in caplog.text


def test_a_lost_connection_ends_streams_and_is_told(run_mocked) -> None:
    async def main() -> None:
        async with two_hosts() as (one, two):
            two.handle("/echo/1", echo)
            events = one.subscribe()
            stream = await one.open_stream(two.peer_id, "/echo/1")
            event = await events.receive()
            assert isinstance(event, PeerConnected)
            assert event.first
            for connection in two.connections():
                connection.abort()
            with pytest.raises(ConnectionLost):
                await stream.receive_some()
            assert await events.receive() == PeerDisconnected(two.peer_id)
            assert one.peers() == []

    run_mocked(main)


def test_concurrent_connects_dial_once(run_mocked) -> None:
    async def main() -> None:
        async with two_hosts(0.1) as (one, two):
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(one.connect, two.peer_id)
            assert len(one.connections()) == 1
            assert one.counters["dials"] == 1

    run_mocked(main)


class Deaf(Transport):
    """Addresses at which nobody refuses, and nobody answers."""

    def can_dial(self, addr: Multiaddr) -> bool:
        return addr.has("tcp")

    async def dial(self, addr: Multiaddr, expected: PeerId | None) -> Connection:
        await trio.sleep_forever()
        raise AssertionError

    def can_listen(self, addr: Multiaddr) -> bool:
        return False

    async def listen(self, addr: Multiaddr, on_connection: OnConnection) -> Listener:
        raise AssertionError


OLD_ADDR = Multiaddr.parse("/ip4/192.0.2.1/tcp/4101")


def test_old_addresses_that_keep_silent_do_not_hold_up_a_search(run_mocked) -> None:
    async def main() -> None:
        async with two_hosts(0.1) as (one, two):
            searches = 0

            async def search(peer: PeerId) -> list[Multiaddr]:
                nonlocal searches
                searches += 1
                await trio.sleep(SEARCH_SECONDS)
                return two.listen_addrs()

            one._transports.append(Deaf())
            for addr in one.peerstore.addrs(two.peer_id):
                one.peerstore.remove_addr(two.peer_id, addr)
            one.peerstore.add_addrs(two.peer_id, [OLD_ADDR], 60)
            one.find_addrs = search
            started = trio.current_time()
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(one.connect, two.peer_id)
            assert trio.current_time() - started == pytest.approx(SEARCH_DELAY + 0.3 + 0.2)
            assert len(one.connections()) == 1
            assert (await one.connect(two.peer_id)).path == "memory"
            assert searches == 20

    run_mocked(main)


@pytest.mark.parametrize("found", [[], [OLD_ADDR], [Multiaddr.parse("/ip4/192.0.2.2/tcp/4101")]])
def test_a_peer_that_answers_nowhere_is_given_up(run_mocked, found: list[Multiaddr]) -> None:
    async def main() -> None:
        async with two_hosts() as (one, two):
            one._transports[:] = [Deaf()]
            one.peerstore.add_addrs(two.peer_id, [OLD_ADDR], 60)

            async def search(peer: PeerId) -> list[Multiaddr]:
                return found

            one.find_addrs = search
            with pytest.raises(ConnectError, match="no answer within 15 s"):
                await one.connect(two.peer_id)
            assert not one._dials

    run_mocked(main)


def test_a_search_that_connects_with_the_peer_itself(run_mocked) -> None:
    async def main() -> None:
        async with two_hosts() as (one, two):
            for addr in one.peerstore.addrs(two.peer_id):
                one.peerstore.remove_addr(two.peer_id, addr)

            async def search(peer: PeerId) -> list[Multiaddr]:
                await one.connect(peer, two.listen_addrs(), route=False)
                return []

            one.find_addrs = search
            assert (await one.connect(two.peer_id)).peer_id == two.peer_id

    run_mocked(main)


def test_a_blocked_peer_is_refused_in_both_directions(run_mocked) -> None:
    async def main() -> None:
        async with two_hosts() as (one, two):
            two.peerstore.add_addrs(one.peer_id, one.listen_addrs(), 60)
            two.gate = lambda peer: "blocked by a rule" if peer == one.peer_id else None
            connection = await one.connect(two.peer_id)
            await connection.closed.wait()
            with pytest.raises(ConnectError, match="blocked by a rule"):
                await two.connect(one.peer_id)
            assert two.peers() == []

    run_mocked(main)


def test_ping_and_identify(run_mocked) -> None:
    async def main() -> None:
        async with two_hosts(0.02) as (one, two):
            PingService(two)
            pinger = PingService(one)
            await identified(one, two)
            info = one.peerstore.info(two.peer_id)
            assert info is not None
            assert info.agent.startswith("lattica-py/")
            assert "/ipfs/ping/1.0.0" in info.protocols
            assert await pinger.ping(two.peer_id) == pytest.approx(0.04, abs=0.005)

    run_mocked(main)


def test_where_a_js_peer_sees_us(run_mocked) -> None:
    """It appends our peer id. Go does not dial an address that ends in one, so it must not go on from here."""
    seen = Multiaddr.parse("/ip4/203.0.113.5/tcp/9")

    async def main() -> None:
        async with two_hosts() as (one, two):

            async def answer(stream: Stream) -> None:
                await stream.send_frame(Identify(observed_addr=seen.with_peer(one.peer_id)).encode())
                await stream.aclose()

            await one.connect(two.peer_id)
            two.handle("/ipfs/id/1.0.0", answer)
            service = IdentifyService(one)
            await service.ask_again()
            connection = one.connection(two.peer_id)
            assert connection is not None
            assert connection.observed_addr == seen

    run_mocked(main)


@pytest.mark.parametrize("ending", ["left open", "reset", "two messages", "closed"])
@pytest.mark.parametrize("damaged", [False, True])
def test_peers_that_identify_in_unusual_ways(run_mocked, ending: str, damaged: bool) -> None:
    """Rust and JS read one message and do not look for an end; nobody refuses a peer for its signed record."""
    addr = Multiaddr.parse("/ip4/127.0.0.1/tcp/9")

    async def main() -> None:
        async with two_hosts(0.02) as (one, two):
            record = b"\x0a\x03\x08\x07\x12what a later version signs" if damaged else None
            told = Identify(two.key.public_key, (addr,), ("/odd/1",), agent_version="odd", signed_peer_record=record)

            async def answer(stream: Stream) -> None:
                await stream.send_frame(told.encode() + b"\xf2\x07\x05later")  # a field 126 nobody knows
                if ending == "two messages":
                    await stream.send_frame(Identify(protocols=("/odd/2",)).encode())
                if ending == "left open":
                    await trio.sleep_forever()
                if ending == "reset":
                    await elapse(0.1)
                    stream.reset()
                else:
                    await stream.aclose()

            two.handle("/ipfs/id/1.0.0", answer)
            service = IdentifyService(one)
            one.nursery.start_soon(lambda: service.run(unix_now=1))
            await trio.testing.wait_all_tasks_blocked()
            events = one.subscribe()
            await one.connect(two.peer_id)
            with trio.fail_after(5):
                while not isinstance(await events.receive(), PeerIdentified):
                    pass
            info = one.peerstore.info(two.peer_id)
            assert info is not None
            assert info.agent == "odd"
            assert info.protocols == ({"/odd/1", "/odd/2"} if ending == "two messages" else {"/odd/1"})
            assert addr in one.peerstore.addrs(two.peer_id)

    run_mocked(main)


def test_a_flood_of_pushes_is_not_read(run_mocked, monkeypatch) -> None:
    """Of each connection a burst; what came after it is asked for once, so nothing that was said is lost."""
    read = []
    decode = Identify.decode_untrusted
    monkeypatch.setattr(Identify, "decode_untrusted", lambda messages: read.append(1) or decode(messages))

    async def main() -> None:
        async with two_hosts(0.001) as (one, two):
            IdentifyService(two)
            connection = await one.connect(two.peer_id)
            agent = "0"

            async def answer(stream: Stream) -> None:
                await stream.send_frame(Identify(agent_version=agent).encode())
                await stream.aclose()

            async def push() -> bool:
                stream = await one.open_stream(two.peer_id, PUSH_PROTOCOL, connection=connection)
                with suppress(StreamReset):
                    await stream.send_frame(Identify(agent_version=agent).encode())
                    await stream.close_write()
                    return await stream.receive_some() == b""
                return False

            def known() -> str:
                info = two.peerstore.info(one.peer_id)
                assert info is not None
                return info.agent

            one.handle(ID_PROTOCOL, answer)
            for number in range(IDENTIFY_PUSH_BURST):
                agent = str(number)
                assert await push()
            assert known() == agent
            for number in range(200):
                agent = f"late {number}"
                await push()
            assert len(read) < IDENTIFY_PUSH_BURST + 10, "a second has passed, not ten"
            await elapse(AFTER_BURST + 1)
            assert known() == agent == "late 199"
            assert len(read) < IDENTIFY_PUSH_BURST + 12
            await elapse(IDENTIFY_PUSH_BURST)
            assert await push(), "an honest peer later"

    run_mocked(main)


@pytest.mark.parametrize(("seen_at", "kept"), [("/ip4/203.0.113.5/tcp/9", False), ("/ip4/127.0.0.1/tcp/9", True)])
def test_a_stranger_does_not_send_us_to_our_own_loopback(run_mocked, seen_at: str, kept: bool) -> None:
    """Its loopback addresses mean our machine as soon as it is another one: any service there would be dialled."""

    async def main() -> None:
        async with two_hosts() as (one, two):
            garbage = [Multiaddr.parse(a) for a in ("/ip4/127.0.0.1/tcp/22", "/ip6/::1/udp/53/quic-v1")]
            honest = Multiaddr.parse("/ip4/203.0.113.5/tcp/4101")
            await identified(one, two)
            two.announce += [*garbage, honest]
            connection = await one.connect(two.peer_id)
            connection.remote_addr = Multiaddr.parse(seen_at)
            await IdentifyService(one).ask_again()
            addrs = one.peerstore.addrs(two.peer_id)
            assert honest in addrs
            assert [addr in addrs for addr in garbage] == [kept, kept]

    run_mocked(main)


def test_a_peer_that_insists_on_a_protocol_is_slowed_down(run_mocked) -> None:
    """The Rust wheel opens a stream for a protocol we refuse hundreds of times a second, for ever."""

    async def main() -> None:
        async with two_hosts() as (one, two):
            two.handle("/echo/1", echo)
            started = trio.current_time()
            for _ in range(30):
                with pytest.raises((ProtocolNotSupported, ConnectionLost)):
                    await one.open_stream(two.peer_id, "/nothing/1")
            assert trio.current_time() - started > 20
            stream = await one.open_stream(two.peer_id, "/echo/1")  # others are not slowed down
            started = trio.current_time()
            await stream.send_all(b"x")
            assert await stream.receive_some() == b"x"
            assert trio.current_time() - started < 0.1

    run_mocked(main)


def test_connections_that_come_at_once_each_take_the_place_of_an_idle_one(run_mocked, monkeypatch) -> None:
    monkeypatch.setattr(lattica.host, "MAX_CONNECTIONS", 2)

    async def main() -> None:
        network = MemoryNetwork()
        async with AsyncExitStack() as stack:
            one, *others = [await stack.enter_async_context(open_memory_host(network, n)) for n in range(1, 7)]
            for other in others[:2]:
                await one.connect(other.peer_id, other.listen_addrs())
            await elapse(60)
            transport = one.transports()[0]
            made = [await transport.dial(other.listen_addrs()[0], other.peer_id) for other in others[2:]]
            assert [one.adopt(connection) for connection in made] == [True, True, False]
            assert one.connections() == made[:2]

    run_mocked(main)


def test_tcp_is_tried_for_bulk_once_an_address_for_it_is_known(run_mocked, monkeypatch) -> None:
    tried = []

    async def dial(peer, addrs) -> None:
        tried.append(addrs)
        raise ConnectError("a firewall")

    async def main() -> None:
        async with two_hosts() as (one, two):
            two.handle("/echo/1", echo)
            (await one.connect(two.peer_id)).path = "quic"
            monkeypatch.setattr(one, "_dial", dial)
            await one.open_stream(two.peer_id, "/echo/1", stream_class="bulk")
            assert tried == []
            tcp = Multiaddr.parse("/ip4/127.0.0.1/tcp/4101")
            one.peerstore.add_addrs(two.peer_id, [tcp], 60)
            for _ in range(2):
                await one.open_stream(two.peer_id, "/echo/1", stream_class="bulk")
            assert tried == [[tcp]]

    run_mocked(main)


def test_the_interfaces_are_not_looked_at_for_every_connection(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each asks eight times where we listen: a third of what a connection cost was reading the same interfaces."""
    looks = 0
    real = ifaddr.get_adapters

    def counted() -> Any:
        nonlocal looks
        looks += 1
        return real()

    monkeypatch.setattr("ifaddr.get_adapters", counted)

    async def main() -> None:
        wildcards = [Multiaddr.parse("/ip4/0.0.0.0/tcp/0"), Multiaddr.parse("/ip4/0.0.0.0/tcp/0")]

        def transports(host: Host) -> list[Any]:
            return [TcpTransport(host.key, host.nursery)]

        async with open_host(PrivateKey.generate(b"w" * 32), transports, listen=wildcards) as host:
            for _ in range(10):
                assert len(host.listen_addrs()) >= len(wildcards)
            assert looks == len(wildcards)
            host.addrs_changed()
            host.listen_addrs()
            assert looks == 2 * len(wildcards)
            monkeypatch.setattr(lattica.host, "INTERFACES_KNOWN_FOR", 0.0)
            host.addrs_changed()
            for _ in range(3):
                host.listen_addrs()
            assert looks == 5 * len(wildcards)

    run(main)
