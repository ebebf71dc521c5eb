"""Noise XX against published vectors, between two of our machines, and against bytes that break it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lattica_protocols import noise
from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.keys import PrivateKey
from lattica_protocols.noise import NoiseHandshake, NoiseIdentity
from lattica_protocols.noise_transport import FRAME_OVERHEAD, REKEY_AFTER, Cipher, NoiseOpener, NoiseSealer

YAMUX = "/yamux/1.0.0"
ALICE = PrivateKey.generate(bytes(range(32)))
BOB = PrivateKey.generate(bytes(range(1, 33)))
ALICE_STATIC = bytes(range(0x00, 0x20))
BOB_STATIC = bytes(range(0x01, 0x21))
ALICE_EPHEMERAL = bytes(range(0x20, 0x40))
BOB_EPHEMERAL = bytes(range(0x41, 0x61))


class BareHandshake(NoiseHandshake):
    """Plain Noise XX: the vectors know no libp2p payload."""

    def _verify_untrusted(self, data: bytes, static: bytes) -> None:
        assert data == b""


# Test vectors of flynn/noise (vectors.txt), Noise_XX_25519_ChaChaPoly_SHA256 without payloads in the
# handshake: prologue, three handshake messages, one transport message in each direction.
VECTORS = [
    (
        "",
        [
            "358072d6365880d1aeea329adf9121383851ed21a28e3b75e965d0d2cd166254",
            "64b101b1d0be5a8704bd078f9895001fc03e8e9f9522f188dd128d9846d484663414af878d3e46a2f58911a816d6e8346d4ea17a6f2a0bb4ef"
            "4ed56c133cff4560a34e36ea82109f26cf2e5a5caf992b608d55c747f615e5a3425a7a19eefb8f",
            "87f864c11ba449f46a0a4f4e2eacbb7b0457784f4fca1937f572c93603e9c4d97e5ea11b16f3968710b23a3be3202dc1b5e1ce3c963347491e"
            "74f5c0768a9b42",
        ],
    ),
    (
        "6e6f74736563726574",
        [
            "358072d6365880d1aeea329adf9121383851ed21a28e3b75e965d0d2cd166254",
            "64b101b1d0be5a8704bd078f9895001fc03e8e9f9522f188dd128d9846d484663414af878d3e46a2f58911a816d6e8346d4ea17a6f2a0bb4ef"
            "4ed56c133cff4588f043d1e49a3289b1beeab8f96b0551a48cddf9f38b1a12e46c6908644198f3",
            "87f864c11ba449f46a0a4f4e2eacbb7b0457784f4fca1937f572c93603e9c4d95a04fa1f1c41fb3f00d496f242c1e44ce5b749b3d54bf74cea"
            "2dad086d601fb6",
        ],
    ),
]
TRANSPORT = [
    (b"yellowsubmarine", "a52ef02ba60e12696d1d6b9ef4245c88fca757b6134ad6e76b56e310a6adf6"),
    (b"submarineyellow", "2445aa438ebd649281c636cc7269ca82f1d9023d72520943aeabf909cdf521"),
]


def identity(
    key: PrivateKey, static: bytes, muxers: tuple[str, ...] = (YAMUX,), ciphers: tuple[Cipher, ...] = ()
) -> NoiseIdentity:
    return NoiseIdentity.create(key, static, muxers, ciphers)


def pair(
    alice_muxers: tuple[str, ...] = (YAMUX,), bob_muxers: tuple[str, ...] = (YAMUX,)
) -> tuple[NoiseHandshake, NoiseHandshake]:
    return (
        NoiseHandshake(
            identity(ALICE, ALICE_STATIC, alice_muxers),
            initiator=True,
            ephemeral_private=ALICE_EPHEMERAL,
            muxers=alice_muxers,
        ),
        NoiseHandshake(
            identity(BOB, BOB_STATIC, bob_muxers), initiator=False, ephemeral_private=BOB_EPHEMERAL, muxers=bob_muxers
        ),
    )


def pair_with_ciphers(
    alice_ciphers: tuple[Cipher, ...], bob_ciphers: tuple[Cipher, ...]
) -> tuple[NoiseHandshake, NoiseHandshake]:
    return (
        NoiseHandshake(
            identity(ALICE, ALICE_STATIC, (), alice_ciphers), initiator=True, ephemeral_private=ALICE_EPHEMERAL
        ),
        NoiseHandshake(identity(BOB, BOB_STATIC, (), bob_ciphers), initiator=False, ephemeral_private=BOB_EPHEMERAL),
    )


def shake_hands(alice: NoiseHandshake, bob: NoiseHandshake) -> None:
    for sender, receiver in ((alice, bob), (bob, alice), (alice, bob)):
        data = sender.poll_transmit()
        assert receiver.receive_untrusted(data) == len(data)


def seal(sealer: NoiseSealer, plaintext: bytes) -> bytes:
    frame = bytearray(len(plaintext) + FRAME_OVERHEAD)
    frame[2 : 2 + len(plaintext)] = plaintext
    assert sealer.seal(memoryview(frame), 0, len(plaintext)) == len(frame)
    return bytes(frame)


def open_frame(opener: NoiseOpener, frame: bytes) -> bytes:
    assert int.from_bytes(frame[:2], "big") == len(frame) - 2
    return bytes(opener.open_untrusted(memoryview(bytearray(frame))[2:]))


@pytest.mark.parametrize(("prologue", "messages"), VECTORS)
def test_published_vectors(prologue: str, messages: list[str]) -> None:
    def machine(static: bytes, ephemeral: bytes, initiator: bool) -> BareHandshake:
        bare = NoiseIdentity.create(ALICE, static, ())
        bare = NoiseIdentity(bare.static_private, bare.static_public, b"")
        return BareHandshake(bare, initiator=initiator, ephemeral_private=ephemeral, prologue=bytes.fromhex(prologue))

    alice, bob = machine(ALICE_STATIC, ALICE_EPHEMERAL, True), machine(BOB_STATIC, BOB_EPHEMERAL, False)
    for (sender, receiver), message in zip(((alice, bob), (bob, alice), (alice, bob)), messages, strict=True):
        data = sender.poll_transmit()
        assert data[2:].hex() == message
        receiver.receive_untrusted(data)
    (alice_seals, alice_opens), (bob_seals, bob_opens) = alice.split(), bob.split()
    for (sealer, opener), (plaintext, ciphertext) in zip(
        ((alice_seals, bob_opens), (bob_seals, alice_opens)), TRANSPORT, strict=True
    ):
        frame = seal(sealer, plaintext)
        assert frame[2:].hex() == ciphertext
        assert open_frame(opener, frame) == plaintext


def test_both_sides_learn_the_host_key_and_the_muxer() -> None:
    alice, bob = pair()
    shake_hands(alice, bob)
    assert alice.finished
    assert bob.finished
    assert alice.remote_key == BOB.public_key
    assert bob.remote_key == ALICE.public_key
    assert alice.muxer == bob.muxer == YAMUX


def test_the_initiators_order_of_muxers_counts() -> None:
    alice, bob = pair(("/a", "/b"), ("/x", "/b", "/a"))
    shake_hands(alice, bob)
    assert alice.muxer == bob.muxer == "/a"


@pytest.mark.parametrize(("ours", "theirs"), [((YAMUX,), ()), ((), (YAMUX,)), (("/a",), ("/b",))])
def test_without_a_common_muxer_none_is_agreed(ours: tuple[str, ...], theirs: tuple[str, ...]) -> None:
    alice, bob = pair(ours, theirs)
    shake_hands(alice, bob)
    assert alice.muxer is None
    assert bob.muxer is None


@pytest.mark.parametrize(
    ("ours", "theirs", "agreed"),
    [
        ((Cipher.AESGCM,), (Cipher.AESGCM,), Cipher.AESGCM),
        ((Cipher.AESGCM,), (), Cipher.CHACHAPOLY),
        ((), (Cipher.AESGCM,), Cipher.CHACHAPOLY),
        ((Cipher.CHACHAPOLY, Cipher.AESGCM), (Cipher.AESGCM, Cipher.CHACHAPOLY), Cipher.CHACHAPOLY),
        ((Cipher.AESGCM, Cipher.CHACHAPOLY), (Cipher.CHACHAPOLY, Cipher.AESGCM), Cipher.AESGCM),
    ],
)
def test_another_cipher_needs_both_and_the_initiators_order_counts(
    ours: tuple[Cipher, ...], theirs: tuple[Cipher, ...], agreed: Cipher
) -> None:
    alice, bob = pair_with_ciphers(ours, theirs)
    shake_hands(alice, bob)
    assert alice.cipher is bob.cipher is agreed
    (alice_seals, alice_opens), (bob_seals, bob_opens) = alice.split(), bob.split()
    for sealer, opener in ((alice_seals, bob_opens), (bob_seals, alice_opens)):
        for message in (b"first", b"", b"third"):
            assert open_frame(opener, seal(sealer, message)) == message


def test_ciphers_nobody_here_knows_are_skipped() -> None:
    alice, bob = pair_with_ciphers((Cipher.AESGCM,), ())
    strange = noise.NoisePayload.decode_untrusted(bob._identity.payload)
    extended = noise.NoisePayload(
        strange.identity_key, strange.identity_sig, noise.NoiseExtensions((), ("ROT13", "AESGCM", "ROT13"))
    )
    bob._identity = NoiseIdentity(BOB_STATIC, bob._identity.static_public, extended.encode(), (Cipher.AESGCM,))
    shake_hands(alice, bob)
    assert alice.cipher is bob.cipher is Cipher.AESGCM


def test_bytes_behind_the_handshake_are_left_alone() -> None:
    alice, bob = pair()
    bob.receive_untrusted(alice.poll_transmit())
    alice.receive_untrusted(bob.poll_transmit())
    last = alice.poll_transmit()
    assert bob.receive_untrusted(last + b"yamux") == len(last)
    assert bob.finished


@settings(deadline=None)
@given(st.lists(st.binary(max_size=3000), max_size=12), st.integers(1, 7))
def test_a_handshake_in_any_pieces_and_the_messages_after_it(messages: list[bytes], step: int) -> None:
    alice, bob = pair()
    for sender, receiver in ((alice, bob), (bob, alice), (alice, bob)):
        data = sender.poll_transmit()
        for start in range(0, len(data), step):
            receiver.receive_untrusted(data[start : start + step])
    sealer, opener = alice.split()[0], bob.split()[1]
    for message in messages:
        assert open_frame(opener, seal(sealer, message)) == message


def test_in_place_is_the_same_as_the_plain_cipher() -> None:
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    key, plaintext = bytes(range(32)), bytes(range(256)) * 255
    expected = ChaCha20Poly1305(key).encrypt(bytes(12), plaintext, None)
    assert seal(NoiseSealer(key), plaintext)[2:] == expected


def hkdf_by_the_book(key: bytes, data: bytes) -> bytes:
    """The first output: HKDF-SHA256 of RFC 5869 with the chaining key as salt and no info, as Noise says."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(algorithm=SHA256(), length=64, salt=key, info=b"").derive(data)[:32]


