"""Values with tensors: what comes back, what is refused, and what copies."""

from __future__ import annotations

import array
import datetime
import enum
import struct
import subprocess
import sys
import types
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
import pytest

from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.limits import RPC_MAX_VALUE
from lattica_protocols.rpc import tensors
from lattica_protocols.rpc.dtypes import CODES, DTYPES
from lattica_protocols.rpc.tensors import (
    decode_args_untrusted,
    decode_value_untrusted,
    encode_args,
    encode_value,
)


def round_trip(value: object) -> Any:
    head, buffers = encode_value(value)
    assert len(head) < 64 * 1024
    return decode_value_untrusted(head, bytearray(b"".join(buffers)))


def assert_same(got: Any, expected: Any) -> None:
    assert isinstance(got, np.ndarray)
    assert got.dtype == expected.dtype.newbyteorder("<")
    assert got.shape == expected.shape
    assert got.flags.c_contiguous
    assert got.flags.writeable
    assert got.tobytes() == np.ascontiguousarray(expected).astype(got.dtype).tobytes()


class Color(enum.IntEnum):
    RED = 3


class Text(str):
    pass


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (2**64 - 1, 2**64 - 1),
        (-(2**63), -(2**63)),
        (1.5, 1.5),
        ("ü", "ü"),
        (b"x" * 100, b"x" * 100),
        (b"x" * 100_000, b"x" * 100_000),
        ({"deep": [b"x" * 100_000]}, {"deep": [b"x" * 100_000]}),
        ("s" * 100_000, "s" * 100_000),
        (list(range(50_000)), list(range(50_000))),
        ((1, (2, 3)), [1, [2, 3]]),
        ({1: {"a": (4,)}, None: 1.0}, {1: {"a": [4]}, None: 1.0}),
        (Color.RED, 3),
        (Text("x"), "x"),
        (np.float32(1.5), 1.5),
        (np.float64(1.5), 1.5),
        (np.int8(-3), -3),
        (np.True_, True),
        (np.str_("x"), "x"),
        (ml_dtypes.bfloat16(2.0), 2.0),
        (
            datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC),
            datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC),
        ),
    ],
)
def test_plain_values(value: object, expected: object) -> None:
    got = round_trip(value)
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize("value", [bytearray(b"abc"), memoryview(b"abc"), memoryview(np.arange(30_000))[::2]])
def test_buffers_arrive_as_views(value: Any) -> None:
    got = round_trip(value)
    assert type(got) is memoryview
    assert bytes(got) == memoryview(value).tobytes()


def test_other_buffers_arrive_as_views_wherever_they_are() -> None:
    got = round_trip({"a": [array.array("h", [1, 2, 3])]})
    assert bytes(got["a"][0]) == struct.pack("<3h", 1, 2, 3)
    assert round_trip([bytearray(b"nested")]) == [b"nested"]


@pytest.mark.parametrize("code", sorted(DTYPES))
@pytest.mark.parametrize("count", [0, 1, 3, 1000])
def test_every_dtype(code: int, count: int) -> None:
    name, size = DTYPES[code]
    dtype = np.dtype(getattr(ml_dtypes, name) if hasattr(ml_dtypes, name) else name)
    assert dtype.itemsize == size
    values = (np.arange(count) % 2).astype(dtype)
    assert_same(round_trip(values), values)


@pytest.mark.parametrize(
    "values",
    [
        np.array(5.0),
        np.zeros((0, 3)),
        np.zeros((3, 0, 2), np.int8),
        np.arange(6000.0).reshape(10, 600).T,
        np.asfortranarray(np.arange(400).reshape(20, 20)),
        np.arange(1000)[::-3],
        np.arange(500, dtype=">i4"),
        np.arange(10, dtype=">f8"),
        np.broadcast_to(np.arange(200), (3, 200)),
        np.arange(200).view(np.recarray),
        np.zeros((1,) * 32),
    ],
)
def test_every_layout(values: Any) -> None:
    assert_same(round_trip(values), np.asarray(values))


def test_many_tensors_in_one_value_are_aligned() -> None:
    value = {"a": [np.arange(n, dtype=np.float32) for n in (100, 1, 333, 0, 65)], "b": (b"z" * 5000,)}
    got = round_trip(value)
    for array_, expected in zip(got["a"], value["a"], strict=True):
        assert_same(array_, expected)
    _, buffers = encode_value(value)
    offsets, position = [], 0
    for buffer in buffers:
        offsets.append(position)
        position += len(buffer)
    assert all(offset % 64 == 0 for offset, buffer in zip(offsets, buffers, strict=True) if len(buffer) >= 64)


