"""NAT traversal in three tiers; what this machine does not allow is skipped, with the reason.

    T0  boxes of the simulated internet (also part of `make test`)
    T1  real daemons and kernel NATs (nftables) in namespaces inside `unshare -Urnm`: no root needed
    T2  the same with delay, loss, slow lines and boxes that restart: needs a TUN device, so root on most machines

Arguments go to pytest: `python tests/nat/run.py -k symseq`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

from nat_lab import missing  # noqa: E402

PEERS = ROOT / "tests" / "interop" / "install_peers.py"
SECONDS = {"T0": 60, "T1": 1200, "T2": 240}
"""What a tier may take; it is ended then, and failed. On two cores they take 5, 520 and 70 s."""
LAST_WORDS_SECONDS = 20
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


def no_tun() -> str | None:
    """Why T2 cannot run where T1 can."""
    probe = in_namespaces([sys.executable, str(HERE / "tun_core.py"), "--probe"])
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else None


def in_namespaces(command: list[str]) -> list[str]:
    """Nothing of what `command` makes is left when it ends."""
    return ["unshare", "-Urnm", "--fork", "--kill-child", "sh", "-c", INSIDE, "sh", *command]


def run_tier(tier: str, command: list[str], environment: dict[str, str]) -> int:
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(SECONDS[tier])
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        sys.stderr.write(f"{tier}: ended after {time.monotonic() - started:.0f} s\n")
        code = 1
        os.killpg(process.pid, signal.SIGINT)  # pytest still says what failed until now
        try:
            process.wait(LAST_WORDS_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    sys.stdout.write(f"{tier}: {time.monotonic() - started:.0f} s\n")
    return code


def peers_problem() -> str | None:
    """Why the Go and Rust peers are not here. They are installed outside: there is no network inside."""
    done = subprocess.run([sys.executable, str(PEERS)], capture_output=True, text=True, check=False)
    return f"they could not be installed: {done.stderr.strip()[-300:]}" if done.returncode else None


def main(arguments: list[str]) -> int:
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    simulated = sorted(str(path) for path in (ROOT / "tests" / "sim").glob("test_nat_*.py"))
    over_tun = sorted(str(path) for path in HERE.glob("test_tun_*.py"))
    codes = {"T0": run_tier("T0", [*pytest, *simulated], {**os.environ})}
    skipped = {}
    environment = {**os.environ, "LATTICA_NAT_LAB": "1"}
    problem = lab_problem()
    if problem is None:
        kernel = [*pytest, str(HERE), f"--ignore-glob={HERE}/test_tun_*.py"]
        without_peers = peers_problem()
        if without_peers is not None:
            skipped["T1 with Go and Rust peers"] = without_peers
            kernel += ["-m", "not interop"]
        codes["T1"] = run_tier("T1", in_namespaces(kernel), environment)
    else:
        skipped["T1"] = problem
    problem = problem or no_tun()
    if problem is None:
        codes["T2"] = run_tier("T2", in_namespaces([*pytest, *over_tun]), environment)
    else:
        skipped["T2"] = problem
    for tier, code in codes.items():
        sys.stdout.write(f"{tier}: {'passed' if code == 0 else 'nothing selected' if code == 5 else 'FAILED'}\n")
    for tier, reason in sorted(skipped.items()):
        sys.stdout.write(f"{tier}: skipped: {reason}\n")
    return max((code for code in codes.values() if code != 5), default=0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
