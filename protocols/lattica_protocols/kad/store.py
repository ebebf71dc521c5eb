"""Provider records and values that other peers stored with us, in memory and bounded.

`poll_changes` gives what changed since the last call, for whoever writes it to disk; `load` puts it back. Times are
Unix seconds, because records outlive the process.

When a bound is reached: the longest unrefreshed provider of a key makes room for another one of that key; a new key,
and a peer over its share, is refused until records expire. Refusing protects what is there against a flood.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.kad.messages import PeerAddrs
from lattica_protocols.kad.records import Validators
from lattica_protocols.limits import (
    KAD_MAX_PROVIDER_RECORDS,
    KAD_MAX_VALUES,
    KAD_MAX_VALUES_BYTES,
    KAD_PROVIDER_KEYS_PER_PEER,
    KAD_PROVIDERS_PER_KEY,
    KAD_VALUES_PER_PUBLISHER,
)
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId

PROVIDER_LIFETIME = 48 * 3600.0
"""Seconds that a provider record lives without being renewed (libp2p's specification)."""

REPUBLISH_INTERVAL = 22 * 3600.0
"""Seconds after which a provider renews its record: twice within a lifetime, with 4 h to spare."""

PROVIDER_ADDRS_LIFETIME = 1800.0
"""Seconds that a provider's addresses are handed out; after that only its id is, to be looked up (libp2p)."""

VALUE_LIFETIME = 48 * 3600.0
"""Seconds that a value lives without being put again, at most until it expires by itself."""


@dataclass(frozen=True, slots=True)
class ProviderRecord:
    """`provider` said at `received` that it has the content `key`."""

    key: bytes
    provider: PeerId
    addrs: tuple[Multiaddr, ...]
    received: float


@dataclass(frozen=True, slots=True)
class ValueRecord:
    """`value` was put under `key`; `sender` is who put it first, for the count of its share."""

    key: bytes
    value: bytes
    sender: bytes
    received: float
    expires: float


@dataclass(frozen=True, slots=True)
class ProviderDropped:
    """`provider` is no longer remembered for `key`."""

    key: bytes
    provider: PeerId


@dataclass(frozen=True, slots=True)
class ValueDropped:
    """The value of `key` is gone."""

    key: bytes


Change = ProviderRecord | ProviderDropped | ValueRecord | ValueDropped


class ProviderStore:
    """Who provides what, as far as we were told."""

    def __init__(self) -> None:
        self._keys: dict[bytes, OrderedDict[PeerId, ProviderRecord]] = {}  # least recently renewed provider first
        self._by_age: OrderedDict[tuple[bytes, PeerId], ProviderRecord] = OrderedDict()  # all, likewise
        self._per_peer: Counter[PeerId] = Counter()
        self._changes: dict[tuple[bytes, PeerId], ProviderRecord | ProviderDropped] = {}

    def __len__(self) -> int:
        return len(self._by_age)

    def add(self, key: bytes, provider: PeerId, addrs: Iterable[Multiaddr], unix_now: float) -> bool:
        """Add or renew; false when the peer's or the whole store's share is used up."""
        record = ProviderRecord(key, provider, tuple(addrs), unix_now)
        providers = self._keys.get(key)
        if providers is not None and provider in providers:
            self._keep(record)
            return True
        if self._per_peer[provider] >= KAD_PROVIDER_KEYS_PER_PEER:
            return False
        if providers is not None and len(providers) >= KAD_PROVIDERS_PER_KEY:
            self._drop(next(iter(providers.values())))
        elif len(self) >= KAD_MAX_PROVIDER_RECORDS:
            return False
        self._keep(record)
        return True

    def get(self, key: bytes, unix_now: float, limit: int | None = None) -> list[PeerAddrs]:
        """Who provides `key`, latest renewal first; addresses only while they are fresh."""
        out: list[PeerAddrs] = []
        providers = self._keys.get(key)
        for record in reversed(providers.values()) if providers else ():
            if len(out) == limit or record.received + PROVIDER_LIFETIME <= unix_now:
                break
            fresh = record.received + PROVIDER_ADDRS_LIFETIME > unix_now
            out.append(PeerAddrs(record.provider, record.addrs if fresh else ()))
        return out

    def remove(self, key: bytes, provider: PeerId) -> None:
        """Forget one record, when there is one."""
        providers = self._keys.get(key)
        if providers is not None and provider in providers:
            self._drop(providers[provider])

    def expire(self, unix_now: float) -> int:
        """Drop what nobody renewed; how many that were."""
        dropped = 0
        while self._by_age:
            oldest = next(iter(self._by_age.values()))
            if oldest.received + PROVIDER_LIFETIME > unix_now:
                break
            self._drop(oldest)
            dropped += 1
        return dropped

    def load(self, records: Iterable[ProviderRecord], unix_now: float) -> None:
        """Put stored records back. Those over today's limits, or from the future, are left out."""
        for record in sorted(records, key=lambda r: r.received):
            if record.received <= unix_now < record.received + PROVIDER_LIFETIME:
                self.add(record.key, record.provider, record.addrs, record.received)
        self._changes.clear()

    def poll_changes(self) -> list[ProviderRecord | ProviderDropped]:
        """What changed since the last call, one entry per record."""
        changes = list(self._changes.values())
        self._changes.clear()
        return changes

    def _keep(self, record: ProviderRecord) -> None:
        providers = self._keys.setdefault(record.key, OrderedDict())
        if providers.pop(record.provider, None) is None:
            self._per_peer[record.provider] += 1
        providers[record.provider] = record
        self._by_age.pop((record.key, record.provider), None)
        self._by_age[record.key, record.provider] = record
        self._changes[record.key, record.provider] = record

    def _drop(self, record: ProviderRecord) -> None:
        providers = self._keys[record.key]
        del providers[record.provider], self._by_age[record.key, record.provider]
        if not providers:
            del self._keys[record.key]
        self._per_peer[record.provider] -= 1
        if not self._per_peer[record.provider]:
            del self._per_peer[record.provider]
        self._changes[record.key, record.provider] = ProviderDropped(record.key, record.provider)


class ValueStore:
    """Values under keys. What may be stored is decided by `validators`."""

    def __init__(self, validators: Validators) -> None:
        self._validators = validators
        self._values: dict[bytes, ValueRecord] = {}
        self._per_sender: Counter[bytes] = Counter()
        self._bytes = 0
        self._changes: dict[bytes, ValueRecord | ValueDropped] = {}

    def __len__(self) -> int:
        return len(self._values)

    @property
    def stored_bytes(self) -> int:
        return self._bytes

    def put_untrusted(self, key: bytes, value: bytes, sender: PeerId, unix_now: float) -> bytes:
        """Store `value` unless a better one is there; gives the value that is stored now.

        `RemoteProtocolError`: the value may not stand under the key, or there is no room for it.
        """
        self._validators.check_untrusted(key, value, unix_now)
        old = self.get(key, unix_now)
        if old is not None and self._validators.better(key, old, value):
            return old
        # The publisher of a /lattica/ key counts for its keys, whoever brings them; of other keys the sender.
        owner = key.split(b"/")[2] if key.startswith(b"/lattica/") else sender.to_bytes()
        self._admit_untrusted(key, value, owner)
        ends = self._validators.expires(key, value)
        expires = unix_now + VALUE_LIFETIME if ends is None else min(ends, unix_now + VALUE_LIFETIME)
        self._keep(ValueRecord(key, value, owner, unix_now, expires))
        return value

    def get(self, key: bytes, unix_now: float) -> bytes | None:
        """The value under `key` that has not expired."""
        record = self._values.get(key)
        return None if record is None or record.expires <= unix_now else record.value

    def expire(self, unix_now: float) -> int:
        """Drop expired values; how many that were."""
        old = [record for record in self._values.values() if record.expires <= unix_now]
        for record in old:
            self._drop(record)
        return len(old)

    def records(self) -> list[ValueRecord]:
        """All values, for putting them again to the peers that are closest by then."""
        return list(self._values.values())

    def load(self, records: Iterable[ValueRecord], unix_now: float) -> None:
        """Put stored values back, without those that expired or are over today's limits."""
        for record in records:
            if (
                record.received <= unix_now < record.expires
                and self._room(record.key, record.value, record.sender) is None
            ):
                self._keep(record)
        self._changes.clear()

    def poll_changes(self) -> list[ValueRecord | ValueDropped]:
        """What changed since the last call, one entry per key."""
        changes = list(self._changes.values())
        self._changes.clear()
        return changes

    def _admit_untrusted(self, key: bytes, value: bytes, owner: bytes) -> None:
        reason = self._room(key, value, owner)
        if reason is not None:
            raise RemoteProtocolError(reason)

    def _room(self, key: bytes, value: bytes, owner: bytes) -> str | None:
        """Why there is no room for `value`; it takes the place of the one that is there."""
        old = self._values.get(key)
        freed = 0 if old is None else len(old.value)
        if self._bytes - freed + len(value) > KAD_MAX_VALUES_BYTES:
            return "the value store is full"
        if old is None and len(self._values) >= KAD_MAX_VALUES:
            return "the value store is full"
        if (old is None or old.sender != owner) and self._per_sender[owner] >= KAD_VALUES_PER_PUBLISHER:
            return f"over {KAD_VALUES_PER_PUBLISHER} values of one publisher"
        return None

    def _keep(self, record: ValueRecord) -> None:
        old = self._values.get(record.key)
        if old is not None:
            self._drop(old)
        self._values[record.key] = record
        self._per_sender[record.sender] += 1
        self._bytes += len(record.value)
        self._changes[record.key] = record

    def _drop(self, record: ValueRecord) -> None:
        del self._values[record.key]
        self._per_sender[record.sender] -= 1
        if not self._per_sender[record.sender]:
            del self._per_sender[record.sender]
        self._bytes -= len(record.value)
        self._changes[record.key] = ValueDropped(record.key)
