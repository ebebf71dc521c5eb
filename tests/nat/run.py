"""NAT traversal in three tiers; what this machine does not allow is skipped, with the reason.

    T0  boxes of the simulated internet (also part of `make test`)
    T1  real daemons and kernel NATs (nftables) in namespaces inside `unshare -Urnm`: no root needed
    T2  delay, loss and rate limits on T1: needs root and /dev/net/tun

Arguments go to pytest: `python tests/nat/run.py -k symseq`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

from nat_lab import missing  # noqa: E402

INSIDE = 'mount -t tmpfs none /run && mkdir /run/netns && exec "$@"'
"""`ip netns` keeps its names under /run, which is not ours outside."""


def lab_problem() -> str | None:
    """Why T1 cannot run here, `None` when it can."""
    try:
        done = subprocess.run(["unshare", "-Urnm", "true"], capture_output=True, text=True, check=False)
    except OSError:
        return "unshare is missing (Debian: apt install util-linux)"
    if done.returncode:
        return f"user namespaces are not allowed here ({done.stderr.strip()})"
    return missing()


def main(arguments: list[str]) -> int:
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    simulated = sorted(str(path) for path in (ROOT / "tests" / "sim").glob("test_nat_*.py"))
    codes = {"T0": subprocess.run([*pytest, *simulated], cwd=ROOT, check=False).returncode}
    skipped = {"T2": "not there yet"}
    problem = lab_problem()
    if problem is None:
        command = ["unshare", "-Urnm", "--fork", "--kill-child", "sh", "-c", INSIDE, "sh", *pytest, str(HERE)]
        environment = {**os.environ, "LATTICA_NAT_LAB": "1"}
        codes["T1"] = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    else:
        skipped["T1"] = problem
    for tier, code in codes.items():
        sys.stdout.write(f"{tier}: {'passed' if code == 0 else 'nothing selected' if code == 5 else 'FAILED'}\n")
    for tier, reason in sorted(skipped.items()):
        sys.stdout.write(f"{tier}: skipped: {reason}\n")
    return max((code for code in codes.values() if code != 5), default=0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
