"""The machine of port mapping against a router that behaves, one that does not, and one that lies."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from portmap_router import GATEWAY, LOCAL, OUTSIDE, Router, description, http, ssdp

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import PORTMAP_MAX_PORTS, UPNP_MAX_DOCUMENT_BYTES
from lattica_protocols.portmap.epoch import Epoch
from lattica_protocols.portmap.gateway import GatewayMapper
from lattica_protocols.portmap.http import ResponseReader, decode_response_untrusted
from lattica_protocols.portmap.igd import decode_description_untrusted
from lattica_protocols.portmap.leases import LeaseTable
from lattica_protocols.portmap.mapping import MAX_LIFETIME, HttpRequest, Outgoing, Port
from lattica_protocols.portmap.ssdp import Url, decode_answer_untrusted
from lattica_protocols.portmap.xml_tree import parse_xml_untrusted

PORTS = (Port("tcp", 4101), Port("udp", 4101))
BOTH = {("tcp", 4101): 4101, ("udp", 4101): 4101}


def started(router: Router | None = None, *, until: float = 10.0, **more: object) -> GatewayMapper:
    mapper = GatewayMapper(GATEWAY, LOCAL, PORTS, random.Random(1), **more)  # type: ignore[arg-type]
    mapper.start(0.0)
    if router is not None:
        router.run(mapper, 0.0, until)
    return mapper


def errors(mapper: GatewayMapper) -> dict[str, str]:
    return {report.protocol: report.error for report in mapper.reports()}


@pytest.mark.parametrize("speaks", [("pcp",), ("nat-pmp",), ("upnp",), ("pcp", "nat-pmp", "upnp")])
def test_each_protocol_maps_renews_and_releases(speaks: tuple[str, ...]) -> None:
    router = Router(*speaks)
    mapper = started(router)
    assert router.mapped == BOTH
    assert {(lease.port, lease.external_ip, lease.via) for lease in mapper.leases()} == {
        (port, OUTSIDE, speaks[0]) for port in PORTS
    }
    router.run(mapper, 10.0, 20_000.0)
    assert router.mapped == BOTH
    assert all(lease.expires_at > 20_000.0 for lease in mapper.leases()), "renewed at half of the lifetime"
    mapper.release(20_000.0)
    router.serve(mapper, 20_000.0)
    assert not router.mapped
    assert mapper.is_released
    assert not mapper.leases()


def test_the_best_protocol_is_taken_at_once_and_the_others_map_nothing() -> None:
    router = Router()
    started(router, until=0.0)
    assert router.mapped == BOTH
    assert "AddPortMapping" not in router.calls


def test_nobody_answers_and_later_somebody_does() -> None:
    mapper = started()
    silent = Router("none")
    silent.run(mapper, 0.0, 30.0)
    assert mapper.phase == "waiting"
    assert set(errors(mapper).values()) == {"no answer"}
    router = Router("pcp")
    router.run(mapper, 30.0, 400.0)
    assert router.mapped == BOTH


def test_what_is_sent_into_silence_is_little() -> None:
    mapper, count, now = started(), 0, 0.0
    while (due := mapper.next_timeout()) is not None and due < 3600:
        count += len([item for item in mapper.poll_transmit() if isinstance(item, Outgoing)])
        now = max(now, due)
        mapper.handle_timer(now)
    assert count < 400


def test_a_forged_answer_from_elsewhere_is_ignored() -> None:
    router = Router("pcp")
    router.source = ("192.168.1.66", 5351)
    mapper = started(router)
    assert not mapper.leases()
    pcp = mapper.reports()[0]
    assert pcp.ignored
    assert "192.168.1.66" in pcp.last_ignored
    assert not pcp.is_garbled


def test_an_answer_with_another_nonce_is_refused() -> None:
    router, other = Router("pcp"), Router("pcp")
    mapper = started()
    for item in mapper.poll_transmit():
        if isinstance(item, Outgoing) and item.channel == "pcp":
            mapper.receive_datagram("pcp", router.answer(item, 0.0) or b"", router.source, 0.0)
    for item in mapper.poll_transmit():
        assert isinstance(item, Outgoing)
        answer = bytearray(other.answer(item, 0.0) or b"")
        answer[24] ^= 1
        mapper.receive_datagram("pcp", bytes(answer), router.source, 0.0)
    assert not mapper.leases()
    assert "nonce" in mapper.reports()[0].last_garbled


@pytest.mark.parametrize("lifetime", [0, 1, 7])
@pytest.mark.parametrize("speaks", ["pcp", "nat-pmp"])
def test_a_lifetime_that_is_too_short_is_a_refusal(speaks: str, lifetime: int) -> None:
    router = Router(speaks)
    router.lifetime = lambda asked: lifetime
    mapper = started(router)
    assert not mapper.leases()
    assert f"for {lifetime} s only" in errors(mapper)[speaks]


def test_a_huge_lifetime_is_not_believed() -> None:
    router = Router("pcp")
    router.lifetime = lambda asked: 2**32 - 1
    mapper = started(router)
    assert all(lease.lifetime == MAX_LIFETIME for lease in mapper.leases())
    assert mapper.leases()


def test_another_port_than_asked_for_is_taken_as_it_is() -> None:
    router = Router("pcp")
    router.external = lambda asked: 50_000 + asked % 100
    assert {lease.external_port for lease in started(router).leases()} == {50_001}


@pytest.mark.parametrize(
    ("speaks", "result", "word"),
    [("pcp", 2, "does not allow"), ("pcp", 8, "another NAT"), ("nat-pmp", 3, "another NAT"), ("nat-pmp", 99, "99")],
)
def test_a_refusal_is_told_with_its_reason(speaks: str, result: int, word: str) -> None:
    router = Router(speaks)
    router.result = result
    mapper = started(router)
    assert not mapper.leases()
    assert word in errors(mapper)[speaks]


def test_a_router_that_was_restarted_is_asked_again() -> None:
    router = Router("pcp")
    mapper = started(router, until=100.0)
    router.mapped.clear()
    router.started_at = 100.0
    router.run(mapper, 100.0, 200.0)
    assert router.mapped == BOTH
    assert mapper.reports()[0].restarts


def test_an_answer_from_before_the_restart_does_not_count() -> None:
    """The router answered, forgot, and said so; its announcement was read before its answer."""
    table = LeaseTable("pcp")
    table.want(PORTS, 0.0)
    assert set(table.take_due(0.0)) == set(PORTS)
    table.granted(PORTS[0], OUTSIDE, 4101, 3600, 0.1)
    table.restarted(0.2)
    table.granted(PORTS[1], OUTSIDE, 4101, 3600, 0.3)
    assert set(table.take_due(0.3)) == set(PORTS)
    for port in PORTS:
        table.granted(port, OUTSIDE, 4101, 3600, 0.4)
    assert not table.take_due(10.0)


def test_a_router_without_a_clock_that_forgot_is_asked_again() -> None:
    router = Router("upnp")
    mapper = started(router, until=100.0)
    router.mapped.clear()
    router.run(mapper, 100.0, 200.0)
    assert router.mapped == BOTH


def test_an_announcement_makes_us_look() -> None:
    router = Router("pcp")
    mapper = started(router, until=10.0)
    router.mapped.clear()
    router.started_at = 10.0
    announcement = b"\x02\x80\x00\x00" + bytes(8) + bytes(12)
    mapper.receive_announcement(announcement, ("192.168.1.66", 5351), 12.0)
    router.serve(mapper, 12.0)
    assert not router.mapped, "only the router's word counts"
    mapper.receive_announcement(announcement, (GATEWAY, 5351), 12.0)
    router.serve(mapper, 12.0)
    assert router.mapped == BOTH


def test_the_next_protocol_is_taken_when_one_refuses_all() -> None:
    router = Router()
    router.result = 2
    mapper = started(router)
    assert {lease.via for lease in mapper.leases()} == {"upnp"}


def test_a_port_granted_at_the_last_moment_is_ended() -> None:
    for speaks in ("pcp", "upnp"):
        router = Router(speaks)
        mapper = started()
        pending: list[Outgoing | HttpRequest] = []
        now = 0.0
        while not router.mapped:
            pending = mapper.poll_transmit() or pending
            batch, pending = pending, []
            for item in batch:
                if isinstance(item, HttpRequest):
                    data = router.respond(item)
                    if router.mapped:
                        mapper.release(now)
                    mapper.receive_response(item.number, data, now)
                elif (answer := router.answer(item, now)) is not None:
                    if router.mapped:
                        mapper.release(now)
                    mapper.receive_datagram(item.channel, answer, (GATEWAY, 1900 if speaks == "upnp" else 5351), now)
            now = mapper.next_timeout() or now
            mapper.handle_timer(now)
        router.serve(mapper, now)
        assert not router.mapped
        assert not mapper.leases()


# -- UPnP -------------------------------------------------------------------------------------------------------------
def test_a_conflict_is_solved_with_another_port() -> None:
    router = Router("upnp")
    router.faults["AddPortMapping"] = [718]
    leases = {lease.port: lease.external_port for lease in started(router).leases()}
    assert leases[PORTS[0]] != 4101
    assert leases[PORTS[1]] == 4101


@pytest.mark.parametrize("code", [725, 402])
def test_a_router_that_knows_permanent_mappings_only(code: int) -> None:
    router = Router("upnp")
    router.faults["AddPortMapping"] = [code]
    mapper = started(router)
    assert len(mapper.leases()) == 2
    mapper.release(20.0)
    router.serve(mapper, 20.0)
    assert not router.mapped


@pytest.mark.parametrize(
    ("location", "word"),
    [
        ("http://8.8.8.8/x", "leads to 8.8.8.8"),
        ("http://192.168.1.66/x", "leads to 192.168.1.66"),
        ("https://192.168.1.1/x", "plain http"),
        ("http://192.168.1.1@8.8.8.8/", "plain http"),
        ("http://router.local/x", "without the router's address"),
        ("file:///etc/passwd", "plain http"),
        ("", "none"),
        ("http://192.168.1.1/a\x00b", "none"),
        (f"http://192.168.1.1/{'a' * 600}", "none"),
    ],
)
def test_only_the_router_itself_is_asked(location: str, word: str) -> None:
    with pytest.raises(RemoteProtocolError, match=word):
        decode_answer_untrusted(ssdp(location), GATEWAY)


@pytest.mark.parametrize("control", ["http://8.8.8.8/ctl", "http://192.168.1.66:80/ctl"])
def test_calls_go_to_the_router_itself(control: str) -> None:
    with pytest.raises(RemoteProtocolError, match="leads to"):
        decode_description_untrusted(description(control).encode(), Url(GATEWAY, 80, "/"))
    more = "<URLBase>http://8.8.8.8/</URLBase>"
    with pytest.raises(RemoteProtocolError, match="leads to"):
        decode_description_untrusted(description(more=more).encode(), Url(GATEWAY, 80, "/"))


@pytest.mark.parametrize(
    "body",
    [
        "\x00\xff garbage",
        "<root>",
        "<!DOCTYPE x [<!ENTITY a 'aaaa'>]><root>&a;</root>",
        '<!DOCTYPE x SYSTEM "http://8.8.8.8/x"><root/>',
        "<a>" * 40 + "</a>" * 40,
        "<a>" + "<b/>" * 5000 + "</a>",
        "<a>" + "x" * 5000 + "</a>",
        "",
    ],
)
def test_xml_that_is_none_or_too_much(body: str) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_xml_untrusted(body.encode())
    router = Router("upnp")
    router.body = lambda action, answer: body
    mapper = started(router)
    assert not mapper.leases()
    upnp = mapper.reports()[-1]
    assert upnp.answered
    assert upnp.is_garbled
    assert mapper.phase == "waiting"


@pytest.mark.parametrize("outside", ["", "0.0.0.0"])
def test_a_router_without_an_address_outside(outside: str) -> None:
    router = Router("upnp")
    router.outside = outside
    mapper = started(router)
    assert "behind another NAT" in errors(mapper)["upnp"]


@pytest.mark.parametrize("outside", ["x", "1.2.3.4.5", "<b>", "::1"])
def test_an_address_outside_that_is_none(outside: str) -> None:
    router = Router("upnp")
    router.outside = outside
    mapper = started(router)
    assert not mapper.leases()
    assert mapper.phase == "waiting"


def test_ports_beyond_the_limit_are_left_out() -> None:
    mapper = GatewayMapper(GATEWAY, LOCAL, [Port("tcp", n) for n in range(1, 100)], random.Random(1))
    router = Router("pcp")
    mapper.start(0.0)
    router.run(mapper, 0.0, 10.0)
    assert len(mapper.leases()) == PORTMAP_MAX_PORTS


def test_a_request_that_fails_is_told() -> None:
    mapper = started()
    mapper.receive_datagram("upnp", ssdp(), (GATEWAY, 1900), 0.0)
    request = next(item for item in mapper.poll_transmit() if isinstance(item, HttpRequest))
    assert (request.host, request.port) == (GATEWAY, 5000)
    mapper.request_failed(request.number, "no complete answer in time", 1.0)
    assert errors(mapper)["upnp"] == "no complete answer in time"


# -- HTTP -------------------------------------------------------------------------------------------------------------
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("data", "body"),
    [(http("hello"), b"hello"), (CHUNKED, b"abcde"), (b"HTTP/1.0 200 OK\n\nuntil the end", b"until the end")],
)
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_answers_come_in_pieces(data: bytes, body: bytes, step: int) -> None:
    reader = ResponseReader()
    for at in range(0, len(data), step):
        assert not reader.is_complete
        reader.receive_untrusted(data[at : at + step])
    assert reader.is_complete == (b"until" not in data)
    response = decode_response_untrusted(bytes(reader.data), closed=True)
    assert response is not None
    assert response.body == body


@pytest.mark.parametrize(
    "data",
    [
        b"x" * 9000,
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 100 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (UPNP_MAX_DOCUMENT_BYTES + 9000),
    ],
)
def test_answers_that_are_too_much(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        ResponseReader().receive_untrusted(data)


def test_clocks_of_routers() -> None:
    epoch = Epoch()
    assert not epoch.restarted(100, 0.0)
    assert not epoch.restarted(160, 60.0)
    assert not epoch.restarted(218, 120.0), "a slow clock"
    assert epoch.restarted(3, 180.0)
    assert epoch.restarted(1000, 190.0), "a jump"


def test_reports_tell_garbled_from_refused() -> None:
    router = Router("upnp")
    router.faults["GetExternalIPAddress"] = [501]
    upnp = started(router).reports()[-1]
    assert not upnp.is_garbled
    assert "501" in upnp.error
    assert replace(upnp, garbled=1, last_garbled="not XML", error="not XML: x").is_garbled
