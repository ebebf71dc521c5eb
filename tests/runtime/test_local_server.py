"""The daemon's end of the local socket: who gets in, what a misbehaving client can do, what is left behind."""

from __future__ import annotations

import array
import gc
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

import lattica
from lattica.errors import ConfigError, ConnectionLost, DaemonNotRunning, HomeInUse
from lattica.local import server
from lattica.testing import MemoryNetwork
from lattica.testing.local import LocalDaemon, open_local_daemon
from lattica_protocols.rpc.frames import (
    DETACHED,
    REQUEST,
    Hello,
    encode_detached,
    encode_frame,
    encode_hello,
    encode_request_head,
)

Run = Callable[..., Any]
SESSION = b"s" * 16


async def echo(value: object) -> object:
    return value


async def forever() -> None:
    await trio.sleep_forever()


CONTROL = {"echo": echo, "forever": forever}


def daemon(home: Path) -> Any:
    return open_local_daemon(home, MemoryNetwork(), 1, control=CONTROL)


def connect_raw(one: LocalDaemon) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(one.server.path))
    sock.setblocking(False)
    return sock


async def receive_all(sock: socket.socket) -> bytes:
    """All the daemon sends until it hangs up."""
    got = b""
    while True:
        await trio.lowlevel.wait_readable(sock)
        try:
            data = sock.recv(65536)
        except ConnectionResetError:
            data = b""
        if not data:
            sock.close()
            return got
        got += data


