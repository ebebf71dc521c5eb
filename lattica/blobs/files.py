"""What the content store asks of the file system: identity, space, copies, and names that appear all at once.

All of this blocks; the service calls it in worker threads.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lattica.errors import LatticaError, StorageError, StorageFull

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_FICLONE = 0x40049409
"""linux/fs.h: share all extents of another file (btrfs, XFS, bcachefs, overlayfs over these)."""
_COPY_STEP = 8 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """Changes whenever the content of a file may have changed.

    `ctime_ns` cannot be set by programs, so that a writer which puts the modification time back is noticed, too.
    Renaming and chmod change it as well; the reaction to a change is to compute hashes again, so that costs time
    and nothing else.
    """

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, target: int | Path) -> FileIdentity:
        found = os.stat(target)
        return cls(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@contextmanager
def storage_errors(path: Path | str) -> Iterator[None]:
    """Turn an `OSError` inside the block into `StorageFull` or `StorageError` that names `path` and what to do."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, path) from error


def storage_error(error: OSError, path: Path | str) -> LatticaError:
    if error.errno in _FULL:
        return StorageFull(
            f"no space left for {path}: free some, or choose another place; what was fetched stays and is used again"
        )
    if error.errno == errno.EFBIG:
        return StorageFull(f"{path} would be larger than this file system or the process limit (ulimit -f) allows")
    if error.errno in (errno.EACCES, errno.EPERM):
        return StorageError(f"no permission for {path}")
    if error.errno == errno.EROFS:
        return StorageError(f"{path} is on a read-only file system")
    return StorageError(f"{path}: {error.strerror or error}")


def preallocate(fd: int, size: int) -> None:
    """Reserve `size` bytes on disk: a disk that is too small fails now and not after an hour."""
    if size == 0:
        return
    if sys.platform == "linux":
        os.posix_fallocate(fd, 0, size)
    else:
        os.ftruncate(fd, size)


def clone(source: int, target: int) -> bool:
    """Make `target` share the extents of `source`. False where the file system cannot."""
    if sys.platform != "linux":
        return False
    import fcntl

    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True


def copy(source: int, target: int, size: int) -> None:
    """Copy `size` bytes, sharing extents or inside the kernel when it can."""
    if clone(source, target):
        return
    at = 0
    in_kernel = hasattr(os, "copy_file_range")
    while at < size:
        step = min(_COPY_STEP, size - at)
        if in_kernel:
            try:
                done = os.copy_file_range(source, target, step, at, at)
            except OSError as error:
                if error.errno in _FULL:
                    raise
                in_kernel = False
                continue
        else:
            done = write_all(target, os.pread(source, step, at), at)
        if done == 0:
            break
        at += done


def new_buffer(length: int) -> mmap.mmap:
    """Zeroed memory at a page boundary, as direct writes need it."""
    return mmap.mmap(-1, length)


def open_direct(path: Path) -> int:
    """A descriptor whose writes go past the page cache, -1 where the system or the file system has none."""
    direct = getattr(os, "O_DIRECT", 0)
    if not direct:
        return -1
    try:
        return os.open(path, os.O_WRONLY | os.O_NOFOLLOW | direct)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return -1
        raise


def write_all(fd: int, data: bytes | memoryview, offset: int) -> int:
    """`pwrite` until everything is written."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)
    return done


def read_full(fd: int, buffer: memoryview, offset: int) -> int:
    """`pread` until `buffer` is full or the file ends; how many bytes."""
    done = 0
    while done < len(buffer):
        got = os.preadv(fd, [buffer[done:]], offset + done)
        if got == 0:
            break
        done += got
    return done


def rename_durably(source: Path, target: Path) -> None:
    """Rename, so that after a power cut `target` is the old file or the new one and never anything else."""
    os.replace(source, target)
    sync_directory(target.parent)


def sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such thing
            raise
    finally:
        os.close(fd)


def data_extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the parts of a sparse file that were written; the whole file where that is not known."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            yield at, size
            return
        yield start, min(end, size)
        at = end
