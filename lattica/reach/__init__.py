"""Where others reach this node: what they see, what they tried, and what changes when our interfaces do."""

from lattica.reach.observed import ObservedAddresses

__all__ = ["ObservedAddresses"]
