"""The fuzzer: `python tests/fuzz/run.py --seconds 600`, or with `--seed N --case M` one case of an earlier run again.

Every case is made from `seed` and its number alone, so any one can be repeated without those before it. A case fails
when something other than `RemoteProtocolError` comes out, when it takes more than `CASE_SECONDS` of this thread's time,
or when it makes the process grow by more than `CASE_BYTES`.
"""

from __future__ import annotations

import argparse
import gc
import random
import resource
import secrets
import sys
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fuzz_targets import Target, all_targets, run_case, unreached

CASE_SECONDS = 2.0
"""CPU time for at most 256 KiB of input. What is linear takes milliseconds."""
CASE_BYTES = 96 << 20
"""Growth of the peak resident memory in one case: objects of 256 KiB of msgpack take 20 MiB."""
ADDRESS_SPACE = 4 << 30
"""The fuzzer gets no more than this from the system, so a case that wants all memory fails instead of the machine."""
MAX_FAILURES = 10


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class Outcome:
    """What became of one case. `failure` is a text: an exception would keep alive what used up the memory."""

    target: Target
    parts: list[bytes]
    accepted: bool
    failure: str | None


def one_case(targets: list[Target], seed: int, number: int) -> Outcome:
    """Make and run case `number`."""
    rng = random.Random(f"{seed}:{number}")
    target = targets[number % len(targets)]
    parts = target.case(rng)
    before, started = _peak_bytes(), time.thread_time()
    accepted, failure = False, None
    try:
        accepted = run_case(target, parts, rng)
    except MemoryError as error:
        traceback.clear_frames(error.__traceback__)
        failure = "".join(traceback.format_exception(error, limit=-6))
    except Exception as error:  # whatever it is, it is what we look for
        failure = "".join(traceback.format_exception(error, limit=-6))
    if failure is not None:
        gc.collect()  # machines stand in reference cycles
    seconds, grown = time.thread_time() - started, _peak_bytes() - before
    if failure is None and seconds > CASE_SECONDS:
        failure = f"{seconds:.1f} s for {sum(map(len, parts))} bytes"
    if failure is None and grown > CASE_BYTES:
        failure = f"{grown >> 20} MiB more memory for {sum(map(len, parts))} bytes"
    return Outcome(target, parts, accepted, failure)


def report(seed: int, number: int, outcome: Outcome) -> None:
    data = b"|".join(outcome.parts)
    shown = data.hex() if len(data) <= 512 else f"{data[:512].hex()}… ({len(data)} bytes)"
    print(f"\nFAILED {outcome.target.name}\n  repeat: --seed {seed} --case {number}\n  input: {shown}")
    print(f"{outcome.failure}"[-6000:])


def fuzz(targets: list[Target], seed: int, seconds: float, cases: int | None) -> int:
    """Run cases until the time or their number is over. How many failures there were."""
    ends = time.monotonic() + seconds
    failed: Counter[str] = Counter()
    accepted: Counter[str] = Counter()
    number = 0
    while time.monotonic() < ends and number != cases and failed.total() < MAX_FAILURES:
        outcome = one_case(targets, seed, number)
        name = outcome.target.name
        if outcome.failure is not None:
            failed[name] += 1
            if failed[name] <= 2:
                report(seed, number, outcome)
        accepted[name] += outcome.accepted
        number += 1
    never = [target.name for target in targets if not accepted[target.name]]
    print(
        f"{number} cases over {len(targets)} targets, {accepted.total()} accepted, {failed.total()} failed, seed {seed}"
    )
    if never:
        print(f"no case accepted: {', '.join(never)}")
    return failed.total()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--cases", type=int, help="stop after so many")
    parser.add_argument("--seed", type=int, default=None, help="default: a new one, which is printed")
    parser.add_argument("--case", type=int, help="run this one only")
    parser.add_argument("--only", default="", help="targets whose name contains this")
    options = parser.parse_args()
    seed = secrets.randbelow(1 << 32) if options.seed is None else options.seed
    warnings.simplefilter("error")
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    print(f"seed {seed}", flush=True)
    targets = all_targets()
    if options.case is not None:
        outcome = one_case(targets, seed, options.case)
        print(f"{outcome.target.name}: {'accepted' if outcome.accepted else 'refused'}")
        if outcome.failure is not None:
            report(seed, options.case, outcome)
        return outcome.failure is not None
    missing = unreached(targets)
    if missing:
        print("nothing runs these; see the docstring of fuzz_targets.py:\n  " + "\n  ".join(missing))
        return 1
    if options.only:
        # The number of a case picks its target, so the others stay in their places and do nothing.
        for target in targets:
            if options.only not in target.name:
                target.run = lambda parts, rng: None
    return fuzz(targets, seed, options.seconds, options.cases) > 0


if __name__ == "__main__":
    sys.exit(main())
