"""Daemons as processes: their start, their end, what survives a kill, and the commands against them."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemon_processes import LOOPBACK, Process, clean_environment
from waiting import wait_until

import lattica
from lattica.errors import ConnectionLost, LatticaError


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """`make(name)`: a daemon that is ended with the test."""
    made: list[Process] = []

    def make(name: str = "home") -> Process:
        process = Process(tmp_path / name)
        made.append(process)
        return process

    yield make
    for process in made:
        process.stop()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, Process]]:
    """Two daemons, the second bootstrapped from the first and connected with it."""
    folder = tmp_path_factory.mktemp("pair")
    first, second = Process(folder / "a"), Process(folder / "b")
    try:
        first.start()
        second.start("--bootstrap", first.address)
        wait_until(lambda: second.json("dht", "info")["peers"] == 1)
        wait_until(lambda: first.json("dht", "info")["peers"] == 1)
        yield first, second
    finally:
        first.stop()
        second.stop()


# -- life cycle -------------------------------------------------------------------------------------------------------
def test_it_is_ready_soon_and_ends_in_order(make: Callable[..., Process]) -> None:
    daemon = make().start()
    assert len(daemon.ready["addrs"]) == 2
    assert daemon.ready_seconds < 10, "2 s on an idle machine; this one is busy with other tests"
    assert stat.S_IMODE(os.stat(daemon.home).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(daemon.home / "lattica.sock").st_mode) == 0o600
    assert stat.S_IMODE(os.stat(daemon.home / "identity.key").st_mode) == 0o600
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert not (daemon.home / "lattica.sock").exists()
    assert "Traceback" not in daemon.log()


def test_identity_survives_a_kill_and_the_socket_is_made_anew(make: Callable[..., Process]) -> None:
    daemon = make().start()
    identity = daemon.peer_id
    daemon.signal(signal.SIGKILL)
    assert daemon.wait() == -signal.SIGKILL
    assert (daemon.home / "lattica.sock").exists()
    done = daemon.cli_process("status")
    assert done.returncode == 3
    assert len(done.stderr.splitlines()) == 1
    assert daemon.start().peer_id == identity
    assert daemon.json("id")["peer_id"] == identity


def test_a_second_daemon_on_the_same_home_is_refused(make: Callable[..., Process]) -> None:
    first = make().start()
    command = [sys.executable, "-m", "lattica_daemon", "--home", str(first.home), *LOOPBACK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert f"process id {first.pid}" in done.stderr
    assert first.json("id")["peer_id"] == first.peer_id


def test_up_is_the_daemon_itself(make: Callable[..., Process], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lattica_cli", "up", "--home", str(tmp_path / "home"), *LOOPBACK, "--no-mdns"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=clean_environment())
    try:
        assert child.stdout is not None
        lines = iter(child.stdout.readline, b"ready\n")
        text = b"".join(lines).decode()
        assert "peer id 12D3KooW" in text
        assert "/p2p/12D3KooW" in text
        assert (tmp_path / "home" / "lock").read_text() == f"{child.pid}\n"
        child.terminate()
        assert child.wait(20) == 0
    finally:
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()


def test_a_call_in_flight_is_finished_before_the_end(make: Callable[..., Process]) -> None:
    daemon = make().start()
    entered, leave = threading.Event(), threading.Event()

    class Slow:
        def work(self) -> str:
            entered.set()
            leave.wait(20)
            return "finished"

    results: list[object] = []
    with lattica.connect(home=daemon.home) as worker, lattica.connect(home=daemon.home) as caller:
        worker.serve("slow", Slow())
        thread = threading.Thread(target=lambda: results.append(caller.call(None, "slow.work", timeout=30)))
        thread.start()
        assert entered.wait(20)
        daemon.signal(signal.SIGTERM)
        wait_until(lambda: "stopping" in daemon.log())
        leave.set()
        thread.join(20)
        assert results == ["finished"]
        assert daemon.wait() == 0


def test_the_drain_has_an_end(make: Callable[..., Process], monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = make()
    daemon.home.mkdir(mode=0o700)
    (daemon.home / "config.toml").write_text("[daemon]\ndrain_seconds = 0.2\n")
    daemon.start()
    entered, leave = threading.Event(), threading.Event()

    class Stuck:
        def work(self) -> None:
            entered.set()
            leave.wait(20)

    failures: list[LatticaError] = []

    def call() -> None:
        try:
            caller.call(None, "stuck.work")
        except LatticaError as error:
            failures.append(error)

    with lattica.connect(home=daemon.home) as worker, lattica.connect(home=daemon.home) as caller:
        worker.serve("stuck", Stuck())
        thread = threading.Thread(target=call)
        thread.start()
        assert entered.wait(20)
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        thread.join(20)
        leave.set()
    assert [type(error) for error in failures] == [ConnectionLost]
    assert "drain_cut_short" in daemon.log()


def test_systemd_is_told(make: Callable[..., Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        daemon = make().start()
        assert b"READY=1" in manager.recv(4096).split(b"\n")
        daemon.signal(signal.SIGHUP)
        assert b"RELOADING=1" in manager.recv(4096)
        assert b"READY=1" in manager.recv(4096).split(b"\n")
        daemon.signal(signal.SIGTERM)
        assert manager.recv(4096) == b"STOPPING=1"
        assert daemon.wait() == 0


def test_hangup_reads_the_level_and_the_rules_again(make: Callable[..., Process]) -> None:
    daemon = make().start()
    (daemon.home / "config.toml").write_text("[log]\nlevel = 'debug'\n")
    (daemon.home / "rules.json").write_text(json.dumps({"block": [daemon.peer_id]}))
    daemon.signal(signal.SIGHUP)
    wait_until(lambda: "reloaded part=lattica_daemon log_level=debug" in daemon.log())
    assert daemon.json("peer", "list-rules")["block"] == [daemon.peer_id]
    (daemon.home / "config.toml").write_text("[log]\nlevel = 'loud'\n")
    daemon.signal(signal.SIGHUP)
    wait_until(lambda: "reload_failed" in daemon.log())
    assert daemon.json("id")["peer_id"] == daemon.peer_id


def test_a_taken_address_is_one_line(make: Callable[..., Process], tmp_path: Path) -> None:
    first = make("first").start()
    command = [sys.executable, "-m", "lattica_daemon", "--home", str(tmp_path / "second")]
    done = subprocess.run(
        [*command, "--listen", first.ready["addrs"][0]], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("latticad: ")
    assert first.ready["addrs"][0] in done.stderr.splitlines()[-1]


def test_wrong_settings_are_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lattica_daemon", "--home", str(tmp_path / "home"), "--listen", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "nowhere" in done.stderr
    assert not (tmp_path / "home").exists()


def test_metrics_are_served_when_asked_for(make: Callable[..., Process]) -> None:
    pytest.importorskip("prometheus_client")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    daemon = make()
    daemon.home.mkdir(mode=0o700)
    (daemon.home / "config.toml").write_text(f"[metrics]\nlisten = '127.0.0.1:{port}'\n")
    daemon.start()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as scraper:
        scraper.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = b"".join(iter(lambda: scraper.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert b"\nlattica_peers 0.0\n" in answer
    with socket.create_connection(("127.0.0.1", port), timeout=10) as scraper:
        scraper.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert scraper.recv(65536).startswith(b"HTTP/1.1 404")


# -- commands ---------------------------------------------------------------------------------------------------------
def test_status_and_peers(pair: tuple[Process, Process]) -> None:
    first, second = pair
    status = second.json("status")
    assert status["peer_id"] == second.peer_id
    assert status["addrs"] == second.ready["addrs"]
    assert status["connections"] >= 1
    assert status["uptime_seconds"] > 0
    assert status["reachability"]
    peers = second.json("peers")
    assert {peer["peer_id"] for peer in peers} == {first.peer_id}
    for name in ("path", "addr", "rtt_ms", "direction", "agent", "sent_bytes", "received_bytes"):
        assert name in peers[0]
    assert peers[0]["path"] in ("tcp", "quic")
    assert peers[0]["direction"] == "outbound"
    assert first.cli("status").returncode == 0
    assert first.peer_id in second.cli("peers").stdout


def test_ping_find_and_connect(pair: tuple[Process, Process]) -> None:
    first, second = pair
    ping = second.json("peer", "ping", first.peer_id, "-c", "3")
    assert len(ping["rtt_ms"]) == 3
    assert all(0 < rtt < 10_000 for rtt in ping["rtt_ms"])
    assert second.json("peer", "find", first.peer_id)["addrs"]
    connected = second.json("peer", "connect", first.address)
    assert connected["peer_id"] == first.peer_id
    assert connected["path"] in ("tcp", "quic")


def test_content_goes_across_by_its_id(pair: tuple[Process, Process], tmp_path: Path) -> None:
    first, second = pair
    file = tmp_path / "weights.bin"
    file.write_bytes(os.urandom(3 << 20))
    shared = first.json("share", str(file))
    assert (shared["bytes"], shared["chunks"]) == (3 << 20, 3)
    assert shared["announced"] >= 1
    providers = second.json("providers", shared["cid"])
    assert [provider["peer_id"] for provider in providers] == [first.peer_id]
    copy = tmp_path / "copy.bin"
    got = second.json("get", shared["cid"], "-o", str(copy))
    assert copy.read_bytes() == file.read_bytes()
    assert (got["bytes"], got["fetched_bytes"], got["reused_bytes"], got["sources"]) == (3 << 20, 3 << 20, 0, 1)
    again = second.json("get", shared["cid"], "-o", str(tmp_path / "again.bin"))
    assert (again["fetched_bytes"], again["reused_bytes"]) == (0, 3 << 20)
    listed = second.json("blobs", "list")
    assert shared["cid"] in {blob["cid"] for blob in listed if blob["complete"]}
    second.json("blobs", "pin", shared["cid"])
    assert next(b for b in second.json("blobs", "list") if b["cid"] == shared["cid"])["pinned"]
    second.json("blobs", "unpin", shared["cid"])
    assert second.json("blobs", "verify")["corrupt"] == 0
    second.json("blobs", "remove", shared["cid"])
    assert shared["cid"] not in {blob["cid"] for blob in second.json("blobs", "list")}
    assert "blobs" in second.json("blobs", "gc")


def test_a_file_without_a_size_is_refused(pair: tuple[Process, Process], tmp_path: Path) -> None:
    """Those of /proc have none, and content all the same: what was shared was an empty blob."""
    first, _ = pair
    done = first.cli("share", "/proc/cpuinfo")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "/proc/cpuinfo has no size, but content: copy it" in done.stderr
    (tmp_path / "empty").touch()
    assert first.json("share", str(tmp_path / "empty"))["bytes"] == 0


def test_a_damaged_file_is_found_by_verify(pair: tuple[Process, Process], tmp_path: Path) -> None:
    first, _ = pair
    file = tmp_path / "damaged.bin"
    file.write_bytes(os.urandom(2 << 20))
    cid = first.json("share", str(file))["cid"]
    with open(file, "r+b") as opened:
        opened.seek(1 << 20)
        opened.write(b"wrong")
    done = first.cli("--json", "blobs", "verify")
    assert done.returncode == 1
    assert json.loads(done.stdout)["damaged"] == [cid]
    first.json("blobs", "remove", cid)


def test_unknown_content_says_how_many_were_asked(pair: tuple[Process, Process], tmp_path: Path) -> None:
    _, second = pair
    from lattica_protocols.blobs.manifest import manifest_cid

    cid = str(manifest_cid(b"nobody has this"))
    done = second.cli("get", cid, "-o", str(tmp_path / "x"))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "asked" in done.stderr
    assert not (tmp_path / "x").exists()
    late = second.cli("get", cid, "-o", str(tmp_path / "x"), "--timeout", "0.001")
    assert late.returncode in (1, 4)


def test_values_are_read_by_the_other_peer(pair: tuple[Process, Process]) -> None:
    first, second = pair
    assert first.json("dht", "put", "greeting", "hello there")["stored_on"] >= 1
    got = second.json("dht", "get", f"{first.peer_id}/greeting")
    assert (got["value"], got["publisher"]) == ("hello there", first.peer_id)
    assert first.json("dht", "get", "greeting")["value"] == "hello there"
    missing = second.cli("dht", "get", f"{first.peer_id}/nothing")
    assert missing.returncode == 1
    assert "asked" in missing.stderr
    info = second.json("dht", "info")
    assert info["peers"] == 1
    assert info["buckets"]


def test_a_method_is_called_from_the_shell(pair: tuple[Process, Process]) -> None:
    first, second = pair

    class Adder:
        def add(self, a: int, b: int) -> int:
            return a + b

        def fail(self) -> None:
            raise ValueError("not today")

    with lattica.connect(home=first.home) as worker:
        worker.serve("adder", Adder())
        assert second.json("rpc", "call", first.peer_id, "adder.add", "2", "3") == {"result": 5}
        services = {s["name"]: s["methods"] for s in second.json("rpc", "services", first.peer_id)}
        assert services["adder"] == ["add", "fail"]
        failed = second.cli("rpc", "call", first.peer_id, "adder.fail")
        assert failed.returncode == 1
        assert "not today" in failed.stderr
        wrong = second.cli("rpc", "call", first.peer_id, "adder.sub")
        assert wrong.returncode == 1
        assert len(wrong.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", [[], ["1"], ["1", "2", "3"]])
def test_wrong_arguments_are_told_in_the_callers_terms(pair: tuple[Process, Process], arguments: list[str]) -> None:
    """Not with the names of our classes, and counted without the object behind the method."""
    first, second = pair

    class Adder:
        def add(self, a: int, b: int) -> int:
            return a + b

    with lattica.connect(home=first.home) as worker:
        worker.serve("sums", Adder())
        done = second.cli("rpc", "call", first.peer_id, "sums.add", *arguments)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        assert "sums.add: " in done.stderr
        assert "the arguments are (a, b)" in done.stderr
        assert "Adder" not in done.stderr
    done = second.cli("rpc", "call", first.peer_id, "lattica.services", *arguments, "1")
    assert done.returncode == 1
    assert "lattica.services: too many positional arguments; the arguments are ()" in done.stderr
    assert "_for_peers" not in done.stderr


def test_other_peers_cannot_call_the_control_service(pair: tuple[Process, Process]) -> None:
    first, second = pair
    done = second.cli("rpc", "call", first.peer_id, "daemon.shutdown")
    assert done.returncode == 1
    assert "daemon" in done.stderr
    assert first.json("id")["peer_id"] == first.peer_id


def test_what_the_daemon_serves_itself_takes_no_long_values(pair: tuple[Process, Process]) -> None:
    """A million strings, decoded in the event loop, would hold up everybody else."""
    first, second = pair
    with lattica.connect(home=second.home) as lat:
        for method in ("bench.echo", "lattica.services"):
            with pytest.raises(lattica.InvalidArgument, match="over the limit"):
                lat.call(first.peer_id, method, ["x"] * 1_000_000, timeout=30)
        assert bytes(lat.call(first.peer_id, "bench.echo", bytes(1 << 20), timeout=30)) == bytes(1 << 20)


def test_the_bench_measures_the_path(pair: tuple[Process, Process]) -> None:
    first, second = pair
    figures = second.json("bench", first.peer_id, "--seconds", "0.2")
    for name in ("calls_per_second_128", "calls_per_second_256k", "upload_mb_s", "download_mb_s"):
        assert figures[name] > 0
    assert 0 < figures["rtt_ms_p50"] <= figures["rtt_ms_p99"]


def test_a_blocked_peer_is_sent_away_and_stays_away(make: Callable[..., Process]) -> None:
    first, second = make("first").start(), make("second").start()
    second.json("peer", "connect", first.address)
    wait_until(lambda: len(first.json("peers")) > 0)
    assert first.json("peer", "block", second.peer_id)["closed"] >= 1
    wait_until(lambda: first.json("peers") == [])
    second.cli("peer", "connect", first.address)
    wait_until(lambda: second.json("peers") == [])
    assert first.json("peer", "list-rules")["block"] == [second.peer_id]
    first.json("peer", "allow", second.peer_id)
    assert second.json("peer", "connect", first.address)["peer_id"] == first.peer_id
    assert second.json("peer", "disconnect", first.peer_id)["closed"] >= 1


def test_wrong_addresses_get_a_clear_answer(pair: tuple[Process, Process]) -> None:
    first, second = pair
    other = "12D3KooWJrDiMu6uEsp5FSmiAPyNqCwiPdNQFVdWaMaP2fXYgqoF"
    impostor = second.cli("peer", "connect", f"{first.ready['addrs'][0]}/p2p/{other}")
    assert impostor.returncode == 1
    assert first.peer_id in impostor.stderr
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    absent = "12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5"
    nobody = second.cli("peer", "connect", f"/ip4/127.0.0.1/tcp/{port}/p2p/{absent}")
    assert nobody.returncode == 1
    assert len(nobody.stderr.splitlines()) == 1
    assert str(port) in nobody.stderr
    itself = second.cli("peer", "connect", second.peer_id)
    assert itself.returncode == 1
    assert "our own" in itself.stderr
    again = second.cli("peer", "connect", other)
    assert first.peer_id not in again.stderr  # where somebody else answered is not remembered as the peer's address


def test_a_peer_that_does_not_answer_pings_is_a_timeout(make: Callable[..., Process]) -> None:
    first, second = make("a").start(), make("b").start()
    assert second.cli("peer", "connect", first.address).returncode == 0
    first.signal(signal.SIGSTOP)
    try:
        late = second.cli("peer", "ping", first.peer_id, "--timeout", "0.5")
    finally:
        first.signal(signal.SIGCONT)
    assert late.returncode == 4, late.stderr


def test_a_daemon_killed_in_the_middle_of_a_command(make: Callable[..., Process], tmp_path: Path) -> None:
    process = make().start()
    command = [sys.executable, "-m", "lattica_cli", "--home", str(process.home), "peer", "connect"]
    with socket.socket() as stalls:
        stalls.bind(("127.0.0.1", 0))
        stalls.listen()
        command.append(f"/ip4/127.0.0.1/tcp/{stalls.getsockname()[1]}")
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=clean_environment()) as child:
            dialled, _ = stalls.accept()  # and says nothing: the command waits
            process.signal(signal.SIGKILL)
            dialled.close()
            assert child.stderr is not None
            told = child.stderr.read()
            assert child.wait(20) == 3
    assert len(told.splitlines()) == 1
    assert "lattica up" in told


def test_a_name_that_is_not_utf8(make: Callable[..., Process], tmp_path: Path) -> None:
    process = make().start()
    umlaut, wrong = tmp_path / "\xe4.bin", tmp_path / "\udcff.bin"
    for file in (umlaut, wrong):
        file.write_bytes(b"x")
    command = [sys.executable, "-m", "lattica_cli", "--home", str(process.home), "--json", "share"]
    plain = {**clean_environment(), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([*command, str(umlaut)], capture_output=True, env=plain, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)["bytes"] == 1
    refused = subprocess.run([*command, str(wrong)], capture_output=True, env=plain, check=False)
    assert refused.returncode == 2
    assert b"not UTF-8" in refused.stderr
