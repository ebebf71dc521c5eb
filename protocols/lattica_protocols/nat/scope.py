"""Where an IP address means something, and whose word counts as one."""

from __future__ import annotations

import ipaddress
from typing import TypeAlias

IpAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

_LOCAL_NETWORKS = (
    ipaddress.IPv4Network("10.0.0.0/8"),  # RFC 1918
    ipaddress.IPv4Network("172.16.0.0/12"),
    ipaddress.IPv4Network("192.168.0.0/16"),
    ipaddress.IPv4Network("100.64.0.0/10"),  # RFC 6598, between a carrier's NAT and its customers
    ipaddress.IPv4Network("169.254.0.0/16"),
    ipaddress.IPv4Network("127.0.0.0/8"),
    ipaddress.IPv4Network("0.0.0.0/8"),
    ipaddress.IPv6Network("fc00::/7"),  # RFC 4193
    ipaddress.IPv6Network("fe80::/10"),
    ipaddress.IPv6Network("::/127"),  # unspecified and loopback
)


def is_local(ip: IpAddress) -> bool:
    """Whether `ip` means something on this machine or in one network only, so that it stands behind a NAT if anything.

    Unlike `ipaddress.is_private` this leaves out the ranges for documentation and benchmarks, of which laboratories
    build their internets; a router that serves the real one does not let them through anyway.
    """
    if ip.version == 6 and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return ip.is_multicast or any(ip in network for network in _LOCAL_NETWORKS if network.version == ip.version)


def customer_of(ip: IpAddress) -> IpNetwork:
    """What counts as one stranger: an IPv4 address, or the /64 that one IPv6 customer has to himself."""
    return ipaddress.ip_network((ip, 32 if ip.version == 4 else 64), strict=False)


def voice_of(ip: IpAddress) -> IpNetwork:
    """Addresses in the same range have one voice together: what one operator gets cheaply, an IPv4 /24 or IPv6 /48."""
    return ipaddress.ip_network((ip, 24 if ip.version == 4 else 48), strict=False)
