"""Every bound on a size or count that a peer can choose, each with its reason.

Units: bytes unless the name says otherwise. One section per protocol.
"""

from __future__ import annotations
