"""Puts the figures of a run where readers look: a table into the README, a chart beside this file.

python tests/bench/run.py --json figures.json
python tests/bench/publish.py figures.json
"""

from __future__ import annotations

import json
import re
import sys
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parents[1] / "README.md"
CHART = HERE / "figures.svg"
BETWEEN = re.compile(r"(?<=<!-- figures -->\n).*?(?=<!-- end of figures -->)", re.DOTALL)

WIDTH, LABEL, ROW, BAR = 1020, 390, 46, 15
"""Pixels: the picture, the names at its left, the height of a figure, of one of its two bars."""
OURS, THEIRS, TEXT = "#2f6fdb", "#a9b4c2", "#57606a"
"""Read on white and on dark pages alike."""


def amount(value: float, unit: str) -> str:
    number = f"{value:,.0f}" if abs(value) >= 10 else f"{value:.2f}"
    return f"{number} {unit}".replace(" %", "%")


def table(machine: str, rows: list[dict[str, Any]]) -> str:
    lines = [machine, "", "| figure | Lattica | beside | | ratio |", "|---|--:|---|--:|--:|"]
    for row in rows:
        beside, theirs, ratio = row["against"], "", ""
        if row["theirs"] is not None:
            theirs, ratio = amount(row["theirs"], row["unit"]), f"{row['ratio']:.2f}"
        lines.append(f"| {row['figure']} | {amount(row['ours'], row['unit'])} | {beside} | {theirs} | {ratio} |")
    return "\n".join(lines) + "\n"


def chart(rows: list[dict[str, Any]]) -> str:
    """Two bars for each figure that has something to be compared with; the longer one takes the whole width."""
    compared = [row for row in rows if row["theirs"] and row["unit"] in ("MB/s", "calls/s")]
    room = WIDTH - LABEL - 260
    parts = []
    for number, row in enumerate(compared):
        top, most = number * ROW + 8, max(row["ours"], row["theirs"])
        parts.append(f'<text x="{LABEL - 10}" y="{top + 19}" text-anchor="end">{escape(row["figure"])}</text>')
        bars = ((row["ours"], "Lattica", OURS), (row["theirs"], row["against"], THEIRS))
        for line, (value, name, colour) in enumerate(bars):
            y, length = top + line * (BAR + 2), max(2, round(room * value / most))
            label = f"{amount(value, row['unit'])}, {name}"
            parts.append(f'<rect x="{LABEL}" y="{y}" width="{length}" height="{BAR}" rx="2" fill="{colour}"/>')
            parts.append(f'<text x="{LABEL + length + 6}" y="{y + 12}">{escape(label)}</text>')
    height = len(compared) * ROW + 8
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{TEXT}">'
    )
    return "\n".join([head, *parts, "</svg>", ""])


def main() -> None:
    run = json.loads(Path(sys.argv[1]).read_text())
    text = README.read_text()
    if not BETWEEN.search(text):
        raise SystemExit("the README has no place for figures")
    figures = table(run["machine"], run["rows"])
    README.write_text(BETWEEN.sub(lambda _: figures, text))
    CHART.write_text(chart(run["rows"]))


if __name__ == "__main__":
    main()
