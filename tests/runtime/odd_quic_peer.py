"""A QUIC peer that is aioquic with other settings than ours, driven by hand, with a certificate of its own choice."""

from __future__ import annotations

import datetime
import os
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio
from aioquic._buffer import Buffer
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionTerminated, HandshakeCompleted, QuicEvent, StreamDataReceived
from aioquic.quic.packet import QuicProtocolVersion, encode_quic_retry, pull_quic_header
from aioquic.quic.retry import QuicRetryTokenHandler
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.x509.oid import NameOID

from lattica_protocols.keys import PublicKey
from lattica_protocols.peer_id import PeerId
from lattica_protocols.tls import EXTENSION_OID, SIGNATURE_PREFIX


def rsa_identity_certificate(host_key: rsa.RSAPrivateKey) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A P-256 certificate for an RSA host key, with extensions that mean nothing to us, the libp2p one not critical."""
    key = ec.generate_private_key(ec.SECP256R1())
    formats = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    encoded = _encoded(host_key)
    signed = SIGNATURE_PREFIX + key.public_key().public_bytes(*formats)
    signature = host_key.sign(signed, padding.PKCS1v15(), hashes.SHA256())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "somebody")])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("example.com")]), critical=False)
        .add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.53594.9.9"), b"?"), critical=False)
        .add_extension(
            x509.UnrecognizedExtension(EXTENSION_OID, _der(0x30, _der(4, encoded) + _der(4, signature))), critical=False
        )
    )
    return builder.sign(key, hashes.SHA256()), key


def _varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number & 0x7F | 0x80]) + _varint(number >> 7)


def _der(tag: int, content: bytes) -> bytes:
    size = len(content)
    head = bytes([size]) if size < 128 else b"\x82" + size.to_bytes(2, "big")
    return bytes([tag]) + head + content


def rsa_peer_id(host_key: rsa.RSAPrivateKey) -> PeerId:
    return PeerId.from_public_key(PublicKey.from_protobuf_untrusted(_encoded(host_key)))


def _encoded(host_key: rsa.RSAPrivateKey) -> bytes:
    public = host_key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return b"\x08\x00\x12" + _varint(len(public)) + public


def _follow_the_rfc(quic: QuicConnection) -> None:
    """aioquic makes the server's first id as long as its own, which has to be 8 bytes at least (section 7.2), and
    issues further ids when its own is empty, which nobody may (section 19.15)."""
    quic._peer_cid.cid = quic._original_destination_connection_id = os.urandom(12)
    if not quic.host_cid:
        quic._replenish_connection_ids = lambda: None  # type: ignore[method-assign]


class OddQuicPeer:
    """One connection on one socket."""

    def __init__(self, sock: trio.socket.SocketType, connection: QuicConnection) -> None:
        self.quic = connection
        self._socket = sock
        self._seen: list[QuicEvent] = []
        self.datagrams: list[int] = []
        """Sizes of what it sent."""

    async def flush(self) -> None:
        for data, addr in self.quic.datagrams_to_send(trio.current_time()):
            self.datagrams.append(len(data))
            await self._socket.sendto(data, addr)

    async def until(self, wanted: Callable[[QuicEvent], bool]) -> Any:
        """Run the connection until such an event, and return it."""
        while True:
            await self.flush()
            while self._seen:
                event = self._seen.pop(0)
                if wanted(event):
                    return event
                assert not isinstance(event, ConnectionTerminated), event
            timer = self.quic.get_timer()
            with trio.move_on_at(timer if timer is not None else float("inf")) as waiting:
                data, addr = await self._socket.recvfrom(65536)
                self.quic.receive_datagram(data, addr, trio.current_time())
            if waiting.cancelled_caught:
                self.quic.handle_timer(trio.current_time())
            while (event := self.quic.next_event()) is not None:
                self._seen.append(event)

    async def ask(self, data: bytes, size: int) -> bytes:
        """Send `data` on a stream of its own and return the `size` bytes, or those up to the end, that come back."""
        stream = self.quic.get_next_available_stream_id()
        self.quic.send_stream_data(stream, data, end_stream=True)
        answer, ended = b"", False
        while len(answer) < size and not ended:
            event = await self.until(lambda e: isinstance(e, StreamDataReceived) and e.stream_id == stream)
            answer, ended = answer + event.data, event.end_stream
        return answer


@asynccontextmanager
async def quic_dialled_by(host_key: rsa.RSAPrivateKey, port: int, **settings: Any) -> AsyncIterator[OddQuicPeer]:
    """An odd peer that dialled us and finished its handshake."""
    certificate, key = rsa_identity_certificate(host_key)
    configuration = QuicConfiguration(
        **{"alpn_protocols": ["libp2p"], "supported_versions": [QuicProtocolVersion.VERSION_1]} | settings,
        is_client=True,
        certificate=certificate,
        private_key=key,
        verify_mode=ssl.CERT_NONE,
    )
    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as sock:
        await sock.bind(("127.0.0.1", 0))
        peer = OddQuicPeer(sock, QuicConnection(configuration=configuration))
        _follow_the_rfc(peer.quic)
        peer.quic.connect(("127.0.0.1", port), trio.current_time())
        await peer.until(lambda event: isinstance(event, HandshakeCompleted))
        yield peer
        peer.quic.close()
        await peer.flush()


class OddQuicServer:
    """Serves one connection, whose streams it echoes. `retry`: it first has the address proven; `deaf`: so many of the
    first datagrams never arrive; `settings` are those of aioquic."""

    def __init__(self, host_key: rsa.RSAPrivateKey, *, retry: bool = False, deaf: int = 0, **settings: Any) -> None:
        certificate, key = rsa_identity_certificate(host_key)
        self._configuration = QuicConfiguration(
            **{"alpn_protocols": ["other", "libp2p"], "connection_id_length": 8} | settings,
            is_client=False,
            certificate=certificate,
            private_key=key,
            verify_mode=ssl.CERT_NONE,
        )
        self._retry, self._deaf = retry, deaf
        self._tokens = QuicRetryTokenHandler()
        self._socket = trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM)

    async def listen(self) -> int:
        """The port."""
        await self._socket.bind(("127.0.0.1", 0))
        return int(self._socket.getsockname()[1])

    async def run(self) -> None:
        with self._socket:
            for _ in range(self._deaf):
                await self._socket.recvfrom(65536)
            peer = await self._accept()
            while True:
                event = await peer.until(lambda event: isinstance(event, StreamDataReceived))
                peer.quic.send_stream_data(event.stream_id, event.data, event.end_stream)

    async def _accept(self) -> OddQuicPeer:
        while True:
            data, addr = await self._socket.recvfrom(65536)
            head = pull_quic_header(Buffer(data=data))
            now = trio.current_time()
            original, retried = head.destination_cid, None
            if self._retry and not head.token:
                await self._socket.sendto(self._ask_for_token(head, addr, now), addr)
                continue
            if self._retry:
                retried = head.destination_cid
                original = self._tokens.validate_token(address=addr, destination_cid=retried, token=head.token, now=now)
            quic = QuicConnection(
                configuration=self._configuration,
                original_destination_connection_id=original,
                retry_source_connection_id=retried,
            )
            if not quic.host_cid:
                quic._replenish_connection_ids = lambda: None  # type: ignore[method-assign]
            quic.receive_datagram(data, addr, now)
            return OddQuicPeer(self._socket, quic)

    def _ask_for_token(self, head: Any, addr: Any, now: float) -> bytes:
        source = os.urandom(20)
        token = self._tokens.create_token(
            address=addr,
            original_destination_connection_id=head.destination_cid,
            retry_source_connection_id=source,
            now=now,
        )
        return encode_quic_retry(
            version=head.version,
            source_cid=source,
            destination_cid=head.source_cid,
            original_destination_cid=head.destination_cid,
            retry_token=token,
        )
