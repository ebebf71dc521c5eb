"""The types of a space, as Python sees them: what reads like a dict, a list, a text, a number and a set.

Each object is a name and a path; it looks up what it stands for on every use, so it stays right when others edit or the
document is made anew. A write outside of `space.transaction()` is an operation of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, MutableMapping, MutableSequence, MutableSet
from typing import TYPE_CHECKING, Any

from pycrdt import Array, Map, Text

from lattica.errors import InvalidArgument
from lattica_protocols.errors import LocalProtocolError
from lattica_protocols.replica.plain import container, container_value, to_plain
from lattica_protocols.replica.plain import to_shared as _to_shared

if TYPE_CHECKING:
    from lattica.replica.space import Space

Step = str | int


def to_shared(value: object) -> Any:
    """What to put into the document. Raises `InvalidArgument` for a value that cannot be shared."""
    try:
        return _to_shared(value)
    except LocalProtocolError as error:
        raise InvalidArgument(str(error)) from None


class _Shared:
    """A place in a space."""

    def __init__(self, space: Space, name: str, path: tuple[Step, ...] = ()) -> None:
        self._space = space
        self._name = name
        self._path = path

    def _target(self) -> Any:
        target = container(self._space.replica.doc, self._name)
        for step in self._path:
            target = target[step]
        return target

    def _wrap(self, value: Any, step: Step) -> Any:
        path = (*self._path, step)
        if isinstance(value, Map):
            return SharedMap(self._space, self._name, path)
        if isinstance(value, Array):
            return SharedList(self._space, self._name, path)
        if isinstance(value, Text):
            return SharedText(self._space, self._name, path)
        return to_plain(value)

    def value(self) -> Any:
        """A plain copy of all that is in it."""
        return to_plain(self._target())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.value()!r})"


class SharedMap(_Shared, MutableMapping[str, Any]):
    """A map with text keys. Values: None, bool, int, float, str, bytes, list, dict; the last two become shared, too.
    Of concurrent writes to one key one wins, the same everywhere."""

    def __getitem__(self, key: str) -> Any:
        return self._wrap(self._target()[key], key)

    def __setitem__(self, key: str, value: object) -> None:
        if not isinstance(key, str):
            raise TypeError(f"keys are texts, not {type(key).__name__}")
        shared = to_shared(value)
        with self._space.transaction():
            self._target()[key] = shared

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)
        with self._space.transaction():
            del self._target()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._target().keys()))

    def __len__(self) -> int:
        return len(self._target())

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and key in self._target()

    def __eq__(self, other: object) -> bool:
        return bool(self.value() == (other.value() if isinstance(other, SharedMap) else other))

    __hash__ = None  # type: ignore[assignment]


class SharedList(_Shared, MutableSequence[Any]):
    """A list. What several insert at one place all stays; one position is replaced by deleting and inserting."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.value()[index]
        index = self._position(index)
        return self._wrap(self._target()[index], index)

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(index, slice):
            raise TypeError("assign positions one by one, or delete and insert")
        index = self._position(index)
        shared = to_shared(value)
        with self._space.transaction():
            target = self._target()
            del target[index]
            target.insert(index, shared)

    def __delitem__(self, index: Any) -> None:
        size = len(self)
        positions = range(*index.indices(size)) if isinstance(index, slice) else [self._position(index)]
        with self._space.transaction():
            target = self._target()
            for position in sorted(positions, reverse=True):
                del target[position]

    def insert(self, index: int, value: object) -> None:
        """Insert before `index`, as a list does."""
        size = len(self)
        index = max(0, size + index) if index < 0 else min(index, size)
        shared = to_shared(value)
        with self._space.transaction():
            self._target().insert(index, shared)

    def extend(self, values: Iterable[object]) -> None:
        """Append all of them with one operation."""
        shared = [to_shared(value) for value in values]
        if shared:
            with self._space.transaction():
                self._target().extend(shared)

    def __len__(self) -> int:
        return len(self._target())

    def __eq__(self, other: object) -> bool:
        return bool(self.value() == (other.value() if isinstance(other, SharedList) else other))

    __hash__ = None  # type: ignore[assignment]

    def _position(self, index: int) -> int:
        size = len(self)
        if not -size <= index < size:
            raise IndexError("list index out of range")
        return index % size


class SharedText(_Shared):
    """A text that several edit at once. Positions count characters."""

    def __str__(self) -> str:
        return str(self._target())

    def __len__(self) -> int:
        return len(str(self))

    def __eq__(self, other: object) -> bool:
        return str(self) == str(other) if isinstance(other, str | SharedText) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def insert(self, index: int, text: str) -> None:
        """Insert before the character `index`."""
        before = str(self)
        if not 0 <= index <= len(before):
            raise IndexError(f"position {index} of a text of {len(before)} characters")
        if text:
            with self._space.transaction():
                self._target().insert(_bytes_in(before[:index]), text)

    def append(self, text: str) -> None:
        self.insert(len(self), text)

    def delete(self, start: int, stop: int) -> None:
        """Delete the characters from `start` up to, not including, `stop`."""
        before = str(self)
        if not 0 <= start <= stop <= len(before):
            raise IndexError(f"positions {start} to {stop} of a text of {len(before)} characters")
        if start < stop:
            first = _bytes_in(before[:start])
            with self._space.transaction():
                del self._target()[first : first + _bytes_in(before[start:stop])]


class Counter(_Shared):
    """A number that everybody adds to: no increment is lost."""

    def value(self) -> Any:
        """The sum of what all members added."""
        return container_value(self._space.replica.doc, self._name)

    def increment(self, by: int | float = 1) -> None:
        """Add; `by` may be negative."""
        if isinstance(by, bool) or not isinstance(by, int | float):
            raise TypeError(f"a counter counts numbers, not {type(by).__name__}")
        with self._space.transaction():
            target = self._target()
            own = str(self._space.replica.doc.client_id)
            target[own] = to_shared(to_plain(target.get(own, 0)) + by)

    def __int__(self) -> int:
        return int(self.value())


class SharedSet(_Shared, MutableSet[Any]):
    """A set of plain values (None, bool, int, float, str, and lists of them). An addition wins over a concurrent
    removal that did not know of it."""

    def add(self, value: Any) -> None:
        key, shared = _element(value), to_shared(value)
        with self._space.transaction():
            self._target()[key] = shared

    def discard(self, value: Any) -> None:
        key = _element(value)
        if key in self._target():
            with self._space.transaction():
                del self._target()[key]

    def value(self) -> Any:
        """The elements as a list, sorted by their JSON."""
        return container_value(self._space.replica.doc, self._name)

    def __contains__(self, value: object) -> bool:
        return _element(value) in self._target()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.value())

    def __len__(self) -> int:
        return len(self._target())

    @classmethod
    def _from_iterable(cls, iterable: Iterable[Any]) -> Any:
        return set(iterable)


def _bytes_in(text: str) -> int:
    """pycrdt counts positions in a text in bytes of UTF-8, whatever its documentation says."""
    return len(text.encode("utf-8", "surrogatepass"))


def _element(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        raise TypeError(f"{type(value).__name__} cannot be an element of a shared set") from None
