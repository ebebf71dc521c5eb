"""The file that holds a node's identity: the protobuf of an Ed25519 private key, as other libp2p programs store it.

Who can read it can be the node, so it belongs to its user alone (mode 0600), and a file that others could have read or
changed is refused instead of being used. It is written once: whole and on disk, or not at all.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from lattica.errors import ConfigError
from lattica_protocols.keys import PrivateKey

_MAX_FILE_BYTES = 4096
"""A stored key has 68 bytes; anything much larger is another file."""


def load_or_create_key(path: str | os.PathLike[str]) -> PrivateKey:
    """The key in `path`; a new one, stored there, when nothing is there yet.

    When two processes create it at once, both get the same key. `ConfigError` (one line) when the file is damaged,
    readable by others, or cannot be read or written.
    """
    path = Path(path)
    try:
        return _load(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ConfigError(f"cannot read the identity file {path}: {error.strerror}") from error
    try:
        _create(path, PrivateKey.generate(os.urandom(32)))
        return _load(path)
    except OSError as error:
        raise ConfigError(f"cannot create the identity file {path}: {error.strerror}") from error


def _load(path: Path) -> PrivateKey:
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"the identity file {path} is not a regular file")
        if status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            raise ConfigError(f"the identity file {path} is open to other users (mode {mode:04o}): chmod 600 {path}")
        data = file.read(_MAX_FILE_BYTES + 1)
    try:
        if len(data) > _MAX_FILE_BYTES:
            raise ValueError(f"it is over {_MAX_FILE_BYTES} bytes")
        return PrivateKey.from_protobuf(data)
    except ValueError as error:
        raise ConfigError(f"the identity file {path} is damaged: {error}") from None


def _create(path: Path, key: PrivateKey) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            file.write(key.to_protobuf())
            file.flush()
            os.fsync(descriptor)
        try:
            os.link(temporary, path)  # unlike a rename it never replaces a key that somebody else just made
        except FileExistsError:
            return
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
