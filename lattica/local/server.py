"""The daemon's end of the local socket, under trio.

Only processes of the same user get in: the socket is 0600 in a directory that is 0700, and the kernel tells the user
of whoever connects. Each client has one channel; what its requests mean is the affair of `on_request`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
import struct
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from lattica.errors import ConfigError, ConnectionLost, HomeInUse, LatticaError
from lattica.local.channel import FEATURES, LOCAL_LIMITS, LocalChannel
from lattica.local.memfd import SegmentPool
from lattica.rpc.channel import RequestHandler, Turn
from lattica.rpc.peer_channel import PeerChannel
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import LOCAL_MAX_CLIENTS
from lattica_protocols.peer_id import PeerId
from lattica_protocols.rpc.connection import RpcConnection

log = logging.getLogger("lattica.local")

SLOW_PEER_SECONDS: Final = 1.0
"""How long one read of a client waits for a peer that is slow to take its answers. A peer that takes less than one read
(256 KiB) in this time is disconnected some reads later; until then the client's other calls wait with it."""
TRIM_SECONDS: Final = 5.0
ACCEPT_RETRY_SECONDS: Final = 0.2
"""Pause after the process ran out of file descriptors."""


class LocalClient(LocalChannel):
    """One client of the daemon. Handlers see it as they see the channel of a peer."""

    def __init__(
        self, sock: socket.socket, peer: PeerId, on_request: RequestHandler, pool: SegmentPool, turn: Turn
    ) -> None:
        machine = RpcConnection(initiator=False, limits=LOCAL_LIMITS, features=FEATURES, allocate=pool.allocate_tail)
        super().__init__(sock, machine, on_request, clock=trio.current_time, pool=pool, turn=turn)
        self.peer = peer
        """The daemon's own peer id: its clients act in its name."""
        self.answers_to: set[PeerChannel] = set()
        """Peers whose calls this client answers: it is read no faster than they take the answers."""
        self.on_blocked = self._blocked
        self._timer_scope: trio.CancelScope | None = None
        self._blocked_lot = trio.lowlevel.ParkingLot()
        self._room = trio.lowlevel.ParkingLot()

    async def run(self) -> None:
        """Live until the client is gone."""
        reason = "the daemon closed the local connection"
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._run_writer)
                nursery.start_soon(self._run_timer)
                self.flush()
                reason = await self._run_reader()
                nursery.cancel_scope.cancel()
        finally:
            self.close(reason)
            self._room.unpark_all()

    async def _run_reader(self) -> str:
        try:
            while True:
                await trio.lowlevel.wait_readable(self.sock)
                self.read()
                if self.answers_to:
                    await self._wait_for_slow_peers()
        except ConnectionLost as error:
            return str(error)
        except RemoteProtocolError as error:
            log.warning("local_client_misbehaved error=%s", error)
            return f"the client broke the protocol: {error}"

    async def _wait_for_slow_peers(self) -> None:
        for channel in [*self.answers_to]:
            if channel.closed.is_set():
                self.answers_to.discard(channel)
            elif channel.congested():
                with trio.move_on_after(SLOW_PEER_SECONDS):
                    await channel.writable()

    async def _run_writer(self) -> None:
        while True:
            if not self.wants_write:
                await self._blocked_lot.park()
            await trio.lowlevel.wait_writable(self.sock)
            self.on_writable()
            if not self.congested():
                self._room.unpark_all()

    def _blocked(self) -> None:
        self._blocked_lot.unpark()

    async def _run_timer(self) -> None:
        while True:
            when = self.machine.next_timeout()
            with trio.CancelScope(deadline=float("inf") if when is None else when) as scope:
                self._timer_scope = scope
                await trio.sleep_forever()
            self.expire()

    def deadlines_changed(self) -> None:
        scope = self._timer_scope
        if scope is not None:
            when = self.machine.next_timeout()
            if when is not None and when < scope.deadline:
                scope.deadline = when

    async def writable(self) -> None:
        """Wait until the client has caught up, or is gone."""
        while self.congested() and not self.closed:
            await self._room.park()


