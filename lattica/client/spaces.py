"""Spaces of the daemon, for workers: reads like a dict.

    roster = lat.space(lat.create_space("roster")["space"])
    roster["layers"] = {"0-11": me}
    with roster.transaction() as edit:                 # one operation for all of it
        edit["model"] = "v2"
        edit.counter("requests").increment()
    for change in roster.watch(): ...

    queue = roster.list("queue")                       # reads like a list; map, text, counter, set_of likewise
    queue.append(3); queue[0]; len(queue); 3 in queue
    with roster.present({"layers": "0-11"}): ...       # others see it in members() while the block runs

With the async client the same methods return awaitables: `await roster.set("model", "v2")`,
`await roster.get("model")`, `await roster.list("queue")[0]` and so on, `async with roster.transaction() as edit`,
`async for change in roster.watch()`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, closing, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lattica.errors import NotFound

if TYPE_CHECKING:
    from lattica.client.verbs import DaemonVerbs, Peer

DEFAULT_MAP = "data"


class _Edits:
    """Where edits go: at once, or gathered."""

    def _edit(self, *edit: object) -> Any:
        raise NotImplementedError

    def set(self, key: str, value: object) -> Any:
        """Write a key of the space's map."""
        return self._edit("set", "map", DEFAULT_MAP, [], key, value)

    def delete(self, key: str) -> Any:
        """Delete a key of the space's map."""
        return self._edit("delete", "map", DEFAULT_MAP, [], key)

    def map(self, name: str = DEFAULT_MAP, *path: str | int) -> MapHandle:
        """A map by name, or one inside of it."""
        return MapHandle(self, "map", name, path)

    def list(self, name: str, *path: str | int) -> ListHandle:
        return ListHandle(self, "list", name, path)

    def text(self, name: str, *path: str | int) -> TextHandle:
        return TextHandle(self, "text", name, path)

    def counter(self, name: str) -> CounterHandle:
        return CounterHandle(self, "counter", name, ())

    def set_of(self, name: str) -> SetHandle:
        """A set by name."""
        return SetHandle(self, "set", name, ())

    def read(self, kind: str, name: str, path: Sequence[str | int]) -> Any:
        raise RuntimeError("read from the space, not from the transaction")


class Handle:
    """A container, or something inside of one."""

    def __init__(self, edits: _Edits, kind: str, name: str, path: Sequence[str | int]) -> None:
        self._edits = edits
        self._place = (kind, name, list(path))

    def value(self) -> Any:
        """A plain copy of it as it is now."""
        kind, name, path = self._place
        return self._edits.read(_outer(kind, path), name, path)

    def __getitem__(self, step: str | int) -> Any:
        """A key or position of it. `NotFound` when it is not there."""
        kind, name, path = self._place
        # The service takes a path from the container, whose kind its first step shows.
        return self._edits.read(_outer(kind, path), name, [*path, step])

    def _edit(self, verb: str, *arguments: object) -> Any:
        kind, name, path = self._place
        return self._edits._edit(verb, kind, name, path, *arguments)


class MapHandle(Handle):
    """A map with text keys."""

    def set(self, key: str, value: object) -> Any:
        return self._edit("set", key, value)

    def delete(self, key: str) -> Any:
        return self._edit("delete", key)

    def __setitem__(self, key: str, value: object) -> None:
        self.set(key, value)


class ListHandle(Handle):
    """A list."""

    def append(self, value: object) -> Any:
        return self._edit("insert", None, [value])

    def extend(self, values: Sequence[object]) -> Any:
        return self._edit("insert", None, [*values])

    def insert(self, index: int, value: object) -> Any:
        return self._edit("insert", index, [value])

    def replace(self, index: int, value: object) -> Any:
        return self._edit("set", index, value)

    def delete(self, start: int, stop: int | None = None) -> Any:
        """Delete one position, or those from `start` up to, not including, `stop`."""
        return self._edit("delete", start, start + 1 if stop is None else stop)