def test_only_the_owner_can_reach_the_socket(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with daemon(tmp_path / "home") as one:
            assert stat.S_IMODE(os.stat(one.server.path).st_mode) == 0o600
            assert stat.S_IMODE(os.stat(one.server.path.parent).st_mode) == 0o700
        assert not one.server.path.exists()

    run(main)


def test_another_user_is_refused(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with daemon(tmp_path) as one:
            with connect_raw(one) as sock:
                monkeypatch.setattr(server, "peer_uid", lambda sock: os.getuid() + 1)
                assert await receive_all(sock) == b""
            assert not one.server.clients

    run(main)


def test_the_kernel_names_the_user() -> None:
    ours, theirs = socket.socketpair()
    assert server.peer_uid(ours) == os.getuid()
    ours.close()
    theirs.close()


def test_a_socket_left_by_a_killed_daemon_is_replaced(run: Run, tmp_path: Path) -> None:
    stale = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stale.bind(str(tmp_path / "lattica.sock"))
    stale.close()

    async def main() -> None:
        async with daemon(tmp_path) as one, lattica.aconnect(one.home) as lat:
            assert await lat.daemon("echo", 1) == 1

    run(main)


def test_a_second_daemon_on_the_same_socket_is_refused(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with daemon(tmp_path) as one:
            with pytest.raises(HomeInUse, match="another daemon answers"):
                server._listen(one.server.path)
            async with lattica.aconnect(one.home) as lat:
                assert await lat.daemon("echo", 1) == 1

    run(main)


def test_a_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "lattica.sock").write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"):
        server._listen(tmp_path / "lattica.sock")
    assert (tmp_path / "lattica.sock").read_text() == "precious"


def test_too_many_clients_are_refused(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with daemon(tmp_path) as one:
            one.server._max_clients = 1
            async with lattica.aconnect(one.home):
                with pytest.raises(DaemonNotRunning):
                    async with lattica.aconnect(one.home):
                        pass

    run(main)


GARBAGE = {
    "noise": os.urandom(4096),
    "no hello": encode_frame(REQUEST, 0, 1, encode_request_head(b"daemon.echo", b"\x90", 0)),
    "a second hello": encode_hello(Hello(SESSION)) * 2,
    "head longer than body": encode_hello(Hello(SESSION)) + b"\x01\0\0\0\x01\0\xff\xff\x01\0\0\0x",
    "a bulk hello": encode_hello(Hello(SESSION, bulk=True)),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_ends_that_client_and_nothing_else(run: Run, tmp_path: Path, name: str) -> None:
    async def main() -> None:
        async with daemon(tmp_path) as one, lattica.aconnect(one.home) as lat:
            sock = connect_raw(one)
            sock.send(GARBAGE[name] + b"\xff" * 64)
            sock.shutdown(socket.SHUT_WR)  # noise can be the beginning of something very long
            await receive_all(sock)
            assert await lat.daemon("echo", "still here") == "still here"
            assert len(one.server.clients) == 1

    run(main)


def memory_that_can_shrink(size: int) -> int:
    fd = os.memfd_create("attack", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    return fd


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no memfd")
@pytest.mark.parametrize("size", [0, 100, 4096 + (2 << 20)])
def test_memory_that_can_shrink_is_refused(run: Run, tmp_path: Path, size: int) -> None:
    """Whoever maps it could be ended by SIGBUS at any time."""

    async def main() -> None:
        async with daemon(tmp_path) as one, lattica.aconnect(one.home) as lat:
            sock = connect_raw(one)
            request = encode_detached(
                REQUEST, DETACHED, 1, encode_request_head(b"daemon.echo", b"\x91\x01", 0), 0, 2 << 20
            )
            fd = memory_that_can_shrink(size)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
            sock.sendmsg([encode_hello(Hello(SESSION, features=frozenset({"fd"}))) + request], rights)
            await receive_all(sock)
            os.close(fd)
            assert await lat.daemon("echo", 1) == 1

    run(main)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no memfd")
def test_descriptors_that_nobody_asked_for_are_closed(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with daemon(tmp_path) as one:
            before = len(os.listdir("/proc/self/fd"))
            sock = connect_raw(one)
            reader, writer = os.pipe()
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [reader] * 200))]
            sock.sendmsg([encode_hello(Hello(SESSION))], rights)
            await receive_all(sock)
            os.close(reader)
            os.close(writer)
            await trio.testing.wait_all_tasks_blocked()
            assert len(os.listdir("/proc/self/fd")) == before

    run(main)


def test_a_client_that_vanishes_leaves_nothing_running(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with daemon(tmp_path) as one:
            async with trio.open_nursery() as nursery:
                async with lattica.aconnect(one.home) as lat:
                    nursery.start_soon(lat.daemon, "forever")
                    await trio.testing.wait_all_tasks_blocked(0.01)
                    assert [c.machine.inbound_calls for c in one.server.clients] == [1]
                    nursery.cancel_scope.cancel()
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert not one.server.clients
            assert one.rpc.calls_in_flight() == 0

    run(main)


def test_a_daemon_that_closes_ends_calls_at_once(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            stop = trio.Event()

            async def serve(task_status: trio.TaskStatus[LocalDaemon] = trio.TASK_STATUS_IGNORED) -> None:
                async with daemon(tmp_path) as one:
                    task_status.started(one)
                    await stop.wait()

            one = await nursery.start(serve)
            async with lattica.aconnect(one.home) as lat:

                async def stop_soon() -> None:
                    await trio.testing.wait_all_tasks_blocked(0.01)
                    stop.set()

                nursery.start_soon(stop_soon)
                with pytest.raises(ConnectionLost):
                    await lat.daemon("forever")
                with pytest.raises(DaemonNotRunning, match=r"no daemon answers at .*; start one with 'lattica up'"):
                    await lat.daemon("echo", 1)

    run(main)


def test_nothing_is_leaked(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with daemon(tmp_path) as one:
            data = b"x" * (3 << 20)

            async def once() -> None:
                async with lattica.aconnect(one.home) as lat:
                    for _ in range(3):
                        assert len(await lat.daemon("echo", data)) == len(data)

            await once()
            gc.collect()
            one.server.pool.close()
            before = len(os.listdir("/proc/self/fd"))
            for _ in range(5):
                await once()
            await trio.testing.wait_all_tasks_blocked(0.01)
            gc.collect()
            assert len(os.listdir("/proc/self/fd")) <= before

    run(main)
