"""Small signed values in the network, and the routing table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lattica.errors import InvalidArgument
from lattica_protocols.peer_id import PeerId

if TYPE_CHECKING:
    from lattica_daemon.daemon import Daemon


class DhtControl:
    """Methods about Kademlia."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def dht_put(self, key: str, value: object, ttl: float | None = None) -> dict[str, Any]:
        """Publish a value (a text, or bytes) under our own `key`: `{key, sequence, expires, stored_on}`.

        `ttl`: seconds it is valid; by default it is renewed as long as the daemon runs. Others read it as `PEER/key`.
        """
        if not isinstance(value, str | bytes):
            raise InvalidArgument(f"a value is a text or bytes, not {type(value).__name__}")
        node = self._daemon.node
        data = value.encode() if isinstance(value, str) else value
        stored = await node.kad.put_value(_own_name(key, node.peer_id), data, lifetime=ttl)
        return {
            "key": f"{node.peer_id}/{_own_name(key, node.peer_id)}",
            "sequence": stored.sequence,
            "expires": stored.expires,
            "stored_on": stored.stored_on,
        }

    async def dht_get(self, key: str) -> dict[str, Any]:
        """The newest valid value of `KEY` (ours) or `PEER/KEY`: `{key, value, publisher, sequence, expires}`."""
        node = self._daemon.node
        publisher, name = _split_key(key, node.peer_id)
        found = await node.kad.get_value(name, publisher)
        try:
            value: str | bytes = found.value.decode()
        except UnicodeDecodeError:
            value = found.value
        return {
            "key": f"{publisher}/{name}",
            "value": value,
            "publisher": str(publisher),
            "sequence": found.sequence,
            "expires": found.expires,
        }

    async def dht_info(self) -> dict[str, Any]:
        """`{peers, buckets: [{prefix_bits, peers}], mode, protocol, …}`."""
        return self._daemon.node.kad.info()


def _split_key(key: str, own: PeerId) -> tuple[PeerId, str]:
    """`PEER/NAME`, or `NAME`, which is one of ours and may have slashes in it, too."""
    if not isinstance(key, str) or not key:
        raise InvalidArgument("a key is a text")
    publisher, _, name = key.partition("/")
    try:
        return PeerId.parse(publisher), name
    except ValueError:
        return own, key


def _own_name(key: str, own: PeerId) -> str:
    publisher, name = _split_key(key, own)
    if publisher != own:
        raise InvalidArgument(f"only {publisher} can publish under its id: a value is signed by its publisher")
    return name