class TextHandle(Handle):
    """A text; positions count characters."""

    def append(self, text: str) -> Any:
        return self._edit("insert", None, text)

    def insert(self, index: int, text: str) -> Any:
        return self._edit("insert", index, text)

    def delete(self, start: int, stop: int) -> Any:
        return self._edit("delete", start, stop)


class CounterHandle(Handle):
    """A number that everybody adds to."""

    def increment(self, by: int | float = 1) -> Any:
        return self._edit("increment", by)


class SetHandle(Handle):
    """A set of plain values."""

    def add(self, value: object) -> Any:
        return self._edit("add", value)

    def discard(self, value: object) -> Any:
        return self._edit("discard", value)


class _SyncReads(Handle):
    """What the sync client's containers have, too: they read like what they are."""

    def __getitem__(self, step: str | int) -> Any:
        try:
            return super().__getitem__(step)
        except NotFound as error:
            raise (IndexError if isinstance(step, int) else KeyError)(str(error)) from None

    def __len__(self) -> int:
        return len(self.value())

    def __iter__(self) -> Iterator[Any]:
        return iter(self.value())

    def __contains__(self, item: object) -> bool:
        return item in self.value()

    def __eq__(self, other: object) -> bool:
        return bool(self.value() == (other.value() if isinstance(other, Handle) else other))

    __hash__ = None  # type: ignore[assignment]


class SyncMap(_SyncReads, MapHandle):
    """Reads like a dict."""

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)
        self.delete(key)

    def keys(self) -> Any:
        return self.value().keys()

    def items(self) -> Any:
        return self.value().items()

    def get(self, key: str, default: Any = None) -> Any:
        return self.value().get(key, default)


class SyncList(_SyncReads, ListHandle):
    """Reads like a list."""

    def __setitem__(self, index: int, value: object) -> None:
        self.replace(index, value)

    def __delitem__(self, index: int) -> None:
        size = len(self)
        if not -size <= index < size:
            raise IndexError("list index out of range")
        self.delete(index % size)


class SyncText(_SyncReads, TextHandle):
    """Reads like a text."""

    def __str__(self) -> str:
        return str(self.value())


class SyncCounter(CounterHandle):
    """A number that everybody adds to."""

    def __int__(self) -> int:
        return int(self.value())


class SyncSet(_SyncReads, SetHandle):
    """Reads like a set."""


def _outer(kind: str, path: Sequence[str | int]) -> str:
    """The kind of the container that a path starts in."""
    return kind if not path else "list" if isinstance(path[0], int) else "map"