class LocalServer:
    """The listening socket and the clients. Made by `open_local_server`."""

    def __init__(
        self,
        listener: socket.socket,
        path: Path,
        peer: PeerId,
        on_request: RequestHandler,
        *,
        turn: Turn,
        pool: SegmentPool,
        on_client_gone: Callable[[LocalClient], None],
        max_clients: int,
    ) -> None:
        self.path = path
        self.pool = pool
        self.clients: set[LocalClient] = set()
        self._listener = listener
        self._peer = peer
        self._on_request = on_request
        self._turn = turn
        self._on_client_gone = on_client_gone
        self._max_clients = max_clients

    async def run(self) -> None:
        """Accept clients until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._trim)
            while True:
                await trio.lowlevel.wait_readable(self._listener)
                try:
                    sock, _ = self._listener.accept()
                except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                    continue
                except OSError as error:
                    if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                        raise
                    log.warning("local_accept_failed error=%s", error.strerror)
                    await trio.sleep(ACCEPT_RETRY_SECONDS)
                    continue
                refusal = self._refusal(sock)
                if refusal is not None:
                    log.warning("local_client_refused reason=%s", refusal)
                    sock.close()
                    continue
                sock.setblocking(False)
                nursery.start_soon(self._serve, sock)

    def _refusal(self, sock: socket.socket) -> str | None:
        try:
            uid = peer_uid(sock)
        except OSError:
            return "its user is not known"
        if uid != os.getuid():
            return f"it belongs to the user {uid}"
        if len(self.clients) >= self._max_clients:
            return f"{self._max_clients} clients are connected"
        return None

    async def _serve(self, sock: socket.socket) -> None:
        client = LocalClient(sock, self._peer, self._on_request, self.pool, self._turn)
        self.clients.add(client)
        try:
            await client.run()
        finally:
            self.clients.discard(client)
            self._on_client_gone(client)

    async def _trim(self) -> None:
        while True:
            await trio.sleep(TRIM_SECONDS)
            self.pool.trim(trio.current_time())


@asynccontextmanager
async def open_local_server(
    path: Path,
    peer: PeerId,
    on_request: RequestHandler,
    *,
    turn: Turn,
    pool: SegmentPool,
    on_client_gone: Callable[[LocalClient], None] = lambda client: None,
    max_clients: int = LOCAL_MAX_CLIENTS,
) -> AsyncIterator[LocalServer]:
    """Listen on the Unix socket `path` and serve clients while the block runs.

    `peer`: the daemon's peer id. `turn`: shared with the channels that calls are forwarded to. `on_client_gone` is
    called after all calls of the client have ended. Raises `HomeInUse` when somebody answers on the path already,
    `ConfigError` when the path cannot be used.
    """
    listener, identity = _listen(path)
    server = LocalServer(
        listener, path, peer, on_request, turn=turn, pool=pool, on_client_gone=on_client_gone, max_clients=max_clients
    )
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.run)
            yield server
            nursery.cancel_scope.cancel()
    finally:
        listener.close()
        with contextlib.suppress(OSError):
            found = os.lstat(path)
            if (found.st_dev, found.st_ino) == identity:
                os.unlink(path)
        pool.close()


def peer_uid(sock: socket.socket) -> int:
    """The user of the process that connected, from the kernel."""
    if sys.platform == "darwin":
        xucred = sock.getsockopt(0, 1, 76)  # SOL_LOCAL, LOCAL_PEERCRED: u32 version, u32 user, …
        uid: int = struct.unpack_from("=II", xucred)[1]
        return uid
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    uid = int(struct.unpack("=iII", credentials)[1])
    return uid


def _listen(path: Path) -> tuple[socket.socket, tuple[int, int]]:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_stale(path)
        listener.bind(str(path))
        os.chmod(path, 0o600)  # until here the directory keeps others out
        found = os.lstat(path)
        listener.setblocking(False)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {path}: {error.strerror or error}") from None
    except LatticaError:
        listener.close()
        raise
    return listener, (found.st_dev, found.st_ino)


def _remove_stale(path: Path) -> None:
    """Remove the socket that a killed daemon left behind."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{path} is in the way: it is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return
    raise HomeInUse(f"another daemon answers on {path}: stop it, or start this one with another --home")
