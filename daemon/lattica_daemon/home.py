"""The home directory: identity, settings, stores and the local socket of one daemon.

    HOME/            0700
      lock           held with flock while a daemon runs; holds its process id as text
      lattica.sock   local clients connect here (0600)
      identity.key   private key (0600)
      config.toml    settings, when there are any
      rules.json     who may connect
      blobs/         content store
      *.sqlite       everything small that must survive a crash

The lock is the kernel's, so it is free again the moment a killed daemon is gone, and no stale file is ever in the way.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
from pathlib import Path

from lattica.errors import ConfigError, HomeInUse

SOCKET_PATH_LIMIT = 103
"""Bytes of a Unix socket's path: sun_path has 108 on Linux and 104 on macOS, with the closing zero."""

_OURS = frozenset({"lock", "lattica.sock", "identity.key", "config.toml", "rules.json", "blobs"})


class Home:
    """The directory, made when it is missing, and the lock on it. Use as a context manager to let the lock go."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.abspath(path))
        self.lock_path = self.path / "lock"
        self.socket_path = self.path / "lattica.sock"
        self.config_path = self.path / "config.toml"
        self.rules_path = self.path / "rules.json"
        self._lock: int | None = None

    def __enter__(self) -> Home:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Make the directory and take the lock.

        Raises `HomeInUse` with the other daemon's process id, `ConfigError` when the directory cannot be used.
        """
        if len(os.fsencode(self.socket_path)) > SOCKET_PATH_LIMIT:
            raise ConfigError(
                f"the home {self.path} is too long for a Unix socket ({SOCKET_PATH_LIMIT} bytes with "
                f"/{self.socket_path.name}): choose a shorter one with --home"
            )
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._make_private()
            fd = os.open(self.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(_cannot_use(self.path, error)) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            os.close(fd)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise ConfigError(_cannot_use(self.path, error)) from None
            who = f"the daemon with process id {owner}" if owner.isdigit() else "another daemon"
            raise HomeInUse(
                f"{who} already runs on {self.path}: stop it, or start this one with another --home"
            ) from None
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            os.close(fd)
            raise ConfigError(_cannot_use(self.path, error)) from None
        self._lock = fd

    def release(self) -> None:
        """Let the lock go. The file stays: removing it would race with a daemon that is just opening it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _make_private(self) -> None:
        found = self.path.stat()
        if not stat.S_ISDIR(found.st_mode) or stat.S_IMODE(found.st_mode) & 0o077 == 0:
            return
        # Only a directory that is empty or already ours is tightened: --home /tmp must not close /tmp.
        names = set(os.listdir(self.path))
        if found.st_uid != os.getuid() or (names and not names & _OURS) or found.st_mode & stat.S_ISVTX:
            raise ConfigError(
                f"the home {self.path} is open to others and holds other files: choose another with --home, "
                f"or `chmod 700` it"
            )
        self.path.chmod(0o700)


def _cannot_use(path: Path, error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"cannot write to the home {path} ({error.strerror}): choose another with --home or LATTICA_HOME"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"the home {path} is not a directory: choose another with --home or LATTICA_HOME"
    if error.errno == errno.ENOSPC:
        return f"no space left on the disk of the home {path}"
    return f"cannot use the home {path}: {error.strerror or error}"


def check_platform() -> None:
    """The daemon needs Unix sockets and flock."""
    if sys.platform == "win32":
        raise ConfigError("latticad runs on Linux and macOS")
