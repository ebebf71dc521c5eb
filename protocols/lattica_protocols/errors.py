"""Who is to blame: the two errors that a machine or codec may raise.

`LocalProtocolError`: the caller broke a rule (a bug on our side, or a wrong argument).
`RemoteProtocolError`: bytes from the network broke a rule. Functions that parse such bytes end in `_untrusted`
and raise nothing else. The runtime turns both into the public errors of `lattica.errors` in one place.
"""

from __future__ import annotations


class ProtocolError(Exception):
    """Base of both errors of the protocol layer."""


class LocalProtocolError(ProtocolError):
    """We asked a machine for something its state or its limits do not allow."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something that the protocol does not allow. The message says what, in one line."""
