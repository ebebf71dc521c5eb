"""Every line that we log is an event and its fields: only then do they come out as fields in JSON."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from lattica_daemon.logs import record_fields

ROOT = Path(__file__).parents[2]
METHODS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "exception": 40}
FIELD = re.compile(r"^([a-z_]+)=%\S+$")
EVENT = re.compile(r"^[a-z0-9_]+$")
OWN = {"time", "level", "part", "event", "traceback"}
"""Names that the formatter gives itself."""


def log_calls() -> list[tuple[str, ast.Call]]:
    found = []
    for package in ("lattica", "daemon"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute)
                    and node.func.attr in METHODS
                    and isinstance(node.func.value, ast.Name)
                    and node.func.value.id in ("log", "_log", "logger")
                ):
                    found.append((f"{path.relative_to(ROOT)}:{node.lineno}", node))
    return found


CALLS = log_calls()


@pytest.mark.parametrize("call", [call for _, call in CALLS], ids=[place for place, _ in CALLS])
def test_a_line_is_an_event_and_its_fields(call: ast.Call) -> None:
    template = call.args[0]
    assert isinstance(template, ast.Constant)
    assert isinstance(template.value, str)
    event, *parts = template.value.split(" ")
    assert EVENT.match(event), event
    names = [match.group(1) if (match := FIELD.match(part)) else part for part in parts]
    assert len(names) == len(call.args) - 1, "each field has a placeholder and a value"
    assert not set(names) & OWN


def test_what_is_checked_is_what_the_formatter_splits() -> None:
    import logging

    record = logging.LogRecord("lattica", 20, __file__, 1, "seen peer=%s seconds=%.3f", ("abc", 0.5), None)
    assert record_fields(record)["seconds"] == 0.5
    assert len(CALLS) > 100
