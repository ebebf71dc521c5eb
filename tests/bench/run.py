"""The benchmark: ours and the peers in one run on one machine, alternating, medians and ratios.

    python tests/bench/run.py [--quick] [--only NAME …] [--json FILE]

Every figure is taken `ROUNDS` times; ours and the peer it is compared with take turns, so that a machine that slows
down slows both. A ratio is the ratio of the medians. The 64-in-flight and sequential calls, the streams and the
fetch are encrypted and authenticated on our side and on the Rust side; grpc is not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measured import HERE, Bench
from scenarios import SCENARIOS


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| figure | ours | against | theirs | ratio | bar | aim | |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        unit, compared = row["unit"], row["theirs"] is not None
        theirs = f"{_number(row['theirs'])} {unit}" if compared else ""
        ratio = f"{row['ratio']:.2f}" if compared else ""
        bounds = [_bound(row[name], "" if compared else unit) for name in ("bar", "aim")]
        ours = f"{_number(row['ours'])} {unit}"
        cells = [row["figure"], ours, row["against"], theirs, ratio, *bounds, row["verdict"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _bound(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{_number(value)} {unit}" if unit else f"{value:g}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


@contextmanager
def bench_folder() -> Iterator[Path]:
    """A folder on a real disk, beside the checkout, removed afterwards."""
    base = HERE.parents[1] / ".bench"
    base.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=base) as folder:
        yield Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round, a quarter of the work")
    parser.add_argument("--only", nargs="*", choices=sorted(SCENARIOS), help="these scenarios only")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with bench_folder() as folder, ExitStack() as stack:
        bench = Bench(stack, folder, options.quick)
        for name in options.only or SCENARIOS:
            for figure in SCENARIOS[name](bench):
                rows.append(figure.row())
                print(f"{name}: {table(rows[-1:]).splitlines()[-1]}", file=sys.stderr, flush=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {date.today()}"
    print(f"{machine}\n\n{table(rows)}")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
