"""Drivers: each runs one machine against what a peer may send, and answers its events as the runtime would.

A driver's seeds are transcripts of honest peers, one part a frame or a flight, recorded by running our machines
against each other. After every piece of input the machine is drained and its bounds are looked at. Where a peer may
choose what stands inside a signature or an encryption, the driver signs and encrypts the mutated bytes itself:
otherwise no mutation would get past the first check.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence

import fuzz_corpus as corpus
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fuzz_mutation import pieces

from lattica_protocols import multistream, noise, tls, yamux
from lattica_protocols.blobs.chunk_set import ChunkSet
from lattica_protocols.blobs.messages import FrameReader as BlobFrameReader
from lattica_protocols.blobs.messages import Have, Kind, encode_frame, encode_ranges
from lattica_protocols.blobs.server import BlobServer, ObjectRequested, WantReceived
from lattica_protocols.blobs.source import BlobSource, HaveReceived
from lattica_protocols.envelope import SignedEnvelope
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.kad import messages as kad_messages
from lattica_protocols.kad import records
from lattica_protocols.kad.lookup import ProvidersLookup, ValueLookup
from lattica_protocols.kad.records import Validators, open_value_untrusted
from lattica_protocols.kad.routing import RoutingTable
from lattica_protocols.kad.server import KadServer
from lattica_protocols.limits import (
    CHUNK_BYTES,
    KAD_MAX_MESSAGE_BYTES,
    MAX_QUEUED_CHUNKS,
    MAX_QUEUED_OBJECTS,
    YAMUX_MAX_CONTROL_FRAMES,
)
from lattica_protocols.peer_record import PEER_RECORD_DOMAIN, PEER_RECORD_TYPE, PeerRecord
from lattica_protocols.rpc import frames as rpc_frames
from lattica_protocols.rpc.bulk import BulkReader
from lattica_protocols.rpc.connection import RpcConnection, RpcLimits
from lattica_protocols.rpc.flow import Flow
from lattica_protocols.rpc.frames import (
    CLIENT_STREAM,
    CREDIT,
    ERROR,
    ITEM,
    REQUEST,
    RESPONSE,
    SERVER_STREAM,
    decode_error_head_untrusted,
)
from lattica_protocols.rpc.inbox import FrameReader as RpcFrameReader
from lattica_protocols.rpc.resume import FEATURE, Account
from lattica_protocols.rpc.tensors import decode_args_untrusted, decode_value_untrusted
from lattica_protocols.yamux_stream import YamuxStream

READ_BYTES = 65536
"""What the runtime hands to a machine at once."""

Transcript = tuple[bytes, ...]


class Driver:
    """One way to run one machine. `covers`: the classes whose `receive_*` methods it exercises."""

    name: str
    covers: tuple[type, ...] = ()
    generate: Callable[[random.Random], list[bytes]] | None = None

    def seeds(self) -> list[Transcript]:
        raise NotImplementedError

    def parts(self) -> list[bytes]:
        """What to splice in: the parts of all transcripts, with noise from other formats."""
        return [part for seed in self.seeds() for part in seed] + corpus.everything()[:8]

    def run(self, parts: list[bytes], rng: random.Random) -> object:
        raise NotImplementedError


def _reads(parts: Sequence[bytes], rng: random.Random) -> list[bytes]:
    """The parts as one stream, cut anywhere."""
    data = b"".join(parts)
    return [piece[i : i + READ_BYTES] for piece in pieces(data, rng) for i in range(0, max(1, len(piece)), READ_BYTES)]


# -- multistream ------------------------------------------------------------------------------------------------------
class MultistreamResponder(Driver):
    name = "multistream.Responder"
    covers = (multistream.Responder,)

    def seeds(self) -> list[Transcript]:
        header, message = multistream.encode_message("/multistream/1.0.0"), multistream.encode_message
        return [
            (header, message("/b"), message("ls"), message("/a"), b"first bytes"),
            (header, message("/lattica/rpc/1")),
        ]

    def run(self, parts: list[bytes], rng: random.Random) -> None:
        machine = multistream.Responder({"/a": 1, "/lattica/rpc/1": 2})
        sent = 0
        for data in _reads(parts, rng):
            machine.receive_data(data)
            sent += len(machine.poll_transmit())
            assert sent < 64 * 1024, "a responder answers without an end"
        if machine.selected is not None:
            machine.take_leftover()


class MultistreamInitiator(Driver):
    name = "multistream.Initiator"
    covers = (multistream.Initiator,)

    def seeds(self) -> list[Transcript]:
        header, message = multistream.encode_message("/multistream/1.0.0"), multistream.encode_message
        return [(header, message("na"), message("/b"), b"first bytes"), (header, message("/a"))]

    def run(self, parts: list[bytes], rng: random.Random) -> None:
        lazy = rng.random() < 0.5
        machine = multistream.Initiator(["/a"] if lazy else ["/a", "/b"], lazy=lazy)
        for data in _reads(parts, rng):
            machine.poll_transmit()
            machine.receive_data(data)
        if machine.confirmed:
            machine.take_leftover()


# -- Noise and what is inside signatures --------------------------------------------------------------------------
IDENTITY = noise.NoiseIdentity.create(corpus.KEY, b"s" * 32, ["/yamux/1.0.0"])
THEIR_IDENTITY = noise.NoiseIdentity.create(corpus.OTHER_KEY, b"t" * 32, ["/yamux/1.0.0", "/mplex/6.7.0"])


def _handshake(initiator: bool, identity: noise.NoiseIdentity = IDENTITY) -> noise.NoiseHandshake:
    key = b"i" * 32 if initiator else b"r" * 32
    return noise.NoiseHandshake(identity, initiator=initiator, ephemeral_private=key, muxers=["/yamux/1.0.0"])


class NoiseBytes(Driver):
    """Mutated handshake messages, to either side."""

    name = "noise.NoiseHandshake"
    covers = (noise.NoiseHandshake,)

    def seeds(self) -> list[Transcript]:
        dialler, listener = _handshake(True), _handshake(False)
        first = dialler.poll_transmit()
        listener.receive_untrusted(first)
        second = listener.poll_transmit()
        dialler.receive_untrusted(second)
        return [(first, dialler.poll_transmit()), (second,)]

    def run(self, parts: list[bytes], rng: random.Random) -> None:
        machine = _handshake(rng.random() < 0.5)
        for data in _reads(parts, rng):
            if machine.finished:
                break
            machine.receive_untrusted(data)
            machine.poll_transmit()
        if machine.finished:
            machine.split()


class NoisePayloads(Driver):
    """Proper handshakes whose payload, or proven host key, is mutated."""

    name = "noise.NoiseHandshake, payloads"

    def seeds(self) -> list[Transcript]:
        return [(THEIR_IDENTITY.payload,)]

    def generate(self, rng: random.Random) -> list[bytes]:  # type: ignore[override]
        return [corpus.random_message(noise.NoisePayload, rng).encode()]

    def run(self, parts: list[bytes], rng: random.Random) -> None:
        forged = noise.NoiseIdentity(
            THEIR_IDENTITY.static_private, THEIR_IDENTITY.static_public, b"".join(parts)[:65000]
        )
        they_dial = rng.random() < 0.5
        ours, theirs = _handshake(not they_dial), _handshake(they_dial, forged)
        for _ in range(3):
            ours.receive_untrusted(theirs.poll_transmit())
            theirs.receive_untrusted(ours.poll_transmit())
        assert ours.finished
        assert ours.remote_key is not None


class SignedPayloads(Driver):
    """Peer records and Kademlia values that are signed properly and say strange things."""

    name = "signed envelopes, payloads"

    def seeds(self) -> list[Transcript]:
        record = SignedEnvelope.open_untrusted(corpus.RECORD.seal(corpus.KEY), PEER_RECORD_DOMAIN, PEER_RECORD_TYPE)
        value = SignedEnvelope.open_untrusted(corpus.VALUE, records.DOMAIN, records.PAYLOAD_TYPE)
        return [(record.payload,), (value.payload,)]

    def run(self, parts: list[bytes], rng: random.Random) -> None:
        payload = b"".join(parts)
        if rng.random() < 0.5:
            PeerRecord.open_untrusted(
                SignedEnvelope.seal(corpus.KEY, PEER_RECORD_DOMAIN, PEER_RECORD_TYPE, payload).to_bytes()
            )
        else:
            sealed = SignedEnvelope.seal(corpus.KEY, records.DOMAIN, records.PAYLOAD_TYPE, payload)
            open_value_untrusted(corpus.VALUE_KEY, sealed.to_bytes())


CERTIFICATE_KEY = ec.derive_private_key(12345, ec.SECP256R1())
_OIDS = [tls.EXTENSION_OID, *(x509.ObjectIdentifier(f"2.5.29.{n}") for n in (14, 15, 17, 18, 19, 30, 31, 32, 35, 37))]


class ForgedCertificates(Driver):
    """Certificates signed by their own key, with extensions of any content."""

    name = "tls.verify_certificate_untrusted, extensions"

    def seeds(self) -> list[Transcript]:
        made = tls.make_certificate(corpus.KEY, CERTIFICATE_KEY, serial=7, unix_now=corpus.NOW)
        valid = made.extensions.get_extension_for_oid(tls.EXTENSION_OID).value
        assert isinstance(valid, x509.UnrecognizedExtension)
        names = x509.SubjectAlternativeName([x509.DNSName("a"), x509.RFC822Name("a@b")])
        return [(valid.value, names.public_bytes()), (valid.value,), (valid.value, b"\x30\x03\x01\x01\xff")]

    def run(self, parts: list[bytes], rng: random.Random) -> None:
        template = tls.make_certificate(corpus.KEY, CERTIFICATE_KEY, serial=7, unix_now=corpus.NOW)
        builder = x509.CertificateBuilder(
            template.issuer,
            template.subject,
            CERTIFICATE_KEY.public_key(),
            rng.choice((1, 7, 1 << 150)),
            template.not_valid_before_utc,
            template.not_valid_after_utc,
        )
        used = set()
        for number, part in enumerate(parts[:6]):
            oid = _OIDS[0] if number == 0 else rng.choice(_OIDS)
            if oid not in used:
                used.add(oid)
                extension = x509.UnrecognizedExtension(oid, part[:4096])
                builder = builder.add_extension(extension, critical=rng.random() < 0.3)
        der = builder.sign(CERTIFICATE_KEY, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
        tls.verify_certificate_untrusted(der, corpus.NOW)


# -- yamux ----------------------------------------------------------------------------------------------------------
class YamuxPeer(Driver):
    """Frames to a session that has streams of its own, answers new ones and reads at its leisure."""

    name = "yamux.YamuxSession"
    covers = (yamux.YamuxSession,)

    def seeds(self) -> list[Transcript]:
        def frame(kind: int, flags: int, stream: int, length: int, body: bytes = b"") -> bytes:
            return yamux._pack(0, kind, flags, stream, length) + body

        data, window, ping, away = yamux.TYPE_DATA, yamux.TYPE_WINDOW_UPDATE, yamux.TYPE_PING, yamux.TYPE_GO_AWAY
        syn, ack, fin, rst = yamux.FLAG_SYN, yamux.FLAG_ACK, yamux.FLAG_FIN, yamux.FLAG_RST
        theirs = (
            frame(data, syn, 1, 5, b"hello"),
            frame(window, syn, 3, 0),
            frame(window, 0, 1, 1000),
            frame(data, 0, 3, 3, b"abc"),
            frame(ping, syn, 0, 7),
            frame(data, fin, 1, 0),
            frame(data, 0, 3, 3, b"abc"),
            frame(window, rst, 3, 0),
            frame(window, syn, 5, 0),
            frame(data, fin, 5, 4, b"last"),
            frame(away, 0, 0, 0),
        )
        answers = (
            frame(window, ack, 2, 0),
            frame(data, ack, 4, 3, b"abc"),
            frame(ping, ack, 0, 1),
            frame(window, 0, 2, 1 << 20),
            frame(data, 0, 2, 2, b"xy"),
            frame(data, fin, 2, 0),
            frame(window, rst, 4, 0),
            frame(window, ack | fin, 6, 0),
        )
        flood = tuple(frame(window, syn, 2 * i + 1, 0) for i in range(600))
        return [theirs, answers, theirs + answers, flood]

    def run(self, parts: list[bytes], rng: random.Random) -> None:
        session = yamux.YamuxSession(initiator=False)
        drains, reads, now = rng.random() < 0.7, rng.random() < 0.7, 100.0
        for _ in range(3):
            session.write(session.open_stream(now), bytes(20_000))
        session.ping(now)
        out = memoryview(bytearray(65536))
        for data in _reads(parts, rng):
            now += 0.01
            session.receive_untrusted(memoryview(bytearray(data)), now)
            while (event := session.next_event()) is not None:
                self._answer(session, event, reads, now, rng)
            self._check(session)
            if drains:
                for _ in range(1000):
                    if not session.wants_transmit:
                        break
                    assert 0 <= session.poll_transmit_into(out, 0, 65536) <= 65536
                else:
                    raise AssertionError("the session transmits without an end")

    def _answer(
        self, session: yamux.YamuxSession, event: yamux.Event, reads: bool, now: float, rng: random.Random
    ) -> None:
        if isinstance(event, yamux.StreamOpened):
            if rng.random() < 0.8:
                session.accept(event.stream)
                if not event.stream.finished and rng.random() < 0.5:
                    session.write(event.stream, b"answer")
            else:
                session.reset(event.stream)
        elif isinstance(event, yamux.DataReceived):
            if reads:
                session.consume(event.stream, len(event.data), now)
        elif isinstance(event, yamux.EofReceived):
            session.close_write(event.stream)

    def _check(self, session: yamux.YamuxSession) -> None:
        streams: list[YamuxStream] = list(session.streams.values())
        inbound = [stream for stream in streams if stream.inbound]
        assert len(inbound) <= 512, "more inbound streams than allowed"
        for stream in streams:
            assert stream.unconsumed <= stream.window, "more data than the window"
            assert 0 <= stream.send_window <= 0xFFFFFFFF
        assert len(session._control) <= 2 * YAMUX_MAX_CONTROL_FRAMES + 2000, "answers pile up"


# -- RPC --------------------------------------------------------------------------------------------------------------
LIMITS = RpcLimits(calls=8, tail=1 << 20, held=4 << 20, detach_over=4096)
RESUMES = frozenset({FEATURE})
_CONTROL, _BULK = b"c", b"b"


class RpcPeer(Driver):
    """Frames on the control stream and on a bulk stream of one session: the first byte of a part says which."""

    name = "rpc.RpcConnection"
    covers = (RpcConnection, BulkReader, RpcFrameReader, Flow)

    def seeds(self) -> list[Transcript]:
        """A caller that uses everything, and a callee that answers the four calls of `_prepare`."""
        return [self._caller(), self._callee(), self._caller() + self._callee()[1:]]

    def generate(self, rng: random.Random) -> list[bytes]:  # type: ignore[override]
        """Well-formed frames in any order."""
        parts = [self._caller()[0]]
        for _ in range(rng.choice((3, 20, 100))):
            kind = rng.choice((1, 1, 2, 3, 3, 4, 5, 6, 7, 8, 10, 11, 12, 200))
            flags = rng.choice((0, 0, 1, 2, 4, 6, 16, 128))
            head = corpus.random_msgpack(rng) if kind != CREDIT else rng.randbytes(8)
            if kind == rpc_frames.ACK:
                few = [rng.randrange(4) for _ in range(rng.randrange(3))]
                head = Account(rng.choice((0, 1, 60, 1 << 40)), rng.randrange(3), tuple(few)).encode()
            if kind == REQUEST:
                head = rpc_frames.encode_request_head(b"echo.echo", head, rng.choice((0, 5, 0xFFFFFFFF)))
            call_id = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 0xFFFFFFFF))
            tail = rng.randbytes(rng.choice((0, 0, 64, 5000, 40_000)))
            if rng.random() < 0.3:
                number = rng.randrange(4)
                parts.append(_CONTROL + rpc_frames.encode_detached(kind, flags, call_id, head, number, len(tail)))
                parts.append(_BULK + rpc_frames.encode_bulk_header(number, len(tail)) + tail)
            else:
                parts.append(_CONTROL + rpc_frames.encode_frame(kind, flags, call_id, head, len(tail)) + tail)
        return parts

    def _collect(self, machine: RpcConnection) -> list[bytes]:
        parts = [_CONTROL + bytes(buffer) for buffer in machine.poll_transmit()]
        for tail_id, length, buffers in machine.poll_detached():
            tail = b"".join(bytes(buffer) for buffer in buffers)
            parts.append(_BULK + rpc_frames.encode_bulk_header(tail_id, length) + tail)
        return parts

    def _caller(self) -> Transcript:
        machine = RpcConnection(initiator=True, session=b"s" * 16, limits=LIMITS, features=RESUMES)
        parts = self._collect(machine)
        for head, tail in corpus.rpc_values():
            call = machine.open_call("echo.echo", head, (tail,) if tail else (), deadline=5.0, now=0.0)
            parts += self._collect(machine)
            machine.cancel(call)
            parts += self._collect(machine)
        call = machine.open_call("echo.both", b"\x90", flags=CLIENT_STREAM | SERVER_STREAM)
        for head, tail in corpus.rpc_values():
            machine.send_item(call, head, (tail,) if tail else ())
            parts += self._collect(machine)
        machine.end(call)
        machine.ping(b"ping")
        machine.go_away()
        return (*parts, *self._collect(machine))

    def _callee(self) -> Transcript:
        frame = rpc_frames.encode_frame
        error = rpc_frames.encode_error_head(rpc_frames.HANDLER_RAISED, "ValueError", "no")
        head, tail = corpus.rpc_values()[4]
        return (
            self._caller()[0],
            _CONTROL + frame(RESPONSE, 1, 2, b"\x01"),
            _CONTROL + frame(ITEM, 0, 4, b"\x01"),
            _CONTROL + frame(ITEM, 0, 4, head, len(tail)) + tail,
            _CONTROL + rpc_frames.encode_detached(ITEM, 0, 4, head, 77, len(tail)),
            _CONTROL + frame(ITEM, 0, 4, b"\x02"),
            _BULK + rpc_frames.encode_bulk_header(77, len(tail)) + tail,
            _CONTROL + frame(rpc_frames.END, 1, 4),
            _CONTROL + frame(CREDIT, 0, 6, rpc_frames.CREDIT_HEAD.pack(10, 1000)),
            _CONTROL + frame(ERROR, 1, 6, error),
            _CONTROL + frame(RESPONSE, 1, 8, head, len(tail)) + tail,
        )

    def _prepare(self, machine: RpcConnection) -> None:
        machine.open_call("a.unary", b"\x90", deadline=110.0, now=100.0)
        machine.open_call("a.down", b"\x90", flags=SERVER_STREAM)
        machine.open_call("a.up", b"\x90", flags=CLIENT_STREAM)
        machine.open_call("a.late", b"\x90")

    def run(self, parts: list[bytes], rng: random.Random) -> None:
        allocated: list[int] = []

        def allocate(length: int) -> bytearray:
            assert length <= LIMITS.tail, "memory for more than the limit"
            allocated.append(length)
            return bytearray(length)

        machine = RpcConnection(initiator=False, limits=LIMITS, features=RESUMES, allocate=allocate)
        self._prepare(machine)
        bulk, now = BulkReader(machine), 100.0
        for part in parts:
            now += 0.05
            for data in _reads([part[1:]], rng):
                if part[:1] == _BULK:
                    bulk.receive_data(data)
                else:
                    machine.receive_data(data, now)
                self._answer(machine, rng)
            machine.handle_timer(now)
            assert machine.inbound_calls <= LIMITS.calls, "more calls than allowed"
            assert 0 <= machine._held <= LIMITS.held + (64 << 10), "more bytes held than allowed"
            assert machine.outbound_calls >= 0
            if machine.resumption is not None and rng.random() < 0.02:  # its path is lost
                account = Account(rng.choice((0, machine.resumption.sent.control_bytes)), rng.randrange(3))
                machine.resumption.resume(account)
                bulk = BulkReader(machine)
            self._answer(machine, rng)
        machine.connection_lost()
        machine.poll_events()
        assert machine.inbound_calls == machine.outbound_calls == machine._held == 0, "a lost session keeps something"

    def _answer(self, machine: RpcConnection, rng: random.Random) -> None:
        for kind, call, head, tail in machine.poll_events():
            if kind == REQUEST:
                self._handle(machine, call, head, tail, rng)
            elif kind in (RESPONSE, ITEM):
                _accept_refusal(lambda head=head, tail=tail: decode_value_untrusted(head, tail))  # type: ignore[misc]
                if kind == ITEM and rng.random() < 0.7:
                    machine.grant(call, 1, len(head) + len(tail))
            elif kind == ERROR:
                _accept_refusal(lambda head=head: decode_error_head_untrusted(head))  # type: ignore[misc]
        machine.poll_transmit()
        machine.poll_detached()

    def _handle(self, machine: RpcConnection, call: object, head: bytes, tail: object, rng: random.Random) -> None:
        flags = call.flags  # type: ignore[attr-defined]
        _accept_refusal(lambda: decode_args_untrusted(head, tail, flags))  # type: ignore[arg-type]
        choice = rng.random()
        if choice < 0.4 and not flags & SERVER_STREAM:
            machine.respond(call, b"\x01", (bytes(5000),))  # type: ignore[arg-type]
        elif choice < 0.6:
            machine.fail(call, rpc_frames.INTERNAL, "Oops", "no")  # type: ignore[arg-type]
        elif flags & SERVER_STREAM:
            machine.send_item(call, b"\x01")  # type: ignore[arg-type]
            if choice < 0.8:
                machine.end(call)  # type: ignore[arg-type]


def _accept_refusal(parse: Callable[[], object]) -> None:
    try:
        parse()
    except RemoteProtocolError:
        pass


# -- content ----------------------------------------------------------------------------------------------------------
class BlobClientPeer(Driver):
    """Requests to a server."""

    name = "blobs.BlobServer"
    covers = (BlobServer, BlobFrameReader)

    def seeds(self) -> list[Transcript]:
        name, ranges = corpus.HASH.to_bytes(), encode_ranges
        return [
            (
                encode_frame(Kind.WANT, 1, name),
                encode_frame(Kind.OBJECT, 2, name),
                encode_frame(Kind.WANT, 3, name),
                encode_frame(Kind.CHUNKS, 1, ranges([(0, 5), (9, 3)])),
                encode_frame(Kind.CANCEL, 1, ranges([(1, 2)])),
                encode_frame(Kind.CHUNKS, 3, ranges([(i, 1) for i in range(0, 18, 2)])),
                encode_frame(Kind.DONE, 1),
                encode_frame(Kind.CHUNKS, 3, ranges([(0, 20)])),
                encode_frame(Kind.CANCEL, 3, ranges([(0, 20)])),
            ),
            tuple(encode_frame(Kind.WANT, n, name) for n in range(64)),
        ]

    def run(self, parts: list[bytes], rng: random.Random) -> None:
        machine = BlobServer()
        answers, sends = rng.random() < 0.8, rng.random() < 0.7
        waiting = 0
        for data in _reads(parts, rng):
            machine.receive_data(data)
            while (event := machine.next_event()) is not None:
                if isinstance(event, WantReceived) and answers:
                    have = rng.choice((None, ChunkSet(20, full=True), ChunkSet(1 << 16)))
                    machine.tell_have(event.blob, have)
                elif isinstance(event, ObjectRequested):
                    if answers:
                        machine.send_object(event.request, rng.choice((None, b"object")))
                    else:
                        waiting += 1
            assert waiting <= MAX_QUEUED_OBJECTS
            assert machine.queued_chunks() <= MAX_QUEUED_CHUNKS
            while sends and (chunk := machine.next_chunk()) is not None:
                machine.tell_gone(*chunk)
            machine.poll_transmit()


class BlobServerPeer(Driver):
    """Answers to a client that asked for two blobs, an object and some chunks."""

    name = "blobs.BlobSource"
    covers = (BlobSource, BlobFrameReader)

    def seeds(self) -> list[Transcript]:
        return [
            (
                encode_frame(Kind.HAVE, 1, arg=20, flags=Have.ALL),
                encode_frame(Kind.HAVE, 2, corpus.bitmap(), arg=20, flags=Have.PART),
                encode_frame(Kind.DATA, 9, b"object", flags=1),
                encode_frame(Kind.CHUNK, 1, bytes(100), arg=0),
                encode_frame(Kind.CHUNK, 1, bytes(100), arg=19),
                encode_frame(Kind.HAVE_MORE, 2, encode_ranges([(1, 2), (9, 4)])),
                encode_frame(Kind.GONE, 1, arg=5),
                encode_frame(Kind.CHUNK, 1, bytes(100), arg=7),
            ),
            (encode_frame(Kind.HAVE, 1, flags=Have.NOTHING), encode_frame(Kind.DATA, 9)),
            (encode_frame(Kind.HAVE, 2, arg=1 << 20, flags=Have.ALL),),
            (encode_frame(Kind.HAVE, 2, bytes(1 << 17), arg=1 << 20, flags=Have.PART),),
        ]

    def run(self, parts: list[bytes], rng: random.Random) -> None:
        taken: list[int] = []

        def take_buffer(length: int) -> memoryview:
            assert length <= CHUNK_BYTES
            taken.append(length)
            return memoryview(bytearray(length))

        machine = BlobSource(take_buffer)
        machine.want(1, corpus.HASH)
        machine.want(2, corpus.HASH)
        machine.request_object(9, corpus.HASH, 1 << 20)
        machine.set_chunk_sizes(1, 20, lambda index: 100)
        machine.request_chunks(1, [(0, 8), (19, 1)])
        machine.cancel_chunks(1, [(7, 1)])
        for data in _reads(parts, rng):
            machine.receive_data(data)
            held = 0
            while (event := machine.next_event()) is not None:
                if isinstance(event, HaveReceived) and event.have is not None:
                    held += event.have.count
            assert held <= 8 << 20, "a few bytes make a client hold megabytes"
            machine.poll_transmit()
        assert len(taken) <= 9 + len(parts), "chunks that nobody asked for"


# -- Kademlia ---------------------------------------------------------------------------------------------------------
class KadClientPeer(Driver):
    """Requests to a server, one part each, from two peers."""

    name = "kad.KadServer"

    def seeds(self) -> list[Transcript]:
        return [tuple(corpus.kad_requests()), *((request,) for request in corpus.kad_requests())]

    def generate(self, rng: random.Random) -> list[bytes]:  # type: ignore[override]
        return [corpus.random_message(kad_messages.KadMessage, rng).encode() for _ in range(rng.choice((1, 5)))]

    def run(self, parts: list[bytes], rng: random.Random) -> None:
        table = RoutingTable(corpus.OTHER, 0.0)
        addresses = {corpus.PEER: corpus.ADDRS}
        table.add(corpus.PEER, corpus.ADDRS, 0.0)
        validators = Validators(accept_any=rng.random() < 0.3)
        server = KadServer(corpus.OTHER, table, lambda peer: addresses.get(peer, []), validators=validators)
        for part in parts:
            try:
                request = kad_messages.decode_message_untrusted(part)
                sender = rng.choice((corpus.PEER, corpus.OTHER))
                answer = server.answer_untrusted(request, sender, rng.choice((None, *corpus.ADDRS)), corpus.NOW)
            except RemoteProtocolError:
                continue  # its stream is reset, others go on
            if answer is not None:
                assert len(kad_messages.encode_answer(answer)) <= KAD_MAX_MESSAGE_BYTES


class KadServerPeer(Driver):
    """Answers to a lookup."""

    name = "kad.Lookup"

    def seeds(self) -> list[Transcript]:
        return [tuple(corpus.kad_requests())]

    def generate(self, rng: random.Random) -> list[bytes]:  # type: ignore[override]
        return [corpus.random_message(kad_messages.KadMessage, rng).encode() for _ in range(rng.choice((1, 5)))]

    def run(self, parts: list[bytes], rng: random.Random) -> None:
        values = ValueLookup(corpus.VALUE_KEY, [corpus.PEER], Validators(accept_any=True))
        providers = ProvidersLookup(corpus.HASH.to_bytes(), [corpus.PEER])
        answers = deque(parts)
        for now in range(400):
            for lookup in (values, providers):
                peer = lookup.next(float(now))
                if peer is None:
                    continue
                part = answers[0] if answers else b""
                answers.rotate()
                try:
                    answer = kad_messages.decode_message_untrusted(part)
                except RemoteProtocolError:
                    lookup.on_failure(peer, float(now))
                    continue
                record = answer.record
                if lookup is values:
                    values.on_value(peer, None if record is None else record.value, corpus.NOW)
                else:
                    providers.on_providers(kad_messages.peers_untrusted(answer.provider_peers, 64))
                closer = [entry.peer for entry in kad_messages.peers_untrusted(answer.closer_peers, 20)]
                lookup.on_success(peer, closer, float(now))
            if values.finished and providers.finished:
                break
        assert values.requests <= 160


DRIVERS: list[Driver] = [
    MultistreamResponder(),
    MultistreamInitiator(),
    NoiseBytes(),
    NoisePayloads(),
    SignedPayloads(),
    ForgedCertificates(),
    YamuxPeer(),
    RpcPeer(),
    BlobClientPeer(),
    BlobServerPeer(),
    KadClientPeer(),
    KadServerPeer(),
]
