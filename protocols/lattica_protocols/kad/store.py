"""Provider records and values that other peers stored with us, in memory and bounded.

`poll_changes` gives what changed since the last call, for whoever writes it to disk; `load` puts it back. Times are
Unix seconds, because records outlive the process.

When a bound is reached, the origin that has most makes room for one that has less (`shares.py`): among the providers
of one key, and in a store that is full. A peer over its share is refused until records expire, and so is an origin for
which nobody has to make room; among the providers of one key it replaces its own longest unrefreshed one.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.kad.messages import PeerAddrs
from lattica_protocols.kad.records import Validators
from lattica_protocols.kad.shares import UNKNOWN, Shares
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
    origin: str = field(default=UNKNOWN, compare=False)
    """See `shares.py`; not kept over a restart."""


@dataclass(frozen=True, slots=True)
class ValueRecord:
    """`value` was put under `key`; `sender` is who put it first, for the count of its share."""

    key: bytes
    value: bytes
    sender: bytes
    received: float
    expires: float
    origin: str = field(default=UNKNOWN, compare=False)
    """As in `ProviderRecord`, of whoever put it last."""


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
        self._keys: dict[bytes, dict[PeerId, ProviderRecord]] = {}  # least recently renewed provider first
        self._by_age: OrderedDict[tuple[bytes, PeerId], ProviderRecord] = OrderedDict()  # all, likewise
        self._per_peer: Counter[PeerId] = Counter()
        self._shares: Shares[tuple[bytes, PeerId]] = Shares()
        self._changes: dict[tuple[bytes, PeerId], ProviderRecord | ProviderDropped] = {}

    def __len__(self) -> int:
        return len(self._by_age)

    def add(
        self, key: bytes, provider: PeerId, addrs: Iterable[Multiaddr], unix_now: float, origin: str = UNKNOWN
    ) -> bool:
        """Add or renew; false when the peer's share is used up, or the whole store and nobody has to make room."""
        record = ProviderRecord(key, provider, tuple(addrs), unix_now, origin)
        providers = self._keys.get(key)
        if providers is not None and provider in providers:
            self._keep(record)
            return True
        if self._per_peer[provider] >= KAD_PROVIDER_KEYS_PER_PEER:
            return False
        if providers is not None and len(providers) >= KAD_PROVIDERS_PER_KEY:
            self._drop(_displaced_by(origin, providers.values()))
        elif len(self) >= KAD_MAX_PROVIDER_RECORDS:
            displaced = self._shares.displaced_by(origin)
            if displaced is None:
                return False
            self._drop(self._by_age[displaced])
        self._keep(record)
        return True

    def get(self, key: bytes, unix_now: float, limit: int | None = None) -> list[PeerAddrs]:
        """Who provides `key`; addresses only while they are fresh. Origins take turns, each with its latest renewal
        first: otherwise one that comes with many would be all that anybody hears of."""
        providers = self._keys.get(key, {})
        found = _in_turns(r for r in reversed(providers.values()) if r.received + PROVIDER_LIFETIME > unix_now)
        return [
            PeerAddrs(r.provider, r.addrs if r.received + PROVIDER_ADDRS_LIFETIME > unix_now else ())
            for r in found[:limit]
        ]

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
        providers = self._keys.setdefault(record.key, {})
        entry = record.key, record.provider
        old = providers.pop(record.provider, None)
        if old is None:
            self._per_peer[record.provider] += 1
        else:
            del self._by_age[entry]
            self._shares.drop(old.origin, entry)
        providers[record.provider] = record
        self._by_age[entry] = record
        self._shares.put(record.origin, entry)
        self._changes[entry] = record

    def _drop(self, record: ProviderRecord) -> None:
        providers = self._keys[record.key]
        entry = record.key, record.provider
        self._shares.drop(record.origin, entry)
        del providers[record.provider], self._by_age[entry]
        if not providers:
            del self._keys[record.key]
        self._per_peer[record.provider] -= 1
        if not self._per_peer[record.provider]:
            del self._per_peer[record.provider]
        self._changes[entry] = ProviderDropped(record.key, record.provider)


def _displaced_by(origin: str, records: Iterable[ProviderRecord]) -> ProviderRecord:
    """Which of the providers of a key, oldest first, makes room for one of `origin`."""
    counts = Counter(record.origin for record in records)
    most = max(counts, key=counts.__getitem__)
    loser = origin if counts[origin] >= counts[most] else most
    return next(record for record in records if record.origin == loser)


