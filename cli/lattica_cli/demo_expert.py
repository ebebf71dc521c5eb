"""The worker of the demo: serves one method through the daemon of its home, until its standard input ends."""

from __future__ import annotations

import sys

import numpy as np
from numpy.typing import NDArray

import lattica


class Expert:
    """What a worker writes: a plain class."""

    def forward(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """`x` of any shape, times two plus one."""
        return x * 2 + 1


def main() -> None:
    with lattica.connect(home=sys.argv[1]) as lat:
        lat.serve("expert", Expert())
        sys.stdout.write("serving\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()
