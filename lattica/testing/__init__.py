"""The public test kit: an in-memory network whose hosts are the real ones.

`MemoryNetwork` gives transports for `/memory/N` addresses. Everything above the transport (sessions, negotiation,
identify, Kademlia, RPC, content) is the code that runs in the daemon. Under `trio.testing.MockClock` latency costs
no real time.

`SimulatedInternet` is for machines that use UDP: hosts behind every kind of NAT (`BOXES`), with delay and loss, on an
event heap without trio or sockets. `examples/test_behind_nats.py` is a test of a protocol of one's own on it.
"""

from lattica.testing.internet import AttachedMachine, DatagramMachine, Gateway, SimHost, SimulatedInternet
from lattica.testing.memory import MemoryNetwork, memory_pair, open_memory_host
from lattica.testing.nat_boxes import BOXES, Box, BoxKind, Packet
from lattica.testing.observers import SimObserver
from lattica_protocols.stun_client import Datagram

__all__ = [
    "BOXES",
    "AttachedMachine",
    "Box",
    "BoxKind",
    "Datagram",
    "DatagramMachine",
    "Gateway",
    "MemoryNetwork",
    "Packet",
    "SimHost",
    "SimObserver",
    "SimulatedInternet",
    "memory_pair",
    "open_memory_host",
]
