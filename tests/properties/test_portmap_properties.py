"""Whatever a router, or somebody who plays one, sends: refused or understood, within bounds, never anywhere else."""

from __future__ import annotations

import contextlib
import random
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from portmap_router import GATEWAY, LOCAL, Router, description, fault, http, soap, ssdp

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.portmap import igd, natpmp, pcp, xml_tree
from lattica_protocols.portmap import ssdp as ssdp_codec
from lattica_protocols.portmap.gateway import PROTOCOLS, GatewayMapper
from lattica_protocols.portmap.http import ResponseReader, decode_response_untrusted
from lattica_protocols.portmap.mapping import HttpRequest, Port
from lattica_protocols.portmap.ssdp import Url

LOCATION = Url(GATEWAY, 80, "/")
XML = st.one_of(
    st.text(max_size=200),
    st.builds(description, st.text(max_size=30)),
    st.builds(fault, st.integers()),
    st.builds(lambda v: soap("GetExternalIPAddress", NewExternalIPAddress=v), st.text(max_size=20)),
)
DATAGRAMS = st.one_of(
    st.binary(max_size=80),
    st.builds(lambda head, rest: bytes(head) + rest,
              st.tuples(st.sampled_from((0, 2)), st.sampled_from((128, 129, 130)), st.just(0), st.integers(0, 15)),
              st.binary(min_size=56, max_size=56)),
    st.builds(ssdp, st.one_of(st.text(max_size=40), st.just(f"http://{GATEWAY}:80/x"))).map(bytes),
)  # fmt: skip


@given(DATAGRAMS)
def test_datagrams(data: bytes) -> None:
    rng = random.Random(0)
    for decode in (
        pcp.PcpCodec(LOCAL, rng).decode_untrusted,
        natpmp.NatPmpCodec().decode_untrusted,
        pcp.decode_announcement_untrusted,
        natpmp.decode_announcement_untrusted,
        lambda data: ssdp_codec.decode_answer_untrusted(data, GATEWAY),
    ):
        with contextlib.suppress(RemoteProtocolError):
            decode(data)  # type: ignore[operator]


@given(st.one_of(XML.map(lambda text: text.encode("utf-8", "surrogatepass")), st.binary(max_size=300)))
def test_documents(data: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        xml_tree.parse_xml_untrusted(data)
    with contextlib.suppress(RemoteProtocolError):
        for service in igd.decode_description_untrusted(data, LOCATION):
            assert service.control.host == GATEWAY
            assert b"\r\n\r\n" in igd.encode_call(service, "X", [])


@given(st.text(max_size=60), st.one_of(st.none(), st.just(LOCATION)))
def test_urls_lead_to_the_router_or_nowhere(text: str, base: Url | None) -> None:
    with contextlib.suppress(RemoteProtocolError):
        url = ssdp_codec.parse_url_untrusted(text, GATEWAY, base)
        assert url.host == GATEWAY
        assert "\r" not in url.path
        assert " " not in url.path


HEADS = st.sampled_from(
    (b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
     b"HTTP/1.1 500 X\nContent-Length: 5\n\n", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"")
)  # fmt: skip


@given(HEADS, st.lists(st.one_of(st.binary(max_size=20), st.just(b"3\r\nabc\r\n"), st.just(b"0\r\n\r\n"))))
def test_http(head: bytes, pieces: list[bytes]) -> None:
    reader = ResponseReader()
    with contextlib.suppress(RemoteProtocolError):
        for piece in (head, *pieces):
            if reader.receive_untrusted(piece):
                break
        decode_response_untrusted(bytes(reader.data), closed=False)
        assert decode_response_untrusted(bytes(reader.data), closed=True) is not None


@given(
    st.lists(st.tuples(DATAGRAMS, XML, st.sampled_from((0.0, 0.1, 1.0, 60.0)), st.booleans()), max_size=30),
    st.integers(0, 2**32),
)
def test_a_hostile_router(script: list[tuple[bytes, str, float, bool]], seed: int) -> None:
    """It honours some requests and answers others with garbage; we ask at a bounded rate, and the router alone."""
    rng, router = random.Random(seed), Router()
    mapper = GatewayMapper(GATEWAY, LOCAL, [Port("tcp", 1), Port("udp", 2)], rng)
    mapper.start(0.0)
    now, sent = 0.0, 0
    for datagram, document, wait, honest in script:
        now += wait
        mapper.handle_timer(now)
        for item in mapper.poll_transmit():
            sent += 1
            if isinstance(item, HttpRequest):
                assert item.host == GATEWAY
                data = http(document) if not honest else router.respond(item)
                mapper.receive_response(item.number, data, now)
            else:
                assert item.to[0] in (GATEWAY, "239.255.255.250")
                answer = router.answer(item, now) if honest else datagram
                mapper.receive_datagram(item.channel, answer or b"", (GATEWAY, item.to[1]), now)
        mapper.receive_datagram(rng.choice(PROTOCOLS), datagram, (GATEWAY, 5351), now)
        mapper.receive_announcement(datagram, (GATEWAY, 5351), now)
        while mapper.next_event() is not None:
            pass
        assert len(mapper.leases()) <= 2
    assert sent <= 60 * len(script) + 60
    mapper.release(now)
    for _ in range(50):
        due = mapper.next_timeout()
        for item in mapper.poll_transmit():
            if isinstance(item, HttpRequest):
                mapper.request_failed(item.number, "gone", now)
        if mapper.is_released:
            break
        now = max(now, due or now)
        mapper.handle_timer(now)
    assert mapper.is_released
    assert not mapper.leases()