def test_sending_and_receiving_copy_nothing() -> None:
    values = np.arange(1000)
    _, (buffer,) = encode_value(values)
    assert np.shares_memory(np.frombuffer(buffer, np.uint8), values)
    head, _ = encode_value(values)
    tail = bytearray(values.tobytes())
    got = decode_value_untrusted(head, tail)
    tail[0] = 99
    assert got[0] == 99


def test_an_object_with_dlpack_only() -> None:
    class Tensor:
        def __init__(self, data: Any) -> None:
            self.data = data

        def __dlpack__(self, **arguments: Any) -> Any:
            return self.data.__dlpack__(**arguments)

        def __dlpack_device__(self) -> Any:
            return self.data.__dlpack_device__()

    values = np.arange(300, dtype=np.float32).reshape(3, 100)
    assert_same(round_trip([Tensor(values)])[0], values)


class FakeTorch(types.ModuleType):
    """As much of torch as the encoder touches."""

    uint8 = np.uint8

    class Tensor:
        def __init__(self, data: Any, dtype: str, steps: list[str]) -> None:
            self.data, self.dtype, self.steps = data, f"torch.{dtype}", steps

        @property
        def shape(self) -> tuple[int, ...]:
            return tuple(self.data.shape)

        def _step(self, name: str, data: Any = None) -> FakeTorch.Tensor:
            self.steps.append(name)
            return FakeTorch.Tensor(self.data if data is None else data, self.dtype[6:], self.steps)

        def detach(self) -> FakeTorch.Tensor:
            return self._step("detach")

        def cpu(self) -> FakeTorch.Tensor:
            return self._step("cpu")

        def resolve_conj(self) -> FakeTorch.Tensor:
            return self._step("resolve_conj")

        def resolve_neg(self) -> FakeTorch.Tensor:
            return self._step("resolve_neg")

        def contiguous(self) -> FakeTorch.Tensor:
            return self._step("contiguous", np.ascontiguousarray(self.data))

        def reshape(self, size: int) -> FakeTorch.Tensor:
            return self._step("reshape", self.data.reshape(size))

        def view(self, dtype: Any) -> FakeTorch.Tensor:
            return self._step("view", self.data.view(dtype))

        def numpy(self) -> Any:
            return self.data


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float8_e4m3fn", "bool"])
def test_torch_tensors_without_importing_torch(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    torch = FakeTorch("torch")
    monkeypatch.setitem(sys.modules, "torch", torch)
    dtype = np.dtype(getattr(ml_dtypes, name) if hasattr(ml_dtypes, name) else name)
    values = np.ones((4, 200), dtype).T
    steps: list[str] = []
    assert_same(round_trip({"x": torch.Tensor(values, name, steps)})["x"], values)
    assert steps[:2] == ["detach", "cpu"]


def test_real_torch_tensors() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    for tensor in (
        torch.arange(12, dtype=torch.float32).reshape(3, 4),
        torch.arange(6).reshape(2, 3).t(),
        torch.ones(4, 4)[:, ::2],
        torch.ones(5, dtype=torch.bfloat16),
        torch.ones(3, requires_grad=True),
        torch.zeros(0, 3),
        torch.tensor(3.5),
    ):
        head, tails = encode_value(tensor)
        array_back = decode_value_untrusted(head, b"".join(tails))
        assert array_back.shape == tuple(tensor.shape)
        assert str(array_back.dtype) == str(tensor.dtype).removeprefix("torch.")
        assert array_back.astype(np.float32).tolist() == tensor.detach().to(torch.float32).tolist()


def test_nothing_imports_numpy_before_there_is_an_array() -> None:
    program = (
        "import sys; from lattica_protocols.rpc.tensors import encode_value, decode_value_untrusted as d; "
        "d(*encode_value({'a': [1, (2, b'x' * 9000)]})); "
        "assert not {'numpy', 'torch', 'ml_dtypes'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def _rank_33() -> object:
    """One dimension too many; NumPy before 2.0 cannot make it at all, so there something else stands in."""
    return np.zeros((1,) * 33) if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else object()


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, 1j, lambda: 0, np.array(["a"]), np.array([object()]), np.zeros(2, "i4,f4"), 2**64,
     _rank_33(), np.ma.masked_array([1], mask=True), datetime.datetime(2026, 1, 1), [[object()]]],
)  # fmt: skip
def test_what_cannot_be_sent_is_named(value: object) -> None:
    with pytest.raises(LocalProtocolError, match=r"sent|dimensions|serialize"):
        encode_value(value)


