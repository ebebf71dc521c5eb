"""QUIC peers that keep to RFC 9000 and the libp2p TLS specification with other choices than the usual ones."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from aioquic.quic.packet import QuicProtocolVersion
from cryptography.hazmat.primitives.asymmetric import rsa
from odd_quic_peer import OddQuicPeer, OddQuicServer, quic_dialled_by, rsa_peer_id

import lattica
from lattica.interfaces import Stream
from lattica.node import Node
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.multistream import encode_message

Run = Callable[..., Any]
LAZY_ECHO = encode_message("/multistream/1.0.0") + encode_message("/echo/1")


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.aclose()


@asynccontextmanager
async def node() -> AsyncIterator[tuple[Node, int]]:
    config = lattica.NodeConfig(listen=["/ip4/127.0.0.1/udp/0/quic-v1"], relay_use="never", punch=False)
    async with lattica.open_node(config) as ours:
        ours.host.handle("/echo/1", echo)
        target = ours.host.listen_addrs()[0].host_port()
        assert target is not None
        yield ours, target[2]


@pytest.fixture(scope="module")
def host_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


async def echoes(peer: OddQuicPeer, payload: bytes) -> bool:
    return await peer.ask(LAZY_ECHO + payload, 1 << 30) == LAZY_ECHO + payload


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"connection_id_length": 0},
        {"connection_id_length": 1},
        {"connection_id_length": 20},
        # a ClientHello over two datagrams, as those with post-quantum key shares are
        {"alpn_protocols": ["libp2p", *(f"protocol-{i}" for i in range(120))]},
        {"alpn_protocols": ["h3", "hq-interop", "libp2p"]},
        {"max_datagram_size": 1200},
        {"max_datagram_size": 1452},
        {"supported_versions": [QuicProtocolVersion.VERSION_1, QuicProtocolVersion.VERSION_2]},
        {
            "supported_versions": [QuicProtocolVersion.VERSION_2, QuicProtocolVersion.VERSION_1],
            "original_version": QuicProtocolVersion.VERSION_2,
        },
        {"max_stream_data": 16384, "max_data": 32768},
        {"quantum_readiness_test": True},
        {"server_name": "example.com"},
        {"idle_timeout": 3.0},
    ],
    ids=lambda settings: ",".join(f"{name}={str(value)[:40]}" for name, value in settings.items()) or "usual",
)
def test_other_settings(run: Run, host_key: rsa.RSAPrivateKey, settings: dict[str, Any]) -> None:
    async def main() -> None:
        async with node() as (_, port), quic_dialled_by(host_key, port, **settings) as peer:
            assert await echoes(peer, bytes(range(256)) * 400)

    run(main)


def test_key_updates_and_new_connection_ids(run: Run, host_key: rsa.RSAPrivateKey) -> None:
    async def main() -> None:
        async with node() as (_, port), quic_dialled_by(host_key, port) as peer:
            for turn in range(6):
                assert await echoes(peer, bytes([turn]) * 50_000)
                if turn % 2:
                    peer.quic.request_key_update()
                else:
                    peer.quic.change_connection_id()

    run(main)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"connection_id_length": 0},
        {"connection_id_length": 20},
        {"retry": True},
        {"retry": True, "connection_id_length": 20},
        {"deaf": 2},
        {"max_stream_data": 4096, "max_data": 8192},
        {"max_datagram_size": 1200},
    ],
    ids=lambda settings: ",".join(f"{name}={value}" for name, value in settings.items()) or "usual",
)
def test_we_dial(run: Run, host_key: rsa.RSAPrivateKey, settings: dict[str, Any]) -> None:
    async def main() -> None:
        async with node() as (ours, _), trio.open_nursery() as nursery:
            server = OddQuicServer(host_key, **settings)
            addr = Multiaddr.parse(f"/ip4/127.0.0.1/udp/{await server.listen()}/quic-v1")
            nursery.start_soon(server.run)
            connection = await ours.host.connect(rsa_peer_id(host_key), [addr])
            stream = await connection.open_stream()
            payload = bytes(range(256)) * 400
            async with trio.open_nursery() as sending:
                sending.start_soon(stream.send_all, payload)
                assert await stream.receive_exactly(len(payload)) == payload
            nursery.cancel_scope.cancel()

    run(main)
