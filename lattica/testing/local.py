"""A daemon for tests: a host on the in-memory network with RPC, forwarding and a local socket, and nothing else.

    network = MemoryNetwork()
    async with open_local_daemon(home_a, network, 1) as a, open_local_daemon(home_b, network, 2) as b:
        b.meet(a)
        async with lattica.aconnect(a.home) as lat: ...

For sync code: `DaemonThread` runs such daemons in a thread of its own.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import trio

from lattica.host import Host
from lattica.local.paths import SOCKET_NAME
from lattica.local.server import LocalServer, open_local_server
from lattica.rpc.forward import Forwarder
from lattica.rpc.service import RpcService
from lattica.testing.memory import MemoryNetwork, open_memory_host


@dataclass
class LocalDaemon:
    """A running one. `home` is what `lattica.connect` takes."""

    home: Path
    host: Host
    rpc: RpcService
    forwarder: Forwarder
    server: LocalServer

    @property
    def peer_id(self) -> str:
        """As text."""
        return str(self.host.peer_id)

    def meet(self, other: LocalDaemon) -> None:
        """Learn where another one is."""
        self.host.peerstore.add_addrs(other.host.peer_id, other.host.listen_addrs(), 3600)


@asynccontextmanager
async def open_local_daemon(
    home: Path, network: MemoryNetwork, seed: int, *, control: Mapping[str, Callable[..., Any]] | None = None
) -> AsyncIterator[LocalDaemon]:
    """A daemon in `home` whose key is made from `seed`. `control`: methods of its own service "daemon"."""
    async with open_memory_host(network, seed) as host, trio.open_nursery() as nursery:
        rpc = RpcService(host)
        forwarder = Forwarder(rpc, host.peer_id, nursery)
        if control is not None:
            forwarder.serve_local("daemon", control)
        async with open_local_server(
            home / SOCKET_NAME,
            host.peer_id,
            forwarder.on_local_request,
            turn=rpc.turn,
            pool=forwarder.pool,
            on_client_gone=forwarder.client_gone,
        ) as server:
            yield LocalDaemon(home, host, rpc, forwarder, server)
        nursery.cancel_scope.cancel()


class DaemonThread:
    """Daemons that know each other, on one in-memory network, in a thread. A context manager: its value is the list."""

    def __init__(self, homes: Sequence[Path], *, control: Mapping[str, Callable[..., Any]] | None = None) -> None:
        self._homes = homes
        self._control = control
        self.daemons: list[LocalDaemon] = []
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="test-daemons")
        self._error: BaseException | None = None
        self._stop: trio.Event | None = None
        self._token: trio.lowlevel.TrioToken | None = None

    def __enter__(self) -> DaemonThread:
        self._thread.start()
        self._ready.wait()
        if self._error is not None:
            raise self._error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        if self._error is not None and error is None:
            raise self._error

    def stop(self) -> None:
        """End the daemons. Safe to call twice."""
        if self._thread.is_alive() and self._token is not None and self._stop is not None:
            self._token.run_sync_soon(self._stop.set)
        self._thread.join()

    def do(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a plain function in the daemons' thread and wait for its result."""
        return trio.from_thread.run_sync(function, *args, trio_token=self._token)

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:  # whatever ends the daemons: raised in the thread that uses them
            self._error = error
        finally:
            self._ready.set()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._stop = trio.Event()
        network = MemoryNetwork()
        async with AsyncExitStack() as stack:
            for seed, home in enumerate(self._homes, 1):
                daemon = open_local_daemon(home, network, seed, control=self._control)
                self.daemons.append(await stack.enter_async_context(daemon))
            for one in self.daemons:
                for other in self.daemons:
                    if other is not one:
                        one.meet(other)
            self._ready.set()
            await self._stop.wait()
