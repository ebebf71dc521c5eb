"""Asking the router for a public port: PCP, NAT-PMP and UPnP-IGD.

`gateway.GatewayMapper` is the whole of it: it asks in all three languages at once, and keeps the ports mapped with the
best that answers. Below it are one machine for the two protocols over datagrams (`control`) and one for UPnP
(`igd_client`), and the codecs.
"""
