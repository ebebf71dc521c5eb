"""Who may connect: an allow list and a block list of peer ids, kept in `rules.json` of the home.

A rule for the peer decides; without one the setting `peers.default` does. `allow` and `block` of the same peer replace
each other. The file is written whole and renamed into place, so a crash leaves the old or the new list.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

from lattica.errors import ConfigError
from lattica_protocols.peer_id import PeerId

Verdict = Literal["allow", "block"]
MAX_RULES = 100_000
"""More than that belongs into a private network's membership."""


class PeerRules:
    """The lists and the default for everybody else (`allow` or `block`)."""

    def __init__(self, path: Path, default: str) -> None:
        self.path = path
        self.default = default
        self._rules: dict[PeerId, Verdict] = {}

    def load(self) -> None:
        """Read the file again. Raises `ConfigError` when it is damaged: guessing would let a blocked peer in."""
        rules: dict[PeerId, Verdict] = {}
        try:
            table = json.loads(self.path.read_text(encoding="utf-8"))
            for verdict in ("allow", "block"):
                for text in table.get(verdict, []):
                    rules[PeerId.parse(text)] = "allow" if verdict == "allow" else "block"
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"cannot read the peer rules in {self.path}: {error}") from None
        self._rules = rules

    def refusal(self, peer: PeerId) -> str | None:
        """Why `peer` may not connect, None when it may."""
        verdict = self._rules.get(peer, self.default)
        if verdict != "block":
            return None
        return "blocked by a rule here" if peer in self._rules else "not on the allow list here"

    def set(self, peer: PeerId, verdict: Verdict | None) -> None:
        """Allow or block `peer`; None takes its rule away. Written before this returns."""
        if verdict is not None and len(self._rules) >= MAX_RULES and peer not in self._rules:
            raise ConfigError(f"there are {MAX_RULES} rules already, which is the limit")
        rules = dict(self._rules)
        if verdict is None:
            rules.pop(peer, None)
        else:
            rules[peer] = verdict
        self._write(rules)
        self._rules = rules

    def listing(self) -> dict[str, object]:
        """`{default, allow: [peer], block: [peer]}`."""
        return {"default": self.default, **_as_table(self._rules)}

    def _write(self, rules: dict[PeerId, Verdict]) -> None:
        temporary = self.path.with_suffix(".tmp")
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump(_as_table(rules), file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except OSError as error:
            raise ConfigError(f"cannot write the peer rules to {self.path}: {error.strerror}") from None


def _as_table(rules: dict[PeerId, Verdict]) -> dict[str, list[str]]:
    return {
        name: sorted(str(peer) for peer, verdict in rules.items() if verdict == name) for name in ("allow", "block")
    }