def test_aesgcm_counts_big_endian_under_a_key_of_its_own() -> None:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    key, plaintext = bytes(range(32)), bytes(range(256)) * 255
    plain = AESGCM(hkdf_by_the_book(key, b"lattica noise AESGCM"))
    sealer = NoiseSealer(key, Cipher.AESGCM)
    for nonce in range(3):
        assert seal(sealer, plaintext)[2:] == plain.encrypt(bytes(4) + nonce.to_bytes(8, "big"), plaintext, None)


def test_aesgcm_gets_a_new_key_in_time_and_both_sides_at_the_same_message() -> None:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    sealer, opener = NoiseSealer(bytes(32), Cipher.AESGCM), NoiseOpener(bytes(32), Cipher.AESGCM)
    first = hkdf_by_the_book(bytes(32), b"lattica noise AESGCM")
    keys = [first, AESGCM(first).encrypt(bytes(4) + b"\xff" * 8, bytes(32), None)[:32]]
    for number in (REKEY_AFTER - 1, REKEY_AFTER, REKEY_AFTER + 1, 2 * REKEY_AFTER - 1, 2 * REKEY_AFTER):
        sealer._nonce = opener._nonce = number
        frame = seal(sealer, b"whichever key")
        if number < 2 * REKEY_AFTER:
            plain = AESGCM(keys[number // REKEY_AFTER])
            assert frame[2:] == plain.encrypt(bytes(4) + number.to_bytes(8, "big"), b"whichever key", None)
        assert open_frame(opener, frame) == b"whichever key"
    assert sealer._limit == opener._limit == 3 * REKEY_AFTER


def test_a_key_that_did_not_sign_is_refused() -> None:
    alice, _ = pair()
    honest = identity(BOB, BOB_STATIC)
    stolen = NoiseIdentity.create(BOB, ALICE_STATIC, ())  # signs another static key than the one used
    mallory = NoiseHandshake(
        NoiseIdentity(honest.static_private, honest.static_public, stolen.payload),
        initiator=False,
        ephemeral_private=BOB_EPHEMERAL,
    )
    mallory.receive_untrusted(alice.poll_transmit())
    with pytest.raises(RemoteProtocolError, match="did not sign"):
        alice.receive_untrusted(mallory.poll_transmit())


@pytest.mark.parametrize("payload", [b"", b"\xff\xff", noise.NoisePayload(identity_key=b"\x08\x01").encode()])
def test_a_payload_without_a_proof_is_refused(payload: bytes) -> None:
    alice, _ = pair()
    honest = identity(BOB, BOB_STATIC)
    mallory = NoiseHandshake(
        NoiseIdentity(honest.static_private, honest.static_public, payload),
        initiator=False,
        ephemeral_private=BOB_EPHEMERAL,
    )
    mallory.receive_untrusted(alice.poll_transmit())
    with pytest.raises(RemoteProtocolError):
        alice.receive_untrusted(mallory.poll_transmit())


@pytest.mark.parametrize("point", [bytes(32), b"\x01" + bytes(31)])
def test_keys_of_small_order_are_refused(point: bytes) -> None:
    _, bob = pair()
    with pytest.raises(RemoteProtocolError, match="small order"):
        bob.receive_untrusted(b"\x00\x20" + point)


@pytest.mark.parametrize("frame", [b"\x00\x00", b"\x00\x1f" + bytes(31), b"\xff\xff"])
def test_handshake_messages_of_a_wrong_size_are_refused(frame: bytes) -> None:
    _, bob = pair()
    with pytest.raises(RemoteProtocolError):
        bob.receive_untrusted(frame + bytes(100))


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=300), st.integers(0, 2), st.data())
def test_a_damaged_handshake_is_the_peers_fault(garbage: bytes, turn: int, data: Any) -> None:
    alice, bob = pair()
    for number, (sender, receiver) in enumerate(((alice, bob), (bob, alice), (alice, bob))):
        message = bytearray(sender.poll_transmit())
        if number == turn:
            at = data.draw(st.integers(2, len(message) - 1))
            message[at : at + len(garbage)] = garbage[: len(message) - at]
        try:
            receiver.receive_untrusted(bytes(message))
        except RemoteProtocolError:
            return


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_garbage_is_the_peers_fault(data: bytes) -> None:
    for machine in pair():
        try:
            machine.receive_untrusted(data)
        except RemoteProtocolError:
            continue


