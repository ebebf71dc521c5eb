"""A few seconds of the fuzzer with a fixed seed, in a process of its own because it limits its memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CASES = 2500


def test_fuzz_for_a_moment() -> None:
    command = [sys.executable, str(Path(__file__).with_name("run.py")), "--seed", "1", "--cases", str(CASES)]
    result = subprocess.run(
        [*command, "--seconds", "120"], capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{CASES} cases" in result.stdout
