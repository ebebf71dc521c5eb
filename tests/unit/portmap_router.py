"""A router for the machines of port mapping, without sockets: PCP, NAT-PMP and UPnP out of one table."""

from __future__ import annotations

import ipaddress
import re
import struct
from collections.abc import Callable

from lattica_protocols.portmap.gateway import GatewayMapper
from lattica_protocols.portmap.mapping import HttpRequest, Outgoing

GATEWAY, LOCAL, OUTSIDE = "192.168.1.1", "192.168.1.5", "45.1.2.3"
LOCATION = f"http://{GATEWAY}:5000/rootDesc.xml"
IP_TYPE = "urn:schemas-upnp-org:service:WANIPConnection:1"


def ssdp(location: str = LOCATION) -> bytes:
    return (
        f"HTTP/1.1 200 OK\r\nST: urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\nLOCATION: {location}\r\n\r\n"
    ).encode()


def http(body: str, status: int = 200) -> bytes:
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body.encode())}\r\n\r\n{body}".encode()


def description(control: str = "/ctl", *, kind: str = IP_TYPE, more: str = "") -> str:
    service = f"<service><serviceType>{kind}</serviceType><controlURL>{control}</controlURL></service>"
    return (
        f'<?xml version="1.0"?><root xmlns="urn:schemas-upnp-org:device-1-0">{more}<device><deviceList><device>'
        f"<serviceList>{service}</serviceList></device></deviceList></device></root>"
    )


def soap(action: str, **values: str) -> str:
    inner = "".join(f"<{name}>{value}</{name}>" for name, value in values.items())
    return (
        '<?xml version="1.0"?><s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"><s:Body>'
        f'<u:{action}Response xmlns:u="{IP_TYPE}">{inner}</u:{action}Response></s:Body></s:Envelope>'
    )


def fault(code: int) -> str:
    return (
        '<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"><s:Body><s:Fault><detail>'
        f"<UPnPError><errorCode>{code}</errorCode><errorDescription>no</errorDescription></UPnPError>"
        "</detail></s:Fault></s:Body></s:Envelope>"
    )


class Router:
    """`speaks`: the protocols it knows. Attributes say how it behaves."""

    def __init__(self, *speaks: str) -> None:
        self.speaks = speaks or ("pcp", "nat-pmp", "upnp")
        self.outside = OUTSIDE
        self.source = (GATEWAY, 5351)
        self.lifetime: Callable[[int], int] = lambda asked: asked
        self.external: Callable[[int], int] = lambda asked: asked
        self.result = 0
        self.faults: dict[str, list[int]] = {}
        """UPnP errors to give, by action, one for each call."""
        self.body: Callable[[str, str], str] = lambda action, answer: answer
        """Changes an answer of UPnP."""
        self.started_at = 0.0
        self.mapped: dict[tuple[str, int], int] = {}
        self.calls: list[str] = []

    # -- datagrams ----------------------------------------------------------------------------------------------------
    def answer(self, item: Outgoing, now: float) -> bytes | None:
        if item.channel == "upnp":
            return ssdp() if "upnp" in self.speaks else None
        if item.channel == "pcp":
            return self._pcp(item.data, now) if "pcp" in self.speaks else self._unsupported()
        return self._natpmp(item.data, now) if "nat-pmp" in self.speaks else None

    def _unsupported(self) -> bytes | None:
        return struct.pack("!BBHI", 0, 128, 1, 5) if "nat-pmp" in self.speaks else None

    def _epoch(self, now: float) -> int:
        return int(now - self.started_at) + 1000 if not self.started_at else int(now - self.started_at)

    def _pcp(self, data: bytes, now: float) -> bytes:
        opcode, asked = data[1], int.from_bytes(data[4:8], "big")
        granted = self.lifetime(asked) if asked else 0
        head = struct.pack("!BBBBII12x", 2, 128 | opcode, 0, self.result if opcode else 0, granted, self._epoch(now))
        if not opcode:
            return head
        nonce, number, internal, external, _ = struct.unpack("!12sB3xHH16s", data[24:60])
        given = self._note("tcp" if number == 6 else "udp", internal, external or internal, asked)
        outside = bytes(10) + b"\xff\xff" + ipaddress.IPv4Address(self.outside).packed
        return head + struct.pack("!12sB3xHH16s", nonce, number, internal, given, outside)

    def _natpmp(self, data: bytes, now: float) -> bytes:
        opcode = data[1]
        head = struct.pack("!BBHI", 0, 128 | opcode, self.result, self._epoch(now))
        if not opcode:
            return head + ipaddress.IPv4Address(self.outside).packed
        internal, external, asked = struct.unpack("!HHI", data[4:12])
        given = self._note("udp" if opcode == 1 else "tcp", internal, external or internal, asked)
        return head + struct.pack("!HHI", internal, given, self.lifetime(asked) if asked else 0)

    def _note(self, transport: str, internal: int, external: int, lifetime: int) -> int:
        if not lifetime:
            self.mapped.pop((transport, internal), None)
            return 0
        if self.result:
            return 0
        self.mapped[transport, internal] = self.external(external)
        return self.mapped[transport, internal]

    # -- HTTP -----------------------------------------------------------------------------------------------------
    def respond(self, request: HttpRequest) -> bytes:
        text = request.data.decode()
        found = re.search(r"#(\w+)", text.partition("\r\n\r\n")[0])
        action = found[1] if found else ""
        self.calls.append(action)
        if not action:
            return http(self.body("", description()))
        if self.faults.get(action):
            return http(self.body(action, fault(self.faults[action].pop(0))), 500)
        values = dict(re.findall(r"<(New\w+)>([^<]*)<", text))
        return http(self.body(action, self._soap(action, values)))

    def _soap(self, action: str, values: dict[str, str]) -> str:
        if action == "GetExternalIPAddress":
            return soap(action, NewExternalIPAddress=self.outside)
        key = (values["NewProtocol"].lower(), int(values["NewExternalPort"]))
        if action in ("AddPortMapping", "AddAnyPortMapping"):
            self.mapped[key] = int(values["NewExternalPort"])
            return soap(action, NewReservedPort="5555")
        if action == "DeletePortMapping":
            self.mapped.pop(key, None)
        elif key not in self.mapped:
            return fault(714)
        return soap(action, NewInternalClient=LOCAL)

    # -- running ----------------------------------------------------------------------------------------------------
    def serve(self, mapper: GatewayMapper, now: float) -> int:
        """Answer all that the mapper asks, and what it asks then; how much that was."""
        count = 0
        while items := mapper.poll_transmit():
            for item in items:
                count += 1
                if isinstance(item, HttpRequest):
                    mapper.receive_response(item.number, self.respond(item), now)
                elif (data := self.answer(item, now)) is not None:
                    source = (self.source[0], 1900) if item.channel == "upnp" else self.source
                    mapper.receive_datagram(item.channel, data, source, now)
        return count

    def run(self, mapper: GatewayMapper, now: float, until: float) -> float:
        """Let time pass."""
        self.serve(mapper, now)
        while (due := mapper.next_timeout()) is not None and due <= until:
            now = max(now, due)
            mapper.handle_timer(now)
            self.serve(mapper, now)
        return until