def test_values_too_large_and_too_deep() -> None:
    with pytest.raises(LocalProtocolError, match="over the limit"):
        encode_value(["x" * 1000] * 20_000)
    deep: Any = []
    for _ in range(2000):
        deep = [deep]
    with pytest.raises(LocalProtocolError):
        encode_value(deep)
    with pytest.raises(RemoteProtocolError):
        decode_value_untrusted(b"\x91" * 2000 + b"\x90")


def test_without_ml_dtypes_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    head, _ = encode_value(np.ones(3, ml_dtypes.bfloat16))
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    monkeypatch.setattr("lattica_protocols.rpc.dtypes._loaded", {})
    with pytest.raises(LocalProtocolError, match="pip install"):
        decode_value_untrusted(head)


# -- arguments ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("big", [1, 10_000])
def test_arguments(big: int) -> None:
    values = np.arange(big)
    head, buffers, flags = encode_args((1, values, b"x" * big), {"k": values, "m": bytearray(big)})
    args, kwargs = decode_args_untrusted(head, bytearray(b"".join(buffers)), flags)
    assert args[0] == 1
    assert args[2] == b"x" * big
    assert_same(args[1], values)
    assert_same(kwargs["k"], values)
    assert bytes(kwargs["m"]) == bytes(big)


@pytest.mark.parametrize(("value", "flags"), [({}, 0), (1, 0), ([], 16), ([1], 16), ([{1: 2}], 16)])
def test_arguments_of_a_wrong_shape(value: object, flags: int) -> None:
    with pytest.raises(RemoteProtocolError, match="argument"):
        decode_args_untrusted(msgpack.packb(value), b"", flags)


# -- what a peer may not say ---------------------------------------------------------------------------------
def tensor(dtype: int, shape: tuple[int, ...], offset: int = 0, code: int = tensors.TENSOR) -> msgpack.ExtType:
    fixed = struct.pack("<BBQ", dtype, len(shape), offset) if code == tensors.TENSOR else bytes([dtype, len(shape)])
    return msgpack.ExtType(code, fixed + struct.pack(f"<{len(shape)}Q", *shape))


def region(code: int, offset: int, length: int) -> msgpack.ExtType:
    return msgpack.ExtType(code, struct.pack("<QQ", offset, length))


F32 = CODES["float32"]


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (tensor(0, (1,)), "unknown element type"),
        (tensor(200, (1,)), "unknown element type"),
        (tensor(F32, (33,)), "out of bounds"),
        (tensor(F32, (2**63, 2**63)), "out of bounds"),
        (tensor(F32, (2**62, 4)), "out of bounds"),
        (tensor(F32, (1,), 32), "misaligned"),
        (tensor(F32, (1,), 128), "out of bounds"),
        (tensor(F32, (1,), 2**64 - 64), "out of bounds"),
        (tensor(F32, (0, 2**60)), "absurd"),
        (tensor(F32, (1,) * 33), "dimensions"),
        (msgpack.ExtType(1, b"\x01"), "cut short"),
        (msgpack.ExtType(1, bytes([F32, 2]) + bytes(16)), "cut short"),
        (msgpack.ExtType(1, struct.pack("<BBQQ", F32, 1, 0, 1) + b"extra"), "in the head"),
        (tensor(F32, (2,), code=2), "comes with"),
        (region(3, 0, 129), "out of bounds"),
        (region(4, 1, 1), "misaligned"),
        ([region(3, 64, 10), region(3, 0, 10)], "twice"),
        ([region(3, 0, 100), region(3, 64, 10)], "twice"),
        ([tensor(F32, (8,)), tensor(F32, (8,))], "twice"),
        ([region(5, 0, 10)], "misplaced"),
        (region(5, 0, 129), "out of bounds"),
        (region(5, 32, 10), "out of bounds"),
        (region(5, 0, RPC_MAX_VALUE + 1), "over the limit"),
        (msgpack.ExtType(3, b"short"), "length"),
        (msgpack.ExtType(99, b""), "unknown"),
    ],
)
def test_lies_about_buffers(value: object, what: str) -> None:
    with pytest.raises(RemoteProtocolError, match=what):
        decode_value_untrusted(msgpack.packb(value), bytearray(128))


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"\xc1",
        b"\x91",
        b"\x90\x90",
        b"\x81\x90\x90",
        b"\xa1\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
    ],
)
def test_garbage_heads(head: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_value_untrusted(head, b"")


def test_nested_claims_of_length_stay_cheap() -> None:
    with pytest.raises(RemoteProtocolError):
        decode_value_untrusted(b"\xdc\xff\xff" * 500)
