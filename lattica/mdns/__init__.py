"""Finding peers in the local network."""

from lattica.mdns.service import MdnsService

__all__ = ["MdnsService"]
