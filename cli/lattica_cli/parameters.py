"""Parameters of commands: those that several have, described once, and how their text is read.

What is wrong with one is told here with exit code 2, before a daemon is asked.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

import typer

if TYPE_CHECKING:
    from lattica_protocols.cid import Cid
    from lattica_protocols.peer_id import PeerId

CID: Final[Any] = typer.Argument(metavar="CID", help="A content id, as `lattica share` prints it.")
PEER: Final[Any] = typer.Argument(metavar="PEER", help="A peer id, as `lattica id` prints it.")
SPACE: Final[Any] = typer.Argument(metavar="SPACE", help="Its id, or its name when only one here is called so.")
KEY: Final[Any] = typer.Argument(metavar="KEY", help="Any text.")

MIN_SECONDS: Final = 0.001
MAX_SECONDS: Final = 1e8
"""Three years: whoever has more patience does not give a timeout."""


def seconds(
    default: float,
    *names: str,
    help: str,
    least: float = MIN_SECONDS,
    most: float = MAX_SECONDS,
    zero_means: str = "",
) -> Any:
    """An option for a time: within its bounds, so neither NaN nor infinity.

    `names`: where the parameter is called otherwise. `zero_means`: what 0 stands for, where that is the default.
    """

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is not a number of seconds.") from None
        if not (least <= value <= most or (zero_means and value == 0)):
            raise typer.BadParameter(f"{text} is not from {least:g} to {most:,.0f} seconds.")
        return value

    return typer.Option(default, *names, metavar="SECONDS", parser=parse, help=help, show_default=zero_means or True)


def parse_path(text: str) -> str:
    """A path as the daemon takes it: absolute, and UTF-8 whatever the locale of this process is."""
    try:
        return os.fsencode(os.path.abspath(text)).decode("utf-8")
    except UnicodeDecodeError:
        raise typer.BadParameter(f"{text!a}: the name is not UTF-8, rename it.") from None


def parse_peer(text: str) -> PeerId:
    """A peer id in either text form."""
    from lattica_protocols.peer_id import PeerId

    try:
        return PeerId.parse(text)
    except ValueError as error:
        raise typer.BadParameter(f"{error}.") from None


def parse_target(text: str) -> str:
    """A multiaddr, or a peer id."""
    from lattica_protocols.multiaddr import Multiaddr
    from lattica_protocols.peer_id import PeerId

    try:
        return str(Multiaddr.parse(text) if text.startswith("/") else PeerId.parse(text))
    except ValueError as error:
        if text.startswith("/"):
            raise typer.BadParameter(f"{error}.") from None
        raise typer.BadParameter(
            f"{text[:80]!r} is neither a peer id nor an address such as /ip4/192.0.2.1/tcp/4101."
        ) from None


def parse_cid(text: str) -> Cid:
    """A content id."""
    from lattica_protocols.cid import Cid

    try:
        return Cid.parse(text)
    except ValueError as error:
        raise typer.BadParameter(f"{error}.") from None
