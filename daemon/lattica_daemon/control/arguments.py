"""Reading the arguments of control methods: texts become ids and addresses, or a clear refusal."""

from __future__ import annotations

from lattica.errors import InvalidArgument
from lattica_protocols.cid import Cid
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId


def read_peer(text: object) -> PeerId:
    """A peer id in either text form."""
    try:
        return PeerId.parse(_text(text, "a peer id"))
    except ValueError as error:
        raise InvalidArgument(str(error)) from None


def read_address(text: object) -> Multiaddr:
    """A multiaddr."""
    try:
        return Multiaddr.parse(_text(text, "an address"))
    except ValueError as error:
        raise InvalidArgument(str(error)) from None


def read_cid(text: object) -> Cid:
    """A content id."""
    try:
        return Cid.parse(_text(text, "a content id"))
    except ValueError as error:
        raise InvalidArgument(str(error)) from None


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise InvalidArgument(f"{what} has to be a text, not {type(value).__name__}")
    return value
