"""Where there is no network to search, mDNS is silent and the node runs."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
from waiting import until

from lattica.mdns import service as mdns_service
from lattica.node import NodeConfig, open_node

Run = Callable[..., Any]


def test_on_loopback_nothing_is_opened(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[list[str]] = []
    monkeypatch.setattr(mdns_service, "_open_socket", lambda interfaces: opened.append(interfaces))

    async def main() -> None:
        async with open_node(NodeConfig(listen=["/ip4/127.0.0.1/tcp/0"])) as node:
            assert node.mdns is not None
            await trio.testing.wait_all_tasks_blocked(0.05)
            node.mdns.network_changed()
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert not opened
            assert node.host.listen_addrs()

    run(main)


def test_a_network_without_multicast_is_no_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with open_node(NodeConfig(listen=["/ip4/127.0.0.1/tcp/0"])) as node:
            assert node.mdns is not None
            monkeypatch.setattr(node.mdns, "_interfaces", lambda: ["192.0.2.77"])  # an address that nobody has
            node.mdns.network_changed()
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert node.mdns.found == 0

    run(main)


def test_a_change_of_the_network_leaves_no_subscription_behind(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that nobody reads fills up, and then every event is logged as lost."""
    opened = 0

    def open_one(interfaces: list[str]) -> trio.socket.SocketType:
        nonlocal opened
        opened += 1
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("127.0.0.1", 0))
        return trio.socket.from_stdlib_socket(sock)

    monkeypatch.setattr(mdns_service, "_open_socket", open_one)

    async def main() -> None:
        async with open_node(NodeConfig(listen=["/ip4/127.0.0.1/tcp/0"])) as node:
            assert node.mdns is not None
            await trio.testing.wait_all_tasks_blocked(0.05)
            monkeypatch.setattr(node.mdns, "_interfaces", lambda: ["127.0.0.1"])
            node.mdns.network_changed()
            await until(lambda: opened == 1)
            await trio.testing.wait_all_tasks_blocked(0.05)
            before = len(node.host._subscribers)
            for number in (2, 3, 4):
                node.mdns.network_changed()
                await until(lambda number=number: opened == number)  # type: ignore[misc]
                await trio.testing.wait_all_tasks_blocked(0.05)
            node.host.addrs_changed()
            assert len(node.host._subscribers) == before

    run(main)


def test_a_membership_that_is_refused_closes_the_socket() -> None:
    assert mdns_service._open_socket(["192.0.2.77"]) is None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        assert not mdns_service._join(probe, "192.0.2.77")
