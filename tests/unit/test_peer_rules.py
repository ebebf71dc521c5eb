"""The allow and block lists survive restarts and decide who may connect."""

from __future__ import annotations

from pathlib import Path

import pytest

from lattica.errors import ConfigError
from lattica_daemon.rules import PeerRules
from lattica_protocols.keys import PrivateKey
from lattica_protocols.peer_id import PeerId

ALICE, BOB = (PeerId.from_public_key(PrivateKey.generate(bytes([n]) * 32).public_key) for n in (1, 2))


def test_a_rule_decides_and_the_default_for_the_rest(tmp_path: Path) -> None:
    rules = PeerRules(tmp_path / "rules.json", "allow")
    rules.load()
    assert rules.refusal(ALICE) is None
    rules.set(ALICE, "block")
    assert rules.refusal(ALICE) is not None
    assert rules.refusal(BOB) is None
    rules.set(ALICE, "allow")
    assert rules.refusal(ALICE) is None


def test_with_a_blocking_default_the_allow_rules_are_the_guest_list(tmp_path: Path) -> None:
    rules = PeerRules(tmp_path / "rules.json", "block")
    rules.set(ALICE, "allow")
    assert rules.refusal(ALICE) is None
    assert rules.refusal(BOB) == "not on the allow list here"
    rules.set(ALICE, None)
    assert rules.refusal(ALICE) is not None


def test_rules_survive_a_restart(tmp_path: Path) -> None:
    PeerRules(tmp_path / "rules.json", "allow").set(ALICE, "block")
    again = PeerRules(tmp_path / "rules.json", "allow")
    again.load()
    assert again.listing() == {"default": "allow", "allow": [], "block": [str(ALICE)]}


@pytest.mark.parametrize("text", ["{", "[]", '{"block": ["nobody"]}', '{"block": [1]}', '{"allow": 3}'])
def test_a_damaged_file_is_refused_and_not_guessed_at(tmp_path: Path, text: str) -> None:
    (tmp_path / "rules.json").write_text(text)
    with pytest.raises(ConfigError, match=r"rules\.json"):
        PeerRules(tmp_path / "rules.json", "allow").load()


def test_a_rule_that_cannot_be_written_is_not_in_force(tmp_path: Path) -> None:
    rules = PeerRules(tmp_path / "missing" / "rules.json", "allow")
    with pytest.raises(ConfigError, match="cannot write"):
        rules.set(ALICE, "block")
    assert rules.refusal(ALICE) is None
