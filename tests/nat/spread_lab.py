"""Labs whose public hosts are each in an address range of their own: only such count as independent of each other."""

from __future__ import annotations

from nat_lab import Lab


class SpreadLab(Lab):
    """One /24 of 198.18.0.0/16 for each public address."""

    def _public_address(self) -> str:
        return f"198.18.{self.next_number()}.1"


class GlobalLab(SpreadLab):
    """The same with addresses that others take for real ones; Go asks nobody in a range for benchmarks."""

    def _public_address(self) -> str:
        return f"45.{self.next_number()}.0.1"
