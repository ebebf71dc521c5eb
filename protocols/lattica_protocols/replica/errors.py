"""Why an operation was not taken. All are the remote side's fault; `MissingParents` and `NotYet` may heal."""

from __future__ import annotations

from collections.abc import Sequence

from lattica_protocols.errors import RemoteProtocolError


class Refused(RemoteProtocolError):
    """The operation breaks a rule, whatever comes later. Every replica refuses it."""


class NotYet(RemoteProtocolError):
    """The operation may be right later (a clock ahead of ours, a proof that has not come): it is offered again."""


class MissingParents(NotYet):
    """The operation is linked to operations that are not here."""

    def __init__(self, missing: Sequence[bytes]) -> None:
        super().__init__(f"{len(missing)} of its parents are not here")
        self.missing = list(missing)
