"""Frames byte by byte, and the test vectors of `protocols/specs/rpc.md`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.rpc import frames, resume
from lattica_protocols.rpc.connection import RpcConnection, RpcLimits
from lattica_protocols.rpc.tensors import decode_args_untrusted, encode_args, encode_value

ACCOUNT = resume.Account(70_000, 3, (5, 6))
SPEC = Path(__file__).parents[2] / "protocols" / "specs" / "rpc.md"


def _output(drive: Callable[[RpcConnection], None], **limits: Any) -> bytes:
    machine = RpcConnection(initiator=True, session=bytes(16), limits=RpcLimits(**limits))
    machine.poll_transmit()
    drive(machine)
    return b"".join(machine.poll_transmit())


def _unary(machine: RpcConnection) -> None:
    head, tails, flags = encode_args((7, "hi"), {"k": None})
    machine.open_call("expert.forward", head, tails, flags=flags, deadline=2.5, now=1.0)


def _tensor(machine: RpcConnection) -> None:
    head, tails, flags = encode_args((np.arange(80, dtype=np.float32).reshape(8, 10),), {})
    machine.open_call("expert.forward", head, tails, flags=flags, route=b"\x00\x24peer")


def _detached(machine: RpcConnection) -> None:
    head, tails, flags = encode_args((np.zeros(100_000, np.uint8),), {})
    machine.open_call("a.b", head, tails, flags=flags)


def vectors() -> dict[str, bytes]:
    """Made by the code; the page has to show the same."""
    return {
        "hello": frames.encode_hello(frames.Hello(bytes(range(16)), calls=4096, tail=1 << 30)),
        "hello of a bulk stream": frames.encode_hello(frames.Hello(bytes(range(16)), bulk=True)),
        'request `expert.forward(7, "hi", k=None)`, 1.5 s left, call 1': _output(_unary),
        "request with a float32 tensor 8 x 10 and a route, without its tail of 320 bytes": _output(_tensor)[:-320],
        "request with 100,000 detached bytes, tail id 0": _output(_detached),
        "header of that tail on a bulk stream": frames.encode_bulk_header(0, 100_000),
        "response `[1, 2.5]` to call 1": frames.encode_frame(2, 1, 1, encode_value([1, 2.5])[0]),
        "item with the int16 array `[1, -2]` in the head, call 2": frames.encode_frame(
            3, 0, 2, encode_value(np.array([1, -2], np.int16))[0]
        ),
        "the callee's end of call 3": frames.encode_frame(4, 1, 3),
        "error, call 5": frames.encode_frame(5, 1, 5, frames.encode_error_head(6, "ValueError", "no")),
        "cancel of call 7": frames.encode_frame(6, 1, 7),
        "credit of 32 items and 2 MiB, call 9": frames.encode_frame(7, 0, 9, frames.CREDIT_HEAD.pack(32, 2 << 20)),
        "ack of 70,000 bytes, the tails before 3, and 5 and 6": frames.encode_frame(12, 0, 0, ACCOUNT.encode()),
        "resume in epoch 2 with the same account": frames.encode_frame(
            13, 0, 0, resume.Resume(bytes(range(16)), 2, ACCOUNT).encode()
        ),
        "hello of a bulk stream of epoch 2": frames.encode_hello(frames.Hello(bytes(range(16)), bulk=True, epoch=2)),
    }


def test_vectors_of_the_page() -> None:
    rows = re.findall(r"^\| (.+?) \| `([0-9a-f]+)` \|$", SPEC.read_text(), re.MULTILINE)
    assert dict(rows) == {name: data.hex() for name, data in vectors().items()}


@pytest.mark.parametrize("name", sorted(vectors()))
def test_vectors_parse(name: str) -> None:
    data = vectors()[name]
    body, _, flags, head_length, _ = frames.HEADER.unpack_from(data)
    if "without" not in name and "header" not in name:
        assert len(data) == 12 + body
    trailer = 8 if flags & frames.DETACHED else 0
    assert head_length == len(data) - 12 - trailer


def test_request_head() -> None:
    head = frames.encode_request_head(b"a.b", b"args", 1500, b"route")
    assert frames.decode_request_head_untrusted(head) == (1500, b"route", b"a.b", b"args")
    for length in range(len(head) - 4):
        with pytest.raises(RemoteProtocolError):
            frames.decode_request_head_untrusted(head[:length])
    with pytest.raises(LocalProtocolError):
        frames.encode_request_head(b"", b"", 0)
    with pytest.raises(LocalProtocolError):
        frames.encode_request_head(b"m", b"", 0, bytes(256))


def test_the_vector_of_a_call_decodes() -> None:
    data = vectors()['request `expert.forward(7, "hi", k=None)`, 1.5 s left, call 1']
    deadline, route, method, args = frames.decode_request_head_untrusted(data[12:])
    assert (deadline, route, method) == (1500, b"", b"expert.forward")
    assert decode_args_untrusted(args, b"", data[5]) == ([7, "hi"], {"k": None})


def test_errors_are_cut_and_unknown_fields_ignored() -> None:
    head = frames.encode_error_head(6, "K" * 1000, "m" * 10_000 + "\ud800")
    assert frames.decode_error_head_untrusted(head) == (6, "K" * 128, "m" * 4096)
    assert frames.decode_error_head_untrusted(msgpack.packb([1, "a", "b", "later"])) == (1, "a", "b")
    frames.decode_error_head_untrusted(frames.encode_error_head(6, "E", "lone \ud800"))


@pytest.mark.parametrize("head", [b"", b"\xc1", msgpack.packb([1, 2, 3]), msgpack.packb({}), msgpack.packb([1, "a"])])
def test_bad_error_heads(head: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        frames.decode_error_head_untrusted(head)


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"v": 2}, [], {"v": 1, "session": b"short"}, {"v": 1, "session": 5}, {"v": 1, "bulk": 1},
        {"v": 1, "bulk": True}, {"v": 1, "calls": 0}, {"v": 1, "calls": "x"}, {"v": 1, "tail": -1},
        {"v": 1, "features": {}}, {"v": 1, "features": [1]},
    ],
)  # fmt: skip
def test_bad_hellos(fields: Any) -> None:
    with pytest.raises(RemoteProtocolError):
        frames.decode_hello_head_untrusted(msgpack.packb(fields))


def test_hello_round_trip_and_unknown_keys() -> None:
    hello = frames.Hello(bytes(16), False, 7, 9, frozenset({"fd", "x"}))
    assert frames.decode_hello_head_untrusted(frames.encode_hello(hello)[12:]) == hello
    assert frames.decode_hello_head_untrusted(msgpack.packb({"v": 1, "later": [1]})) == frames.Hello()
