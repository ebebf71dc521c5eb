"""Replicated state: the methods behind `lattica space …` and the clients' spaces."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any

import trio

from lattica.errors import InvalidArgument, NotFound
from lattica.replica import Counter, SharedList, SharedMap, SharedSet, SharedText
from lattica_daemon.control.arguments import read_peer

if TYPE_CHECKING:
    from lattica.replica import Space
    from lattica_daemon.daemon import Daemon


class SpaceControl:
    """Methods about spaces. `space` is an id, or a name when only one space has it."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    # -- spaces -----------------------------------------------------------------------------------------------
    async def space_create(
        self, name: str, writers: Sequence[str] = (), quorum: int = 0, signers: Sequence[str] = ()
    ) -> dict[str, Any]:
        """A new space that this peer owns: `{space, name}`. With a `quorum`, so many of `signers` sign checkpoints."""
        who, trusted = ([read_peer(peer) for peer in peers] for peers in (writers, signers))
        space = await self._daemon.node.spaces.create(name, who, quorum=quorum, signers=trusted)
        return {"space": space.id, "name": space.name}

    async def space_join(self, space: str, peers: Sequence[str] = (), timeout: float = 30.0) -> dict[str, Any]:
        """Hold a replica, and wait until it is in step with a member: `{space, name, operations, synced}`."""
        spaces = self._daemon.node.spaces
        found = await spaces.join(space, [read_peer(peer) for peer in peers], timeout=timeout)
        synced = await spaces.wait_synced(found, timeout)
        return {"space": found.id, "name": found.name, "operations": found.operations(), "synced": synced}

    async def space_leave(self, space: str) -> dict[str, Any]:
        """Forget our replica."""
        found = self._space(space)
        await self._daemon.node.spaces.leave(found.id)
        return {"space": found.id}

    async def space_list(self) -> list[dict[str, Any]]:
        """`[{space, name, operations, writable, owners, writers, excluded, neighbours}]`."""
        return [
            {
                "space": info.id,
                "name": info.name,
                "operations": info.operations,
                "writable": info.writable,
                "owners": [str(peer) for peer in info.owners],
                "writers": [str(peer) for peer in info.writers],
                "excluded": [str(peer) for peer in info.excluded],
                "neighbours": [str(peer) for peer in info.neighbours],
            }
            for info in self._daemon.node.spaces.list()
        ]

    # -- contents ---------------------------------------------------------------------------------------------
    async def space_set(self, space: str, key: str, value: object) -> dict[str, Any]:
        """Write a key of the map: `{space, key, value, root}`."""
        found = self._space(space)
        found[key] = value
        return {"space": found.id, "key": key, "value": value, "root": found.root().hex()}

    async def space_delete(self, space: str, key: str) -> dict[str, Any]:
        """Delete a key of the map."""
        found = self._space(space)
        if key not in found:
            raise NotFound(f"there is no {key!r} in {found.name}")
        del found[key]
        return {"space": found.id, "key": key, "root": found.root().hex()}

    async def space_get(self, space: str, key: str = "") -> dict[str, Any]:
        """A key of the map, or without one the whole map: `{space, key, value}`."""
        found = self._space(space)
        if not key:
            return {"space": found.id, "key": None, "value": found.map().value()}
        if key not in found:
            raise NotFound(f"there is no {key!r} in {found.name}")
        value = found[key]
        return {"space": found.id, "key": key, "value": value.value() if hasattr(value, "value") else value}

    async def space_read(self, space: str, kind: str = "", name: str = "", path: Sequence[str | int] = ()) -> Any:
        """A plain copy of a container, of something inside of it, or (without `kind`) of everything."""
        found = self._space(space)
        if not kind:
            return found.snapshot()
        target: Any = _container(found, kind, name)
        for step in path:
            try:
                target = target[step]
            except (KeyError, IndexError, TypeError):
                raise NotFound(f"there is no {step!r} in {kind} {name}") from None
        return target.value() if hasattr(target, "value") else target

    async def space_edit(self, space: str, edits: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """Several edits as one operation. Each is `[verb, kind, name, path, …]`, see `EDITS`. `{root, operations}`."""
        found = self._space(space)
        with found.transaction():
            for edit in edits:
                _edit(found, edit)
        return {"root": found.root().hex(), "operations": found.operations()}

    async def space_watch(self, space: str) -> AsyncIterator[dict[str, Any]]:
        """Changes as they come: `{kind, name, path, key, action, value}`; the first item is `{action: "watching"}`."""
        watcher = self._space(space).watch()
        try:
            yield {"action": "watching"}
            async for change in watcher:
                yield change.as_dict()
        finally:
            watcher.close()

    # -- members ----------------------------------------------------------------------------------------------
    async def space_add_writer(self, space: str, peer: str) -> dict[str, Any]:
        """Let a peer write."""
        return self._change(space, peer, lambda found, who: found.add_writer(who))

    async def space_remove_writer(self, space: str, peer: str) -> dict[str, Any]:
        """Let a peer write no more."""
        return self._change(space, peer, lambda found, who: found.remove_writer(who))

    async def space_hand_over(self, space: str, peer: str) -> dict[str, Any]:
        """Make a peer the owner."""
        return self._change(space, peer, lambda found, who: found.hand_over(who))

    def _change(self, space: str, peer: str, call: Callable[[Space, Any], None]) -> dict[str, Any]:
        found = self._space(space)
        call(found, read_peer(peer))
        return {"space": found.id, "writers": [str(each) for each in found.writers]}

    async def space_announce(self, space: str, info: object) -> dict[str, Any]:
        """Say that we are here until told otherwise; `info` None: stop."""
        found = self._space(space)
        found.announce(info)
        return {"space": found.id}

    async def space_present(self, space: str, info: object) -> AsyncIterator[dict[str, Any]]:
        """Say that we are here for as long as the call lasts; the first and only item is `{action: "present"}`."""
        with self._space(space).present(info):
            yield {"action": "present"}
            await trio.sleep_forever()

    async def space_members(self, space: str) -> list[dict[str, Any]]:
        """Who announced itself within 30 s: `[{peer_id, info, seconds_ago}]`."""
        return [
            {"peer_id": str(member.peer), "info": member.info, "seconds_ago": round(member.seconds_ago, 3)}
            for member in self._space(space).members()
        ]

    # -- history ----------------------------------------------------------------------------------------------
    async def space_log(self, space: str, limit: int = 100) -> list[dict[str, Any]]:
        """The newest operations: `[{operation, author, kind, seq, time, bytes}]`, oldest first."""
        return [
            {
                "operation": entry.id.hex(),
                "author": str(entry.author),
                "kind": entry.kind,
                "seq": entry.seq,
                "time": entry.time,
                "bytes": entry.bytes,
            }
            for entry in self._space(space).log(limit)
        ]

    async def space_root(self, space: str) -> dict[str, Any]:
        """`{space, root, operations}`."""
        found = self._space(space)
        return {"space": found.id, "root": found.root().hex(), "operations": found.operations()}

    async def space_verify(self, space: str) -> dict[str, Any]:
        """Check everything again from the genesis or the checkpoint: `{ok, operations, refused, root, lost}`;
        `lost`: our own operations that a checkpoint left out."""
        found = self._space(space)
        report = found.verify()
        await trio.lowlevel.checkpoint()
        return {
            "ok": report.ok,
            "operations": report.operations,
            "refused": [{"operation": key.hex(), "reason": reason} for key, reason in report.refused],
            "document_equal": report.document_equal,
            "root": found.root().hex(),
            "lost": [key.hex() for key in found.lost()],
        }

    async def space_checkpoint(self, space: str) -> dict[str, Any]:
        """Replace the history by a signed state: `{space, checkpoint, complete, operations, root}`; not `complete`:
        it waits for signatures of others."""
        found = self._space(space)
        made = found.checkpoint()
        return {
            "space": found.id,
            "checkpoint": made.hex(),
            "complete": found.checkpoint_id == made,
            "operations": found.operations(),
            "root": found.root().hex(),
        }

    async def space_prove(self, space: str, operation: str) -> dict[str, Any]:
        """A proof that an operation is part of the state: `{operation, root, proof}`; `proof` in bytes."""
        found = self._space(space)
        try:
            key = bytes.fromhex(operation)
        except ValueError:
            raise InvalidArgument(f"{operation!r} is no id of an operation; `lattica space log` shows them") from None
        return {"operation": operation, "root": found.root().hex(), "proof": found.prove(key)}

    def _space(self, space: str) -> Space:
        return self._daemon.node.spaces.get(space)


# -- edits of clients -------------------------------------------------------------------------------------------
def _container(space: Space, kind: str, name: str) -> Any:
    makers: dict[str, Callable[[str], Any]] = {
        "map": space.map,
        "list": space.list,
        "text": space.text,
        "counter": space.counter,
        "set": space.set,
    }
    if kind not in makers:
        raise InvalidArgument(f"{kind!r} is no type of a space: map, list, text, counter or set")
    return makers[kind](name)


def _map_delete(target: SharedMap, key: str) -> None:
    target.pop(key, None)


def _list_insert(target: SharedList, index: int | None, values: Sequence[object]) -> None:
    if index is None:
        target.extend(values)
        return
    for offset, value in enumerate(values):
        target.insert(index + offset, value)


def _list_delete(target: SharedList, start: int, stop: int) -> None:
    del target[start:stop]


def _text_insert(target: SharedText, index: int | None, text: str) -> None:
    target.insert(len(target) if index is None else index, text)


EDITS: dict[tuple[str, str], tuple[type, Callable[..., None]]] = {
    ("set", "map"): (SharedMap, SharedMap.__setitem__),
    ("delete", "map"): (SharedMap, _map_delete),
    ("set", "list"): (SharedList, SharedList.__setitem__),
    ("insert", "list"): (SharedList, _list_insert),
    ("delete", "list"): (SharedList, _list_delete),
    ("insert", "text"): (SharedText, _text_insert),
    ("delete", "text"): (SharedText, SharedText.delete),
    ("increment", "counter"): (Counter, Counter.increment),
    ("add", "set"): (SharedSet, SharedSet.add),
    ("discard", "set"): (SharedSet, SharedSet.discard),
}
"""What an edit `[verb, kind, name, path, *arguments]` does. `kind` is that of what the path leads to, and of the
container when the path is empty; else the container is a map unless the path starts with a position."""


def _edit(space: Space, edit: Sequence[Any]) -> None:
    try:
        verb, kind, name, path, *arguments = edit
        expected, call = EDITS[verb, kind]
        first = kind if not path else "list" if isinstance(path[0], int) else "map"
        target = functools.reduce(lambda inside, step: inside[step], path, _container(space, first, name))
    except (ValueError, TypeError):
        raise InvalidArgument("an edit is [verb, kind, name, path, …]") from None
    except (KeyError, IndexError) as error:
        raise InvalidArgument(f"an edit names {error}, which is not there") from None
    if not isinstance(target, expected):
        raise InvalidArgument(f"{'/'.join(map(str, path))} in {name} is no {kind}")
    try:
        call(target, *arguments)
    except (TypeError, KeyError, IndexError) as error:
        raise InvalidArgument(f"{verb} {kind}: {error}") from None
