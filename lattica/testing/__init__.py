"""The public test kit: an in-memory network whose hosts are the real ones.

`MemoryNetwork` gives transports for `/memory/N` addresses. Everything above the transport (sessions, negotiation,
identify, Kademlia, RPC, content) is the code that runs in the daemon. Under `trio.testing.MockClock` latency costs
no real time.
"""

from lattica.testing.memory import MemoryNetwork, memory_pair, open_memory_host

__all__ = ["MemoryNetwork", "memory_pair", "open_memory_host"]
