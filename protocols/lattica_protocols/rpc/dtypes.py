"""Element types of tensors on the wire: a byte each, the table of `specs/rpc.md`.

Only these can be named by a peer. bfloat16 and the float8 types need the `ml_dtypes` package on the side that
wants them as arrays; a forwarder needs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError

if TYPE_CHECKING:
    import numpy

DTYPES: Final[dict[int, tuple[str, int]]] = {
    1: ("bool", 1),
    2: ("int8", 1),
    3: ("int16", 2),
    4: ("int32", 4),
    5: ("int64", 8),
    6: ("uint8", 1),
    7: ("uint16", 2),
    8: ("uint32", 4),
    9: ("uint64", 8),
    10: ("float16", 2),
    11: ("float32", 4),
    12: ("float64", 8),
    13: ("complex64", 8),
    14: ("complex128", 16),
    15: ("bfloat16", 2),
    16: ("float8_e4m3fn", 1),
    17: ("float8_e5m2", 1),
    18: ("float8_e4m3fnuz", 1),
    19: ("float8_e5m2fnuz", 1),
}
"""Code: name as NumPy and torch spell it, bytes per element."""

CODES: Final[dict[str, int]] = {name: code for code, (name, _) in DTYPES.items()}

_FIRST_ML_DTYPE: Final = 15

_loaded: dict[int, numpy.dtype[Any]] = {}


def dtype_code(name: str) -> int:
    """The code of an element type. `LocalProtocolError` when tensors of it cannot be sent."""
    code = CODES.get(name)
    if code is None:
        raise LocalProtocolError(f"arrays of {name} cannot be sent; convert to one of {', '.join(CODES)}")
    return code


def item_size_untrusted(code: int) -> int:
    """Bytes per element of the type that a peer named."""
    entry = DTYPES.get(code)
    if entry is None:
        raise RemoteProtocolError(f"unknown element type {code}")
    return entry[1]


def numpy_dtype(code: int) -> numpy.dtype[Any]:
    """The NumPy type for a valid code. `LocalProtocolError` when it needs `ml_dtypes`, which is not
    installed."""
    found = _loaded.get(code)
    if found is None:
        found = _loaded[code] = _load(code)
    return found


def _load(code: int) -> numpy.dtype[Any]:
    import numpy

    name = DTYPES[code][0]
    if code < _FIRST_ML_DTYPE:
        return numpy.dtype(name).newbyteorder("<")
    try:
        import ml_dtypes
    except ImportError:
        raise LocalProtocolError(
            f"a {name} array came, which needs the ml_dtypes package: pip install 'lattica-node[ml]'"
        ) from None
    dtype: numpy.dtype[Any] = numpy.dtype(getattr(ml_dtypes, name))
    return dtype
