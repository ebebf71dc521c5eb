"""Routers that answer nonsense or lie about what they mapped: nothing is advertised that does not work, and doctor of
the running daemon says what is wrong."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from lab_daemons import LabDaemon, wait_until
from nat_lab import LabBox
from spread_lab import GlobalLab

CLIENT = '[discovery]\nmode = "client"\nmdns = "off"\n'
SSDP_GROUP = "239.255.255.250"
LIE = "45.99.0.1"
"""Nobody's address in the lab."""
TRIED_SECONDS = 60.0


class BadRouter:
    """Answers in threads, at the inner address of a box."""

    def __init__(self, box: LabBox) -> None:
        self.gateway = f"{box.prefix}.1"
        self._box = box
        self._closing: list[Callable[[], None]] = []

    def answer_datagrams(self, port: int, answer: Callable[[bytes], bytes | None], group: str | None = None) -> None:
        with self._box.netns.entered():
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("" if group else self.gateway, port))
        if group:
            member = socket.inet_aton(group) + socket.inet_aton(self.gateway)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)

        def serve() -> None:
            while True:
                data, source = sock.recvfrom(2048)
                if not data:
                    return
                found = answer(data)
                if found is not None:
                    sock.sendto(found, source)

        thread = threading.Thread(target=serve)
        thread.start()

        def close() -> None:
            sock.sendto(b"", (self.gateway, port))
            thread.join()
            sock.close()

        self._closing.append(close)

    def answer_http(self, port: int, page: bytes) -> None:
        with self._box.netns.entered():
            listener = socket.create_server((self.gateway, port))

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(4096)
                    connection.sendall(page)

        thread = threading.Thread(target=serve)
        thread.start()

        def close() -> None:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            listener.close()

        self._closing.append(close)

    def close(self) -> None:
        with self._box.netns.entered():
            for close in self._closing:
                close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def behind(stack: ExitStack, folder: Path, prepare: Callable[[BadRouter], None]) -> tuple[LabBox, LabDaemon]:
    """A daemon behind such a router, with three public ones that see it and try its addresses."""
    lab = GlobalLab()
    known: list[str] = []
    for i in range(3):
        public = LabDaemon(lab.public_host(), folder / f"public{i}", *known)
        stack.callback(public.stop)
        known += ["--bootstrap", public.address("udp"), "--bootstrap", public.address("tcp")]
    box = lab.box("apdf")
    router = BadRouter(box)
    stack.callback(router.close)
    prepare(router)
    daemon = LabDaemon(box.host(), folder / "daemon", *known, settings=CLIENT)
    stack.callback(daemon.stop)
    return box, daemon


def told(daemon: LabDaemon) -> dict[str, Any]:
    found: dict[str, Any] = next(f for f in daemon.json("doctor") if f["check"] == "port-mapping")
    return found


def test_a_description_that_is_no_xml(stack: ExitStack, tmp_path: Path) -> None:
    def prepare(router: BadRouter) -> None:
        place = f"http://{router.gateway}:49000/igd.xml"
        kind = "urn:schemas-upnp-org:device:InternetGatewayDevice:1"
        head = f"HTTP/1.1 200 OK\r\nST: {kind}\r\nLOCATION: {place}\r\n\r\n"
        router.answer_datagrams(1900, lambda data: head.encode() if data.startswith(b"M-SEARCH") else None, SSDP_GROUP)
        router.answer_http(49000, b"HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n\x00<root><<<no XML>")

    _, daemon = behind(stack, tmp_path, prepare)
    wait_until(lambda: told(daemon)["ok"] is False, 30.0, lambda: str(told(daemon)) + daemon.process.log())
    found = told(daemon)
    assert "makes no sense" in found["detail"], found
    assert "UPnP" in found["detail"]
    assert "restart the router" in found["fix"]
    assert found["evidence"]


def test_ports_that_are_mapped_in_words_only(stack: ExitStack, tmp_path: Path) -> None:
    """NAT-PMP grants everything at an address that is not the router's."""

    def answer(data: bytes) -> bytes | None:
        if data[:2] == b"\0\0":
            return struct.pack(">BBHI4s", 0, 128, 0, 100, socket.inet_aton(LIE))
        if len(data) == 12 and data[0] == 0 and data[1] in (1, 2):
            inner, outer, seconds = struct.unpack(">HHI", data[4:])
            return struct.pack(">BBHIHHI", 0, 128 + data[1], 0, 100, inner, outer or inner, seconds)
        return None

    box, daemon = behind(stack, tmp_path, lambda router: router.answer_datagrams(5351, answer))
    wait_until(lambda: told(daemon)["ok"] is False, TRIED_SECONDS, lambda: str(told(daemon)) + daemon.process.log())
    found = told(daemon)
    assert f"mapped to {LIE}, but nobody gets in there" in found["detail"], found
    assert any(box.address in line and LIE in line for line in found["evidence"]), found
    assert found["fix"]
    assert not any(LIE in addr for addr in daemon.json("id")["addrs"]), "told to others although nobody gets in"
