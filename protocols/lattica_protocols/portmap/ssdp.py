"""SSDP: asking who in the local network is an internet gateway (UPnP Device Architecture 1.1, section 1.3).

M-SEARCH * HTTP/1.1             to 239.255.255.250:1900, and to the router's own port 1900
HTTP/1.1 200 OK                 from the router: ST says what it is, LOCATION where its description is
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import UPNP_MAX_HEAD_BYTES, UPNP_MAX_URL_CHARS
from lattica_protocols.portmap.http import AGENT, decode_head_untrusted, status_untrusted

MULTICAST: Final = ("239.255.255.250", 1900)
SSDP_PORT: Final = 1900
_DEVICES: Final = (
    "urn:schemas-upnp-org:device:InternetGatewayDevice:1",
    "urn:schemas-upnp-org:device:InternetGatewayDevice:2",
    "urn:schemas-upnp-org:service:WANIPConnection:1",
)
"""Version 2 answers to 1 as well, where routers follow the rules; some answer to the service alone."""
_WAIT_SECONDS: Final = 1
"""MX: a device waits a random part of it before it answers."""


@dataclass(frozen=True, slots=True)
class Url:
    """`http://host:port/path`."""

    host: str
    port: int
    path: str


def encode_searches(host: str, port: int) -> list[bytes]:
    """One for each kind of device, to be sent to `host:port`."""
    return [
        (
            f'M-SEARCH * HTTP/1.1\r\nHOST: {host}:{port}\r\nMAN: "ssdp:discover"\r\n'
            f"MX: {_WAIT_SECONDS}\r\nST: {device}\r\nUSER-AGENT: {AGENT}\r\n\r\n"
        ).encode("ascii")
        for device in _DEVICES
    ]


def decode_answer_untrusted(data: bytes, gateway: str) -> Url:
    """Where the description is. It must be at the `gateway` itself: whoever answers could else have us ask anybody."""
    if len(data) > UPNP_MAX_HEAD_BYTES:
        raise RemoteProtocolError(f"an SSDP answer of {len(data)} bytes")
    line, headers = decode_head_untrusted(data.rstrip(b"\r\n"))
    if status_untrusted(line) != 200:
        raise RemoteProtocolError("an SSDP answer that is an error")
    if not headers.get("st", "").startswith(("urn:schemas-upnp-org:", "upnp:rootdevice")):
        raise RemoteProtocolError("an SSDP answer of some other device")
    return parse_url_untrusted(headers.get("location", ""), gateway)


def parse_url_untrusted(text: str, gateway: str, base: Url | None = None) -> Url:
    """An absolute URL, or with `base` also a path; refused when it leads anywhere but to the `gateway`."""
    if not text or len(text) > UPNP_MAX_URL_CHARS or not all("!" <= letter <= "~" for letter in text):
        raise RemoteProtocolError("a URL that is none")
    if base is not None and "://" not in text:
        return Url(base.host, base.port, text if text.startswith("/") else "/" + text)
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port or 80
        if parts.scheme != "http" or host is None or "@" in parts.netloc:
            raise RemoteProtocolError(f"a URL that is not plain http: {text[:80]}")
        if ipaddress.ip_address(host) != ipaddress.ip_address(gateway):
            raise RemoteProtocolError(f"a URL that leads to {host[:60]}, not to the router {gateway}")
    except ValueError:
        raise RemoteProtocolError(f"a URL without the router's address: {text[:80]}") from None
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Url(gateway, port, path)
