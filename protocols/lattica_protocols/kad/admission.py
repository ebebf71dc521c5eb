"""How much one peer may ask of us: a token bucket of requests and a number of streams at once."""

from __future__ import annotations

from dataclasses import dataclass

from lattica_protocols.limits import KAD_REQUEST_BURST, KAD_REQUESTS_PER_SECOND, KAD_STREAMS_PER_PEER
from lattica_protocols.peer_id import PeerId


@dataclass(slots=True)
class _Account:
    tokens: float
    updated: float
    streams: int = 0


class Admission:
    """One account per peer that asked lately. An account that is full again and has no streams is forgotten."""

    def __init__(
        self,
        *,
        rate: float = KAD_REQUESTS_PER_SECOND,
        burst: float = KAD_REQUEST_BURST,
        streams: int = KAD_STREAMS_PER_PEER,
    ) -> None:
        self._rate = rate
        self._burst = burst
        self._streams = streams
        self._accounts: dict[PeerId, _Account] = {}
        self._swept = 0.0

    def stream_opened(self, peer: PeerId, now: float) -> bool:
        """Whether to serve one more stream of `peer`; if so, `stream_closed` has to follow."""
        account = self._account(peer, now)
        if account.streams >= self._streams:
            return False
        account.streams += 1
        return True

    def stream_closed(self, peer: PeerId, now: float) -> None:
        self._account(peer, now).streams -= 1
        if now - self._swept > self._burst / self._rate:
            self._swept = now
            for other in [p for p, a in self._accounts.items() if self._is_idle(a, now)]:
                del self._accounts[other]

    def request(self, peer: PeerId, now: float) -> bool:
        """Whether to answer one more request of `peer` now."""
        account = self._account(peer, now)
        account.tokens = min(self._burst, account.tokens + (now - account.updated) * self._rate)
        account.updated = now
        if account.tokens < 1:
            return False
        account.tokens -= 1
        return True

    def __len__(self) -> int:
        return len(self._accounts)

    def _account(self, peer: PeerId, now: float) -> _Account:
        return self._accounts.setdefault(peer, _Account(self._burst, now))

    def _is_idle(self, account: _Account, now: float) -> bool:
        return not account.streams and account.tokens + (now - account.updated) * self._rate >= self._burst
