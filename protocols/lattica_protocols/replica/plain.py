"""Plain Python values in and out of a document.

Values are None, bool, int (up to 64 bits), float, str, bytes, lists and dicts with string keys. A dict or list becomes
a shared map or array, so that its parts merge; a number without a fraction reads as an int.
"""

from __future__ import annotations

from typing import Any

from pycrdt import Array, Doc, Map, Text

from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.limits import REPLICA_MAX_DEPTH

TYPES: dict[str, type[Map[Any] | Array[Any] | Text]] = {"m": Map, "l": Array, "t": Text, "c": Map, "s": Map}
"""What a container is made of, by the first letter of its name."""


def container(doc: Doc[Any], name: str) -> Any:
    """The container `name` (`m:config`) of a document."""
    return doc.get(name, type=TYPES[name[0]])


def apply_untrusted(doc: Doc[Any], update: bytes) -> None:
    """Apply an update. Raises `RemoteProtocolError` where yrs does not take it, or panics; then `doc` is not to be used
    any more."""
    try:
        doc.apply_update(update)
    except (ValueError, RuntimeError) as error:
        raise RemoteProtocolError(f"yrs does not take the update: {error}") from None
    except BaseException as error:
        # pyo3's PanicException cannot be imported, and is no Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise RemoteProtocolError("yrs panics at the update") from None


def to_shared(value: object, depth: int = 0) -> Any:
    """What to put into a document for `value`. `LocalProtocolError` names a value that cannot be shared."""
    if value is None or isinstance(value, bool | str | float | bytes):
        return value
    if isinstance(value, int):
        if not -(1 << 63) <= value < 1 << 63:
            raise LocalProtocolError(f"the number {str(value)[:24]} does not fit 64 bits")
        return value
    if depth >= REPLICA_MAX_DEPTH:
        raise LocalProtocolError(f"values are nested more than {REPLICA_MAX_DEPTH} deep")
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise LocalProtocolError(f"keys of a map are texts, not {type(key).__name__}")
        return Map({key: to_shared(item, depth + 1) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return Array([to_shared(item, depth + 1) for item in value])
    raise LocalProtocolError(
        f"{type(value).__name__} cannot be shared: a value is None, bool, int, float, str, bytes, a list or a dict"
    )


def to_plain(value: Any) -> Any:
    """The plain value of something read from a document."""
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 1 << 53 else value
    if isinstance(value, bytearray):
        return bytes(value)
    if isinstance(value, Text):
        return str(value)
    if isinstance(value, Map | dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, Array | list | tuple):
        return [to_plain(item) for item in value]
    return value


def container_value(doc: Doc[Any], name: str) -> Any:
    """A container's content: dict, list, str, for a counter a number, for a set a list sorted by its keys."""
    content = to_plain(container(doc, name))
    if name[0] == "c":
        return sum(part for part in content.values() if isinstance(part, int | float) and not isinstance(part, bool))
    if name[0] == "s":
        return [content[key] for key in sorted(content)]
    return content


def document_value(doc: Doc[Any]) -> dict[str, Any]:
    """All containers that have something in them, by name."""
    out = {}
    for name in sorted(doc.keys()):
        if name[0] in TYPES and (content := to_plain(container(doc, name))):
            out[name] = content
    return out


def same_value(one: Any, other: Any) -> bool:
    """Whether two plain values are the same, type by type; NaN is like itself."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_value(item, other[key]) for key, item in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same_value, one, other))
    return bool(one == other or (one != one and other != other))
