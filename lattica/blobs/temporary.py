"""The directory of a store that is to leave nothing behind, also when its process is killed.

The process holds a lock on the directory (`flock`, which the kernel lets go of when the process dies). Whoever makes
such a directory first removes those of the same user that nobody holds any more. A directory that was removed between
being made and being locked is noticed by its maker, who makes another.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import stat
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger("lattica.blobs")

PREFIX: Final = "lattica-store-"
MOST_AT_ONCE: Final = 100
"""Directories removed at one start, which waits for it: some 10 ms."""


@contextmanager
def temporary_directory() -> Iterator[Path]:
    """A new directory, removed afterwards. `OSError` when none can be made."""
    _remove_abandoned(Path(tempfile.gettempdir()))
    path, lock = _make()
    try:
        yield path
    finally:
        try:
            shutil.rmtree(path)
        finally:
            os.close(lock)


def _make() -> tuple[Path, int]:
    """A directory and a descriptor that holds its lock."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=PREFIX))
        with suppress(FileNotFoundError):  # somebody who starts, too, took it for abandoned before it was locked
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            held = False
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                held = os.path.samestat(os.fstat(lock), os.stat(path))
            finally:
                if not held:
                    os.close(lock)
            if held:
                return path, lock


def _remove_abandoned(parent: Path) -> None:
    removed = 0
    for path in parent.glob(f"{PREFIX}*"):
        if removed == MOST_AT_ONCE:
            break
        try:
            found = path.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
                removed += _remove_unless_held(path)
        except FileNotFoundError:
            continue  # its owner, or another one who starts, has just removed it
        except OSError as error:  # it goes on without it
            log.warning("temporary_store_kept path=%s error=%s", path, error)


def _remove_unless_held(path: Path) -> bool:
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        shutil.rmtree(path)
        log.info("temporary_store_removed path=%s", path)
        return True
    finally:
        os.close(lock)
