"""Who is there: signed announcements that expire, passed on and never stored.

    [key: bin 32, time: uint (Unix milliseconds), info: bin, Ed25519("lattica-presence-1" || space || time u64 || info)]

A newer time replaces an older one. An announcement counts for 30 s from when it was first heard here, so clocks need
not agree; `time` only orders those of one member, and one from the past hour's other side is refused as a replay.
"""

from __future__ import annotations

from dataclasses import dataclass

from nacl.bindings import crypto_sign_open
from nacl.exceptions import BadSignatureError

from lattica_protocols.keys import PrivateKey
from lattica_protocols.limits import REPLICA_MAX_CLOCK_SKEW, REPLICA_MAX_PRESENT, REPLICA_PRESENCE_SECONDS

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

    def announce(self, key: PrivateKey, info: bytes, now: float, unix_now: float) -> Record:
        """Our own announcement."""
        time = int(unix_now * 1000)
        signature = key.sign(_DOMAIN + self._space + time.to_bytes(8, "big") + info)
        record = (key.public_key.data, time, info, signature)
        self._members[record[0]] = Present(record[0], info, now, record)
        return record

    def receive_untrusted(self, record: Record, now: float, unix_now: float) -> bool:
        """Take an announcement; whether it is news."""
        key, time, info, signature = record
        known = self._members.get(key)
        if known is not None and known.record[1] >= time:
            return False
        if abs(time / 1000 - unix_now) > REPLICA_MAX_CLOCK_SKEW:
            return False
        if known is None and len(self._members) >= REPLICA_MAX_PRESENT:
            return False
        try:
            crypto_sign_open(signature + _DOMAIN + self._space + time.to_bytes(8, "big") + info, key)
        except (BadSignatureError, ValueError):
            return False
        self._members[key] = Present(key, info, now, record)
        return True

    def expire(self, now: float) -> None:
        limit = now - REPLICA_PRESENCE_SECONDS
        for key in [key for key, member in self._members.items() if member.heard <= limit]:
            del self._members[key]

    def members(self, now: float) -> list[Present]:
        """Who was heard of within 30 s."""
        self.expire(now)
        return sorted(self._members.values(), key=lambda member: member.key)
