"""A Go peer: starts `p2pd` and speaks its control protocol (uvarint-framed protobuf on a Unix socket).

Streams that a peer opens for a protocol we registered are handed to us as connections to a socket of ours, with a
`StreamInfo` in front; streams that we open arrive on the control connection itself.
"""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId
from lattica_protocols.protobuf import Kind, Message, optional, repeated, required
from lattica_protocols.varint import encode_uvarint

IDENTIFY, CONNECT, STREAM_OPEN, STREAM_HANDLER, DHT, LIST_PEERS, DISCONNECT = 0, 1, 2, 3, 4, 5, 7
FIND_PEER, FIND_PROVIDERS, GET_CLOSEST_PEERS, GET_VALUE, PUT_VALUE, PROVIDE = 0, 2, 3, 5, 7, 8
END = 2
LISTEN = ("/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1")


@dataclass(frozen=True, slots=True)
class ConnectRequest(Message):
    peer: bytes = required(1, Kind.BYTES)
    addrs: tuple[bytes, ...] = repeated(2, Kind.BYTES)
    timeout: int | None = optional(3, Kind.INT)


@dataclass(frozen=True, slots=True)
class StreamOpenRequest(Message):
    peer: bytes = required(1, Kind.BYTES)
    proto: tuple[str, ...] = repeated(2, Kind.STRING)
    timeout: int | None = optional(3, Kind.INT)


@dataclass(frozen=True, slots=True)
class StreamHandlerRequest(Message):
    addr: bytes = required(1, Kind.BYTES)
    proto: tuple[str, ...] = repeated(2, Kind.STRING)
    balanced: bool = required(3, Kind.BOOL)


@dataclass(frozen=True, slots=True)
class DhtRequest(Message):
    type: int = required(1, Kind.ENUM)
    peer: bytes | None = optional(2, Kind.BYTES)
    cid: bytes | None = optional(3, Kind.BYTES)
    key: bytes | None = optional(4, Kind.BYTES)
    value: bytes | None = optional(5, Kind.BYTES)
    count: int | None = optional(6, Kind.INT)
    timeout: int | None = optional(7, Kind.INT)


@dataclass(frozen=True, slots=True)
class DisconnectRequest(Message):
    peer: bytes = required(1, Kind.BYTES)


@dataclass(frozen=True, slots=True)
class Request(Message):
    type: int = required(1, Kind.ENUM)
    connect: ConnectRequest | None = optional(2, ConnectRequest)
    stream_open: StreamOpenRequest | None = optional(3, StreamOpenRequest)
    stream_handler: StreamHandlerRequest | None = optional(4, StreamHandlerRequest)
    dht: DhtRequest | None = optional(5, DhtRequest)
    disconnect: DisconnectRequest | None = optional(7, DisconnectRequest)


@dataclass(frozen=True, slots=True)
class ErrorResponse(Message):
    msg: str = required(1, Kind.STRING)


@dataclass(frozen=True, slots=True)
class StreamInfo(Message):
    peer: bytes = required(1, Kind.BYTES)
    addr: bytes = required(2, Kind.BYTES)
    proto: str = required(3, Kind.STRING)


@dataclass(frozen=True, slots=True)
class PeerInfo(Message):
    id: bytes = required(1, Kind.BYTES)
    addrs: tuple[bytes, ...] = repeated(2, Kind.BYTES)


@dataclass(frozen=True, slots=True)
class DhtResponse(Message):
    type: int = required(1, Kind.ENUM)
    peer: PeerInfo | None = optional(2, PeerInfo)
    value: bytes | None = optional(3, Kind.BYTES)


@dataclass(frozen=True, slots=True)
class Response(Message):
    type: int = required(1, Kind.ENUM)
    error: ErrorResponse | None = optional(2, ErrorResponse)
    stream_info: StreamInfo | None = optional(3, StreamInfo)
    identify: PeerInfo | None = optional(4, PeerInfo)
    dht: DhtResponse | None = optional(5, DhtResponse)
    peers: tuple[PeerInfo, ...] = repeated(6, PeerInfo)


class P2pdError(Exception):
    """The Go daemon said no; the text is its own."""


