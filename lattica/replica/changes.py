"""What changed in a space: from the events of its document to plain values for those who watch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pycrdt import Doc, MapEvent

from lattica_protocols.replica.plain import TYPES, container, to_plain

KINDS = {"m": "map", "l": "list", "t": "text", "c": "counter", "s": "set"}


@dataclass(frozen=True, slots=True)
class Change:
    """One change. `kind` "space" and `action` "reset": the document was made anew, read again what you need."""

    kind: str
    """`map`, `list`, `text`, `counter`, `set` or `space`."""
    name: str
    """The container."""
    path: tuple[str | int, ...]
    """Where inside of it: keys and positions."""
    key: str | None
    """For maps, counters and sets."""
    action: str
    """`set`, `delete`, `edit` (lists and texts) or `reset`."""
    value: Any
    """The new value; for `edit` a list of {"retain": n}, {"insert": …}, {"delete": n}."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "name": self.name,
            "path": list(self.path),
            "key": self.key,
            "action": self.action,
            "value": self.value,
        }


RESET = Change("space", "", (), None, "reset", None)


class ChangeFeed:
    """Observes a document while somebody watches. Costs nothing otherwise."""

    def __init__(self, publish: Callable[[Change], None]) -> None:
        self._publish = publish
        self._doc: Doc[Any] | None = None
        self._subscriptions: dict[str, tuple[Any, Any]] = {}

    def follow(self, doc: Doc[Any]) -> None:
        """Observe all containers of `doc`. Called again after each batch: containers may be new, the document too."""
        if doc is not self._doc:
            known = self._doc is not None
            self.stop()
            self._doc = doc
            for name in list(doc.keys()):
                self._observe(name)
            if known:
                self._publish(RESET)
            return
        for name in list(doc.keys()):
            if name not in self._subscriptions and name[0] in TYPES:
                self._observe(name)
                content = to_plain(container(doc, name))
                if isinstance(content, dict):
                    for key, value in content.items():
                        self._publish(Change(KINDS[name[0]], name[2:], (), key, "set", value))
                elif content:
                    inserted = content if isinstance(content, str) else list(content)
                    self._publish(Change(KINDS[name[0]], name[2:], (), None, "edit", [{"insert": inserted}]))

    def stop(self) -> None:
        for shared, subscription in self._subscriptions.values():
            shared.unobserve(subscription)
        self._subscriptions.clear()
        self._doc = None

    def _observe(self, name: str) -> None:
        if name[0] not in TYPES or self._doc is None:
            return
        shared = container(self._doc, name)
        subscription = shared.observe_deep(lambda events: self._on_events(name, events))
        self._subscriptions[name] = (shared, subscription)

    def _on_events(self, name: str, events: list[Any]) -> None:
        kind = KINDS[name[0]]
        for event in events:
            path = tuple(event.path)
            if isinstance(event, MapEvent):
                for key, change in event.keys.items():  # type: ignore[attr-defined]
                    gone = change["action"] == "delete"
                    value = None if gone else to_plain(change["newValue"])
                    self._publish(Change(kind, name[2:], path, key, "delete" if gone else "set", value))
            else:
                delta = [{what: to_plain(part) for what, part in step.items()} for step in event.delta]
                self._publish(Change(kind, name[2:], path, None, "edit", delta))
