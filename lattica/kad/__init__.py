"""Kademlia on a host: find peers and providers, keep small signed values, serve others."""

from lattica.kad.search import ProviderSearch
from lattica.kad.service import KadService, StoredValue

__all__ = ["KadService", "ProviderSearch", "StoredValue"]
