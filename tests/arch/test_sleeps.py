"""A sleep in the tests has a name that says why: a pace, or the length of a measurement. Waiting is in `waiting`."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).parents[1]


def sleeps_for_a_number(tree: ast.AST) -> list[int]:
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "sleep"
        and any(isinstance(part, ast.Constant) and isinstance(part.value, int | float) for part in node.args)
    ]


def test_no_test_sleeps_for_a_bare_number() -> None:
    found = {
        f"{path.relative_to(TESTS)}:{line}"
        for path in TESTS.rglob("*.py")
        for line in sleeps_for_a_number(ast.parse(path.read_text()))
    }
    assert not found, "wait for the event, or name the pace"


def test_a_bare_number_is_found() -> None:
    assert sleeps_for_a_number(ast.parse("time.sleep(PACE)\ntime.sleep(0.1)")) == [2]
