"""Who is there: signed announcements that expire, passed on and never stored.

    [key: bin 32, time: uint (Unix milliseconds), info: bin, Ed25519("lattica-presence-1" || space || time u64 || info)]

An empty info says that the member is gone. A newer time replaces an older one. An announcement counts for 30 s from
when it was first heard here, so clocks need not agree; `time` only orders those of one member. One that is 10 minutes
off our clock is refused, and the time of a member's last one is remembered for so long: whoever keeps an announcement
cannot make a dead member look alive. Each is passed on by everybody, so a member has one a second in the long run. When
there are too many, those of writers push out those of others.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from nacl.bindings import crypto_sign_open
from nacl.exceptions import BadSignatureError

from lattica_protocols.keys import PrivateKey
from lattica_protocols.limits import (
    REPLICA_MAX_CLOCK_SKEW,
    REPLICA_MAX_PRESENT,
    REPLICA_PRESENCE_BURST,
    REPLICA_PRESENCE_SECONDS,
)

_DOMAIN = b"lattica-presence-1"
Record = tuple[bytes, int, bytes, bytes]


@dataclass(frozen=True, slots=True)
class Present:
    """A member that was heard of."""

    key: bytes
    info: bytes
    heard: float
    """The machine's `now` when its last announcement came."""
    record: Record


class Presence:
    """Members of one space that announced themselves lately."""

    def __init__(self, space: bytes) -> None:
        self._space = space
        self._members: dict[bytes, Present] = {}
        self._last: dict[bytes, int] = {}
        """Times of the last announcements, also of members that are gone."""
        self._allowed: dict[bytes, tuple[float, float]] = {}
        """How many more of each were passed on at once, and when that was so."""

    def announce(self, key: PrivateKey, info: bytes, now: float, unix_now: float) -> Record:
        """Our own announcement. Empty `info`: we are gone."""
        own = key.public_key.data
        time = max(int(unix_now * 1000), self._last.get(own, -1) + 1)
        signature = key.sign(_DOMAIN + self._space + time.to_bytes(8, "big") + info)
        record = (key.public_key.data, time, info, signature)
        self._last[record[0]] = time
        self._hear(record, now)
        return record

    def is_here(self, key: bytes) -> bool:
        """Whether a member announced itself and did not leave."""
        return key in self._members

    def _hear(self, record: Record, now: float) -> None:
        key, _, info, _ = record
        if info:
            self._members[key] = Present(key, info, now, record)
        else:
            self._members.pop(key, None)

    def receive_untrusted(
        self, record: Record, now: float, unix_now: float, writers: Container[bytes] = frozenset()
    ) -> bool:
        """Take an announcement; whether it is news."""
        key, time, info, signature = record
        if self._last.get(key, -1) >= time or abs(time / 1000 - unix_now) > REPLICA_MAX_CLOCK_SKEW:
            return False
        if key not in self._members and len(self._members) >= REPLICA_MAX_PRESENT and key not in writers:
            return False
        left, at = self._allowed.get(key, (REPLICA_PRESENCE_BURST, now))
        left = min(REPLICA_PRESENCE_BURST, left + now - at)
        if left < 1:
            return False
        try:
            crypto_sign_open(signature + _DOMAIN + self._space + time.to_bytes(8, "big") + info, key)
        except (BadSignatureError, ValueError):
            return False
        if info and key not in self._members and len(self._members) >= REPLICA_MAX_PRESENT:
            del self._members[next((each for each in self._members if each not in writers), next(iter(self._members)))]
        self._note(key, time, unix_now)
        self._allowed[key] = left - 1, now
        self._hear(record, now)
        return True

    def _note(self, key: bytes, time: int, unix_now: float) -> None:
        if key not in self._last and len(self._last) >= 2 * REPLICA_MAX_PRESENT:
            oldest = (unix_now - REPLICA_MAX_CLOCK_SKEW) * 1000
            self._last = {each: at for each, at in self._last.items() if at >= oldest and each in self._members}
            self._allowed = {each: row for each, row in self._allowed.items() if each in self._last}
        self._last[key] = time

    def expire(self, now: float) -> None:
        limit = now - REPLICA_PRESENCE_SECONDS
        for key in [key for key, member in self._members.items() if member.heard <= limit]:
            del self._members[key]

    def members(self, now: float) -> list[Present]:
        """Who was heard of within 30 s."""
        self.expire(now)
        return sorted(self._members.values(), key=lambda member: member.key)
