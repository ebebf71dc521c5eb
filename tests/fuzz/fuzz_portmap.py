"""Drivers of port mapping: a router, or somebody in its place, that answers with whatever it likes."""

from __future__ import annotations

import random
import sys
from pathlib import Path

from fuzz_machines import Driver, Transcript

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from portmap_router import GATEWAY, LOCAL, Router, description, fault, http, soap, ssdp

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.portmap.control import ControlClient
from lattica_protocols.portmap.gateway import GatewayMapper
from lattica_protocols.portmap.http import ResponseReader, decode_response_untrusted
from lattica_protocols.portmap.igd import (
    Fault,
    decode_answer_untrusted,
    decode_description_untrusted,
    external_ip_untrusted,
    reserved_port_untrusted,
)
from lattica_protocols.portmap.igd_client import IgdClient
from lattica_protocols.portmap.mapping import HttpRequest, Outgoing, Port
from lattica_protocols.portmap.natpmp import NatPmpCodec
from lattica_protocols.portmap.pcp import PcpCodec, decode_announcement_untrusted
from lattica_protocols.portmap.ssdp import Url

DOCUMENTS = [
    description(),
    soap("GetExternalIPAddress", NewExternalIPAddress="45.1.2.3"),
    soap("AddAnyPortMapping", NewReservedPort="5"),
    fault(718),
]


def datagrams() -> list[bytes]:
    """Of a router that speaks everything."""
    router, mapper = Router(), GatewayMapper(GATEWAY, LOCAL, [Port("tcp", 4101)], random.Random(1))
    found = []
    mapper.start(0.0)
    for _ in range(3):
        for item in mapper.poll_transmit():
            if isinstance(item, Outgoing) and (data := router.answer(item, 0.0)):
                found.append(data)
                mapper.receive_datagram(item.channel, data, item.to, 0.0)
    return [*dict.fromkeys(found), ssdp(), b"\x00\x80\x00\x00" + bytes(8), b"\x02\x80" + bytes(22)]


class Routers(Driver):
    """The whole mapper; nonces of PCP are put right, as by somebody who sees our requests."""

    name = "portmap.GatewayMapper"
    covers = (GatewayMapper, ControlClient, IgdClient)

    def seeds(self) -> list[Transcript]:
        return [(*datagrams(), *(http(text) for text in DOCUMENTS))]

    def run(self, parts: list[bytes], rng: random.Random) -> None:
        mapper, honest, now = GatewayMapper(GATEWAY, LOCAL, [Port("tcp", 4101)], rng), Router(), 0.0
        mapper.start(now)
        sent = 0
        for part in parts:
            for item in mapper.poll_transmit():
                sent += 1
                if isinstance(item, HttpRequest):
                    assert item.host == GATEWAY
                    data = part if rng.random() < 0.5 else honest.respond(item)
                    mapper.receive_response(item.number, data, now)
                else:
                    data = part if rng.random() < 0.5 else honest.answer(item, now) or b""
                    if item.channel == "pcp" and len(data) >= 60 <= len(item.data):
                        data = data[:24] + item.data[24:36] + data[36:]
                    mapper.receive_datagram(item.channel, data, (GATEWAY, item.to[1]), now)
            mapper.receive_announcement(part, (GATEWAY, 5351), now)
            now += rng.choice((0.0, 0.2, 30.0, 4000.0))
            mapper.handle_timer(now)
            while mapper.next_event() is not None:
                pass
            assert len(mapper.leases()) <= 1
        assert sent <= 60 * len(parts) + 60


class Answers(Driver):
    """The answers one by one."""

    name = "portmap.answers"
    covers = (ResponseReader,)

    def seeds(self) -> list[Transcript]:
        chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
        documents = [(text.encode(),) for text in DOCUMENTS]
        return documents + [(http(text),) for text in DOCUMENTS] + [(chunked,)] + [(data,) for data in datagrams()]

    def run(self, parts: list[bytes], rng: random.Random) -> None:
        reader = ResponseReader()
        for part in parts:
            parsers = (
                PcpCodec(LOCAL, rng).decode_untrusted,
                NatPmpCodec().decode_untrusted,
                decode_announcement_untrusted,
                lambda data: decode_description_untrusted(data, Url(GATEWAY, 5000, "/")),
            )
            for parse in parsers:
                try:
                    parse(part)
                except RemoteProtocolError:
                    pass
            try:
                reader.receive_untrusted(part)
            except RemoteProtocolError:
                reader = ResponseReader()
        response = decode_response_untrusted(bytes(reader.data), closed=True)
        assert response is not None
        for action in ("GetExternalIPAddress", "AddAnyPortMapping"):
            try:
                values = decode_answer_untrusted(response, action)
                if not isinstance(values, Fault):
                    external_ip_untrusted(values)
                    reserved_port_untrusted(values)
            except RemoteProtocolError:
                pass


DRIVERS: list[Driver] = [Routers(), Answers()]
