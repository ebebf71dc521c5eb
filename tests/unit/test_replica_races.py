"""Golden scenarios: who counts when grants, removals and equivocation race, in any order of arrival."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from replica_members import NOW, data, deliver, forged, genesis, key_of, member, put, update_of

from lattica_protocols.replica.operation import Kind, Operation
from lattica_protocols.replica.replica import Replica
from lattica_protocols.replica.short_form import RowWriter

FILE = Path(__file__).parents[1] / "vectors" / "replica-races.txt"
NUMBERS = {"owner": 0, "a": 1, "b": 2}
ORDERS = 30


@dataclass
class Scenario:
    title: str
    steps: list[str] = field(default_factory=list)
    golden: list[str] = field(default_factory=list)


def scenarios() -> list[Scenario]:
    out: list[Scenario] = []
    for line in FILE.read_text("utf-8").splitlines():
        if line.startswith("== "):
            out.append(Scenario(line[3:]))
        elif line.startswith("-> "):
            out[-1].golden.append(line[3:])
        elif line and not line.startswith("#"):
            out[-1].steps.append(line)
    return out


class Play:
    """Plays the steps of a scenario."""

    def __init__(self, scenario: Scenario) -> None:
        self.space = genesis()
        self.members = {name: member(number, self.space) for name, number in NUMBERS.items()}
        self.made: dict[str, Operation] = {}
        for step in scenario.steps:
            self.step(step)

    def step(self, step: str) -> None:
        name, verb, *words = step.split()
        replica = self.members[name]
        if verb == "sees":
            deliver(replica, *self.with_past(words))
            return
        labels = words[words.index("as") + 1 :]
        if verb == "sets":
            self.made[labels[0]] = put(replica, words[0], int(words[1]))
        elif verb in ("grants", "removes"):
            kind = Kind.GRANT if verb == "grants" else Kind.REMOVE
            who = key_of(NUMBERS[words[0]]).public_key.data
            self.made[labels[0]] = replica.change_members(kind, who, NOW)
        else:
            assert verb == "forks"
            second = forged(replica, update_of(replica, words[0], int(words[2])))
            self.made[labels[0]] = put(replica, words[0], int(words[1]))
            self.made[labels[1]] = second

    def with_past(self, labels: list[str]) -> list[Operation]:
        by_id = {op.id: op for op in self.made.values()}
        found: dict[bytes, Operation] = {}
        stack = [self.made[label] for label in labels]
        while stack:
            op = stack.pop()
            if op.id not in found:
                found[op.id] = op
                stack += [by_id[parent] for parent in op.parents]
        return list(found.values())

    def outcome(self, replica: Replica) -> list[str]:
        counted = [label for label, op in self.made.items() if replica.graph.entries[op.id].counted]
        void = [label for label in self.made if label not in counted]
        out = {author for author, _, _ in replica.graph.exclusions()}
        names = [name for name, number in NUMBERS.items() if key_of(number).public_key.data in out]
        return [
            f"counts: {' '.join(counted) or 'nothing'}",
            f"void: {' '.join(void) or 'nothing'}",
            f"excluded: {' '.join(names) or 'nobody'}",
            f"document: {json.dumps(data(replica), sort_keys=True)}",
        ]


@pytest.mark.parametrize("scenario", scenarios(), ids=lambda scenario: scenario.title)
def test_all_orders_of_arrival_come_to_the_golden_end(scenario: Scenario, request: pytest.FixtureRequest) -> None:
    play = Play(scenario)
    outcomes, roots = set(), set()
    for seed in range(ORDERS):
        ops = list(play.made.values())
        random.Random(seed).shuffle(ops)
        replica = Replica(play.space)
        deliver(replica, *ops)
        assert replica.verify().ok
        outcomes.add(tuple(play.outcome(replica)))
        roots.add(replica.root())
    assert len(outcomes) == 1, outcomes
    assert len(roots) == 1
    found = list(outcomes.pop())
    if request.config.getoption("--rewrite-races", default=False):
        _rewrite(scenario, found)
    else:
        assert found == scenario.golden


def _rewrite(scenario: Scenario, found: list[str]) -> None:
    lines, inside = [], False
    for line in FILE.read_text("utf-8").splitlines():
        if line.startswith("== "):
            inside = line[3:] == scenario.title
        if not (inside and line.startswith("-> ")):
            lines.append(line)
        if inside and line == scenario.steps[-1]:
            lines += [f"-> {each}" for each in found]
    FILE.write_text("\n".join(lines) + "\n", "utf-8")


def test_a_restart_where_something_counted_again() -> None:
    """What counted, then did not, then did again makes the document anew in the middle of loading."""
    space = genesis(3)
    removed, third, owner = member(2, space), member(3, space), member(0, space)
    void = put(removed, "b", 2)
    removal = owner.change_members(Kind.REMOVE, void.author, NOW)
    deliver(third, void)
    replica = Replica(space)
    deliver(replica, void, removal, put(third, "c", 3))
    row, again = RowWriter(), Replica(space)
    stored = [(row.write(entry.op), entry.end - entry.start) for entry in replica.graph.counted()]
    again.load(stored, snapshot=(len(stored), replica.doc.get_update()))
    assert data(again) == data(replica) == {"b": 2, "c": 3}
