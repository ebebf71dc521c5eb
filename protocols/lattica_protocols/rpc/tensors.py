"""Values: msgpack for what is small, raw buffers in the frame's tail for what is large.

    ext 1  tensor in the tail   u8 dtype | u8 dimensions | u64 offset | u64 per dimension
    ext 2  tensor in the head   u8 dtype | u8 dimensions | u64 per dimension | elements
    ext 3  bytes in the tail    u64 offset | u64 length
    ext 4  buffer in the tail   u64 offset | u64 length
    ext 5  value in the tail    u64 offset | u64 length; the whole head

All little-endian and in C order, offsets multiples of 64, ascending, regions apart from each other: so a
message can make its reader hold no more than its own length.

| sent | arrives as |
|---|---|
| None, bool, int (64 bits), float, str, bytes, dict, list, aware datetime | the same |
| tuple | list |
| NumPy array, torch tensor, anything with `__dlpack__` | NumPy array: C order, little-endian, writable |
| NumPy scalar | Python number |
| bytearray, memoryview: as an argument or result itself | memoryview |
| the same inside a list or dict | bytes |
| any other buffer (mmap, array.array) | memoryview |

Arrays and views lie over the received buffer, without a copy, and keep all of it alive: copy a small array
out of a large message before storing it for long. Sending makes no copy either, unless an array is not
contiguous or not little-endian: what is sent must not change until the call is over. msgpack bounds nesting
at 511 levels."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgpack

from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.limits import RPC_MAX_ARRAY, RPC_MAX_RANK, RPC_MAX_VALUE, RPC_SPILL_OVER
from lattica_protocols.rpc.dtypes import dtype_code, item_size_untrusted, numpy_dtype
from lattica_protocols.rpc.frames import KEYWORDS, VALUE_HEAD, Buffer

if TYPE_CHECKING:
    import numpy

TENSOR: Final = 1
INLINE_TENSOR: Final = 2
BYTES: Final = 3
BUFFER: Final = 4
VALUE: Final = 5

ALIGNMENT: Final = 64
"""A cache line, and the widest vector load."""
INLINE_TENSOR_BYTES: Final = 256
"""Below this a tensor costs less in the head than as a buffer of its own."""
TAIL_BYTES: Final = 4096
"""Bytes and buffers longer than this are not copied into the head."""

_codes: dict[numpy.dtype[Any], int] = {}
"""Codes of the little-endian types seen so far; `dtype.name` takes longer than all the rest."""

_PAD = bytes(ALIGNMENT)
_REGION = struct.Struct("<QQ")
_NO_TAIL: tuple[Buffer, ...] = ()

_pack_plain: Callable[[object], bytes] = msgpack.Packer(strict_types=True).pack
"""For values of plain types. It calls no Python code, so one for all threads is safe; anything else raises
TypeError and goes the long way. (Tuples do, too: `strict_types` is what keeps subclasses out.)"""


# -- encoding -----------------------------------------------------------------------------------------
def encode_value(value: object) -> tuple[bytes, Sequence[Buffer]]:
    """`(head, buffers of the tail)` for a result or an item.

    Raises `LocalProtocolError` when something in it cannot be sent; the message names its type.
    """
    if type(value) not in _BUFFER_TYPES:
        try:
            head = _pack_plain(value)
        except (TypeError, ValueError, OverflowError):
            pass  # the long way, which also says what cannot be sent
        else:
            if len(head) <= RPC_SPILL_OVER:
                return head, _NO_TAIL
    return _Encoder().encode(_shield(value))


def encode_args(args: Sequence[object], kwargs: Mapping[str, object]) -> tuple[bytes, Sequence[Buffer], int]:
    """`(head, buffers, request flags)` for the arguments of a call. Errors as in `encode_value`."""
    values = [*args, kwargs] if kwargs else list(args)
    flags = KEYWORDS if kwargs else 0
    for value in args:
        if type(value) in _BUFFER_TYPES:
            break
    else:
        if not kwargs or not any(type(value) in _BUFFER_TYPES for value in kwargs.values()):
            try:
                head = _pack_plain(values)
            except (TypeError, ValueError, OverflowError):
                pass  # likewise
            else:
                if len(head) <= RPC_SPILL_OVER:
                    return head, _NO_TAIL, flags
    shielded: list[object] = [_shield(value) for value in args]
    if kwargs:
        shielded.append({name: _shield(value) for name, value in kwargs.items()})
    head, buffers = _Encoder().encode(shielded)
    return head, buffers, flags


class _Raw:
    """Bytes or a buffer that stand for themselves: wrapped, so msgpack asks us instead of copying them."""

    __slots__ = ("code", "view")

    def __init__(self, code: int, view: memoryview) -> None:
        self.code = code
        self.view = view


_PLAIN_TYPES: Final[tuple[tuple[type, Callable[[Any], object]], ...]] = (
    (dict, dict),
    (list, list),
    (tuple, list),
    (str, str),
    (bytes, bytes),
    (int, int),
    (float, float),
)
_BUFFER_TYPES: Final = frozenset({bytearray, memoryview})


def _shield(value: object) -> object:
    if isinstance(value, bytes):
        return _Raw(BYTES, memoryview(value)) if len(value) > TAIL_BYTES else value
    if isinstance(value, (bytearray, memoryview)):
        return _Raw(BUFFER, _flat_view(memoryview(value)))
    return value


class _Encoder:
    """Collects the buffers of one message while msgpack walks over the value."""

    __slots__ = ("buffers", "length")

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.length = 0

    def encode(self, value: object) -> tuple[bytes, Sequence[Buffer]]:
        packer = msgpack.Packer(default=self._default, strict_types=True, datetime=True, buf_size=4096)
        try:
            head: bytes = packer.pack(value)
        except (TypeError, ValueError, OverflowError, BufferError) as error:
            raise LocalProtocolError(f"the value cannot be sent: {error}") from error
        if len(head) > RPC_SPILL_OVER:
            if len(head) > RPC_MAX_VALUE:
                raise LocalProtocolError(
                    f"a value of {len(head)} bytes in lists, dicts and strings is over the limit of "
                    f"{RPC_MAX_VALUE}: send arrays or bytes, or a stream"
                )
            offset = self._add(memoryview(head))
            head = _ext(VALUE, _REGION.pack(offset, len(head)))
        return head, self.buffers

    def _add(self, view: memoryview) -> int:
        """Append a buffer; its offset in the tail."""
        gap = -self.length % ALIGNMENT
        if gap:
            self.buffers.append(_PAD[:gap])
        offset = self.length + gap
        self.buffers.append(view)
        self.length = offset + len(view)
        return offset

    def _default(self, value: Any) -> object:
        """msgpack does not know the type of `value`."""
        kind = type(value)
        if kind is tuple:
            return list(value)
        if kind is _Raw:
            return msgpack.ExtType(value.code, _REGION.pack(self._add(value.view), len(value.view)))
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            if isinstance(value, numpy.ndarray):
                return self._array(value)
            if isinstance(value, numpy.generic):
                item = value.item()
                # float8 and bfloat16 scalars turn into floats here, float64 and str_ into what they derive
                # from
                return item if type(item) is not kind else self._plain(value)
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.Tensor):
            return self._torch_tensor(torch, value)
        if hasattr(value, "__dlpack__"):
            import numpy as np

            return self._array(np.from_dlpack(value))
        return self._plain(value)

    def _plain(self, value: Any) -> object:
        """Subclasses of what msgpack knows, and buffers."""
        for base, plain in _PLAIN_TYPES:
            if isinstance(value, base):
                return plain(value)
        try:
            view = memoryview(value)
        except TypeError:
            raise LocalProtocolError(
                f"a {type(value).__module__}.{type(value).__qualname__} cannot be sent: "
                "values are None, bool, int, float, str, bytes, list, dict, datetime, arrays and buffers"
            ) from None
        return self._default(_Raw(BUFFER, _flat_view(view)))

    def _array(self, array: numpy.ndarray[Any, Any]) -> object:
        import numpy as np

        if type(array) is not np.ndarray:
            if isinstance(array, np.ma.MaskedArray):
                raise LocalProtocolError("a masked array cannot be sent: its mask would be lost; use filled()")
            array = np.asarray(array)
        dtype = array.dtype
        code = _codes.get(dtype)
        if code is None:
            code = dtype_code(dtype.name)
            if dtype == dtype.newbyteorder("<"):
                _codes[dtype] = code
            else:
                array = array.astype(dtype.newbyteorder("<"))
        if not array.flags.c_contiguous:
            array = array.copy(order="C")
        view: Any = array.reshape(-1).view(np.uint8)
        return self._tensor(code, array.shape, memoryview(view))

    def _torch_tensor(self, torch: Any, tensor: Any) -> object:
        code = dtype_code(str(tensor.dtype).removeprefix("torch."))
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        flat = plain.reshape(-1).view(torch.uint8).numpy()
        return self._tensor(code, tuple(plain.shape), memoryview(flat))

    def _tensor(self, code: int, shape: tuple[int, ...], view: memoryview) -> object:
        if len(shape) > RPC_MAX_RANK:
            raise LocalProtocolError(f"an array has at most {RPC_MAX_RANK} dimensions, not {len(shape)}")
        if len(view) <= INLINE_TENSOR_BYTES:
            data = struct.pack(f"<BB{len(shape)}Q", code, len(shape), *shape) + bytes(view)
            return msgpack.ExtType(INLINE_TENSOR, data)
        data = struct.pack(f"<BBQ{len(shape)}Q", code, len(shape), self._add(view), *shape)
        return msgpack.ExtType(TENSOR, data)


def _flat_view(view: memoryview) -> memoryview:
    if view.nbytes == 0:
        return memoryview(b"")
    return view.cast("B") if view.c_contiguous else memoryview(view.tobytes())


def _ext(code: int, payload: bytes) -> bytes:
    packed: bytes = msgpack.packb(msgpack.ExtType(code, payload))
    return packed


# -- decoding -----------------------------------------------------------------------------------------
def decode_value_untrusted(head: bytes, tail: Buffer = b"", max_value: int = RPC_MAX_VALUE) -> Any:
    """The value that `encode_value` put into `head` and `tail`; arrays and views lie over `tail`.

    `max_value`: bytes of msgpack in the tail, buffers and arrays aside. More is refused before it is decoded.
    Raises `LocalProtocolError` only for element types that need `ml_dtypes` when that is not installed.
    """
    hook = _Decoder(tail).hook if len(tail) else _NO_TAIL_HOOK
    data: bytes | memoryview = head
    if head[:2] == VALUE_HEAD and len(head) == 18:
        data = _value_in_tail_untrusted(head, tail, max_value)
    try:
        return msgpack.unpackb(data, ext_hook=hook, strict_map_key=False, timestamp=3, max_array_len=RPC_MAX_ARRAY)
    except (ValueError, TypeError, OverflowError, MemoryError) as error:
        # TypeError: a map key that cannot be hashed; OverflowError: a timestamp out of range; MemoryError:
        # arrays # that claim more elements than there is room for
        raise RemoteProtocolError(f"value cannot be decoded: {error or type(error).__name__}") from None


def decode_args_untrusted(
    head: bytes, tail: Buffer, flags: int, max_value: int = RPC_MAX_VALUE
) -> tuple[list[Any], dict[str, Any]]:
    """`(arguments, keyword arguments)` of a REQUEST; `max_value` as above."""
    values = decode_value_untrusted(head, tail, max_value)
    if not isinstance(values, list):
        raise RemoteProtocolError("the arguments are not an array")
    if not flags & KEYWORDS:
        return values, {}
    kwargs = values.pop() if values else None
    if not isinstance(kwargs, dict) or not all(isinstance(name, str) for name in kwargs):
        raise RemoteProtocolError("the keyword arguments are not a map with names")
    return values, kwargs


def _value_in_tail_untrusted(head: bytes, tail: Buffer, max_value: int) -> memoryview:
    offset, length = _REGION.unpack_from(head, 2)
    if length > max_value:
        raise RemoteProtocolError(
            f"a value of {length} bytes in lists, dicts and strings is over the limit of {max_value} here: "
            "send arrays or bytes"
        )
    if offset % ALIGNMENT or offset + length > len(tail):
        raise RemoteProtocolError("the value's place in the tail is out of bounds")
    return memoryview(tail)[offset : offset + length]


class _Decoder:
    """Makes objects of extensions while msgpack walks over a head."""

    __slots__ = ("_end", "_tail")

    def __init__(self, tail: Buffer) -> None:
        self._tail = tail
        self._end = 0
        """Where the last region ended: the next one may not begin before."""

    def hook(self, code: int, data: bytes) -> object:
        if code == TENSOR or code == INLINE_TENSOR:  # noqa: SIM109 - a comparison is cheaper than a tuple
            return self._tensor(code, data)
        if code == BYTES or code == BUFFER:  # noqa: SIM109
            if len(data) != _REGION.size:
                raise RemoteProtocolError(f"extension {code} has a wrong length")
            offset, length = _REGION.unpack(data)
            self._take(offset, length)
            view = memoryview(self._tail)[offset : offset + length]
            return bytes(view) if code == BYTES else view
        raise RemoteProtocolError(f"unknown or misplaced extension {code}")

    def _take(self, offset: int, length: int) -> None:
        if offset % ALIGNMENT or offset < self._end or offset + length > len(self._tail):
            raise RemoteProtocolError("a buffer in the tail is misaligned, out of bounds or used twice")
        self._end = offset + length

    def _tensor(self, code: int, data: bytes) -> numpy.ndarray[Any, Any]:
        import numpy as np

        fixed = 10 if code == TENSOR else 2
        if len(data) < fixed:
            raise RemoteProtocolError("a tensor is cut short")
        dtype, rank = data[0], data[1]
        if rank > RPC_MAX_RANK or len(data) < fixed + 8 * rank:
            raise RemoteProtocolError("a tensor has too many dimensions, or is cut short")
        shape = struct.unpack_from(f"<{rank}Q", data, fixed)
        nbytes = item_size_untrusted(dtype)
        for size in shape:
            nbytes *= size  # Python's integers do not overflow; 32 factors of 64 bits are cheap
        buffer: Buffer
        if code == TENSOR:
            offset = int.from_bytes(data[2:10], "little")
            if len(data) != fixed + 8 * rank:
                raise RemoteProtocolError("a tensor in the tail has elements in the head")
            self._take(offset, nbytes)
            buffer = self._tail
        else:
            buffer, offset = bytearray(data[fixed + 8 * rank :]), 0
            if len(buffer) != nbytes:
                raise RemoteProtocolError(f"a tensor of {nbytes} bytes comes with {len(buffer)}")
        if nbytes == 0:
            if any(size > RPC_MAX_VALUE for size in shape):  # an empty array can claim any size otherwise
                raise RemoteProtocolError("an empty tensor has an absurd shape")
            return np.empty(shape, numpy_dtype(dtype))
        return np.ndarray(shape, numpy_dtype(dtype), buffer, offset)


_NO_TAIL_HOOK = _Decoder(b"").hook
