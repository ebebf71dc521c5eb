"""Where the socket of a daemon is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

SOCKET_NAME = "lattica.sock"


def default_home(environ: Mapping[str, str] = os.environ) -> Path:
    """`LATTICA_HOME`, else `$XDG_STATE_HOME/lattica`, else `~/.local/state/lattica` (the XDG default)."""
    if environ.get("LATTICA_HOME"):
        return Path(environ["LATTICA_HOME"]).expanduser()
    state = environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path("~/.local/state").expanduser()) / "lattica"


def socket_path(home: str | os.PathLike[str] | None = None) -> Path:
    """The socket of the daemon whose home is `home` (`None`: the default home)."""
    return (default_home() if home is None else Path(home).expanduser()) / SOCKET_NAME
