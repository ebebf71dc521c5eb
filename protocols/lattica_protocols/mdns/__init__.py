"""Peers in the local network, by multicast DNS in libp2p's format (specs/discovery/mdns.md)."""
