"""The router's clock, which starts anew when it forgets its mappings (RFC 6887, section 8.5; RFC 6886, section 3.6)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Epoch:
    """What the router said last, and when."""

    server: int | None = None
    client: float = 0.0

    def restarted(self, server: int, now: float) -> bool:
        """Whether the router lost its state since the last answer; remembers this one.

        Clocks may drift by a sixteenth against each other, and be a second late.
        """
        before, since = self.server, now - self.client
        self.server, self.client = server, now
        if before is None:
            return False
        passed = server - before
        if passed < -1:
            return True
        return since + 2 < passed - passed / 16 or passed + 2 < since - since / 16
