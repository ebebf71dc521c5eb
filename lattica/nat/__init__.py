"""What the NATs in front of this node do: STUN on the node's own UDP socket, and machines that use many sockets."""

from lattica.nat.service import NatService

__all__ = ["NatService"]
