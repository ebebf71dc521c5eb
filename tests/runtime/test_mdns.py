"""Where there is no network to search, mDNS is silent and the node runs."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest
import trio.testing

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


def test_a_membership_that_is_refused_closes_the_socket() -> None:
    assert mdns_service._open_socket(["192.0.2.77"]) is None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        assert not mdns_service._join(probe, "192.0.2.77")
