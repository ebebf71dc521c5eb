"""Between which two items a new one of a list or text may stand, so that all replicas come to one order.

yrs puts an item behind its left origin and before its right one; where others were put into the same gap, it walks over
them and compares their origins and client ids. For origins that no honest member could have chosen, the result depends
on what it walked over, so on what came first. Say A stands in a list, B and C were put behind it by two who did not
know of each other, and X is signed as standing between the start and B. Then one replica shows A C X B and another
A X B C, for ever, and one of them the other order after a restart.

Left origins make a tree: an item hangs below its left origin, one without it below the start. In each replica's list
the items below an item follow it without a gap. So what follows an item L directly hangs below L, or below one that L
hangs below, or below the start. The rule is just this, looked at without a list:

    the right origin R of an item with the left origin L is none, or: R is neither L nor above L, and what R hangs below
    is L, above L, or the start

Whatever an honest member writes keeps it, for its two origins are neighbours in its own list. And it is enough: a walk
then never leaves what is below L before it meets an R that is there to be met. It depends on the items' origins alone,
not on the order in which they came, nor on their client ids (those of an equivocator's items change when it is found
out).

The tree is kept for runs of items, not for each: within a run each hangs below the one before it. Each run has its
depth and a link to a run far above (skew-binary jumps), so the question takes logarithmic time.
"""

from __future__ import annotations

Reference = tuple[int, int]


class Run:
    """Items of one client with contiguous clocks, each but the first with the one before it as its left origin."""

    __slots__ = ("above", "at", "client", "clock", "depth", "jump", "jump_at")

    def __init__(self, client: int, clock: int, above: Run | None, at: int) -> None:
        """`above` and `at`: the left origin of the first item, by its run and clock; None: the start."""
        self.client = client
        self.clock = clock
        self.above = above
        self.at = at
        self.depth = 0
        self.jump: Run | None = None
        self.jump_at = 0
        if above is not None:
            self.depth = above.depth + 1
            over = above.jump
            if over is not None and over.jump is not None and above.depth - over.depth == over.depth - over.jump.depth:
                self.jump, self.jump_at = over.jump, over.jump_at
            else:
                self.jump, self.jump_at = above, at

    def left_of(self, clock: int) -> tuple[Run | None, int]:
        """The left origin of the item `clock` of this run."""
        return (self, clock - 1) if clock > self.clock else (self.above, self.at)


def hangs_below(run: Run, clock: int, upper: Run, upper_clock: int) -> bool:
    """Whether the item `clock` of `run` is the item `upper_clock` of `upper`, or hangs below it."""
    while run.depth > upper.depth:
        jump, above = run.jump, run.above
        assert jump is not None
        assert above is not None
        run, clock = (jump, run.jump_at) if jump.depth >= upper.depth else (above, run.at)
    return run is upper and clock >= upper_clock


def is_gap(left: tuple[Run, int] | None, right: tuple[Run, int]) -> bool:
    """Whether an item may have these two as its origins; each is a run and a clock in it."""
    over, over_clock = right[0].left_of(right[1])
    if left is None:
        return over is None
    if over is None:
        return not hangs_below(*left, *right)
    if over is left[0] and over_clock == left[1]:
        return True
    return hangs_below(*left, over, over_clock) and not hangs_below(*left, *right)
