"""Labs whose public hosts are each in an address range of their own: only such count as independent of each other."""

from __future__ import annotations

import itertools

from nat_lab import Lab

_numbers = itertools.count(1000)
"""For names of namespaces and links, over all labs of the process."""


class SpreadLab(Lab):
    """One /24 of 198.18.0.0/16 for each public address."""

    def next_name(self, kind: str) -> str:
        return f"{kind}{next(_numbers)}"

    def _public_address(self) -> str:
        return f"198.18.{self.next_number()}.1"


class GlobalLab(SpreadLab):
    """The same with addresses that others take for real ones; Go asks nobody in a range for benchmarks."""

    def _public_address(self) -> str:
        return f"45.{self.next_number()}.0.1"