class Control:
    """One connection to the control socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(30)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rb")

    def request(self, request: Request) -> Response:
        data = request.encode()
        self._socket.sendall(encode_uvarint(len(data)) + data)
        response = Response.decode_untrusted(self.read_frame())
        if response.type != 0:
            raise P2pdError(response.error.msg if response.error else "no reason given")
        return response

    def read_frame(self) -> bytes:
        length = shift = 0
        while True:
            byte = self._file.read(1)
            if not byte:
                raise P2pdError("the daemon closed the control connection")
            length |= (byte[0] & 0x7F) << shift
            shift += 7
            if byte[0] < 0x80:
                return self._file.read(length)

    def read_exactly(self, n: int) -> bytes:
        return self._file.read(n)

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def close(self) -> None:
        self._file.close()
        self._socket.close()


class P2pd:
    """A running Go peer."""

    def __init__(self, control_path: Path) -> None:
        self._path = control_path
        info = self._once(Request(type=IDENTIFY)).identify
        assert info is not None
        self.peer_id = PeerId.from_bytes_untrusted(info.id)
        self.addrs = [Multiaddr.from_bytes_untrusted(a) for a in info.addrs]

    def _once(self, request: Request) -> Response:
        control = Control(self._path)
        try:
            return control.request(request)
        finally:
            control.close()

    def connect(self, peer: PeerId, addrs: Sequence[Multiaddr]) -> None:
        encoded = tuple(a.without_peer().to_bytes() for a in addrs)
        self._once(Request(type=CONNECT, connect=ConnectRequest(peer=peer.to_bytes(), addrs=encoded, timeout=10)))

    def disconnect(self, peer: PeerId) -> None:
        self._once(Request(type=DISCONNECT, disconnect=DisconnectRequest(peer=peer.to_bytes())))

    def peers(self) -> set[PeerId]:
        return {PeerId.from_bytes_untrusted(p.id) for p in self._once(Request(type=LIST_PEERS)).peers}

    def open_stream(self, peer: PeerId, protocol: str) -> Control:
        """A stream to `peer`: `send` and `read_exactly` on what is returned."""
        control = Control(self._path)
        request = StreamOpenRequest(peer=peer.to_bytes(), proto=(protocol,), timeout=10)
        control.request(Request(type=STREAM_OPEN, stream_open=request))
        return control

    def serve(self, protocol: str, listen_path: Path) -> None:
        """Hand inbound streams of `protocol` to whoever listens on the Unix socket `listen_path`."""
        addr = Multiaddr.parse(f"/unix{listen_path}").to_bytes()
        handler = StreamHandlerRequest(addr=addr, proto=(protocol,), balanced=False)
        self._once(Request(type=STREAM_HANDLER, stream_handler=handler))

    def dht(self, request: DhtRequest) -> list[DhtResponse]:
        """Run a DHT request and collect its answers."""
        control = Control(self._path)
        try:
            first = control.request(Request(type=DHT, dht=request))
            assert first.dht is None or first.dht.type in (0, 1, END)
            if first.dht is None:
                return []
            if first.dht.type == 1:
                return [first.dht]
            answers = []
            while True:
                answer = DhtResponse.decode_untrusted(control.read_frame())
                if answer.type == END:
                    return answers
                answers.append(answer)
        finally:
            control.close()


@contextmanager
def running_p2pd(binary: Path, *extra: str, listen: Sequence[str] = LISTEN) -> Iterator[P2pd]:
    """Start a Go peer on loopback (TCP and QUIC, ports of the system's choice) and end it afterwards."""
    with tempfile.TemporaryDirectory(prefix="p2pd-") as folder:
        control = Path(folder) / "c.sock"
        process = subprocess.Popen(
            [
                str(binary),
                f"-listen=/unix{control}",
                f"-hostAddrs={','.join(listen)}",
                *extra,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:  # it says "Control socket: …", "Peer ID: …", "Peer Addrs: …" when it is ready
                if "Peer Addrs" in line or "Peer ID" in line:
                    break
            yield P2pd(control)
        finally:
            process.terminate()
            process.communicate(timeout=10)


def closest_to(go: P2pd, peer: PeerId) -> list[DhtResponse]:
    """Ask again while the table is empty: Go tells nobody when it fills."""
    deadline = time.monotonic() + 15
    while True:
        try:
            return go.dht(DhtRequest(type=GET_CLOSEST_PEERS, key=peer.to_bytes()))
        except P2pdError:
            if time.monotonic() > deadline:
                raise
