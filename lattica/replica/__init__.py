"""Spaces: replicated state that converges without a server and that anybody can verify.

space = await node.spaces.create("roster")
space["layers"] = {"0-11": str(node.peer_id)}
space.counter("requests").increment()
async for change in space.watch(): ...
"""

from __future__ import annotations

from lattica.replica.changes import Change
from lattica.replica.service import SpaceInfo, SpaceService
from lattica.replica.shared import Counter, SharedList, SharedMap, SharedSet, SharedText
from lattica.replica.space import Space
from lattica.replica.store import SpaceStore

__all__ = [
    "Change",
    "Counter",
    "SharedList",
    "SharedMap",
    "SharedSet",
    "SharedText",
    "Space",
    "SpaceInfo",
    "SpaceService",
    "SpaceStore",
]
