"""Log lines on standard error: `key=value` for people, one JSON object a line for machines.

Call sites name the event first and then its fields, with a placeholder each:

    log.info("connection_refused peer=%s reason=%s", peer.short(), reason)

The formatters split that template, so in JSON every field is one of its own, and in text a value with spaces or line
breaks in it is quoted: what a peer chose (an agent, an error message) cannot forge a line or a field. Names of events
and fields are listed in `daemon/README.md`.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import TextIO

_FIELD = re.compile(r"([a-z_][a-z0-9_]*)=%[-+ #0]*[0-9]*(?:\.[0-9]+)?[srdifg]")
_PLAIN = re.compile(r"[^\s\"\\=]+")


def configure(level: str, format: str, stream: TextIO | None = None) -> None:
    """Send everything from `level` up to `stream` (standard error) in `format` (`text` or `json`)."""
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    set_level(level)


def set_level(level: str) -> None:
    """Change the level while running. Libraries below us stay at warnings: their debug output is for their authors."""
    logging.getLogger().setLevel(logging.WARNING)
    for name in ("lattica", "lattica_daemon"):
        logging.getLogger(name).setLevel(level.upper())


def record_fields(record: logging.LogRecord) -> dict[str, object]:
    """`time`, `level`, `part`, `event`, then the fields of the call site, then `traceback` if there is one."""
    when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    event, fields = _split(record)
    out: dict[str, object] = {
        "time": when.replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "part": record.name,
        "event": event,
        **fields,
    }
    if record.exc_info and record.exc_info[0] is not None:
        out["traceback"] = logging.Formatter().formatException(record.exc_info)
    return out


def _split(record: logging.LogRecord) -> tuple[str, dict[str, object]]:
    event, *parts = str(record.msg).split(" ")
    names = [match.group(1) for match in map(_FIELD.fullmatch, parts) if match]
    args = record.args if isinstance(record.args, tuple) else ()
    if len(names) != len(parts) or len(names) != len(args):
        return record.getMessage(), {}  # a library's free text
    values = [arg if isinstance(arg, int | float) else str(arg) for arg in args]
    return event, dict(zip(names, values, strict=True))


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(record_fields(record), ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """`time level event key=value …`; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        fields = record_fields(record)
        trace = fields.pop("traceback", None)
        head = f"{fields.pop('time')} {fields.pop('level'):<7} {_one_line(str(fields.pop('event')))}"
        line = " ".join([head, *(f"{key}={_quoted(value)}" for key, value in fields.items())])
        return f"{line}\n{trace}" if trace else line


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _quoted(value: object) -> str:
    text = str(value) if not isinstance(value, float) else f"{value:.6g}"
    if text.isprintable() and _PLAIN.fullmatch(text):
        return text
    return json.dumps(text)
