"""`GET /metrics` for Prometheus, when the setting `metrics.listen` asks for it. Needs the prometheus-client package.

Just enough HTTP for a scraper: one request a connection, the answer closes it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import trio

from lattica.errors import ConfigError

if TYPE_CHECKING:
    from lattica_daemon.daemon import Daemon

log = logging.getLogger("lattica_daemon.metrics")

REQUEST_TIMEOUT = 5.0
MAX_REQUEST = 8192
"""Bytes of a request's head: scrapers send a few hundred."""


async def serve_metrics(
    daemon: Daemon, listen: str, task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve until cancelled. `ConfigError` when the package is missing or the address cannot be used."""
    try:
        import prometheus_client
    except ImportError:
        raise ConfigError("metrics.listen needs the prometheus-client package: pip install prometheus-client") from None
    registry = prometheus_client.CollectorRegistry()
    registry.register(NodeCollector(daemon))

    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            with trio.move_on_after(REQUEST_TIMEOUT):
                try:
                    await stream.send_all(_response(await _request_line(stream), registry))
                except trio.BrokenResourceError:
                    log.debug("scraper_left")

    host, _, port = listen.rpartition(":")
    try:
        await trio.serve_tcp(answer, int(port), host=host.strip("[]"), task_status=task_status)
    except OSError as error:
        raise ConfigError(f"metrics.listen = {listen!r}: {error.strerror or error}") from None


async def _request_line(stream: trio.SocketStream) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data and len(data) < MAX_REQUEST:
        more = await stream.receive_some(MAX_REQUEST)
        if not more:
            break
        data += more
    return data.split(b"\r\n", 1)[0]


def _response(request_line: bytes, registry: Any) -> bytes:
    import prometheus_client

    if request_line.split(b" ")[:2] != [b"GET", b"/metrics"]:
        return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    body: bytes = prometheus_client.generate_latest(registry)
    head = (
        f"HTTP/1.1 200 OK\r\nContent-Type: {prometheus_client.CONTENT_TYPE_LATEST}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


class NodeCollector:
    """Reads the figures of the node when somebody scrapes; nothing is counted twice."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def collect(self) -> list[Any]:
        """Metric families; names as in `daemon/README.md`."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        daemon = self._daemon
        host = daemon.node.host
        connections = host.connections()
        by_path = GaugeMetricFamily("lattica_connections", "Connections that are up", labels=["path"])
        for path in ("tcp", "quic", "relay"):
            by_path.add_metric([path], sum(connection.path == path for connection in connections))
        traffic = CounterMetricFamily("lattica_bytes", "Bytes carried by connections", labels=["direction"])
        traffic.add_metric(["sent"], daemon.traffic.sent(connections))
        traffic.add_metric(["received"], daemon.traffic.received(connections))
        events = CounterMetricFamily("lattica_events", "Events of the host since the start", labels=["event"])
        for name, count in sorted(host.counters.items()):
            events.add_metric([name], count)
        store = daemon.store_summary()
        return [
            by_path,
            traffic,
            events,
            GaugeMetricFamily("lattica_peers", "Peers with a connection", value=len(host.peers())),
            GaugeMetricFamily(
                "lattica_calls_in_flight", "Calls that somebody waits for", value=daemon.calls_in_flight()
            ),
            GaugeMetricFamily(
                "lattica_routing_table_peers", "Peers known to Kademlia", value=len(daemon.node.kad.table)
            ),
            GaugeMetricFamily("lattica_store_blobs", "Complete blobs in the store", value=store["blobs"]),
            GaugeMetricFamily("lattica_store_bytes", "Their bytes", value=store["bytes"]),
        ]
