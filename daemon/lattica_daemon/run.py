"""From settings to a running daemon and, at a signal, in order to its end.

The order matters: the lock on the home is held before this begins (`main`); the local socket opens when the node is up,
and the ready line is printed when both are, so whoever reads it can use everything.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from lattica.errors import ConfigError, LatticaError
from lattica.local.server import open_local_server
from lattica.node import Node, NodeConfig, open_node
from lattica_daemon import logs
from lattica_daemon.daemon import Daemon
from lattica_daemon.home import Home
from lattica_daemon.notify import notify
from lattica_daemon.rules import PeerRules
from lattica_daemon.settings import DEFAULT_LISTEN, DEFAULT_PORT, Settings

log = logging.getLogger("lattica_daemon")


def run_daemon(home: Home, settings: Settings, reload: Callable[[], Settings], *, ready_as_json: bool) -> None:
    """Run until SIGTERM, SIGINT or a local client's request. `reload` reads the settings again at SIGHUP."""
    logs.configure(settings.log.level, settings.log.format)
    raise_file_limit()
    try:
        trio.run(_run, home, settings, reload, ready_as_json)
    except BaseExceptionGroup as group:
        # Nurseries wrap what ends them. An error that a user can do something about is one line, so it is unwrapped.
        error = sole_error(group)
        if isinstance(error, LatticaError | OSError):
            raise error from None
        raise


def sole_error(group: BaseExceptionGroup[BaseException]) -> BaseException | None:
    """The one error at the bottom of nested groups, None when there are several."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        if len(error.exceptions) != 1:
            return None
        error = error.exceptions[0]
    return error


async def _run(home: Home, settings: Settings, reload: Callable[[], Settings], ready_as_json: bool) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with open_daemon(home, settings) as daemon:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_watch_signals, signals, daemon, reload)
                _say_ready(daemon, as_json=ready_as_json)
                await daemon.stopping.wait()
                notify(STOPPING="1")
                await daemon.drain()
                nursery.cancel_scope.cancel()
    log.info("stopped")


@asynccontextmanager
async def open_daemon(home: Home, settings: Settings) -> AsyncIterator[Daemon]:
    """The daemon on a home whose lock is held. Errors: `ConfigError`, `OSError` (an address is in use)."""
    rules = PeerRules(home.rules_path, settings.peers.default)
    rules.load()
    config = NodeConfig(
        home=home.path,
        listen=choose_listen_addrs(settings),
        announce=settings.listen.announce,
        bootstrap=settings.discovery.bootstrap,
        kad_protocol=settings.discovery.protocol,
        kad_mode=settings.discovery.mode,  # type: ignore[arg-type]  # the rule of the setting says so
        relay_serve=settings.relay.serve == "on",
        relay_bytes_per_second=settings.relay.max_mb_per_second * 1e6 or None,
        stun_servers=settings.discovery.stun_servers,
        relay_use=settings.relay.use,  # type: ignore[arg-type]
        relays=settings.relay.relays,
        punch=settings.relay.punch == "on",
        mdns=settings.discovery.mdns == "on",
        port_mapping=settings.listen.port_mapping == "on",
        gate=rules.refusal,
    )
    async with open_node(config) as node, trio.open_nursery() as nursery:
        daemon = Daemon(home, settings, node, rules, nursery)
        nursery.start_soon(daemon.count_traffic)
        async with _local_socket(daemon, node):
            if settings.metrics.listen:
                from lattica_daemon.metrics import serve_metrics

                await nursery.start(serve_metrics, daemon, settings.metrics.listen)
            yield daemon
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def _local_socket(daemon: Daemon, node: Node) -> AsyncIterator[None]:
    async with open_local_server(
        daemon.home.socket_path,
        node.peer_id,
        daemon.forwarder.on_local_request,
        turn=node.rpc.turn,
        pool=daemon.forwarder.pool,
        on_client_gone=daemon.forwarder.client_gone,
    ) as server:
        daemon.local = server
        try:
            yield
        finally:
            daemon.local = None


async def _watch_signals(signals: AsyncIterator[int], daemon: Daemon, reload: Callable[[], Settings]) -> None:
    async for number in signals:
        if number == signal.SIGHUP:
            notify(RELOADING="1")
            try:
                level = reload().log.level
                daemon.rules.load()
            except ConfigError as error:
                log.error("reload_failed error=%s", error)
            else:
                logs.set_level(level)
                for peer in daemon.node.host.peers():
                    if daemon.rules.refusal(peer) is not None:
                        await daemon.node.host.disconnect(peer)
                log.info("reloaded log_level=%s", level)
            notify(READY="1")
        elif daemon.stopping.is_set():
            log.warning("killed_by_second_signal signal=%s", signal.Signals(number).name)
            os._exit(1)  # asked twice: whoever asks does not want to wait for the drain
        else:
            daemon.stop(signal.Signals(number).name)


def _say_ready(daemon: Daemon, *, as_json: bool) -> None:
    """The one line (or, for people, the few lines) on standard output."""
    peer_id = str(daemon.node.peer_id)
    addrs = [str(addr) for addr in daemon.node.host.advertised_addrs()]
    if as_json:
        text = json.dumps({"peer_id": peer_id, "addrs": addrs})
    else:
        text = "\n".join([f"peer id {peer_id}", *(f"listening on {addr}/p2p/{peer_id}" for addr in addrs), "ready"])
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nobody reads; that is no reason to stop
    log.info("ready peer=%s count=%d", peer_id, len(addrs))
    notify(READY="1", STATUS=f"peer {peer_id}", MAINPID=str(os.getpid()))


# -- where to listen ---------------------------------------------------------------------------------------------------
def choose_listen_addrs(settings: Settings) -> tuple[str, ...]:
    """The configured addresses; for the default ones, families this machine lacks left out, and a free port when the
    usual one is taken: a second daemon on the same machine should start without being told how."""
    if settings.source("listen.addrs") != "default":
        return settings.listen.addrs
    families = {"ip4": socket.AF_INET, "ip6": socket.AF_INET6}
    kinds = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
    usable, taken = [], False
    for text in DEFAULT_LISTEN:
        _, family, host, kind, *_ = text.split("/")
        problem = _bind_problem(families[family], kinds[kind], host)
        if problem in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT):
            log.info("family_missing addr=%s", text)
            continue
        taken = taken or problem == errno.EADDRINUSE
        usable.append(text)
    if taken:
        log.warning("default_port_taken port=%d", DEFAULT_PORT)
        return tuple(text.replace(f"/{DEFAULT_PORT}", "/0") for text in usable)
    return tuple(usable)


def _bind_problem(family: socket.AddressFamily, kind: socket.SocketKind, host: str) -> int | None:
    """The errno of trying the default port, None when it can be bound."""
    try:
        with socket.socket(family, kind) as probe:
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if kind == socket.SOCK_STREAM:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, DEFAULT_PORT))
    except OSError as error:
        return error.errno
    return None


def raise_file_limit() -> None:
    """Take all file descriptors we may have: each connection, client and shared buffer is one."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 65536) if hard != resource.RLIM_INFINITY else 65536
    if soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError) as error:
            log.debug("file_limit_kept count=%d error=%s", soft, error)
