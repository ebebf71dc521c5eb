"""Log lines: fields of the call site, and nothing a peer chose can forge one."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from lattica_daemon.logs import JsonFormatter, TextFormatter


def record(message: str, *args: object, error: bool = False) -> logging.LogRecord:
    info = None
    if error:
        try:
            raise ValueError("wrong")
        except ValueError:
            info = sys.exc_info()
    return logging.LogRecord("lattica.host", logging.INFO, __file__, 1, message, args, info)


def test_fields_of_the_template_become_fields_of_the_object() -> None:
    line = json.loads(JsonFormatter().format(record("refused peer=%s count=%d rtt=%.3f", "abc", 3, 0.25)))
    assert line["event"] == "refused"
    assert line["level"] == "info"
    assert line["part"] == "lattica.host"
    assert (line["peer"], line["count"], line["rtt"]) == ("abc", 3, 0.25)
    assert line["time"].endswith("Z")


def test_text_is_one_line_of_key_and_value() -> None:
    line = TextFormatter().format(record("refused peer=%s why=%s", "abc", "too many"))
    assert line.endswith('info    refused part=lattica.host peer=abc why="too many"')


@pytest.mark.parametrize("value", ["a\nfake event", "x y=z", 'quo"te', "", "a\x1b[31m", "a b", "back\\slash"])
def test_a_value_cannot_forge_a_line_or_a_field(value: str) -> None:
    line = TextFormatter().format(record("refused agent=%s", value))
    assert len(line.splitlines()) == 1
    assert "\x1b" not in line
    assert json.loads(line.partition("agent=")[2]) == value
    assert json.loads(JsonFormatter().format(record("refused agent=%s", value)))["agent"] == value


def test_free_text_of_a_library_is_kept() -> None:
    line = TextFormatter().format(record("something %s happened\nhere", "odd"))
    assert "something odd happened\\nhere part=" in line
    assert json.loads(JsonFormatter().format(record("100% done")))["event"] == "100% done"


def test_a_traceback_follows() -> None:
    assert "ValueError: wrong" in TextFormatter().format(record("failed", error=True)).splitlines()[-1]
    assert "ValueError: wrong" in json.loads(JsonFormatter().format(record("failed", error=True)))["traceback"]
