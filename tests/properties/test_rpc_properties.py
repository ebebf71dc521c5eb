"""Garbage, chunking and round trips of the RPC layer."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.rpc import frames
from lattica_protocols.rpc.bulk import BulkReader
from lattica_protocols.rpc.connection import RpcConnection, RpcLimits
from lattica_protocols.rpc.tensors import (
    decode_args_untrusted,
    decode_value_untrusted,
    encode_args,
    encode_value,
)

dtypes = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
    hnp.complex_number_dtypes(endianness="?", sizes=(64, 128)),
)
arrays = dtypes.flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9))
)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(max_size=6000),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=15,
)


@given(plain)
def test_plain_values_round_trip(value: Any) -> None:
    head, buffers = encode_value(value)
    assert decode_value_untrusted(head, b"".join(buffers)) == value


@given(st.lists(arrays, max_size=5), st.dictionaries(st.text(), arrays, max_size=3))
def test_arrays_round_trip(args: list[Any], kwargs: dict[str, Any]) -> None:
    head, buffers, flags = encode_args(args, kwargs)
    got, got_kwargs = decode_args_untrusted(head, bytearray(b"".join(buffers)), flags)
    assert got_kwargs.keys() == kwargs.keys()
    for a, b in zip([*got, *got_kwargs.values()], [*args, *kwargs.values()], strict=True):
        assert a.dtype == b.dtype.newbyteorder("<")
        assert a.shape == b.shape
        np.testing.assert_array_equal(a, b)


@given(st.binary(max_size=300), st.binary(max_size=300), st.integers(0, 255))
def test_garbage_values(head: bytes, tail: bytes, flags: int) -> None:
    for decode in (
        lambda: decode_value_untrusted(head, bytearray(tail)),
        lambda: decode_args_untrusted(head, bytearray(tail), flags),
        lambda: frames.decode_error_head_untrusted(head),
        lambda: frames.decode_hello_head_untrusted(head),
        lambda: frames.decode_request_head_untrusted(head),
    ):
        try:
            decode()
        except RemoteProtocolError:
            pass


@given(plain, st.data())
def test_values_with_flipped_bytes(value: Any, data: st.DataObject) -> None:
    head, buffers = encode_value([value, np.arange(200)])
    broken = bytearray(head)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(head) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode_value_untrusted(bytes(broken), bytearray(b"".join(buffers)))
    except RemoteProtocolError:
        pass


def chunks(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


some_frames = st.lists(
    st.tuples(
        st.integers(0, 14),
        st.integers(0, 255),
        st.integers(0, 8),
        st.binary(max_size=40) | st.just(frames.encode_request_head(b"a.b", b"\x90", 5)) | st.just(bytes(8)),
        st.binary(max_size=60) | st.just(bytes(20_000)),
    ),
    max_size=12,
)


@given(some_frames, st.lists(st.integers(0, 1 << 20), max_size=10), st.binary(max_size=20))
def test_any_frames_in_any_chunks(sequence: list[Any], cuts: list[int], garbage: bytes) -> None:
    """Whatever comes: an error or events, the same for every chunking, with books that add up."""
    data = frames.encode_hello(frames.Hello()) + b"".join(
        frames.encode_frame(kind, flags, call_id, head, len(tail)) + tail
        for kind, flags, call_id, head, tail in sequence
    )
    outcomes = []
    for pieces in ([data + garbage], chunks(data + garbage, cuts)):
        machine = RpcConnection(initiator=True, session=bytes(16), limits=RpcLimits(calls=3, tail=10_000, held=15_000))
        ours = [machine.open_call("a.b", b"\x90", flags=flags) for flags in (0, 2, 4, 6)]
        error = None
        try:
            for piece in pieces:
                machine.receive_data(memoryview(piece), 1.0)
        except RemoteProtocolError as caught:
            error = str(caught)
        machine.handle_timer(2.0)
        events = [(kind, call.id, head, bytes(tail)) for kind, call, head, tail in machine.poll_events()]
        assert machine._held == sum(call.held for call in machine._calls.values())
        assert machine.outbound_calls == sum(not call.over for call in ours)
        assert machine.inbound_calls == sum(not call.outbound for call in machine._calls.values()) <= 3
        outcomes.append((events, error))
        machine.connection_lost()
        assert machine._held == 0
        assert not machine._calls
    assert outcomes[0] == outcomes[1]


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=5))
def test_garbage_on_a_bulk_stream(data: bytes, cuts: list[int]) -> None:
    reader = BulkReader(RpcConnection(initiator=False, limits=RpcLimits(tail=1000)))
    try:
        for piece in chunks(data, cuts):
            reader.receive_data(piece)
    except RemoteProtocolError:
        pass


@given(st.lists(st.binary(max_size=70_000), min_size=1, max_size=6), st.lists(st.integers(0, 1 << 20), max_size=20))
def test_tails_survive_any_chunking(tails: list[bytes], cuts: list[int]) -> None:
    a = RpcConnection(initiator=True, session=bytes(16), limits=RpcLimits(detach_over=None))
    b = RpcConnection(initiator=False)
    for tail in tails:
        a.open_call("a.b", b"\x90", [tail] if tail else [])
    for piece in chunks(b"".join(a.poll_transmit()), cuts):
        b.receive_data(piece, 0.0)
    assert [bytes(tail) for kind, _, _, tail in b.poll_events() if kind == frames.REQUEST] == tails
