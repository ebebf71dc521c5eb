"""Where others reach this node: what they see, what they tried, and what changes when our interfaces do."""

from lattica.reach.interfaces import InterfaceWatch
from lattica.reach.keep_alive import KeepAlives
from lattica.reach.observed import ObservedAddresses
from lattica.reach.server import DialServer
from lattica.reach.service import ReachService

__all__ = ["DialServer", "InterfaceWatch", "KeepAlives", "ObservedAddresses", "ReachService"]
