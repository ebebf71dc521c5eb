"""UPnP Internet Gateway Device, versions 1 and 2: the router's description, and the calls to its WAN service (SOAP).

The description is an XML tree of devices; somewhere in it stand services of the types below with a `controlURL`, to
which calls are posted:

    POST controlURL        SOAPAction: "TYPE#Action"
    <s:Envelope><s:Body><u:Action xmlns:u="TYPE"><NewExternalPort>4101</NewExternalPort>…</u:Action></s:Body>…

    200  <u:ActionResponse> with its values          500  <UPnPError><errorCode>718</errorCode>…
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import UPNP_MAX_SERVICES
from lattica_protocols.portmap.http import HttpResponse, encode_post
from lattica_protocols.portmap.mapping import Port
from lattica_protocols.portmap.ssdp import Url, parse_url_untrusted
from lattica_protocols.portmap.xml_tree import parse_xml_untrusted

SERVICE_TYPES: Final = (
    "urn:schemas-upnp-org:service:WANIPConnection:2",
    "urn:schemas-upnp-org:service:WANIPConnection:1",
    "urn:schemas-upnp-org:service:WANPPPConnection:1",
)
"""In the order in which they are tried."""
DESCRIPTION: Final = "lattica"
"""How the mapping is shown in the router's list."""

INVALID_ACTION: Final = 401
INVALID_ARGUMENTS: Final = 402
NO_SUCH_ENTRY: Final = 714
CONFLICT: Final = 718
SAME_PORT_REQUIRED: Final = 724
ONLY_PERMANENT: Final = 725
CONFLICT_ELSEWHERE: Final = 729
_REASONS: Final = {
    INVALID_ACTION: "the router does not know this request",
    INVALID_ARGUMENTS: "the router did not understand the request",
    501: "the router failed: it has no connection, or stands behind another NAT",
    606: "the router does not allow it",
    CONFLICT: "another machine has this port",
    SAME_PORT_REQUIRED: "the router maps a port only to the same number, which another machine has",
    ONLY_PERMANENT: "the router grants permanent mappings only",
    728: "the router has no port left",
    CONFLICT_ELSEWHERE: "the router uses this port itself",
}


@dataclass(frozen=True, slots=True)
class Service:
    """What can be asked, and where."""

    type: str
    control: Url

    @property
    def version(self) -> int:
        return int(self.type[-1])


@dataclass(frozen=True, slots=True)
class Fault:
    """The router said no."""

    code: int
    text: str

    def __str__(self) -> str:
        known = _REASONS.get(self.code)
        return f"UPnP error {self.code}" + (f": {known}" if known else f": {self.text}" if self.text else "")


def decode_description_untrusted(data: bytes, location: Url) -> list[Service]:
    """The WAN services of the router whose description came from `location`, the best first; at least one."""
    root = parse_xml_untrusted(data)
    base_text = next((e.text.strip() for e in root.children if e.name == "URLBase" and e.text.strip()), "")
    base = parse_url_untrusted(base_text, location.host) if base_text else location
    found: list[Service] = []
    problem = "no WANIPConnection in the router's description"
    for element in root.walk():
        if element.name != "service":
            continue
        kind, control = element.text_of("serviceType"), element.text_of("controlURL")
        if kind not in SERVICE_TYPES or control is None or len(found) == UPNP_MAX_SERVICES:
            continue
        try:
            found.append(Service(kind, parse_url_untrusted(control, location.host, base)))
        except RemoteProtocolError as error:
            problem = str(error)
    if not found:
        raise RemoteProtocolError(problem)
    return sorted(dict.fromkeys(found), key=lambda service: SERVICE_TYPES.index(service.type))


def encode_call(service: Service, action: str, arguments: Sequence[tuple[str, str]]) -> bytes:
    """The HTTP request. Names and values are ours and need no escaping: numbers, addresses, plain words."""
    body = "".join(f"<{name}>{value}</{name}>" for name, value in arguments)
    envelope = (
        '<?xml version="1.0"?>\r\n'
        '<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/" '
        's:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/"><s:Body>'
        f'<u:{action} xmlns:u="{service.type}">{body}</u:{action}></s:Body></s:Envelope>\r\n'
    )
    headers = {"Content-Type": 'text/xml; charset="utf-8"', "SOAPAction": f'"{service.type}#{action}"'}
    url = service.control
    return encode_post(url.host, url.port, url.path, headers, envelope.encode("ascii"))


def decode_answer_untrusted(response: HttpResponse, action: str) -> Mapping[str, str] | Fault:
    """The values of the answer by name."""
    if response.status not in (200, 500):
        raise RemoteProtocolError(f"HTTP status {response.status} to {action}")
    root = parse_xml_untrusted(response.body)
    fault = root.find("UPnPError")
    if fault is not None:
        code = fault.text_of("errorCode") or ""
        if not (code.isascii() and code.isdigit() and len(code) <= 4):
            raise RemoteProtocolError(f"an error without a number to {action}")
        told = "".join(letter for letter in fault.text_of("errorDescription") or "" if letter.isprintable())
        return Fault(int(code), told[:80])
    answer = root.find(action + "Response")
    if answer is None or response.status != 200:
        raise RemoteProtocolError(f"something else than an answer to {action}")
    return {child.name: child.text.strip() for child in answer.children}


# -- the calls ----------------------------------------------------------------------------------------------------
def adding(port: Port, external_port: int, client: str, lifetime: int) -> list[tuple[str, str]]:
    """Arguments of AddPortMapping and AddAnyPortMapping. Lifetime 0: for ever (version 1)."""
    return [
        *naming(port, external_port),
        ("NewInternalPort", str(port.number)),
        ("NewInternalClient", client),
        ("NewEnabled", "1"),
        ("NewPortMappingDescription", DESCRIPTION),
        ("NewLeaseDuration", str(lifetime)),
    ]


def naming(port: Port, external_port: int) -> list[tuple[str, str]]:
    """Arguments of DeletePortMapping and GetSpecificPortMappingEntry."""
    return [
        ("NewRemoteHost", ""),
        ("NewExternalPort", str(external_port)),
        ("NewProtocol", port.transport.upper()),
    ]


def external_ip_untrusted(values: Mapping[str, str]) -> str | None:
    """Of an answer to GetExternalIPAddress; `None`: the router has none."""
    text = values.get("NewExternalIPAddress", "")
    if not text:
        return None
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError:
        raise RemoteProtocolError(f"an external address that is none: {text[:40]!r}") from None
    return None if address.is_unspecified else str(address)


def reserved_port_untrusted(values: Mapping[str, str]) -> int:
    """Of an answer to AddAnyPortMapping."""
    text = values.get("NewReservedPort", "")
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) < 65536):
        raise RemoteProtocolError("a reserved port that is none")
    return int(text)