def _in_turns(records: Iterable[ProviderRecord]) -> list[ProviderRecord]:
    """One of each origin, then another one of each, and so on."""
    seen: Counter[str] = Counter()
    turns = []
    for number, record in enumerate(records):
        turns.append((seen[record.origin], number, record))
        seen[record.origin] += 1
    turns.sort(key=lambda turn: turn[:2])
    return [record for _, _, record in turns]


class ValueStore:
    """Values under keys. What may be stored is decided by `validators`."""

    def __init__(self, validators: Validators) -> None:
        self._validators = validators
        self._values: dict[bytes, ValueRecord] = {}
        self._per_sender: Counter[bytes] = Counter()
        self._shares: Shares[bytes] = Shares()
        self._bytes = 0
        self._changes: dict[bytes, ValueRecord | ValueDropped] = {}

    def __len__(self) -> int:
        return len(self._values)

    @property
    def stored_bytes(self) -> int:
        return self._bytes

    def put_untrusted(self, key: bytes, value: bytes, sender: PeerId, unix_now: float, origin: str = UNKNOWN) -> bytes:
        """Store `value` unless a better one is there; gives the value that is stored now.

        `RemoteProtocolError`: the value may not stand under the key, or there is no room for it.
        """
        self._validators.check_untrusted(key, value, unix_now)
        old = self.get(key, unix_now)
        if old is not None and self._validators.better(key, old, value):
            return old
        # The publisher of a /lattica/ key counts for its keys, whoever brings them; of other keys the sender.
        owner = key.split(b"/")[2] if key.startswith(b"/lattica/") else sender.to_bytes()
        self._admit_untrusted(key, value, owner, origin)
        if old == value:  # or whoever repeats others' values would make them his, and those of a crowd
            origin = self._values[key].origin
        ends = self._validators.expires(key, value)
        expires = unix_now + VALUE_LIFETIME if ends is None else min(ends, unix_now + VALUE_LIFETIME)
        self._keep(ValueRecord(key, value, owner, unix_now, expires, origin))
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
                and not self._over_share(record.key, record.sender)
                and not self._is_full(record.key, record.value)
            ):
                self._keep(record)
        self._changes.clear()

    def poll_changes(self) -> list[ValueRecord | ValueDropped]:
        """What changed since the last call, one entry per key."""
        changes = list(self._changes.values())
        self._changes.clear()
        return changes

    def _admit_untrusted(self, key: bytes, value: bytes, owner: bytes, origin: str) -> None:
        if self._over_share(key, owner):
            raise RemoteProtocolError(f"over {KAD_VALUES_PER_PUBLISHER} values of one publisher")
        while self._is_full(key, value):
            displaced = self._shares.displaced_by(origin, _weight(value))
            if displaced is None:
                raise RemoteProtocolError("the value store is full")
            self._drop(self._values[displaced])

    def _over_share(self, key: bytes, owner: bytes) -> bool:
        old = self._values.get(key)
        return (old is None or old.sender != owner) and self._per_sender[owner] >= KAD_VALUES_PER_PUBLISHER

    def _is_full(self, key: bytes, value: bytes) -> bool:
        """There is no room for `value`, which takes the place of the one that is there."""
        old = self._values.get(key)
        freed = 0 if old is None else len(old.value)
        too_many = old is None and len(self._values) >= KAD_MAX_VALUES
        return too_many or self._bytes - freed + len(value) > KAD_MAX_VALUES_BYTES

    def _keep(self, record: ValueRecord) -> None:
        old = self._values.get(record.key)
        if old is not None:
            self._drop(old)
        self._values[record.key] = record
        self._shares.put(record.origin, record.key, _weight(record.value))
        self._per_sender[record.sender] += 1
        self._bytes += len(record.value)
        self._changes[record.key] = record

    def _drop(self, record: ValueRecord) -> None:
        del self._values[record.key]
        self._shares.drop(record.origin, record.key)
        self._per_sender[record.sender] -= 1
        if not self._per_sender[record.sender]:
            del self._per_sender[record.sender]
        self._bytes -= len(record.value)
        self._changes[record.key] = ValueDropped(record.key)


def _weight(value: bytes) -> int:
    """What a value takes of the store: its bytes, and its place as so many as each place has on average."""
    return len(value) + KAD_MAX_VALUES_BYTES // KAD_MAX_VALUES
