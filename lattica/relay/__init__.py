"""Circuit relay v2: carry other peers' connections (`RelayServer`), and be reachable through relays (`RelayClient`)."""

from lattica.relay.client import RelayClient
from lattica.relay.server import RelayServer

__all__ = ["RelayClient", "RelayServer"]
