"""From the address a socket is bound to, to the addresses others can use."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

import ifaddr

if TYPE_CHECKING:
    from lattica_protocols.multiaddr import Multiaddr


def interface_ips() -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """All addresses of this machine's interfaces, link-local ones left out: they need a zone to be dialled."""
    found: list[ipaddress.IPv4Address | ipaddress.IPv6Address] = []
    for adapter in ifaddr.get_adapters():
        for ip in adapter.ips:
            address = ipaddress.ip_address(ip.ip if isinstance(ip.ip, str) else ip.ip[0])
            if not address.is_link_local and address not in found:
                found.append(address)
    return found


def interface_networks() -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """The networks that this machine's interfaces are in."""
    found: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
    for adapter in ifaddr.get_adapters():
        for ip in adapter.ips:
            host = ip.ip if isinstance(ip.ip, str) else ip.ip[0]
            network = ipaddress.ip_network(f"{host.partition('%')[0]}/{ip.network_prefix}", strict=False)
            if network not in found:
                found.append(network)
    return found


def expand_wildcards(addr: Multiaddr) -> list[Multiaddr]:
    """`addr` itself, or one address per interface of the same family when it is bound to 0.0.0.0 or ::."""
    from lattica_protocols.multiaddr import Multiaddr

    if not addr.is_unspecified:
        return [addr]
    family = "ip4" if addr.value("ip4") is not None else "ip6"
    rest = str(addr).split("/", 3)[3]
    return [
        Multiaddr.parse(f"/{family}/{ip}/{rest}") for ip in interface_ips() if (ip.version == 4) == (family == "ip4")
    ]
