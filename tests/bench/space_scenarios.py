"""Replicated state: what an edit costs, how quickly replicas meet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

from driven import Driven, driven
from measured import HERE, Bench, Figure
from nacl.signing import VerifyKey

from lattica_protocols.keys import PrivateKey
from lattica_protocols.replica.operation import Operation

SCRIPT = HERE / "space_node.py"


def _node(stack: ExitStack, bench: Bench, name: str) -> Driven:
    settings = {"home": str(bench.folder / name)}
    return stack.enter_context(driven(sys.executable, SCRIPT, settings, log=bench.folder / f"{name}.log"))


def space_sync(bench: Bench) -> Iterator[Figure]:
    """100,000 operations: made on one node, fetched by another, from the first operation and from a checkpoint."""
    count = 100_000 // bench.scale
    edit = Figure("space: local edit, signed, stored, visible", "/s", "", 2_000, 5_000)
    first = Figure("space: first sync of 100,000 operations, TCP", "s", "", 10, 4, lower_is_better=True)
    later = Figure("space: the same from a checkpoint", "s", "", 1, 0.3, lower_is_better=True)
    start = Figure("space: start with 100,000 operations on disk", "s", "", 10, 4, lower_is_better=True)
    disk = Figure("space: bytes on disk per small map edit, less the update", "B", "", 220, 160, lower_is_better=True)
    wire = Figure("space: bytes on the wire per small map edit, the same", "B", "", 220, 160, lower_is_better=True)
    for number in range(bench.rounds):
        with ExitStack() as stack:
            one = _node(stack, bench, f"space-one-{number}")
            space = one.do("create", "bench", [])
            empty = one.do("disk")
            filled = one.do("fill", space, count)
            edit.ours.append(filled["per_second"])
            disk.ours.append((one.do("disk") - empty) / count - filled["update_bytes"])
            with ExitStack() as other:
                two = _node(other, bench, f"space-two-{number}")
                seconds = two.do("join", space, one.hello["addr"], one.do("root", space))
                first.ours.append(seconds * 100_000 / count)
            two = _node(stack, bench, f"space-two-{number}")
            start.ours.append(two.hello["start_seconds"])
            two.do("join", space, one.hello["addr"], one.do("root", space))
            wire.ours.append(one.do("wire", space, 1000) - filled["update_bytes"])
            one.do("checkpoint", space)
            three = _node(stack, bench, f"space-three-{number}")
            later.ours.append(three.do("join", space, one.hello["addr"], one.do("root", space)))
    yield from (edit, first, later, start, disk, wire)


def space_everywhere(bench: Bench) -> Iterator[Figure]:
    """An edit on one of 20 nodes in one process until all 20 show it, beyond the longest round trips."""
    bar = Figure("space: edit until 20 of 20 show it, less 3 round trips", "ms", "", 50, 50, lower_is_better=True)
    aim = Figure("space: the same, less 2 round trips", "ms", "", None, 20, lower_is_better=True)
    for _ in range(bench.rounds):
        with driven(sys.executable, SCRIPT, {}, log=bench.folder / "everywhere.log") as process:
            result = process.do("everywhere", 20, 40)
            bar.ours.append((result["median"] - 3 * result["longest_trip"]) * 1e3)
            aim.ours.append((result["median"] - 2 * result["longest_trip"]) * 1e3)
    yield bar
    yield aim


def space_signatures(bench: Bench) -> Iterator[Figure]:
    """CPU of the signature checks, against PyNaCl over the same signatures in a bare loop."""
    figure = Figure("space: CPU of signature checks", "s", "PyNaCl, bare loop", 2.5, 1.5, lower_is_better=True)
    count = 20_000 // bench.scale
    key, space = PrivateKey.generate(bytes(32)), bytes(32)
    encoded, previous = [], bytes(32)
    for seq in range(1, count + 1):
        op = Operation.seal(key, space, instance=1, seq=seq, parents=[previous], time=1, body=b"x" * 30)
        encoded.append(op.encoded)
        previous = op.id
    domain = b"lattica-replica-op-1" + space
    bare = [(domain + data[:-66], data[-64:]) for data in encoded]
    verify_key = VerifyKey(key.public_key.data)

    def ours() -> float:
        parsed = [Operation.decode_untrusted(data, space) for data in encoded]
        before = time.process_time()
        assert all(op.check_signature(space) for op in parsed)
        return time.process_time() - before

    def theirs() -> float:
        before = time.process_time()
        for message, signature in bare:
            verify_key.verify(message, signature)
        return time.process_time() - before

    for _ in range(bench.rounds):
        figure.ours.append(ours() * 100_000 / count)
        figure.theirs.append(theirs() * 100_000 / count)
    yield figure


SPACE_SCENARIOS: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    "space-sync": space_sync,
    "space-everywhere": space_everywhere,
    "space-signatures": space_signatures,
}
