"""One seeded run of a space under everything that goes wrong, and a command that makes many.

python tests/sim/replica_runs.py --runs 1000            seeds 0 to 999, 50 replicas each
python tests/sim/replica_runs.py --seed 17 --size 50    one again
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "unit"))

from pycrdt import Doc
from replica_cheats import cheat
from replica_network import EDIT_SECONDS, SETTLE_SECONDS, UNIX, Network, grant

from lattica_protocols.replica import client_ids
from lattica_protocols.replica.operation import Kind
from lattica_protocols.replica.plain import document_value


def run(seed: int, size: int = 50, edits: int = 120) -> dict[str, float]:
    """Edits, cheats, crashes, removals and partitions for 20 s, then quiet. Raises AssertionError when the honest
    replicas do not come to one root and one document.

    Under odd seeds client ids have 11 bits, so that chains collide, by chance and because cheats look for it."""
    bits, client_ids.CLIENT_BITS = client_ids.CLIENT_BITS, 11 if seed % 2 else client_ids.CLIENT_BITS
    try:
        return _run(seed, size, edits)
    finally:
        client_ids.CLIENT_BITS = bits


def _run(seed: int, size: int, edits: int) -> dict[str, float]:
    byzantine = max(1, size // 8)
    network = Network(seed, size, byzantine)
    rng = network.rng
    honest = network.honest()
    writers = [member for member in honest if member.writes]
    for _ in range(edits):
        member = rng.choice(writers)
        network.at(rng.uniform(0, EDIT_SECONDS), lambda member=member: network.edit(member))
    for member in network.members:
        if member.byzantine:
            # It also writes what everybody takes, so that others build on it.
            for _ in range(3):
                network.at(rng.uniform(0, EDIT_SECONDS * 0.6), lambda member=member: network.edit(member))
            for _ in range(4):
                network.at(rng.uniform(1, EDIT_SECONDS), lambda member=member: cheat(network, member))
    for _ in range(max(1, size // 10)):
        member = rng.choice(honest[1:])
        forget = rng.random() < 0.5
        network.at(rng.uniform(1, EDIT_SECONDS), lambda m=member, f=forget: network.crash(m, forget=f))
    removed = rng.choice(writers[1:]).key.public_key.data
    network.at(rng.uniform(2, EDIT_SECONDS), lambda: grant(network, Kind.REMOVE, removed))
    if rng.random() < 0.5:
        network.at(rng.uniform(EDIT_SECONDS / 2, EDIT_SECONDS), lambda: grant(network, Kind.GRANT, removed))
    if rng.random() < 0.5:
        network.at(rng.uniform(5, EDIT_SECONDS), lambda: _checkpoint(network))
    start = rng.uniform(1, EDIT_SECONDS / 2)
    network.at(start, lambda: network.partition.update({m.number: rng.randrange(2) for m in network.members}))
    network.at(start + rng.uniform(2, 10), network.partition.clear)
    network.run(EDIT_SECONDS)
    network.partition.clear()
    agreed = network.run(EDIT_SECONDS + SETTLE_SECONDS, network.agreed)
    replicas = [member.replica for member in honest]
    assert agreed, f"seed {seed}, size {size}: {len({r.root() for r in replicas})} roots after {network.now:.0f} s"
    values = [replica.value() for replica in replicas]
    assert all(value == values[0] for value in values), f"seed {seed}, size {size}: equal roots, different documents"
    for replica in replicas:
        copy = Doc[object]()
        copy.apply_update(replica.doc.get_update())
        assert document_value(copy) == values[0], f"seed {seed}, size {size}: another document after a restart"
    excluded = {author for author, _, _ in replicas[0].graph.exclusions()}
    assert not [m.number for m in honest if m.key.public_key.data in excluded], f"seed {seed}: an honest one excluded"
    verified = replicas[-1].verify()
    assert verified.ok, f"seed {seed}, size {size}: {verified}"
    return {
        "operations": replicas[0].operations(),
        "settled": network.now - EDIT_SECONDS,
        "excluded": len(replicas[0].graph.exclusions()),
        "collided": len(replicas[0].graph.client_ids.collided),
        "lost": sum(len(replica.lost) for replica in replicas),
    }


def _checkpoint(network: Network) -> None:
    owner = network.members[0]
    owner.replica.adopt(owner.replica.make_checkpoint(UNIX + network.now))
    owner.machine.announce_checkpoint()
    network.pump(owner)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--size", type=int, default=50)
    parser.add_argument("--edits", type=int, default=120)
    arguments = parser.parse_args()
    seeds = [arguments.seed] if arguments.seed is not None else range(arguments.first, arguments.first + arguments.runs)
    failed = []
    started = time.monotonic()
    for seed in seeds:
        try:
            result = run(seed, arguments.size, arguments.edits)
        except AssertionError as error:
            failed.append(seed)
            print(f"FAILED {error}", flush=True)
            continue
        if arguments.seed is not None or seed % 50 == 49:
            print(f"seed {seed}: {result}, {time.monotonic() - started:.0f} s so far", flush=True)
    print(
        f"{len(list(seeds)) - len(failed)} runs ended with one root and one document, {len(failed)} did not: {failed}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
