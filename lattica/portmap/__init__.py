"""Ports of ours that the router leads to us: asked for by PCP, NAT-PMP and UPnP, kept while we run, ended at exit."""

from lattica.portmap.service import PortMapService, PortMapStatus

__all__ = ["PortMapService", "PortMapStatus"]