def test_a_message_that_was_changed_repeated_or_cut_is_refused() -> None:
    key = bytes(32)
    frame = seal(NoiseSealer(key), b"hello")
    changed = bytearray(frame)
    changed[-1] ^= 1
    with pytest.raises(RemoteProtocolError):
        open_frame(NoiseOpener(key), bytes(changed))
    opener = NoiseOpener(key)
    open_frame(opener, frame)
    with pytest.raises(RemoteProtocolError):
        open_frame(opener, frame)
    with pytest.raises(RemoteProtocolError):
        NoiseOpener(key).open_untrusted(memoryview(bytearray(15)))


@pytest.mark.parametrize("cipher", list(Cipher))
def test_used_up_nonces_end_the_connection(cipher: Cipher) -> None:
    sealer, opener = NoiseSealer(bytes(32), cipher), NoiseOpener(bytes(32), cipher)
    sealer._nonce = opener._nonce = 2**64 - 2
    sealer._limit = opener._limit = 2**64 - 1
    assert open_frame(opener, seal(sealer, b"the last one")) == b"the last one"
    with pytest.raises(LocalProtocolError, match="nonces"):
        seal(sealer, b"one more")
    with pytest.raises(RemoteProtocolError, match="nonces"):
        opener.open_untrusted(memoryview(bytearray(20)))


def test_calls_at_the_wrong_moment_are_our_fault() -> None:
    alice, _ = pair()
    with pytest.raises(LocalProtocolError):
        alice.split()
    with pytest.raises(LocalProtocolError):
        NoiseHandshake(identity(ALICE, ALICE_STATIC), initiator=True, ephemeral_private=b"short")