class SpaceHandle(_Edits):
    """A space of the daemon, by id or name. Errors as in `DaemonVerbs`; `SpaceNotFound`, `NotWriter`."""

    def __init__(self, client: DaemonVerbs, space: str) -> None:
        self._client = client
        self.id = space

    def _edit(self, *edit: object) -> Any:
        return self._client.daemon("space_edit", self.id, [list(edit)])

    def read(self, kind: str, name: str, path: Sequence[str | int]) -> Any:
        return self._client.daemon("space_read", self.id, kind, name, list(path))

    def get(self, key: str) -> Any:
        """A key of the space's map. `NotFound` when it is not there."""
        return self.read("map", DEFAULT_MAP, [key])

    def snapshot(self) -> Any:
        """A plain copy of everything: {"map": {name: …}, "list": …, "text": …, "counter": …, "set": …}."""
        return self._client.daemon("space_read", self.id)

    def transaction(self) -> Transaction:
        """Gather edits; they become one operation at the end of the block, none when it raises."""
        return Transaction(self._client, self.id)

    def watch(self) -> Any:
        """Changes as they come, as dicts: `kind`, `name`, `path`, `key`, `action`, `value`. The first says
        `{"action": "watching"}`: from then on none is missed."""
        return self._client.daemon_stream("space_watch", self.id)

    def root(self) -> Any:
        """`root` (hex) and `operations`."""
        return self._client.daemon("space_root", self.id)

    def verify(self) -> Any:
        """Check everything again: `ok`, `operations`, `refused`."""
        return self._client.daemon("space_verify", self.id)

    def log(self, limit: int = 100) -> Any:
        """The newest operations, oldest first."""
        return self._client.daemon("space_log", self.id, limit)

    def prove(self, operation: str) -> Any:
        """A proof of an operation for third parties: `operation`, `root`, `proof` (bytes)."""
        return self._client.daemon("space_prove", self.id, operation)

    def checkpoint(self) -> Any:
        """Replace the history by a signed state: `checkpoint`, `root`."""
        return self._client.daemon("space_checkpoint", self.id)

    def add_writer(self, peer: Peer) -> Any:
        return self._client.daemon("space_add_writer", self.id, str(peer))

    def remove_writer(self, peer: Peer) -> Any:
        return self._client.daemon("space_remove_writer", self.id, str(peer))

    def hand_over(self, peer: Peer) -> Any:
        return self._client.daemon("space_hand_over", self.id, str(peer))

    def announce(self, info: object) -> Any:
        """Say that we are here; others see it in `members`."""
        return self._client.daemon("space_announce", self.id, info)

    def present(self, info: object) -> Any:
        """Say that we are here while the block runs, and no longer than this program lives: `async with`, in the sync
        client `with space.present(…):`."""
        return self._present(info)

    @asynccontextmanager
    async def _present(self, info: object) -> AsyncIterator[None]:
        async with aclosing(self._client.daemon_stream("space_present", self.id, info)) as stream:
            await anext(stream)
            yield

    def members(self) -> Any:
        """Who announced itself within 30 s: a list of `peer_id`, `info`, `seconds_ago`."""
        return self._client.daemon("space_members", self.id)


class SyncSpaceHandle(SpaceHandle):
    """What the sync client gives: the space's map reads like a dict."""

    @contextmanager
    def present(self, info: object) -> Iterator[None]:
        with closing(self._client.daemon_stream("space_present", self.id, info)) as stream:
            next(stream)
            yield

    def map(self, name: str = DEFAULT_MAP, *path: str | int) -> SyncMap:
        return SyncMap(self, "map", name, path)

    def list(self, name: str, *path: str | int) -> SyncList:
        return SyncList(self, "list", name, path)

    def text(self, name: str, *path: str | int) -> SyncText:
        return SyncText(self, "text", name, path)

    def counter(self, name: str) -> SyncCounter:
        return SyncCounter(self, "counter", name, ())

    def set_of(self, name: str) -> SyncSet:
        return SyncSet(self, "set", name, ())

    def __getitem__(self, key: str) -> Any:
        try:
            return self.get(key)
        except NotFound:
            raise KeyError(key) from None

    def __setitem__(self, key: str, value: object) -> None:
        self.set(key, value)

    def __delitem__(self, key: str) -> None:
        self.delete(key)

    def __contains__(self, key: object) -> bool:
        return key in self.read("map", DEFAULT_MAP, [])

    def __iter__(self) -> Iterator[str]:
        return iter(self.read("map", DEFAULT_MAP, []))

    def __len__(self) -> int:
        return len(self.read("map", DEFAULT_MAP, []))


class Transaction(_Edits):
    """Gathers edits. A context manager of either kind."""

    def __init__(self, client: DaemonVerbs, space: str) -> None:
        self._client = client
        self._space = space
        self._gathered: list[list[object]] = []

    def _edit(self, *edit: object) -> None:
        self._gathered.append(list(edit))

    def __setitem__(self, key: str, value: object) -> None:
        self.set(key, value)

    def __delitem__(self, key: str) -> None:
        self.delete(key)

    def __enter__(self) -> Transaction:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None and self._gathered:
            self._client.daemon("space_edit", self._space, self._gathered)

    async def __aenter__(self) -> Transaction:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None and self._gathered:
            await self._client.daemon("space_edit", self._space, self._gathered)
