"""The port mapping service over real sockets: a router on a loopback address of its own, honest or not."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from portmap_router import Router, description, http, ssdp

from lattica.node import Node, NodeConfig, open_node
from lattica.portmap import PortMapService
from lattica.portmap import driver as portmap_driver
from lattica.portmap.route import Route
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.portmap.mapping import HttpRequest, Outgoing

Run = Callable[..., Any]
GATEWAY, OURS = "127.0.0.77", "127.0.0.1"
LISTEN = [f"/ip4/{OURS}/tcp/0", f"/ip4/{OURS}/udp/0/quic-v1"]


class SocketRouter:
    """`Router` on real sockets. `page`: what is answered to every HTTP request instead; `None`: nothing ever."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.page: Callable[[bytes], bytes | None] | None = None
        self.changed = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(0, host=GATEWAY)
            self.http_port = listeners[0].socket.getsockname()[1]
            nursery.start_soon(trio.serve_listeners, self._serve, listeners)
            for channel, port in (("pcp", 5351), ("upnp", 1900)):
                await nursery.start(self._answer, channel, port)
            task_status.started()

    async def _answer(self, channel: str, port: int, *, task_status: trio.TaskStatus[None]) -> None:
        with trio.socket.socket(type=trio.socket.SOCK_DGRAM) as sock:
            await sock.bind((GATEWAY, port))
            task_status.started()
            while True:
                data, source = await sock.recvfrom(2048)
                if channel == "upnp":
                    answer = ssdp(f"http://{GATEWAY}:{self.http_port}/d.xml") if "upnp" in self.router.speaks else None
                else:
                    name: Any = "pcp" if data[0] == 2 else "nat-pmp"
                    answer = self.router.answer(Outgoing(name, source, data), trio.current_time())
                if answer is not None:
                    await sock.sendto(answer, source)
                self._tell()

    async def _serve(self, stream: trio.SocketStream) -> None:
        request = b""
        while b"\r\n\r\n" not in request or (b"POST" in request and b"Envelope>\r\n" not in request):
            piece = await stream.receive_some()
            if not piece:
                return
            request += piece
        answer = self.router.respond(HttpRequest(1, GATEWAY, 1, request)) if self.page is None else self.page(request)
        try:
            if answer is None:
                await trio.sleep_forever()
            else:
                await stream.send_all(answer)
        except trio.BrokenResourceError:
            pass
        self._tell()

    def _tell(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


@asynccontextmanager
async def behind(router: SocketRouter) -> AsyncIterator[tuple[Node, PortMapService]]:
    """A node whose service thinks that the router is the way out."""
    async with trio.open_nursery() as nursery:
        await nursery.start(router.run)
        async with open_node(NodeConfig(listen=LISTEN, port_mapping=False)) as node:
            service = PortMapService(node.host, find_route=lambda: Route(GATEWAY, OURS))
            async with trio.open_nursery() as serving:
                serving.start_soon(service.run)
                yield node, service
                serving.cancel_scope.cancel()
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], object], router: SocketRouter, seconds: float = 12.0) -> None:
    with trio.fail_after(seconds):
        while not condition():
            with trio.move_on_after(0.05):
                await router.changed.wait()


def numbers(addrs: list[Multiaddr]) -> set[int]:
    return {target[2] for addr in addrs if (target := addr.host_port()) is not None}


@pytest.mark.parametrize("speaks", ["pcp", "nat-pmp", "upnp"])
def test_ports_are_mapped_advertised_and_given_back(run: Run, speaks: str) -> None:
    async def main() -> None:
        router = SocketRouter(Router(speaks))
        async with behind(router) as (node, service):
            await until(lambda: service.status().seconds is not None, router)
            status = service.status()
            assert status.phase == "mapped"
            assert len(service.addrs()) == 2
            assert status.seconds is not None
            assert status.seconds < 2
            ports = numbers(node.host.bound_addrs())
            assert set(service.addrs()) <= set(node.host.advertised_addrs())
            assert numbers(service.addrs()) == ports
            assert {number for _, number in router.router.mapped} == ports
        assert not router.router.mapped

    run(main)


def test_a_private_address_outside_is_not_told(run: Run) -> None:
    async def main() -> None:
        router = SocketRouter(Router("pcp"))
        router.router.outside = "10.9.9.9"
        async with behind(router) as (_, service):
            await until(lambda: service.status().leases, router)
            assert not service.addrs()

    run(main)


PAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "garbage": lambda request: http("\x00 this is no XML"),
    "no http": lambda request: b"\xff" * 100,
    "huge": lambda request: b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (1 << 20),
    "huge head": lambda request: b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 10_000,
    "silent": lambda request: None,
    "cut off": lambda request: b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n<root>",
    "elsewhere": lambda request: http(description("http://8.8.8.8/ctl")),
}


@pytest.mark.parametrize("page", PAGES)
def test_bad_answers_over_http_end_in_a_clear_state(run: Run, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portmap_driver, "HTTP_SECONDS", 0.5)

    async def main() -> None:
        router = SocketRouter(Router("upnp"))
        router.page = PAGES[page]
        async with behind(router) as (_, service):
            await until(lambda: any(report.error for report in service.status().reports[-1:]), router)
            upnp = service.status().reports[-1]
            assert upnp.error
            assert upnp.error != "no answer"
            assert not service.addrs()

    run(main)


def test_the_service_is_off_where_it_is_of_no_use(run: Run) -> None:
    async def main() -> None:
        for route, ports, phase in (
            (None, LISTEN, "no-router"),
            (Route("45.0.0.1", "45.0.0.2"), LISTEN, "not-needed"),
            (Route("10.0.0.1", "10.0.0.2"), LISTEN, "not-needed"),
        ):
            async with open_node(NodeConfig(listen=ports, port_mapping=False)) as node:
                assert node.port_map.status().phase == "off"
                service = PortMapService(node.host, find_route=lambda route=route: route)  # type: ignore[misc]
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(service.run)
                    await trio.testing.wait_all_tasks_blocked(0.05)
                    assert service.status().phase == phase
                    nursery.cancel_scope.cancel()
        async with open_node(NodeConfig(listen=LISTEN, announce=["/ip4/45.1.1.1/tcp/1"])) as node:
            service = PortMapService(node.host, find_route=lambda: Route(GATEWAY, OURS))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(service.run)
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert service.status().phase == "not-needed"
                nursery.cancel_scope.cancel()
            assert node.host.advertised_addrs() == [Multiaddr.parse("/ip4/45.1.1.1/tcp/1")]

    run(main)


def test_a_router_that_does_not_answer_at_the_end_holds_nobody_up(run: Run) -> None:
    async def main() -> None:
        router = SocketRouter(Router("upnp"))
        async with behind(router) as (_, service):
            await until(lambda: len(service.addrs()) == 2, router)
            router.page = lambda request: None
            started = trio.current_time()
        assert trio.current_time() - started < 5

    run(main)
