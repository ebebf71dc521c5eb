"""The home directory: private, and locked by one daemon."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lattica.errors import ConfigError, HomeInUse
from lattica.local.paths import default_home
from lattica_daemon import home as home_module
from lattica_daemon.home import Home


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_default_follows_the_environment() -> None:
    assert default_home({"LATTICA_HOME": "/a/b"}) == Path("/a/b")
    assert default_home({"XDG_STATE_HOME": "/state"}) == Path("/state/lattica")
    assert default_home({}) == Path("~/.local/state/lattica").expanduser()


def test_a_new_home_is_private(tmp_path: Path) -> None:
    with Home(tmp_path / "a" / "home") as home:
        home.acquire()
        assert mode(home.path) == 0o700
        assert mode(home.lock_path) == 0o600
        assert home.lock_path.read_text() == f"{os.getpid()}\n"


def test_a_second_daemon_is_refused_with_the_first_ones_process_id(tmp_path: Path) -> None:
    with Home(tmp_path / "home") as first:
        first.acquire()
        with pytest.raises(HomeInUse, match=rf"process id {os.getpid()}\b.*--home"):
            Home(tmp_path / "home").acquire()
    with Home(tmp_path / "home") as again:
        again.acquire()


def test_the_lock_is_free_after_a_kill(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from lattica_daemon.home import Home\n"
        "Home(Path(sys.argv[1])).acquire(); print('held', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "home")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    with pytest.raises(HomeInUse, match=f"process id {child.pid}"):
        Home(tmp_path / "home").acquire()
    child.kill()
    child.wait()
    child.stdin.close()
    child.stdout.close()
    with Home(tmp_path / "home") as home:
        home.acquire()


def test_an_empty_open_directory_is_closed_to_others(tmp_path: Path) -> None:
    path = tmp_path / "home"
    path.mkdir(mode=0o755)
    with Home(path) as home:
        home.acquire()
        assert mode(path) == 0o700


def test_a_directory_with_other_files_is_not_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "home"
    path.mkdir(mode=0o755)
    (path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="holds other files"):
        Home(path).acquire()
    assert mode(path) == 0o755


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "home").touch()
    with pytest.raises(ConfigError, match="is not a directory"):
        Home(tmp_path / "home").acquire()
    with pytest.raises(ConfigError, match="is not a directory"):
        Home(tmp_path / "home" / "deeper").acquire()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_read_only_home_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(home_module.os, "open", refuse)
    with pytest.raises(ConfigError) as caught:
        Home(tmp_path / "home").acquire()
    assert str(caught.value).startswith(f"cannot write to the home {tmp_path / 'home'}")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_home_without_write_permission_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "home"
    path.mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="cannot write to the home"):
        Home(path).acquire()


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too long for a Unix socket"):
        Home(tmp_path / ("x" * 100)).acquire()
